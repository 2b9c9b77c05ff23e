"""Every file of a folder is used or left out with a reason, and what is wrong is said."""

import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from regraft.data.dataset import DataOptions, Dataset
from regraft.data.listing import Listed, list_folder
from regraft.data.tables import Columns, list_table
from regraft.errors import DataError, UsageError

MakeFolder = Callable[..., Path]


def refusal(root: Path) -> str:
    with pytest.raises(DataError) as caught:
        Dataset.open(root)
    assert caught.value.exit_code == 3
    return str(caught.value)


def unaccounted(root: Path) -> list[str]:
    """Files on disk that are neither used nor excluded (themselves or with their folder)."""
    listing = list_folder(root)
    named = [image.path for image in listing.images] + [path for path, _ in listing.excluded]
    assert Counter(named).most_common(1)[0][1] == 1, "something is named twice"
    assert all(os.path.lexists(root / path) for path in named)
    files = [path.relative_to(root) for path in root.rglob("*") if not path.is_dir()]
    covered = set(map(Path, named))
    return [str(file) for file in files if not covered & {file, *file.parents}]


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("training", "valid", "testing"),
        ("Train", "Validation", "TEST"),
        ("TRAINING", "dev", "Testing"),
    ],
)
def test_every_usual_word_for_a_split_is_known(
    make_folder: MakeFolder, train: str, val: str, test: str
) -> None:
    root = make_folder({f"{train}/a": 3, f"{val}/a": 2, f"{test}/a": 1})
    splits = Counter(image.split for image in list_folder(root).images)
    assert splits == {"train": 3, "val": 2, "test": 1}


@pytest.mark.parametrize("word", ["eval", "Evaluation"])
def test_eval_is_refused_because_tools_disagree(make_folder: MakeFolder, word: str) -> None:
    root = make_folder({"train/a": 1, f"{word}/a": 1})
    told = refusal(root)
    assert f"`{root / word}` may mean validation or test: tools disagree" in told
    assert "hint: rename the folder to `val` or `test`" in told


@pytest.mark.fault("A13")
def test_class_folders_hold_images_at_any_depth(make_folder: MakeFolder) -> None:
    root = make_folder({"cats": 1, "cats/old/older": 1, "dogs": 1})
    assert list_folder(root).images == [
        Listed("cats/cats_000.png", "cats"),
        Listed("cats/old/older/older_000.png", "cats"),
        Listed("dogs/dogs_000.png", "dogs"),
    ]


@pytest.mark.fault("A12", "A11")
def test_every_file_is_used_or_left_out_with_its_reason(make_folder: MakeFolder) -> None:
    root = make_folder({"train/a": 3, "train/b": 3, "val/a": 1, "train/a/.ipynb_checkpoints": 2})
    for name in ("train/a/notes.txt", "train/b/._b.png", "train/loose.png", "readme.md"):
        (root / name).write_text("x")
    (root / "train/a/gone.png").symlink_to("nowhere.png")
    (root / "train/b/more").symlink_to(root / "val", target_is_directory=True)
    assert unaccounted(root) == []
    assert dict(list_folder(root).excluded) == {
        "train/a/.ipynb_checkpoints": "hidden or system folder",
        "train/a/notes.txt": "not an image by its suffix",
        "train/b/._b.png": "hidden file",
        "train/b/more": "linked folder",
        "train/loose.png": "not in a class folder",
        "readme.md": "not in a class folder",
    }


@pytest.mark.parametrize("name", [".git", "__MACOSX", "@eaDir"])
@pytest.mark.parametrize("place", ["", "train", "train/a"])
@pytest.mark.fault("A11")
def test_system_folders_are_left_out_and_listed_wherever_they_stand(
    make_folder: MakeFolder, place: str, name: str
) -> None:
    hidden = f"{place}/{name}".strip("/")
    root = make_folder({"train/a": 2, "train/b": 2, hidden: 1})
    listing = list_folder(root)
    assert len(listing.images) == 4
    assert listing.problems == []
    assert listing.excluded == [(hidden, "hidden or system folder")]


