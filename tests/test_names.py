"""Names of classes, files and folders may be anything that a file system takes."""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from regraft import api, cli
from regraft.data.dataset import Dataset
from regraft.documents import read_json
from regraft.errors import readable
from regraft.run import Run
from regraft.storage import write_json
from regraft.training.recipe import Recipe

PLAIN = [
    "two words",
    "don't",
    'say "so"',
    "a&b",
    "#1",
    "100%",
    "a;b",
    "a,b",
    "膝関節",
    "🦴",
    "Größe",
]
HOSTILE = ["cat\u202egnp.exe", "line\nbreak", "tab\there", "esc\x1b[2J", "=1+1", "--help", "-x"]
RESERVED = ["a..%2f", "a\\b", "CON", "nul", "$a_b^2$", "<script>alert(1)", "{{ 7*7 }}"]
CLASSES = PLAIN + HOSTILE + RESERVED
NOT_UTF8 = os.fsdecode(b"caf\xe9.png")
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]")


def regraft(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def written(root: Path, names: Iterable[str], *, number: int = 5) -> Path:
    generator = np.random.default_rng(0)
    for label in names:
        (root / label).mkdir(parents=True)
        for index, name in enumerate((*HOSTILE[:number], NOT_UTF8)):
            pixels = generator.integers(0, 256, (12, 12), dtype=np.uint8)
            image = name if name.endswith(".png") else f"{index}{name}.png"
            if index == 0:
                image = "--help.png"
            with open(os.fsencode(root / label / image), "wb") as stream:
                Image.fromarray(pixels).save(stream, "PNG")
    return root


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A training on 25 classes of such names, evaluated, in a folder of such a name."""
    base = tmp_path_factory.mktemp("ü n")
    data = written(base / "my data", CLASSES)
    recipe = Recipe.scratch().changed({"image_size": 32, "epochs": 1})
    run = api.pretrain(data, out=base / "r ü n", arch="resnet10t", recipe=recipe)
    api.evaluate(run.folder, data)
    return data, run.folder


@pytest.mark.fault("C1", "C2", "C3", "C10")
def test_every_name_comes_back_from_a_run(story: tuple[Path, Path]) -> None:
    data, folder = story
    run = Run.open(folder)
    assert set(run.class_names) == set(CLASSES)
    on_disk = {path.relative_to(data).as_posix() for path in data.rglob("*.png")}
    assert {sample["path"] for sample in run.samples()} == on_disk
    assert sum(NOT_UTF8 in path for path in on_disk) == len(CLASSES)
    for file in folder.rglob("*.json*"):
        file.read_bytes().decode("ascii")  # whatever the name, the file is plain text


@pytest.mark.fault("C1", "C2", "C3")
def test_tables_are_valid_and_start_no_formula(story: tuple[Path, Path]) -> None:
    _, folder = story
    text = (folder / "predictions.csv").read_bytes().decode("utf-8")
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    tested = [s for s in Run.open(folder).samples() if s.get("split") == "test"]
    assert len(rows) == len(tested)
    for row in rows:
        assert not row["path"].startswith(("=", "+", "-", "@", "\t", "\r"))
    plain = {sample["path"] for sample in tested if readable(sample["path"]) == sample["path"]}
    assert {path for path in plain if path[0] not in "=-"} <= {row["path"] for row in rows}


@pytest.mark.fault("C2")
def test_what_people_read_has_no_control_characters(
    story: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data, folder = story
    capsys.readouterr()
    assert regraft("evaluate", folder, data, "--device", "cpu") == 0
    assert regraft("predict", folder, data / "esc\x1b[2J", "--device", "cpu") == 0
    assert regraft("report", folder, "--out", tmp_path / "report.html") == 0
    for label in ("esc\x1b[2J", "cat\u202egnp.exe"):
        (tmp_path / "broken" / label).mkdir(parents=True)
        (tmp_path / "broken" / label / "line\nbreak\x1b.png").write_bytes(b"no image")
    assert regraft("pretrain", tmp_path / "broken", "--out", tmp_path / "x") == 3
    told = capsys.readouterr()
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for text in (told.out, told.err, page):
        assert not CONTROLS.search(text), CONTROLS.search(text)
    assert r"line\u000abreak\u001b.png" in told.err


@pytest.mark.fault("C3", "C4")
def test_predict_takes_a_folder_with_a_file_named_as_an_option(
    story: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    data, folder = story
    capsys.readouterr()
    assert regraft("predict", folder, data / "CON", "--json", "--device", "cpu") == 0
    rows = json.loads(capsys.readouterr().out)["predictions"]
    assert {Path(row["path"]).name for row in rows} == {p.name for p in (data / "CON").iterdir()}
    assert "--help.png" in {Path(row["path"]).name for row in rows}


@pytest.mark.fault("C6")
def test_no_written_file_is_named_after_a_class_or_an_image(story: tuple[Path, Path]) -> None:
    _, folder = story
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
    assert names
    assert all(re.fullmatch(r"[a-z0-9_./-]+", name) for name in names)


@pytest.mark.fault("C7")
def test_a_figure_never_typesets_a_class_name(story: tuple[Path, Path], tmp_path: Path) -> None:
    _, folder = story
    page = api.report([folder], out=tmp_path / "report.html").read_text(encoding="utf-8")
    assert "$a_b^2$" in page
    assert "{{ 7*7 }}" in page
    assert "<script>alert" not in page


@pytest.mark.fault("C9")
def test_data_may_move_and_be_named_in_any_way(
    story: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, folder = story
    before = api.evaluate(folder, data)["accuracy"]
    moved = tmp_path / "elsewhere"
    shutil.copytree(data, moved)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("elsewhere", "elsewhere/", "./elsewhere/../elsewhere", str(moved)):
        assert api.evaluate(folder, name)["accuracy"] == before
    assert all(not s["path"].startswith(("/", "..")) for s in Run.open(folder).samples())
    assert str(data).encode() not in b"".join(p.read_bytes() for p in folder.rglob("*.json"))


def test_a_surrogate_survives_a_json_file(tmp_path: Path) -> None:
    document: Any = {"path": NOT_UTF8}
    write_json(tmp_path / "x.json", document)
    assert read_json(tmp_path / "x.json") == document
    assert os.fsencode(read_json(tmp_path / "x.json")["path"]) == b"caf\xe9.png"


@pytest.mark.fault("C8")
def test_two_names_of_one_stem_are_two_images(tmp_path: Path) -> None:
    data = written(tmp_path / "data", ["a", "b"])
    for label, value in (("a", 3), ("b", 9)):
        Image.new("L", (8, 8), value).save(data / label / "same.png")
        Image.new("L", (8, 8), value + 1).save(data / label / "same.bmp")
    paths = {sample.path for sample in Dataset.open(data).samples}
    assert {"a/same.png", "a/same.bmp", "b/same.png", "b/same.bmp"} <= paths


@pytest.mark.fault("C5")
def test_a_name_as_long_as_the_file_system_takes_is_read(tmp_path: Path) -> None:
    data = written(tmp_path / "data", ["a" * 255, "b"])
    Image.new("L", (8, 8), 3).save(data / "b" / ("c" * 251 + ".png"))
    dataset = Dataset.open(data)
    assert "a" * 255 in dataset.class_names
    assert "b/" + "c" * 251 + ".png" in {sample.path for sample in dataset.samples}


@pytest.mark.slow
@pytest.mark.fault("C11")
def test_without_a_locale_and_a_home_the_output_is_escaped_and_whole(
    story: tuple[Path, Path], tmp_path: Path
) -> None:
    data, folder = story
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    environment = kept | {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment["REGRAFT_CACHE"] = str(tmp_path / "cache")
    command = [sys.executable, "-m", "regraft", "predict", str(folder), str(data / PLAIN[-1])]
    done = subprocess.run(command, capture_output=True, env=environment, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode("ascii", "backslashreplace")
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert len(rows) == len(list((data / PLAIN[-1]).iterdir()))
