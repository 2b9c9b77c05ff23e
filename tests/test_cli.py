"""The command line from outside: exit codes, wording, what is created, what stdout holds."""

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

import regraft as regraft_package
from regraft import api, cli
from regraft.commands.arguments import parse_seconds, parse_shares
from regraft.errors import UsageError
from regraft.training.recipe import Recipe

MakeFolder = Callable[..., Path]
TINY = ("--arch", "resnet10t", "--image-size", "32", "--epochs", "1", "--device", "cpu")


def regraft(*arguments: object) -> int:
    """Runs the command line in this process and returns its exit code."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished pretraining on three classes of noise."""
    import numpy as np
    from PIL import Image

    root = tmp_path_factory.mktemp("start")
    generator = np.random.default_rng(0)
    for label in "abc":
        (root / "data" / label).mkdir(parents=True)
        for i in range(8):
            pixels = generator.integers(0, 256, (32, 32), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "data" / label / f"{i}.png")
    recipe = Recipe.scratch().changed({"image_size": 32, "epochs": 1, "channels": 3})
    api.pretrain(root / "data", out=root / "run", arch="resnet10t", recipe=recipe)
    return root / "run"


def test_help_answers_without_torch() -> None:
    code = (
        "import sys\nfrom regraft.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'torch', 'timm', 'sklearn', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in ("demo", "pretrain", "finetune", "compare", "evaluate", "predict", "report"):
        assert command in done.stdout


def test_what_a_command_does_has_a_public_name() -> None:
    commands = {name for name in cli.app if not name.startswith("-")}
    verbs = {{"import": "import_weights"}.get(name, name) for name in commands - {"demo", "recipe"}}
    assert verbs <= set(regraft_package.__all__)
    assert all(callable(getattr(regraft_package, name)) for name in regraft_package.__all__)


def test_a_recipe_is_printed_as_toml(capsys: pytest.CaptureFixture[str]) -> None:
    assert regraft("recipe", "transfer") == 0
    assert tomllib.loads(capsys.readouterr().out)["phases"][0]["learns"] == "head"
    assert regraft("recipe", "magic") == 2
    assert "there is no recipe `magic`" in capsys.readouterr().err


def with_text_as_image(make_folder: MakeFolder) -> Path:
    root = make_folder({"a": 6, "b": 6})
    (root / "a" / "note.jpg").write_text("not a picture")
    return root


def with_empty_class(make_folder: MakeFolder) -> Path:
    root = make_folder({"a": 6, "b": 6})
    (root / "c").mkdir()
    return root


def a_file(make_folder: MakeFolder) -> Path:
    file = make_folder({"a": 1}).parent / "file.txt"
    file.write_text("x")
    return file


@pytest.mark.parametrize(
    ("data", "exit_code", "wording"),
    [
        (lambda _: Path("nowhere"), 3, "dataset folder not found: `nowhere`"),
        (a_file, 3, "is a file; expected a folder"),
        (with_empty_class, 3, "1 class folder has no images: `c`"),
        (lambda make: make({"only": 8}), 3, "only the class `only`; a classifier needs at least 2"),
        (with_text_as_image, 3, "1 file cannot be read: `a/note.jpg` (not-an-image: a text file)"),
        (lambda make: make({"train/a": 6, "train/b": 6, "eval/a": 2}), 3, "validation or test"),
    ],
)
def test_bad_data_is_refused_before_anything_is_created(
    make_folder: MakeFolder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    data: Callable[[MakeFolder], Path],
    exit_code: int,
    wording: str,
) -> None:
    assert regraft("pretrain", data(make_folder), "--out", tmp_path / "run", *TINY) == exit_code
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].startswith("hint: ")
    assert f"error: {wording}" in said.err or wording in said.err
    assert "Traceback" not in said.err
    assert said.out == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "wording"),
    [
        (["--epochs", "many"], "epochs"),
        (["--colour", "red"], "--colour"),
        (["--set", "batchsize=3"], "unknown key `batchsize`; did you mean `batch_size`?"),
        (["--set", "epochs"], "`--set epochs` has no `=`"),
        (["--arch", "vgg17"], "timm has no architecture `vgg17`"),
        (["--device", "tpu9"], "`--device tpu9`"),
        (["--recipe", "missing.toml"], "recipe `missing.toml` cannot be read"),
        (["--group-regex", "("], "is no regular expression"),
        (["--per-class", "0"], "`--per-class 0` leaves nothing to learn"),
        (["--set", "goal=transfer"], 'goal = "transfer"; this command needs "scratch"'),
        (["--set", "channels=4"], "the network takes 4"),
        (["--allow", "everything"], "`--allow` does not know `everything`"),
        (["--set", 'phases=[{learns="head"}]'], "a frozen random backbone stays random"),
    ],
)
@pytest.mark.fault("E1", "E5")
def test_a_wrong_option_is_a_usage_error(
    make_folder: MakeFolder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    wording: str,
) -> None:
    data = make_folder({"a": 6, "b": 6})
    arguments = [] if "--arch" in options else ["--arch", "resnet10t"]
    arguments += ["--image-size", "32", *options]
    assert regraft("pretrain", data, "--out", tmp_path / "run", *arguments) == 2
    assert wording in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_own_network_that_freezes_at_random_is_refused_by_name(
    make_folder: MakeFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_folder({"a": 6, "b": 6})
    out = tmp_path / "run"
    assert regraft("finetune", data, "--out", out, "--strategy", "head") == 2
    assert (
        "there is no `--start` to carry over: `--strategy head` would train a head on a frozen "
        "random backbone" in capsys.readouterr().err
    )
    assert not out.exists()


def test_a_start_of_another_architecture_is_refused(
    start: Path, make_folder: MakeFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_folder({"x": 6, "y": 6})
    options = ("--start", start, "--arch", "resnet18", "--out", tmp_path / "run")
    assert regraft("finetune", data, *options) == 4
    said = capsys.readouterr().err
    assert "the weights of `resnet10t` (3 channels) do not fit `resnet18`" in said
    assert "`body.conv1.0.weight` 24x3x3x3" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("folder", ["nowhere", "."])
def test_a_start_that_is_no_run_is_refused(
    make_folder: MakeFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    data = make_folder({"x": 6, "y": 6})
    place = tmp_path / folder
    assert regraft("finetune", data, "--start", place, "--out", tmp_path / "run") == 4
    assert re.search("run not found|holds no trained classifier", capsys.readouterr().err)


@pytest.mark.fault("E9", "A23")
def test_nothing_is_written_over_or_into_the_data(
    start: Path, make_folder: MakeFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_folder({"x": 6, "y": 6})
    assert regraft("pretrain", data, "--out", start, *TINY) == 2
    assert "exists already" in capsys.readouterr().err
    assert regraft("pretrain", data, "--out", data / "run", *TINY) == 2
    assert "which is never written to" in capsys.readouterr().err
    assert not (data / "run").exists()


@pytest.mark.fault("D10")
def test_the_story_on_the_command_line(
    start: Path, make_folder: MakeFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_folder({"x": 12, "y": 12}, size=(20, 16))
    run = tmp_path / "run"
    assert regraft("finetune", data, "--start", start, "--out", run, "--epochs", 1) == 0
    said = capsys.readouterr()
    assert "grey images are replicated to RGB" in said.err
    assert "100.0% of the backbone taken" in said.err
    assert re.search(r"head +dropped +2", said.err)
    assert f"next: regraft evaluate {run} {data}" in said.out

    moved = data.rename(tmp_path / "elsewhere")
    printed = []
    for _ in range(2):
        assert regraft("evaluate", run, moved, "--json") == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    document = json.loads(printed[0])
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "nll", "ece"):
        assert set(document[name]) == {"value", "low", "high"}
    kept = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert document["n"] == sum(sample.get("split") == "test" for sample in kept)
    assert str(tmp_path) not in (run / "final" / "model.json").read_text()

    (moved / "x" / "broken.png").write_bytes(b"\x89PNG no")
    table = tmp_path / "table.csv"
    assert regraft("predict", run, moved, "--out", table) == 3
    rows = table.read_text().splitlines()
    assert len(rows) == 1 + 24 + 1
    assert rows[-1].startswith(f"{moved}/x/broken.png,,,")
    assert "not-an-image" in rows[-1]
    capsys.readouterr()
    assert regraft("predict", run, moved / "y" / "y_000.png", "--json") == 0
    assert json.loads(capsys.readouterr().out)["predictions"][0]["predicted"] in ("x", "y")

    assert regraft("report", run, "--out", tmp_path / "page.html") == 0
    assert "<html" in (tmp_path / "page.html").read_text()


def test_predict_names_what_is_missing(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert regraft("predict", start, tmp_path / "none.png") == 3
    assert "image or folder not found" in capsys.readouterr().err
    assert regraft("predict", start, tmp_path) == 3
    assert "holds no images" in capsys.readouterr().err


def test_a_mistake_of_ours_is_exit_70_with_a_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def mistake(*_: object, **__: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(api, "report", mistake)
    assert regraft("report", tmp_path, "--out", tmp_path / "page.html") == 70
    said = capsys.readouterr().err
    assert "ZeroDivisionError: planted" in said
    assert "a mistake in regraft itself" in said


def test_a_place_that_cannot_be_written_is_exit_5(
    start: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert regraft("report", start, "--out", "/proc/nowhere/page.html") == 5
    said = capsys.readouterr().err
    assert "hint: check the place" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("20m", 1200), ("1.5h", 5400), ("7", 7)]
)
def test_a_time_budget_is_read_as_people_write_it(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["soon", "0m", "-5s", "1d", ""])
def test_no_time_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"write 90s, 20m or 2h"):
        parse_seconds(text)


def test_shares_are_read_and_what_is_none_is_refused() -> None:
    assert parse_shares("0.1, 0.5,1") == (0.1, 0.5, 1.0)
    assert parse_shares("") == ()
    with pytest.raises(UsageError, match=r"no list of shares"):
        parse_shares("half")
