"""`check` finds planted traps with their exact count, and calls no honest image a leak."""

import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from regraft import cli
from regraft.data import decode, survey
from regraft.data.checks import Checked, check_data
from regraft.data.dataset import DataOptions
from regraft.data.finding import Finding

MakeFolder = Callable[..., Path]
Change = Callable[[Image.Image], Image.Image]
SIDE = 96


def scene(seed: int, side: int = SIDE) -> Image.Image:
    """Returns a picture of its own: blobs and edges in colour, as photographs have."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (7, 7, 3), dtype=np.uint8)
    fine = generator.integers(0, 256, (24, 24, 3), dtype=np.uint8)
    wide, narrow = (
        np.asarray(Image.fromarray(one).resize((side, side), Image.Resampling.BICUBIC), np.float32)
        for one in (coarse, fine)
    )
    return Image.fromarray(np.clip(0.65 * wide + 0.35 * narrow, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, form: str, **how: Any) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, form, **how)
    return Image.open(io.BytesIO(stream.getvalue()))


def cropped(
    image: Image.Image, left: float, top: float, right: float, bottom: float
) -> Image.Image:
    width, height = image.size
    box = (left * width, top * height, (1 - right) * width, (1 - bottom) * height)
    return image.crop(tuple(map(round, box)))  # type: ignore[arg-type]


def write_split(root: Path, *, number: int = 10, first: int = 0, side: int = SIDE) -> Path:
    """Writes two classes of different scenes in train, val and test."""
    seed = first
    for split, share in (("train", number), ("val", 4), ("test", 4)):
        for label in ("cats", "dogs"):
            (root / split / label).mkdir(parents=True, exist_ok=True)
            for place in range(share):
                scene(seed, side).save(root / split / label / f"{label}_{split}_{place}.png")
                seed += 1
    return root


def found(data: Path | list[Path], **options: Any) -> dict[str, Finding]:
    return {one.code: one for one in checked(data, **options).findings}


def checked(data: Path | list[Path], **options: Any) -> Checked:
    folders = data if isinstance(data, list) else [data]
    return check_data(folders, DataOptions(**options))


def files(finding: Finding) -> list[str]:
    return [one.path for one in finding.files]


def test_scenes_without_a_trap_have_no_findings(tmp_path: Path) -> None:
    """Every other test of this file tells by one finding more."""
    assert found(write_split(tmp_path / "data")) == {"tiny-class": found_tiny(tmp_path / "data")}


def found_tiny(root: Path) -> Finding:
    finding = found(root)["tiny-class"]
    assert finding.severity == "warning"
    assert finding.count == 2
    return finding


@pytest.mark.fault("D1", "A17")
def test_the_bytes_of_training_images_in_test_are_a_leak(tmp_path: Path) -> None:
    root = write_split(tmp_path / "data")
    for place in range(3):
        shutil.copy(
            root / f"train/cats/cats_train_{place}.png", root / f"test/cats/copy_{place}.png"
        )
    shutil.copy(root / "train/dogs/dogs_train_0.png", root / "train/dogs/twice.png")
    told = found(root)
    assert told["leak"].severity == "error"
    assert told["leak"].count == 3
    assert files(told["leak"]) == [f"test/cats/copy_{place}.png" for place in range(3)]
    assert told["leak"].examples[0] == "train/cats/cats_train_0.png = test/cats/copy_0.png"
    assert told["copies"].severity == "warning"
    assert files(told["copies"]) == ["train/dogs/twice.png"]


@pytest.mark.fault("D2")
def test_the_same_pixels_in_other_files_are_a_leak(tmp_path: Path) -> None:
    root = write_split(tmp_path / "data")
    for place, suffix in enumerate(("bmp", "tif", "webp")):
        picture = Image.open(root / f"train/cats/cats_train_{place}.png")
        picture.save(root / f"test/cats/again_{place}.{suffix}", lossless=True)
    finding = found(root)["leak"]
    assert (finding.severity, finding.count) == ("error", 3)
    assert {Path(name).suffix for name in files(finding)} == {".bmp", ".tif", ".webp"}


ALTERED: dict[str, Change] = {
    "resized to half": lambda image: image.resize((SIDE // 2, SIDE // 2)),
    "enlarged": lambda image: image.resize((SIDE * 2, SIDE * 2), Image.Resampling.BICUBIC),
    "stretched": lambda image: image.resize((SIDE, SIDE // 2)),
    "cropped by 5 % at one side": lambda image: cropped(image, 0.05, 0, 0, 0),
    "cropped by 5 % at a corner": lambda image: cropped(image, 0, 0, 0.05, 0.05),
    "cropped by 5 % all round": lambda image: cropped(image, 0.05, 0.05, 0.05, 0.05),
    "cropped by 5 % in all": lambda image: cropped(image, 0.025, 0.025, 0.025, 0.025),
    "JPEG quality 50": lambda image: encoded(image, "JPEG", quality=50),
    "brighter": lambda image: image.point(lambda value: min(255, round(value * 1.1 + 5))),
    "grey": lambda image: image.convert("L"),
    "turned by 90": lambda image: image.transpose(Image.Transpose.ROTATE_90),
    "turned by 180": lambda image: image.transpose(Image.Transpose.ROTATE_180),
    "turned by 270": lambda image: image.transpose(Image.Transpose.ROTATE_270),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "upside down": lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    "transposed": lambda image: image.transpose(Image.Transpose.TRANSPOSE),
    "turned by 33": lambda image: image.rotate(33, Image.Resampling.BICUBIC),
}


@pytest.mark.fault("D3")
@pytest.mark.parametrize("change", ALTERED.values(), ids=ALTERED.keys())
def test_an_altered_training_image_in_test_is_told(tmp_path: Path, change: Change) -> None:
    root = write_split(tmp_path / "data")
    for place in range(4):
        picture = change(Image.open(root / f"train/cats/cats_train_{place}.png"))
        picture.save(root / f"test/cats/altered_{place}.png")
    told = found(root)
    assert "leak" not in told
    assert told["near-leak"].severity == "warning"
    assert files(told["near-leak"]) == [f"test/cats/altered_{place}.png" for place in range(4)]
    assert (
        told["near-leak"]
        .examples[0]
        .startswith("train/cats/cats_train_0.png ~ test/cats/altered_0.png")
    )


@pytest.mark.fault("D5")
def test_test_images_of_dataset2_in_dataset1_are_a_leak_between_them(tmp_path: Path) -> None:
    first = write_split(tmp_path / "first", number=12)
    second = write_split(tmp_path / "second", first=500)
    for place in range(3):
        shutil.copy(second / f"test/cats/cats_test_{place}.png", first / f"train/dogs/{place}.png")
    picture = Image.open(second / "test/dogs/dogs_test_0.png")
    encoded(picture, "JPEG", quality=50).convert("RGB").save(first / "val/dogs/near.png")
    shutil.copy(second / "train/cats/cats_train_0.png", first / "train/cats/harmless.png")
    told = found([first, second])
    assert told["transfer-leak"].severity == "error"
    assert files(told["transfer-leak"]) == [
        f"test/cats/cats_test_{place}.png" for place in range(3)
    ]
    assert {one.place for one in told["transfer-leak"].files} == {1}
    assert files(told["near-transfer-leak"]) == ["test/dogs/dogs_test_0.png"]
    assert told["overlap"].severity == "note"
    assert files(told["overlap"]) == ["train/cats/cats_train_0.png"]
    turned_round = found([second, first])
    assert "transfer-leak" not in turned_round
    assert turned_round["overlap"].count == 4


@pytest.mark.fault("D4")
def test_a_patient_on_both_sides_is_an_error(tmp_path: Path) -> None:
    root = write_split(tmp_path / "data")
    for path in sorted(root.rglob("*.png")):
        path.rename(path.with_name(f"p{path.stem.replace('_', '-')}_1.png"))
    for split, label in (("train", "cats"), ("test", "cats"), ("val", "dogs"), ("test", "dogs")):
        path = next(iter(sorted((root / split / label).iterdir())))
        path.rename(path.with_name(f"p7{label}_{split}.png"))
    finding = found(root, group_regex=r"^(p[^_]+)_")["group-leak"]
    assert (finding.severity, finding.count) == ("error", 2)
    assert finding.examples == ("p7cats: test, train", "p7dogs: test, val")
    assert files(finding) == ["test/cats/p7cats_test.png", "test/dogs/p7dogs_test.png"]


@pytest.mark.fault("D15")
def test_one_picture_with_two_labels_is_an_error(tmp_path: Path) -> None:
    root = write_split(tmp_path / "data")
    shutil.copy(root / "train/cats/cats_train_3.png", root / "train/dogs/same.png")
    Image.open(root / "train/cats/cats_train_4.png").save(root / "train/dogs/pixels.bmp")
    encoded(Image.open(root / "train/cats/cats_train_5.png"), "JPEG").save(
        root / "train/dogs/near.jpg", quality=60
    )
    told = found(root)
    assert (told["two-labels"].severity, told["two-labels"].count) == ("error", 2)
    assert files(told["two-labels"]) == [
        "train/cats/cats_train_3.png",
        "train/cats/cats_train_4.png",
        "train/dogs/pixels.bmp",
        "train/dogs/same.png",
    ]
    assert (told["near-two-labels"].severity, told["near-two-labels"].count) == ("warning", 1)


def test_20_turned_copies_each_of_10_originals_are_counted(tmp_path: Path) -> None:
    for number in range(10):
        folder = tmp_path / "data" / ("cats" if number % 2 else "dogs")
        folder.mkdir(parents=True, exist_ok=True)
        original = scene(number, 128)
        original.save(folder / f"{number}.png")
        for copy in range(1, 21):
            turned = original.rotate(17.1 * copy, Image.Resampling.BILINEAR)
            turned.save(folder / f"{number}_{copy}.png")
    finding = found(tmp_path / "data")["augmented"]
    assert (finding.severity, finding.count) == ("warning", 200)
    assert finding.numbers == {"images": 210, "pictures": 10}
    assert finding.told == "210 images are 10 pictures, each altered 21 times or so"


def as_jpeg(path: Path) -> None:
    Image.open(path).save(path.with_suffix(".jpg"), quality=95)
    path.unlink()


def as_grey(path: Path) -> None:
    Image.open(path).convert("L").save(path)


def larger(path: Path) -> None:
    Image.open(path).resize((120, 100)).save(path)


def framed(path: Path) -> None:
    image = Image.open(path)
    inner = image.resize((SIDE - 12, SIDE - 12))
    frame = Image.new("RGB", image.size)
    frame.paste(inner, (6, 6))
    frame.save(path)


@pytest.mark.parametrize(
    ("change", "trait"),
    [
        (as_jpeg, "the file format"),
        (as_grey, "the pixel mode"),
        (larger, "the image size"),
        (framed, "the brightness of the border"),
    ],
)
def test_a_shortcut_is_found(tmp_path: Path, change: Callable[[Path], None], trait: str) -> None:
    root = write_split(tmp_path / "data")
    assert "shortcut" not in found(root)
    for path in sorted(root.rglob("dogs*.png")):
        change(path)
    told = [one for one in checked(root).findings if one.code == "shortcut"]
    assert [one.told.split(" alone")[0] for one in told] == [trait]
    assert told[0].numbers["score"] > 0.9
    assert told[0].numbers["chance"] == 0.5


def test_a_format_that_both_classes_share_is_no_shortcut(tmp_path: Path) -> None:
    root = write_split(tmp_path / "data")
    for path in sorted(root.rglob("*_[13579].png")):
        as_jpeg(path)
    assert "shortcut" not in found(root)


@pytest.mark.fault("A20")
def test_imbalance_is_a_warning_with_numbers(tmp_path: Path) -> None:
    root = write_split(tmp_path / "data", number=102, side=24)
    for path in sorted((root / "train" / "dogs").iterdir())[2:]:
        path.unlink()
    finding = found(root)["imbalance"]
    assert finding.severity == "warning"
    assert finding.told == "`cats` has 11 times as many images as `dogs`"
    assert finding.examples == ("cats: 110", "dogs: 10")
    assert "class_weights=balanced" in finding.advice


@pytest.mark.fault("B29")
def test_constant_images_are_listed_and_are_no_copies(tmp_path: Path) -> None:
    root = write_split(tmp_path / "data")
    for place, value in enumerate((0, 0, 128)):
        Image.new("RGB", (SIDE + place, SIDE), (value,) * 3).save(root / f"test/cats/c{place}.png")
    Image.new("RGB", (SIDE, SIDE)).save(root / "train/cats/c.bmp")
    told = found(root)
    assert (told["constant"].severity, told["constant"].count) == ("warning", 4)
    assert not {"leak", "near-leak", "copies", "near-copies"} & set(told)


def test_an_image_of_another_brightness_is_told(tmp_path: Path) -> None:
    root = write_split(tmp_path / "data")
    dark = Image.open(root / "train/cats/cats_train_0.png").point(lambda value: value // 12)
    dark.save(root / "train/cats/cats_train_0.png")
    assert files(found(root)["intensity"]) == ["train/cats/cats_train_0.png"]


def test_odd_sizes_are_noted(tmp_path: Path) -> None:
    root = write_split(tmp_path / "data")
    scene(900).resize((20, 20)).save(root / "train/cats/thumbnail.png")
    scene(901, 200).crop((0, 0, 200, 20)).save(root / "train/cats/strip.png")
    finding = found(root)["odd-size"]
    assert finding.severity == "note"
    assert files(finding) == ["train/cats/strip.png", "train/cats/thumbnail.png"]


def test_unreadable_files_are_listed_with_their_reasons(tmp_path: Path) -> None:
    root = write_split(tmp_path / "data")
    whole = (root / "train/cats/cats_train_0.png").read_bytes()
    (root / "train/cats/half.png").write_bytes(whole[: len(whole) // 2])
    (root / "test/dogs/text.jpg").write_text("<html>")
    (root / "test/dogs/empty.png").write_bytes(b"")
    told = checked(root)
    finding = told.findings[0]
    assert (finding.code, finding.severity, finding.count) == ("unreadable", "error", 3)
    assert any("half.png: truncated" in line for line in finding.examples)
    assert [one.code for one in told.errors] == ["unreadable"]
    assert checked(root, allow=("unreadable",)).errors == []


@pytest.mark.fault("A9", "A10")
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere files are read in this process")
def test_a_file_that_kills_its_decoder_is_listed_and_the_others_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_split(tmp_path / "data")
    deadly = root / "train/cats/cats_train_3.png"
    content, whole = deadly.read_bytes(), decode.read_whole

    def read_whole(read: Any) -> Any:
        if read == content:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(read)

    monkeypatch.setattr(survey, "read_whole", read_whole)
    broken = checked(root)
    assert broken.num_images == (35,)
    (finding,) = [one for one in broken.findings if one.code == "unreadable"]
    assert finding.examples == (
        "train/cats/cats_train_3.png: decoder-crash: the decoder died of it",
    )


def test_classes_that_differ_by_spelling_are_an_error(tmp_path: Path) -> None:
    root = write_split(tmp_path / "data", side=24)
    for label in ("Cats", "Caf\u00e9", "Cafe\u0301"):
        for split in ("train", "val", "test"):
            (root / split / label).mkdir()
            for place in range(2):
                seed = int.from_bytes(f"{label}{split}{place}".encode()[-6:])
                scene(seed, 24).save(root / split / label / f"{place}.png")
    finding = found(root)["spelling"]
    assert (finding.severity, finding.count) == ("error", 2)
    assert finding.examples == ("'Cafe\\u0301', 'Caf\\xe9'", "'Cats', 'cats'")


def test_the_folder_is_not_written_to_and_every_image_is_counted(tmp_path: Path) -> None:
    root = write_split(tmp_path / "data")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert checked(root).num_images == (36,)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


# The command


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["check", *map(str, arguments)])
    return int(ended.value.code or 0)


def test_errors_are_exit_3_and_json_is_one_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_split(tmp_path / "data")
    assert run(root) == 0
    assert "0 errors, 1 warning" in capsys.readouterr().out
    shutil.copy(root / "train/cats/cats_train_0.png", root / "test/cats/copy.png")
    assert run(root, "--json") == 3
    document = json.loads(capsys.readouterr().out)
    assert document["data"] == [{"name": "data", "images": 37}]
    leak = document["findings"][0]
    assert {"code", "severity", "count", "examples", "message", "advice"} <= set(leak)
    assert (leak["code"], leak["severity"], leak["count"]) == ("leak", "error", 1)
    assert leak["files"][0]["path"] == "test/cats/copy.png"
    assert str(tmp_path) not in json.dumps(document)
    assert run(root, "--allow", "leak") == 0
    said = capsys.readouterr().out
    assert "allowed" in said


def test_the_page_shows_pairs_and_holds_no_metadata_and_no_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_split(tmp_path / "data")
    exif = Image.Exif()
    exif[0x010E] = "SECRET-PLACE"
    name = "<script>alert(1)<"
    Image.open(root / "train/cats/cats_train_0.png").save(
        root / f"test/cats/{name}.jpg", exif=exif, quality=80
    )
    assert run(root, "--out", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "&lt;script&gt;alert(1)&lt;" in page
    assert "<script" not in page
    assert "SECRET-PLACE" not in page
    assert str(tmp_path) not in page
    assert "http" not in page.replace("http-equiv", "")
    assert f"page: {tmp_path / 'page.html'}" in capsys.readouterr().out
    (tmp_path / "notes.txt").write_text("mine")
    assert run(root, "--out", tmp_path / "notes.txt") == 2
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert "is no HTML page" in capsys.readouterr().err


def test_a_check_needs_no_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    root = write_split(tmp_path / "data", number=2, side=24)
    code = (
        "import sys\nfrom regraft.cli import main\n"
        f"try:\n    main(['check', {str(root)!r}])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'timm', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
