"""The pages are kept true: commands run, links lead somewhere, the reference is current.

Commands in ```sh blocks are run on tiny images that bear the names the pages use, page by page, in
their order. What would take minutes is cut down by `SMALLER`; a line after `# fails` must fail.
"""

import importlib.util
import re
import shlex
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from keras_layouts import Net, write_keras, write_named
from regraft import cli

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [
    "how-to/from-torch", "how-to/own-network", "how-to/medical-images", "how-to/predict",
    "how-to/export", "how-to/check",
]  # fmt: skip
SLOW = ["tutorial", "how-to/from-keras", "how-to/read-a-verdict"]
# In place of what the page says.
SMALL = {"--image-size": "32", "--epochs": "1", "--device": "cpu"}
SMALLER = {
    "pretrain": SMALL,
    "finetune": SMALL,
    "compare": {**SMALL, "--seeds": "1", "--strategy": "head"},
}
NETWORKS = {"vgg16_bn", "vgg16", "resnet18"}  # in `pretrain`: too large for a test
ALLOWED = ("pip install",)  # lines that are not ours to run


@pytest.fixture
def place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_shapes: Callable[..., Path]
) -> Path:
    """A folder with all that the pages name."""
    make_shapes(("NORMAL", "PNEUMONIA"), 10, name="chest_xray", splits=("train", "test"))
    make_shapes(("NORMAL", "PNEUMONIA"), 6, name="other_hospital", seed=9, splits=("test",))
    make_shapes(("mild", "severe"), 12, name="knees", seed=1)
    make_shapes(("ap", "pa"), 20, name="projections", seed=2)
    make_shapes(("a", "b"), 2, name="new_images", seed=3)
    _deep(make_shapes(("one", "two"), 12, name="scans", seed=4))
    _deep(make_shapes(("one", "two"), 12, name="knees16", seed=5))
    for image in [*tmp_path.glob("chest_xray/*/*/*"), *tmp_path.glob("projections/*/*")]:
        number = image.stem.rpartition("_")[2]
        patient = f"{image.parent.parent.name}{image.parent.name[0]}{int(number) // 2}"
        image.rename(image.with_name(f"{patient}_{number}.png"))
    _starts(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _deep(folder: Path) -> None:
    for path in folder.rglob("*.png"):
        pixels = np.asarray(Image.open(path)).astype(np.uint16) * 16  # 12 bits
        Image.fromarray(pixels).save(path)


def _starts(place: Path) -> None:
    import timm

    torch.manual_seed(0)
    network = timm.create_model("resnet18", num_classes=2)
    torch.save(network.state_dict(), place / "weights.pt")
    (place / "timm_folder").mkdir()
    save_file(network.state_dict(), place / "timm_folder" / "model.safetensors")
    (place / "timm_folder" / "config.json").write_text('{"architecture": "resnet18"}')
    (page,) = re.findall(r"```python\n# net.py\n(.*?)```", text_of("how-to/own-network"), re.DOTALL)
    (place / "net.py").write_text(page)
    net = Net((32, 32, 1)).conv(16).pool().conv(32).add("GlobalAveragePooling2D").dense(32, 2)
    write_keras(net, place / "model.keras")
    filters = [64, 64, 128, 128, *[256] * 3, *[512] * 6]
    blocks = [1, 1, 2, 2, *[3] * 3, *[4] * 3, *[5] * 3]
    vgg = Net((64, 64, 3))
    for number, (size, block) in enumerate(zip(filters, blocks, strict=True)):
        name = f"block{block}_conv{number - blocks.index(block) + 1}"
        vgg.conv(size, name=name)
        vgg.arrays[name]["bias"] = np.zeros(size, np.float32)
    write_named(vgg.add("Flatten").dense(2048, 2), place / "first_try.h5")


def text_of(page: str) -> str:
    return (DOCS / f"{page}.md").read_text(encoding="utf-8")


def commands(page: str) -> list[tuple[str, bool]]:
    """Returns the lines of a page's ```sh blocks, and whether each must fail."""
    lines = []
    for block in re.findall(r"```sh\n(.*?)```", text_of(page), re.DOTALL):
        fails = False
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("#"):
                fails = line.startswith("# fails")
            elif line.strip():
                lines.append((line.partition("   #")[0].strip(), fails))
                fails = False
    return lines


def cut_down(line: str) -> list[str]:
    """Returns the arguments of a command, made small; what it does stays."""
    name, *given = shlex.split(line)[1:]
    if name not in SMALLER:
        return [name, *given]
    options = {option: value for option, value in pairwise(given) if option.startswith("--")}
    small = dict(SMALLER[name])
    if (small | options).get("--strategy") == "head" or name == "compare":
        del small["--epochs"]  # a head is solved: it has no epochs
    if name == "pretrain" and options.get("--arch", "vgg16_bn") in NETWORKS:
        small["--arch"] = "resnet10t"
    for option in small.keys() & options.keys() | ({"--epochs"} & options.keys()):
        place = given.index(option)
        del given[place : place + 2]
    return [name, *given, *(part for pair in small.items() for part in pair)]


def run_page(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = commands(page)
    assert found, f"{page} has no commands"
    if not any("pretrain" in line for line, _ in found):  # the page takes its Run for granted
        found.insert(0, ("regraft pretrain chest_xray --out runs/source", False))
    for line, fails in found:
        if line.startswith(ALLOWED):
            continue
        assert line.startswith("regraft "), f"{page}: `{line}` is run by no test"
        with pytest.raises(SystemExit) as ended:
            cli.main(cut_down(line))
        told = capsys.readouterr().err
        assert bool(ended.value.code) == fails, f"{page}: `{line}` ended with {told}"


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    "page", [*PAGES, *(pytest.param(page, marks=pytest.mark.slow) for page in SLOW)]
)
def test_the_commands_of_a_page_run(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_page(page, capsys)


def test_a_command_that_does_not_exist_would_be_found(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("test_docs.DOCS", place)
    (place / "page.md").write_text("```sh\nregraft finetune knees --begin runs/source\n```\n")
    with pytest.raises(AssertionError, match="page: `regraft finetune knees --begin runs/source`"):
        run_page("page", capsys)
    fine = (
        "regraft pretrain chest_xray --out runs/fine\n# fails: so it says\nregraft recipe scratch"
    )
    (place / "page.md").write_text(f"```sh\n{fine}\n```\n")
    with pytest.raises(AssertionError, match="recipe scratch"):
        run_page("page", capsys)


def test_every_page_that_has_commands_is_run() -> None:
    with_commands = {
        page.relative_to(DOCS).with_suffix("").as_posix()
        for page in DOCS.rglob("*.md")
        if "```sh\n" in page.read_text(encoding="utf-8")
    }
    assert with_commands == {*PAGES, *SLOW}


def test_every_link_between_pages_leads_somewhere() -> None:
    lost = []
    for page in [*DOCS.rglob("*.md"), DOCS.parent / "README.md"]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                lost.append(f"{page.name}: {target}")
    assert lost == []


def test_files_that_pages_name_exist() -> None:
    root = DOCS.parent
    lost = [
        f"{page.name}: {name}"
        for page in DOCS.rglob("*.md")
        if "decisions" not in page.parts
        for name in re.findall(
            r"`((?:tests|examples|benchmarks)/[\w/.]+\.\w+)", page.read_text("utf-8")
        )
        if not (root / name).exists()
    ]
    assert lost == []


def test_the_reference_is_made_from_the_code_as_it_is() -> None:
    spec = importlib.util.spec_from_file_location("make_reference", DOCS / "make_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert text_of("reference") == module.reference(), "run `make reference`"
