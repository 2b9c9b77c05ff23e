"""The layers of docs/architecture.md, section 4, held by reading the imports."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "regraft"
# From the bottom up; parts of one row may import each other only where the row says so.
ROWS = [
    {"errors"},
    {"faults", "documents", "progress", "signals"},
    {"disk", "manifests"},
    {"storage"},
    {"locks", "tensors"},
    {"engine", "inputs", "run"},
    {"data", "models"},
    {"evaluation"},
    {"training", "delivery"},
    {"api"},
    {"demo"},
    {"terminal"},
    {"commands"},
    {"cli"},
    {"__main__", "__init__"},
]
RANK = {part: rank for rank, row in enumerate(ROWS) for part in row}
COMMANDS = {
    f"commands/{name}.py"
    for name in (
        "arguments",
        "check",
        "foreign",
        "models",
        "resuming",
        "serving",
        "training",
        "verify",
    )
}
DOORS = {
    "timm": {"models/backbone.py"},
    "accelerate": {"engine.py"},
    "PIL": {"data/pictures.py"},
    "tifffile": {"data/deep.py"},
    "imagecodecs": {"data/deep.py"},
    "pydicom": {"data/dicom.py"},
    "gdcm": {"data/dicom.py"},
    "cyclopts": {"cli.py", *COMMANDS},
    "rich": {"terminal.py"},
    "jinja2": {"delivery/pages.py"},
    "matplotlib": {"delivery/figures.py"},
    "h5py": {"models/keras_files.py"},
    "fastapi": {"delivery/serve.py"},
    "starlette": {"delivery/serve.py"},
    "uvicorn": {"delivery/serve.py"},
    "h11": {"delivery/serve.py"},
}
LAZY = {
    "h5py", "timm", "accelerate", "sklearn", "matplotlib", "jinja2", "rich", "tifffile",
    "imagecodecs", "pydicom", "gdcm",
}  # fmt: skip
WITHOUT_TORCH = {
    "errors.py", "faults.py", "documents.py", "disk.py", "manifests.py", "storage.py", "locks.py",
     "progress.py", "inputs.py", "run.py", "cli.py", "terminal.py",
    *COMMANDS, "training/recipe.py", "data/dataset.py",
}  # fmt: skip


def imports(tree: ast.AST, *, top_only: bool = False) -> set[str]:
    """Returns the modules that a file imports; with `top_only`, those it imports at once."""
    found = set()
    for node in ast.iter_child_nodes(tree) if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # `from regraft import api` names the module `regraft.api`.
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if node.module == "regraft" else {str(node.module)}
    return found


def violations(file: str, text: str) -> list[str]:
    """Returns what a file of that name and text does against the layers."""
    tree = ast.parse(text)
    part = Path(file).parts[0].removesuffix(".py")
    found = []
    for module in sorted(imports(tree)):
        outer, *inner = module.split(".")
        if outer == "regraft" and inner and part != "__init__":
            other = inner[0]
            if other != part and RANK[other] >= RANK[part]:
                found.append(f"{file} imports {module}: {part} may not import {other}")
        if file not in DOORS.get(outer, {file}):
            found.append(f"{file} imports {outer}: only {DOORS[outer]} may")
    at_once = {module.split(".")[0] for module in imports(tree, top_only=True)}
    found += [f"{file} imports {name} at once" for name in sorted(at_once & LAZY)]
    if file in WITHOUT_TORCH and "torch" in at_once:
        found.append(f"{file} imports torch")
    return found + _bans(file, tree)


def _bans(file: str, tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append(f"{file}:{node.lineno} has a bare except")
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if (file, called) == ("models/torch_files.py", "torch.load"):
                continue  # in a process of its own, weights_only (tests/test_foreign_torch.py)
            banned = {"torch.load", "pickle.load", "pickle.loads", "eval", "yaml.load"}
            if called in banned or (called == "print" and file not in ("terminal.py", *COMMANDS)):
                found.append(f"{file}:{node.lineno} calls {called}")
    return found


def source_files() -> list[str]:
    return sorted(path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py"))


@pytest.mark.parametrize("file", source_files())
def test_each_file_keeps_to_its_layer(file: str) -> None:
    assert violations(file, (SOURCE / file).read_text()) == []


@pytest.mark.parametrize("file", [f for f in source_files() if "/__init__" in f])
def test_package_files_below_the_top_are_empty(file: str) -> None:
    assert (SOURCE / file).read_text() == ""


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        ("data/cache.py", "from regraft.models.head import Head", "data may not import models"),
        ("evaluation/metrics.py", "import regraft.training.loop", "may not import training"),
        ("delivery/report.py", "from regraft.training.loop import fit", "may not import training"),
        ("training/loop.py", "import timm", "only {'models/backbone.py'} may"),
        ("training/loop.py", "def f():\n    from regraft import api", "may not import api"),
        ("models/backbone.py", "import timm", "imports timm at once"),
        ("run.py", "import torch", "imports torch"),
        ("api.py", "print(1)", "calls print"),
        ("api.py", "try:\n    pass\nexcept:\n    pass", "bare except"),
        ("models/classifier.py", "import torch\ntorch.load('x')", "calls torch.load"),
    ],
)
def test_a_planted_violation_is_found(file: str, text: str, complaint: str) -> None:
    assert complaint in " ".join(violations(file, text))


def test_files_are_named_for_what_they_hold() -> None:
    nothing = {"utils", "util", "helpers", "common", "misc", "base", "core", "manager"}
    assert [file for file in source_files() if Path(file).stem in nothing] == []