@pytest.mark.parametrize(
    "places",
    [["a/loop"], ["a/loop", "b/loop"], ["loop"], [f"{'ab'[n % 2]}/loop{n}" for n in range(10)]],
)
@pytest.mark.fault("A14", "A15")
def test_a_symlink_loop_neither_multiplies_images_nor_takes_time(
    make_folder: MakeFolder, places: list[str]
) -> None:
    root = make_folder({"a": 2, "b": 2})
    for place in places:
        (root / place).symlink_to(root, target_is_directory=True)
    start = time.perf_counter()
    listing = list_folder(root)
    assert time.perf_counter() - start < 1
    assert [image.label for image in listing.images] == ["a", "a", "b", "b"]
    assert listing.excluded == [(place, "linked folder") for place in sorted(places)]


@pytest.mark.fault("A22")
def test_a_pipe_named_as_an_image_does_not_hang_and_is_named(make_folder: MakeFolder) -> None:
    root = make_folder({"a": 5, "b": 5})
    pipe = root / "a" / "x.png"
    os.mkfifo(pipe)
    # Where the pipe is opened after all, this ends the wait, and the reason below differs.
    release = threading.Timer(5, lambda: os.close(os.open(pipe, os.O_RDWR | os.O_NONBLOCK)))
    release.start()
    try:
        told = refusal(root)
    finally:
        release.cancel()
    assert "1 file cannot be read: `a/x.png`" in told
    assert "empty-file" not in told
    assert "no such file" not in told, "it is there, but it is not a regular file"


@pytest.mark.fault("A1")
def test_a_folder_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    assert refusal(tmp_path / "no").startswith(f"dataset folder not found: `{tmp_path / 'no'}`")
    assert not (tmp_path / "no").exists()


@pytest.mark.fault("A1")
def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "data.zip").write_text("x")
    assert f"`{tmp_path / 'data.zip'}` is a file; expected a folder" in refusal(
        tmp_path / "data.zip"
    )


@pytest.mark.fault("A2")
def test_images_directly_inside_are_counted_and_the_layout_is_shown(
    make_folder: MakeFolder,
) -> None:
    root = make_folder({"": 3})
    told = refusal(root)
    assert f"`{root}` has 3 images directly inside, and no class folders" in told
    assert "`data/cats/1.jpg`, `data/dogs/2.jpg`" in told


@pytest.mark.parametrize(
    ("layout", "told"),
    [
        ({"a": 5, "b": 0, "c": 0}, "2 class folders have no images: `b`, `c`"),
        ({"train/a": 5, "train/b": 0}, "1 class folder has no images: `train/b`"),
        ({"train/a": 5, "cats": 5}, "`cats` stand beside `train`: a class or a split?"),
        ({"val/a": 5, "test/a": 5}, "there is no `train` folder beside `test`, `val`"),
        ({"train/a": 5, "Train/a": 5}, "`Train`, `train`: 1 split named twice"),
        ({"a": 5}, "there is only the class `a`; a classifier needs at least 2 classes"),
        ({"a": 5, "b": 4, "c": 1}, "2 classes have fewer than 5 images: `b` (4), `c` (1)"),
        ({"Cat": 5, "cat": 5}, "classes that differ by spelling only: 'Cat', 'cat'"),
        (
            {"Caf\u00e9": 5, "Cafe\u0301": 5},
            r"classes that differ by spelling only: 'Cafe\u0301', 'Caf\xe9'",
        ),
    ],
)
@pytest.mark.fault("A3", "A5", "A6", "A9", "A10")
def test_a_folder_that_cannot_be_used_is_told_why(
    make_folder: MakeFolder, layout: dict[str, int], told: str
) -> None:
    root = make_folder(layout)
    message = refusal(root)
    assert message.startswith(f"`{root}` cannot be used: ")
    assert f"\n  - {told}\n" in message


# CSV


