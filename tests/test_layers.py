"""The layers of docs/architecture.md, section 4, held by reading the imports."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "regraft"
# From the bottom up; parts of one row may import each other only where the row says so.
ROWS = [
    {"errors"},
    {"faults", "documents", "parallel", "progress", "signals"},
    {"disk", "manifests"},
    {"storage"},
    {"changing", "locks", "tensors"},
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
    f"commands/{name}.py" for name in ("arguments", "check", "training", "models", "delivery")
}
DOORS = {
    "timm": {"models/architectures.py"},
    "accelerate": {"engine.py", "training/tracking.py"},
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
    "pyarrow": {"evaluation/embeddings.py"},
    "onnx": {"delivery/export.py"},
    "onnxscript": {"delivery/export.py"},
    "onnxruntime": {"delivery/export.py"},
    "fastapi": {"delivery/serve.py"},
    "starlette": {"delivery/serve.py"},
    "uvicorn": {"delivery/serve.py"},
    "h11": {"delivery/serve.py"},
}
LAZY = {
    "onnx", "onnxscript", "onnxruntime", "pyarrow",
    "h5py", "timm", "accelerate", "sklearn", "matplotlib", "jinja2", "rich", "tifffile",
    "imagecodecs", "pydicom", "gdcm",
}  # fmt: skip
WITHOUT_TORCH = {
    "errors.py", "faults.py", "documents.py", "disk.py", "manifests.py", "storage.py",
    "changing.py", "locks.py", "progress.py", "inputs.py", "run.py", "cli.py", "terminal.py",
    *COMMANDS, "training/recipe.py", "training/settings.py", "training/records.py",
    "training/tracking.py",
    "parallel.py", "data/dataset.py",
}  # fmt: skip
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}
UNSAFE_CALLS = {
    "torch.load", "pickle.load", "pickle.loads", "eval", "exec", "yaml.load", "os.system",
    "torch.save", "np.save", "np.savez",
}  # fmt: skip
ALLOWED = {
    # In a process of its own, weights_only (tests/test_foreign_torch.py).
    ("models/torch_files.py", "torch.load"),
    # Into the temporary folder of a committed one, which is hashed and synced as a whole.
    ("data/cache.py", "np.save"),
}
DECODING = {"data/pictures.py"}
WRITING = {"disk.py", "storage.py", "models/quarantine.py"}
"""`models/quarantine.py` runs in a process of its own, in a folder that goes with it."""


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
        if isinstance(node, ast.Import | ast.ImportFrom):
            for name in sorted(imports(ast.Module([node], [])) & UNSAFE_MODULES):
                found.append(f"{file}:{node.lineno} imports {name}")
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            is_print = called == "print" and file not in ("terminal.py", *COMMANDS)
            if is_print or (called in UNSAFE_CALLS and (file, called) not in ALLOWED):
                found.append(f"{file}:{node.lineno} calls {called}")
            found += [f"{file}:{node.lineno} {what}" for what in _unsafe(file, called, node)]
    return found


def _unsafe(file: str, called: str, node: ast.Call) -> list[str]:
    """Returns what a call does that only one file may, or none."""
    text, last = ast.unparse(node), called.split(".")[-1]
    options = {each.arg: ast.unparse(each.value) for each in node.keywords}
    found = [f"has {key}=True" for key in ("shell", "allow_pickle") if options.get(key) == "True"]
    if last in ("extractall", "mktemp", "getmtime"):
        found.append(f"calls {last}")
    if last == "convert" and "'RGB'" in text and file not in DECODING:
        found.append("converts to RGB outside the boundary of decoding")
    if file in WRITING:
        return found
    mode = options.get("mode", ast.unparse(node.args[-1]) if node.args else "")
    if last == "open" and mode[:1] in "'\"" and set("wax+") & set(mode.strip("'\"")):
        is_mode = set(mode.strip("'\"")) <= set("rwaxbt+")
        if is_mode and "devnull" not in text:
            found.append("opens a file for writing")
    if called == "os.open" and any(flag in text for flag in ("O_WRONLY", "O_RDWR", "O_CREAT")):
        found.append("opens a file for writing")
    is_of_path = isinstance(node.func, ast.Attribute)
    if last in ("write_text", "write_bytes", "open_memmap") and is_of_path:
        found.append(f"calls {last} of a path, not of storage")
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
        ("training/loop.py", "import timm", "only {'models/architectures.py'} may"),
        ("training/loop.py", "def f():\n    from regraft import api", "may not import api"),
        ("models/architectures.py", "import timm", "imports timm at once"),
        ("run.py", "import torch", "imports torch"),
        ("api.py", "print(1)", "calls print"),
        ("api.py", "try:\n    pass\nexcept:\n    pass", "bare except"),
        ("models/classifier.py", "import torch\ntorch.load('x')", "calls torch.load"),
        ("run.py", "import pickle", "imports pickle"),
        ("run.py", "from joblib import load", "imports joblib"),
        ("run.py", "np.load(path, allow_pickle=True)", "has allow_pickle=True"),
        ("run.py", "yaml.load(text)", "calls yaml.load"),
        ("run.py", "eval('1')", "calls eval"),
        ("run.py", "exec('1')", "calls exec"),
        ("run.py", "os.system('ls')", "calls os.system"),
        ("run.py", "subprocess.run('ls', shell=True)", "has shell=True"),
        ("run.py", "zipfile.ZipFile(p).extractall(q)", "calls extractall"),
        ("run.py", "tempfile.mktemp()", "calls mktemp"),
        ("run.py", "os.path.getmtime(p)", "calls getmtime"),
        ("data/cache.py", "image.convert('RGB')", "converts to RGB"),
        ("run.py", "open(path, 'w')", "opens a file for writing"),
        ("run.py", "open(path, mode='ab')", "opens a file for writing"),
        ("run.py", "path.open('r+b')", "opens a file for writing"),
        ("run.py", "os.open(path, os.O_CREAT | os.O_RDWR)", "opens a file for writing"),
        ("run.py", "path.write_text('x')", "calls write_text of a path"),
        ("run.py", "(folder / name).write_bytes(b'x')", "calls write_bytes of a path"),
        ("run.py", "torch.save(state, path)", "calls torch.save"),
    ],
)
def test_a_planted_violation_is_found(file: str, text: str, complaint: str) -> None:
    assert complaint in " ".join(violations(file, text))


def test_files_are_named_for_what_they_hold() -> None:
    nothing = {"utils", "util", "helpers", "common", "misc", "base", "core", "manager"}
    assert [file for file in source_files() if Path(file).stem in nothing] == []
