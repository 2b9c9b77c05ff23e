"""Rows of the catalogue of faults about data folders, recipes and the command line."""

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from regraft import api, cli
from regraft.data.dataset import DataOptions, Dataset
from regraft.data.listing import list_folder, list_images
from regraft.errors import ArtefactError, DataError, UsageError
from regraft.models.backbone import Backbone
from regraft.run import Run
from regraft.training.keeping import Stopped
from regraft.training.recipe import Recipe
from regraft.training.records import Step

MakeFolder = Callable[..., Path]
TINY = ("--arch", "resnet10t", "--image-size", "32", "--epochs", "1", "--device", "cpu")


def regraft(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def tree(root: Path) -> dict[str, tuple[int, int, bytes]]:
    return {
        str(path.relative_to(root)): (
            path.lstat().st_mode,
            path.lstat().st_mtime_ns,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in sorted(root.rglob("*"))
    }


# A: folders


@pytest.mark.fault("A4")
def test_when_every_class_folder_is_empty_all_are_named(make_folder: MakeFolder) -> None:
    with pytest.raises(DataError) as refused:
        Dataset.open(make_folder({"a": 0, "b": 0}))
    assert "2 class folders have no images: `a`, `b`" in refused.value.problems
    assert refused.value.exit_code == 3


@pytest.mark.fault("A5")
def test_a_folder_without_classes_can_still_be_predicted(make_folder: MakeFolder) -> None:
    root = make_folder({"": 3})
    found, left_out = list_images([root])
    assert [path for _, path in found] == ["_000.png", "_001.png", "_002.png"]
    assert left_out == []


@pytest.mark.fault("A6")
def test_one_image_in_a_class_is_enough_where_the_folder_says_the_split(
    make_folder: MakeFolder,
) -> None:
    layout = {f"{split}/{label}": 1 for split in ("train", "val", "test") for label in "ab"}
    assert len(Dataset.open(make_folder(layout)).samples) == 6
    with pytest.raises(DataError, match=r"fewer than 5 images: `b` \(1\)"):
        Dataset.open(make_folder({"a": 6, "b": 1}, name="unsplit"))


@pytest.mark.fault("A14", "A15")
@pytest.mark.parametrize("number", [1, 2, 10])
def test_looping_links_are_listed_once_in_under_a_second(
    make_folder: MakeFolder, number: int
) -> None:
    root = make_folder({"a": 3, "b": 3})
    for place in range(number):
        (root / "ab"[place % 2] / f"loop_{place}").symlink_to(root, target_is_directory=True)
    began = time.perf_counter()
    listing = list_folder(root)
    assert time.perf_counter() - began < 1
    assert len(listing.images) == 6
    assert [reason for _, reason in listing.excluded] == ["linked folder"] * number


@pytest.mark.fault("A18")
def test_a_link_to_nothing_is_named_or_left_out(make_folder: MakeFolder) -> None:
    root = make_folder({"a": 6, "b": 6})
    (root / "a" / "gone.png").symlink_to(root / "nowhere.png")
    with pytest.raises(DataError, match=r"1 file cannot be read: `a/gone\.png` \(missing"):
        Dataset.open(root)
    dataset = Dataset.open(root, DataOptions(allow=("unreadable",)))
    assert [path for path, _ in dataset.excluded] == ["a/gone.png"]
    assert len(dataset.samples) == 12


@pytest.mark.fault("A16")
def test_a_linked_class_folder_is_never_followed_silently(make_folder: MakeFolder) -> None:
    root, other = make_folder({"a": 6, "b": 6}), make_folder({"c": 6}, name="elsewhere")
    (root / "c").symlink_to(other / "c", target_is_directory=True)
    with pytest.raises(DataError, match="is a link to a folder: links are not followed"):
        Dataset.open(root)


@pytest.mark.fault("A23")
def test_data_that_may_not_be_written_to_are_used_and_stay_as_they_are(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    root = make_folder({"a": 8, "b": 8}, size=(32, 32))
    for path in [*root.rglob("*"), root]:
        path.chmod(stat.S_IRUSR | stat.S_IXUSR if path.is_dir() else stat.S_IRUSR)
    before = tree(root)
    try:
        recipe = Recipe.scratch().changed({"image_size": 32, "epochs": 1})
        run = api.pretrain(root, out=tmp_path / "run", arch="resnet10t", recipe=recipe)
        api.evaluate(run.folder, root)
        assert regraft("check", root, "--out", tmp_path / "page.html") == 0
        assert tree(root) == before
    finally:
        for path in [root, *root.rglob("*")]:
            path.chmod(0o755)


@pytest.mark.fault("A21")
def test_classes_come_back_from_a_run_by_name_not_by_the_order_of_folders(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    root = make_folder({"10": 6, "2": 6, "1": 6}, size=(32, 32))
    recipe = Recipe.scratch().changed({"image_size": 32, "epochs": 1})
    run = api.pretrain(root, out=tmp_path / "run", arch="resnet10t", recipe=recipe)
    assert Run.open(run.folder).class_names == ("1", "10", "2")
    before = api.evaluate(run.folder, root)
    for name in ("1", "10", "2"):  # another order on disk
        shutil.move(root / name, root / f"x{name}")
        shutil.move(root / f"x{name}", root / name)
    assert api.evaluate(run.folder, root)["confusion"] == before["confusion"]


# D: transfer


@pytest.mark.fault("D7")
def test_other_class_names_of_the_same_number_are_never_matched_by_place(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    root = make_folder({"cats": 8, "dogs": 8}, size=(32, 32))
    recipe = Recipe.scratch().changed({"image_size": 32, "epochs": 1})
    run = api.pretrain(root, out=tmp_path / "run", arch="resnet10t", recipe=recipe)
    new = make_folder({"cats": 3, "wolves": 3}, size=(32, 32), seed=9, name="new")
    with pytest.raises(DataError, match="does not know `wolves`; it knows `cats`, `dogs`"):
        api.evaluate(run.folder, new)


def interrupted(data: Path, out: Path) -> Path:
    """Returns a Run that was stopped in its second epoch."""

    def stop(record: Any) -> None:
        if isinstance(record, Step) and record.epoch == 2:
            os.kill(os.getpid(), signal.SIGINT)

    recipe = Recipe.scratch().changed({"image_size": 32, "epochs": 4})
    with pytest.raises(Stopped):
        api.pretrain(data, out=out, arch="resnet10t", recipe=recipe, on_progress=stop)
    return out


def _add(root: Path) -> None:
    shutil.copy(root / "a" / "a_000.png", root / "a" / "new.png")


def _remove(root: Path) -> None:
    (root / "a" / "a_000.png").unlink()


def _edit(root: Path) -> None:
    Image.new("L", (32, 32), 9).save(root / "a" / "a_000.png")


@pytest.mark.fault("D13")
@pytest.mark.parametrize("change", [_add, _remove, _edit])
def test_data_that_changed_before_a_resume_are_refused(
    make_folder: MakeFolder, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    data = make_folder({"a": 8, "b": 8}, size=(32, 32))
    run = interrupted(data, tmp_path / "run")
    change(data)
    with pytest.raises(DataError, match="chang"):
        api.resume(run)
    assert Run.open(run).status["state"] == "interrupted"


@pytest.mark.fault("D14")
def test_other_dates_of_files_are_no_change(make_folder: MakeFolder, tmp_path: Path) -> None:
    data = make_folder({"a": 8, "b": 8}, size=(32, 32))
    run = interrupted(data, tmp_path / "run")
    for path in data.rglob("*.png"):
        os.utime(path, (0, 0))
    api.resume(run)
    assert Run.open(run).status["state"] == "finished"


# E: recipes and the command line


@pytest.mark.fault("E10")
def test_a_resume_with_another_recipe_is_refused(make_folder: MakeFolder, tmp_path: Path) -> None:
    run = interrupted(make_folder({"a": 8, "b": 8}, size=(32, 32)), tmp_path / "run")
    document = json.loads((run / "run.json").read_text())
    document["recipe"]["phases"][0]["lr"] = 0.5
    (run / "run.json").write_text(json.dumps(document))
    with pytest.raises(ArtefactError, match="is damaged or was changed") as refused:
        api.resume(run)
    assert refused.value.problems[0].startswith("`run.json`")
    assert regraft("resume", run, "--lr", "0.5") == 2, "there is no way to ask for another one"


@pytest.mark.fault("E2")
def test_a_key_given_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("seed = 1\nepochs = 2\nseed = 3\n")
    with pytest.raises(UsageError, match=r"is no TOML: Cannot overwrite a value \(at .*line 3"):
        Recipe.from_toml(tmp_path / "recipe.toml")


@pytest.mark.fault("E3")
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", 0),
        ("lr", -0.1),
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("weight_decay", -1e-4),
        ("batch_size", 0),
        ("batch_size", -8),
        ("epochs", -1),
        ("ema_decay", 1.5),
        ("label_smoothing", -0.1),
        ("train_share", 0),
    ],
)
def test_a_number_out_of_range_is_named_with_what_it_was(key: str, value: float) -> None:
    with pytest.raises(UsageError) as refused:
        Recipe.scratch().changed({key: value})
    assert any(f"`{key}`" in problem or f".{key}`" in problem for problem in refused.value.problems)
    assert refused.value.exit_code == 2


@pytest.mark.fault("E4")
def test_values_of_another_type_are_refused_and_exponents_are_numbers(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    for text in ('seed = "0"', "seed = true", "augment = 1", "class_weights = true"):
        file.write_text(text)
        with pytest.raises(UsageError, match="cannot be used: 1 problem"):
            Recipe.from_toml(file)
    file.write_text("weight_decay = 1e-3")
    assert Recipe.from_toml(file).weight_decay == 0.001


@pytest.mark.fault("E5")
def test_an_unknown_architecture_names_close_ones_and_asks_no_network(
    make_folder: MakeFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_folder({"a": 6, "b": 6})
    assert regraft("pretrain", data, "--out", tmp_path / "run", "--arch", "vgg61") == 2
    said = capsys.readouterr().err
    assert "timm has no architecture `vgg61`" in said
    assert "vgg16" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.fault("E6")
def test_no_architecture_is_ever_asked_for_with_pretrained_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import timm

    asked: list[dict[str, Any]] = []
    create = timm.create_model

    def spy(*arguments: Any, **options: Any) -> Any:
        asked.append(options)
        return create(*arguments, **options)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(timm, "create_model", spy)
    monkeypatch.setattr(socket, "socket", refuse)
    from regraft.inputs import InputSpec

    for arch in ("resnet10t", "vgg11"):
        Backbone.create(arch, InputSpec((32, 32), 3), seed=0)
    assert asked
    assert all(options["pretrained"] is False for options in asked)
    with pytest.raises(UsageError, match="asks for the weights `a1_in1k` of somebody else"):
        Backbone.create("resnet18.a1_in1k", InputSpec((32, 32), 3), seed=0)


@pytest.mark.fault("E7")
@pytest.mark.parametrize(
    "text",
    [
        "seed = !!python/object/apply:os.system ['touch canary']\n",
        "a: &a [x, x]\nb: &b [*a, *a]\n",
        "[[phases]]\nlearns = \"__import__('os').system('touch canary')\"\n",
        "# " + "x" * (2 << 20),
    ],
)
def test_a_hostile_recipe_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text(text)
    began = time.perf_counter()
    with pytest.raises(UsageError) as refused:
        Recipe.from_toml(tmp_path / "recipe.toml")
    assert time.perf_counter() - began < 1
    assert refused.value.exit_code == 2
    assert os.listdir(tmp_path) == ["recipe.toml"]


@pytest.mark.fault("E8")
def test_a_value_that_looks_like_a_variable_stays_text() -> None:
    with pytest.raises(UsageError, match=r"not `\$\{HOME\}`"):
        Recipe.scratch().changed({"augment": "${HOME}"})


@pytest.mark.fault("E9")
@pytest.mark.parametrize("state", ["finished", "interrupted", "foreign"])
def test_a_folder_that_is_taken_is_never_written_over(
    make_folder: MakeFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], state: str
) -> None:
    data, out = make_folder({"a": 6, "b": 6}, size=(32, 32)), tmp_path / "run"
    if state == "foreign":
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
    else:
        assert regraft("pretrain", data, "--out", out, *TINY) == 0
        if state == "interrupted":
            Run.open(out).set_status("interrupted", best_epoch=1)
    before = tree(out)
    assert regraft("pretrain", data, "--out", out, *TINY) == 2
    assert f"`{out}` exists already" in capsys.readouterr().err
    assert tree(out) == before


@pytest.mark.fault("E13")
def test_nobody_to_ask_and_nobody_to_tell_stops_nothing(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    data, out = make_folder({"a": 6, "b": 6}, size=(32, 32)), tmp_path / "run"
    code = (
        f"from regraft.cli import main; main({['pretrain', str(data), '--out', str(out), *TINY]!r})"
    )
    reader, writer = os.pipe()
    os.close(reader)  # `| head` that has ended already
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=100,
        env=os.environ | {"COLUMNS": "0", "CI": "1"},
    )
    os.close(writer)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads((out / "status.json").read_text())["state"] == "finished"