def rows_of(
    root: Path, text: str, group: str | None = None, split: str | None = None
) -> list[Listed]:
    file = root / "labels.csv"
    file.write_text(text, encoding="utf-8")
    listing = list_table(root, file, Columns(group=group, split=split))
    assert listing.problems == []
    return listing.images


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_csv_is_read_with_any_usual_delimiter_and_ending(
    tmp_path: Path, delimiter: str, bom: str, newline: str
) -> None:
    lines = ["image|label|patient|part", "a/1.png|cat|p1|train", "a/2.png| dog |p2|Dev"]
    text = bom + newline.join(lines).replace("|", delimiter) + newline
    assert rows_of(tmp_path, text, "patient", "part") == [
        Listed("a/1.png", "cat", "train", "p1"),
        Listed("a/2.png", "dog", "val", "p2"),
    ]


def test_spaces_around_a_patient_do_not_make_another_patient(tmp_path: Path) -> None:
    images = rows_of(tmp_path, "image,label,patient\n1.png,a,p1\n2.png,a, p1 \n", "patient")
    assert {image.group for image in images} == {"p1"}


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("../secret.png,a,train", "row 3: `../secret.png` leads out of `{root}`"),
        ("/etc/x.png,a,train", "row 3: `/etc/x.png` leads out of `{root}`"),
        ("1.png,b,train", "row 3: `1.png` is named twice"),
        ("./1.png,b,train", "row 3: `./1.png` is named twice"),
        ("2.png,a,eval", "row 3: split `eval` is none of ['dev', 'test'"),
        ("2.png,a,", "row 3: split `` is none of ['dev', 'test'"),
    ],
)
def test_a_csv_row_that_cannot_be_used_is_named(tmp_path: Path, row: str, told: str) -> None:
    (tmp_path / "x.csv").write_text(f"image,label,split\n1.png,a,train\n{row}\n")
    listing = list_table(tmp_path, tmp_path / "x.csv", Columns(split="split"))
    assert len(listing.problems) == 1
    assert listing.problems[0].startswith(told.format(root=tmp_path))


def test_a_csv_row_without_image_or_label_is_left_out_and_listed(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("image,label\n1.png,a\n2.png,\n,b\n3.png\n")
    listing = list_table(tmp_path, tmp_path / "x.csv", Columns())
    assert [image.path for image in listing.images] == ["1.png"]
    assert listing.excluded == [(f"x.csv row {n}", "no image or no label") for n in (3, 4, 5)]


def test_a_missing_csv_column_is_told_with_those_that_exist(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("file,label\n1.png,a\n")
    with pytest.raises(UsageError) as caught:
        list_table(tmp_path, tmp_path / "x.csv", Columns(group="patient"))
    assert "has no column `image`, `patient`; it has `file`, `label`" in str(caught.value)
    assert "--image-column" in caught.value.hint


@pytest.mark.parametrize(
    ("content", "kind", "told"),
    [
        (None, UsageError, "cannot be read: No such file or directory"),
        ("Größe,label\n".encode("latin-1"), DataError, "is not UTF-8"),
    ],
)
def test_a_csv_that_cannot_be_read_is_named(
    tmp_path: Path, content: bytes | None, kind: type[Exception], told: str
) -> None:
    if content is not None:
        (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(kind) as caught:
        list_table(tmp_path, tmp_path / "x.csv", Columns())
    assert f"`{tmp_path / 'x.csv'}` {told}" in str(caught.value)


def test_an_image_that_only_the_csv_knows_is_named(make_folder: MakeFolder) -> None:
    root = make_folder({"a": 5, "b": 5})
    lines = [f"{path.relative_to(root)},{path.parent.name}" for path in sorted(root.rglob("*.png"))]
    (root / "x.csv").write_text("\n".join(["image,label", *lines, "a/gone.png,a"]))
    with pytest.raises(DataError, match=r"1 file cannot be read: `a/gone\.png` \(missing"):
        Dataset.open(root, DataOptions(csv=root / "x.csv"))
