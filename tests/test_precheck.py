"""A training looks at what decoding tells anyway, refuses errors, and leaves found files out."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import regraft
from regraft import api
from regraft.data import duplicates
from regraft.data.dataset import DataOptions, Dataset
from regraft.data.duplicates import near_hashes, near_pairs
from regraft.data.looks import Looks, Seen, perceptual_hashes
from regraft.errors import ArtefactError, DataError, UsageError
from regraft.progress import Note
from regraft.run import Run
from regraft.training.recipe import Recipe
from test_checks import encoded, run, scene, write_split

SIDE = 48


def pretrain(data: Path | Dataset, out: Path, told: Callable[[Any], None] = lambda _: None) -> Run:
    recipe = Recipe.scratch().changed({"image_size": SIDE, "epochs": 1})
    return api.pretrain(data, out=out, arch="resnet10t", recipe=recipe, on_progress=told)


def notes(records: list[Any]) -> str:
    return "\n".join(one.text for one in records if isinstance(one, Note))


@pytest.mark.fault("D2")
def test_the_same_pixels_in_train_and_test_stop_a_training_or_are_left_out(tmp_path: Path) -> None:
    root = write_split(tmp_path / "data", side=SIDE)
    picture = Image.open(root / "train/cats/cats_train_0.png")
    picture.save(root / "test/cats/again.bmp")
    with pytest.raises(DataError, match="1 image, found in an earlier split too") as refused:
        pretrain(root, tmp_path / "run")
    assert "`train/cats/cats_train_0.png = test/cats/again.bmp`" in str(refused.value)
    assert "`--allow leak`" in refused.value.hint
    assert not (tmp_path / "run").exists()
    records: list[Any] = []
    made = pretrain(
        Dataset.open(root, DataOptions(allow=("leak",))), tmp_path / "run", records.append
    )
    out = {s["path"]: s["excluded"] for s in made.samples() if "excluded" in s}
    assert out == {"test/cats/again.bmp": "copy: the same pixels are in an earlier split"}
    assert made.record["data"]["splits"] == {"train": 20, "val": 8, "test": 8}
    assert "allowed: 1 image, found in an earlier split too" in notes(records)


@pytest.mark.fault("D3")
def test_near_copies_are_said_once_and_stand_in_the_run(tmp_path: Path) -> None:
    root = write_split(tmp_path / "data", side=SIDE)
    picture = Image.open(root / "train/cats/cats_train_0.png")
    picture.transpose(Image.Transpose.ROTATE_90).save(root / "test/cats/turned.png")
    encoded(picture, "JPEG", quality=50).convert("RGB").resize((64, 64)).save(
        root / "test/cats/small.png"
    )
    records: list[Any] = []
    made = pretrain(root, tmp_path / "run", records.append)
    assert notes(records).count("(`near-leak`)") == 1
    assert "warning: 2 images, found in an earlier split too (2 of test as in train)" in notes(
        records
    )
    kept = {one["code"]: one for one in made.record["data"]["findings"]}
    assert (kept["near-leak"]["severity"], kept["near-leak"]["count"]) == ("warning", 2)
    assert any("`near-leak`" in note for note in made.record["data"]["notes"])
    page = api.report([made.folder], out=tmp_path / "page.html").read_text()
    assert "found in an earlier split too" in page


@pytest.mark.fault("D15")
def test_two_labels_stop_a_training_unless_allowed_by_name(tmp_path: Path) -> None:
    root = write_split(tmp_path / "data", side=SIDE)
    Image.open(root / "train/cats/cats_train_0.png").save(root / "train/dogs/same.bmp")
    with pytest.raises(DataError, match="1 picture stands under more than one label"):
        pretrain(root, tmp_path / "run")
    made = pretrain(Dataset.open(root, DataOptions(allow=("two-labels",))), tmp_path / "run")
    assert made.record["data"]["options"]["allow"] == ["two-labels"]
    assert made.record["data"]["findings"][0]["allowed"] is True


@pytest.mark.fault("D5")
def test_a_run_tells_altered_test_images_without_its_dataset_at_hand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write_split(tmp_path / "first", side=SIDE)
    second = write_split(tmp_path / "second", first=500, side=SIDE)
    picture = Image.open(first / "train/cats/cats_train_1.png")
    encoded(picture, "JPEG", quality=50).convert("RGB").save(second / "test/dogs/near.png")
    shutil.copy(first / "val/cats/cats_val_1.png", second / "test/dogs/same.png")
    start = pretrain(first, tmp_path / "start").folder
    shutil.rmtree(first)
    recipe = Recipe.transfer("head")
    with pytest.raises(DataError, match="the start was trained on 1 test image"):
        api.finetune(second, out=tmp_path / "run", start=start, recipe=recipe)
    assert run(second, "--start", start, "--json") == 3
    told = {one["code"]: one for one in json.loads(capsys.readouterr().out)["findings"]}
    assert [one["path"] for one in told["transfer-leak"]["files"]] == ["test/dogs/same.png"]
    assert [one["path"] for one in told["near-transfer-leak"]["files"]] == ["test/dogs/near.png"]
    records: list[Any] = []
    dataset = Dataset.open(second, DataOptions(allow=("leak",)))
    made = api.finetune(
        dataset, out=tmp_path / "run", start=start, recipe=recipe, on_progress=records.append
    )
    assert "1 image, test images, were seen by the start (`near-transfer-leak`)" in notes(
        records
    ).replace("warning: ", "")
    assert dict((s["path"], s["excluded"]) for s in made.samples() if "excluded" in s) == {
        "test/dogs/same.png": "leak: the start was trained on it"
    }
    # The next one knows the images of both.
    third = write_split(tmp_path / "third", first=900, side=SIDE)
    picture.save(third / "test/cats/near.bmp")
    records.clear()
    api.finetune(
        third, out=tmp_path / "on", start=made.folder, recipe=recipe, on_progress=records.append
    )
    assert "(`near-transfer-leak`)" in notes(records)


def test_found_files_are_left_out_and_listed_with_the_finding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_split(tmp_path / "data", side=SIDE)
    Image.open(root / "train/cats/cats_train_0.png").save(root / "test/cats/again.bmp")
    shutil.copy(root / "train/cats/cats_train_1.png", root / "train/cats/twice.png")
    (root / "train/dogs/half.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert run(root, "--json") == 3
    file = tmp_path / "check.json"
    file.write_text(capsys.readouterr().out)
    dataset = Dataset.open(root, DataOptions(exclude_from=str(file)))
    assert dict(dataset.excluded) == {
        "test/cats/again.bmp": "found by a check: leak",
        "train/cats/twice.png": "found by a check: copies",
        "train/dogs/half.png": "found by a check: unreadable",
    }
    assert dataset.notes == ("3 files left out that a check has found",)
    assert dataset.options.to_dict()["exclude_from"] == "check.json"
    assert run(root, "--exclude-from", file) == 0
    capsys.readouterr()
    some = Dataset.open(root, DataOptions(exclude_from=f"{file}:unreadable,leak"))
    assert [path for path, _ in some.excluded] == ["test/cats/again.bmp", "train/dogs/half.png"]
    # A file that has changed since is another file.
    scene(77, SIDE).save(root / "train/cats/twice.png")
    assert "train/cats/twice.png" in {
        sample.path for sample in Dataset.open(root, dataset.options).samples
    }
    with pytest.raises(UsageError, match="has no finding `constant`; it has"):
        Dataset.open(root, DataOptions(exclude_from=f"{file}:constant"))
    file.write_text("[]")
    with pytest.raises(ArtefactError, match="is no check of this version"):
        Dataset.open(root, DataOptions(exclude_from=str(file)))


def test_a_hash_finds_its_picture_turned_and_mirrored_and_no_other() -> None:
    pictures = [scene(seed, 64) for seed in range(30)]
    turned = [pictures[k].transpose(Image.Transpose(k)) for k in range(7)]
    arrays = [np.asarray(one) for one in [*pictures, *turned]]
    looks = Looks.empty(len(arrays))
    looks.set(np.arange(len(arrays)), [Seen.of(pixels, "uint8") for pixels in arrays])
    hashes = perceptual_hashes(np.stack(arrays))
    assert (looks.hashes() == hashes).all()
    found = near_hashes(hashes, np.arange(30, 37))
    assert [(one, other) for one, other, _ in found] == [(k, 30 + k) for k in range(7)]


def test_the_check_is_a_verb_too(tmp_path: Path) -> None:
    root = write_split(tmp_path / "data", side=SIDE)
    shutil.copy(root / "train/cats/cats_train_0.png", root / "test/cats/copy.png")
    checked = regraft.check([root])
    assert [one.code for one in checked.errors] == ["leak"]


def test_pairs_are_the_same_in_whatever_blocks_pictures_are_looked_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pictures = [scene(seed, 64) for seed in range(9)]
    arrays = np.stack([np.asarray(one) for one in [*pictures, *pictures[:4]]])
    hashes, asked = perceptual_hashes(arrays), np.arange(9, 13)
    looks = Looks.empty(len(arrays))
    looks.set(np.arange(len(arrays)), [Seen.of(pixels, "uint8") for pixels in arrays])
    expected = [(k, 9 + k) for k in range(4)]
    for block in (2, 3, 100):
        monkeypatch.setattr(duplicates, "CHUNK", block)
        assert [pair[:2] for pair in near_hashes(hashes, asked)] == expected
        assert [pair[:2] for pair in near_pairs(looks, np.arange(13))] == expected
