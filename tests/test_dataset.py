"""A Dataset is validated, split honestly and fingerprinted, and its folder is never written to."""

import gzip
import hashlib
import os
import re
import shutil
import struct
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from regraft.data.cache import Cache
from regraft.data.dataset import DataOptions, Dataset
from regraft.errors import DataError, RegraftError, UsageError

MakeFolder = Callable[..., Path]
TWO = {"a": 8, "b": 8}
SPLIT = {"train/a": 5, "train/b": 5, "val/a": 2, "val/b": 2, "test/a": 2, "test/b": 2}


def problems(root: Path, options: DataOptions | None = None) -> tuple[str, ...]:
    with pytest.raises(DataError) as caught:
        Dataset.open(root, options)
    return caught.value.problems


def write_random(path: Path, shape: tuple[int, ...], kind: type[np.generic] = np.uint8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = int.from_bytes(hashlib.sha256(str(path).encode()).digest()[:4])
    pixels = np.random.default_rng(seed).integers(0, np.iinfo(kind).max, shape).astype(kind)  # type: ignore[type-var]
    Image.fromarray(pixels).save(path)


def tree(root: Path) -> dict[str, tuple[int, int, bytes]]:
    return {
        str(path.relative_to(root)): (
            path.stat().st_mode,
            path.stat().st_mtime_ns,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in [root, *root.rglob("*")]
    }


@pytest.mark.fault("A21")
def test_class_names_are_in_code_point_order_and_give_the_labels(make_folder: MakeFolder) -> None:
    dataset = Dataset.open(make_folder({"2": 5, "10": 5, "Z": 5, "a": 5, "1": 5}))
    assert dataset.class_names == ("1", "10", "2", "Z", "a")
    names = [dataset.class_names[label] for label in dataset.labels]
    assert names == [Path(sample.path).parent.name for sample in dataset.samples]


def test_found_is_used_plus_excluded(make_folder: MakeFolder) -> None:
    root = make_folder({**TWO, "c": 6, "a/inner": 2})
    (root / "a" / "notes.txt").write_text("x")
    (root / "b" / "broken.png").write_bytes(b"")
    options = DataOptions(relabel=("x=a", "y=b"), per_class=3, allow=("unreadable",))
    dataset = Dataset.open(root, options)
    used = [sample.path for sample in dataset.samples]
    left_out = dict(dataset.excluded)
    on_disk = {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}
    assert {*used, *left_out} == on_disk
    assert len(used) + len(dataset.excluded) == len(on_disk)
    assert set(left_out.values()) == {
        "not an image by its suffix",
        "empty-file: 0 bytes",
        "class not named by --relabel",
        "beyond --per-class",
    }
    assert f"{len(left_out)} files left out" in dataset.summary()


@pytest.mark.parametrize("options", [DataOptions(), DataOptions(group_regex=r"(\d)\.")])
@pytest.mark.fault("D4")
def test_no_content_and_no_group_is_in_two_splits(
    make_folder: MakeFolder, options: DataOptions
) -> None:
    root = make_folder({"a": 40, "b": 40})
    for number in range(8):
        shutil.copy(root / f"a/a_{number:03d}.png", root / f"a/copy_{number:03d}.png")
    dataset = Dataset.open(root, options)
    splits: dict[str | None, set[str]] = {}
    for sample in dataset.samples:
        splits.setdefault(sample.sha256, set()).add(sample.split)
        if sample.group is not None:
            splits.setdefault(sample.group, set()).add(sample.split)
    assert set(map(len, splits.values())) == {1}
    assert {sample.split for sample in dataset.samples} == {"train", "val", "test"}


# The fingerprint


def test_the_fingerprint_ignores_place_names_and_mtime(make_folder: MakeFolder) -> None:
    root = make_folder(TWO)
    before = Dataset.open(root)
    for number, path in enumerate(sorted(root.rglob("*.png"), reverse=True)):
        path.rename(path.with_name(f"{number:05d}.png"))
        os.utime(path.with_name(f"{number:05d}.png"), ns=(number, number))
    after = Dataset.open(root.rename(root.with_name("elsewhere")))
    assert [s.path for s in after.samples] != [s.path for s in before.samples]
    assert after.fingerprint == before.fingerprint
    assert {s.sha256: s.split for s in after.samples} == {s.sha256: s.split for s in before.samples}


def _change_a_pixel(root: Path) -> None:
    write_random(root / "a" / "a_000.png", (12, 10))


def _remove(root: Path) -> None:
    (root / "a" / "a_000.png").unlink()


def _move(root: Path) -> None:
    (root / "a" / "a_000.png").rename(root / "b" / "a_000.png")


def _rename_class(root: Path) -> None:
    (root / "a").rename(root / "c")


@pytest.mark.parametrize("change", [_change_a_pixel, _remove, _move, _rename_class])
def test_the_fingerprint_tells_other_contents_and_labels(
    make_folder: MakeFolder, change: Callable[[Path], None]
) -> None:
    root = make_folder(TWO)
    before = Dataset.open(root).fingerprint
    change(root)
    assert Dataset.open(root).fingerprint != before


def test_worker_threads_leave_the_warning_filters_alone(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered_in: set[threading.Thread] = set()
    enter = warnings.catch_warnings.__enter__

    def spy(self: Any) -> Any:
        entered_in.add(threading.current_thread())
        return enter(self)

    # It exchanges a list of the whole process: two threads in it leave filters behind for good.
    monkeypatch.setattr(warnings.catch_warnings, "__enter__", spy)
    Cache.build(Dataset.open(make_folder(TWO)), (4, 4), 1)
    assert entered_in <= {threading.main_thread()}


@pytest.mark.parametrize("allow", [(), ("unreadable", "leak")])
@pytest.mark.fault("A23")
def test_the_data_folder_is_never_written_to(
    make_folder: MakeFolder, allow: tuple[str, ...]
) -> None:
    root = make_folder(TWO)
    if allow:
        path = root / "a" / "a_000.png"
        path.write_bytes(path.read_bytes()[:80])
    before = tree(root)
    dataset = Dataset.open(root, DataOptions(allow=allow))
    Cache.build(dataset, (4, 4), 1)
    assert tree(root) == before


# What cannot be used


@pytest.mark.fault("A7")
def test_a_class_that_train_lacks_is_listed(make_folder: MakeFolder) -> None:
    root = make_folder({**SPLIT, "val/new": 1, "test/new": 1, "test/other": 1})
    assert problems(root) == (
        "val has classes that train lacks: `new`",
        "test has classes that train lacks: `new`, `other`",
    )


@pytest.mark.fault("A8")
def test_a_class_that_test_lacks_is_noted(make_folder: MakeFolder) -> None:
    dataset = Dataset.open(make_folder({**SPLIT, "train/c": 5, "val/c": 2}))
    assert dataset.notes == ("test has no images of `c`",)


@pytest.mark.fault("D1")
def test_equal_bytes_across_splits_are_refused_unless_left_out(make_folder: MakeFolder) -> None:
    root = make_folder(SPLIT)
    shutil.copy(root / "train/a/a_000.png", root / "test/a/copy.png")
    shutil.copy(root / "val/b/b_001.png", root / "test/b/copy.png")
    (told,) = problems(root)
    assert told.startswith("2 images are in ")
    assert told.endswith(
        "train and test with equal bytes, e.g. `train/a/a_000.png` = `test/a/copy.png`"
    )
    dataset = Dataset.open(root, DataOptions(allow=("leak",)))
    assert dataset.excluded == (
        ("test/a/copy.png", "same bytes as `train/a/a_000.png`"),
        ("test/b/copy.png", "same bytes as `val/b/b_001.png`"),
    )
    assert dataset.notes == ("2 copies across splits left out (allowed)",)


@pytest.mark.parametrize("layout", [TWO, SPLIT])
@pytest.mark.fault("D15")
def test_one_image_with_two_labels_is_refused(
    make_folder: MakeFolder, layout: dict[str, int]
) -> None:
    root = make_folder(layout)
    first, second = (root / name for name in list(layout)[:2])
    shutil.copy(first / "a_000.png", second / "same.png")
    told = " ".join(problems(root))
    assert "a_000.png" in told
    assert "same.png" in told


def test_unreadable_files_are_refused_unless_left_out(make_folder: MakeFolder) -> None:
    root = make_folder(TWO)
    for number in range(4):
        (root / f"a/bad_{number}.png").write_text("no image")
    (told,) = problems(root)
    assert told == (
        "4 files cannot be read: `a/bad_0.png`, `a/bad_1.png`, `a/bad_2.png` and 1 more "
        "(not-an-image: a text file)"
    )
    dataset = Dataset.open(root, DataOptions(allow=("unreadable",)))
    assert dataset.excluded == tuple(
        (f"a/bad_{number}.png", "not-an-image: a text file") for number in range(4)
    )
    assert dataset.notes == ("4 unreadable files left out (allowed)",)


def test_images_of_different_channels_are_refused(make_folder: MakeFolder) -> None:
    root = make_folder(TWO)
    np.save(root / "a" / "many.npy", np.zeros((5, 5, 4), np.uint8))
    assert problems(root) == ("images differ in channels: 1 (16 images), 4 (1 image)",)


def test_grey_images_among_colour_ones_are_noted(make_folder: MakeFolder) -> None:
    root = make_folder(TWO, mode="RGB")
    write_random(root / "a" / "grey.png", (5, 5))
    dataset = Dataset.open(root)
    assert dataset.channels == 3
    assert dataset.notes == ("1 grey image replicated to RGB",)


def test_all_problems_of_a_folder_are_told_at_once(make_folder: MakeFolder) -> None:
    root = make_folder({**SPLIT, "test/A": 2, "test/c": 0})
    (root / "train/a/bad.png").write_text("no image")
    shutil.copy(root / "train/a/a_000.png", root / "test/a/copy.png")
    told = problems(root)
    for part in (
        "no images: `test/c`",
        "cannot be read: `train/a/bad.png`",
        "by spelling only: 'A', 'a'",
        "test has classes that train lacks: `A`",
        "= `test/a/copy.png`",
    ):
        assert [part in problem for problem in told].count(True) == 1, part
    with pytest.raises(DataError, match=f"cannot be used: {len(told)} problems"):
        Dataset.open(root)


# Options


def test_an_unknown_finding_cannot_be_allowed(make_folder: MakeFolder) -> None:
    with pytest.raises(UsageError, match="`--allow` does not know `everything`") as caught:
        Dataset.open(make_folder(TWO), DataOptions(allow=("everything",)))
    assert caught.value.hint == "it takes `unreadable`, `leak`, `two-labels` and 2 more"


@pytest.mark.parametrize(
    ("regex", "group"), [(r"^(p\d+)_", "p7"), (r"p\d+_\d", "p7_1"), (r"_(\d)", "1")]
)
def test_a_group_is_the_first_parenthesis_or_the_whole_match(
    make_folder: MakeFolder, regex: str, group: str
) -> None:
    root = make_folder(TWO)
    for path in sorted(root.rglob("*.png")):
        number = int(path.stem.split("_")[1])
        path.rename(path.with_name(f"p{number}_{number % 3}x{path.parent.name}.png"))
    dataset = Dataset.open(root, DataOptions(group_regex=regex), whole=True)
    assert {s.group for s in dataset.samples if "/p7_" in s.path} == {group}


@pytest.mark.parametrize("regex", [r"^(p\d+)_", r"^(p\d+)?a?_?"])
def test_files_that_the_group_regex_does_not_match_are_counted(
    make_folder: MakeFolder, regex: str
) -> None:
    root = make_folder({"a": 5, "b": 5})
    (told,) = problems(root, DataOptions(group_regex=regex))
    assert told == (
        "`--group-regex` does not match 10 files, "
        "e.g. `a/a_000.png`, `a/a_001.png`, `a/a_002.png` and 7 more"
    )


@pytest.mark.fault("D4")
def test_a_group_in_two_given_splits_is_refused(make_folder: MakeFolder) -> None:
    root = make_folder(SPLIT)
    regex = r"(\d+)"  # a_000 is in train, val and test
    assert problems(root, DataOptions(group_regex=regex)) == (
        "2 groups in more than one split: `000`, `001`",
    )


def test_a_missing_split_is_taken_from_train_and_that_is_noted(make_folder: MakeFolder) -> None:
    root = make_folder({"train/a": 20, "train/b": 20, "test/a": 3, "test/b": 3})
    dataset = Dataset.open(root)
    assert Counter(s.split for s in dataset.samples) == {"train": 34, "val": 6, "test": 6}
    assert {s.path[:4] for s in dataset.samples if s.split == "test"} == {"test"}
    assert dataset.notes == ("val taken from train, by stable hash",)


def test_relabel_makes_new_classes_and_lists_what_it_leaves_out(make_folder: MakeFolder) -> None:
    root = make_folder({str(digit): 5 for digit in range(5)})
    dataset = Dataset.open(root, DataOptions(relabel=("even=0, 2", "odd=1,3")))
    assert dataset.class_names == ("even", "odd")
    parity = {sample.path[0]: sample.label for sample in dataset.samples}
    assert parity == {"0": "even", "1": "odd", "2": "even", "3": "odd"}
    assert dataset.excluded == tuple(
        (f"4/4_{number:03d}.png", "class not named by --relabel") for number in range(5)
    )


@pytest.mark.parametrize(
    ("relabel", "kind", "told"),
    [
        (("x=a", "y=b,zebra"), DataError, "`--relabel` names `zebra`, which do not exist"),
        (("x",), UsageError, "`--relabel x` is not understood"),
        (("x=",), UsageError, "`--relabel x=` is not understood"),
        (("x=a", "y=a,b"), UsageError, "`a`"),
    ],
)
def test_a_relabel_that_cannot_be_followed_is_told(
    make_folder: MakeFolder, relabel: tuple[str, ...], kind: type[RegraftError], told: str
) -> None:
    with pytest.raises(kind, match=re.escape(told)):
        Dataset.open(make_folder(TWO), DataOptions(relabel=relabel))


def test_per_class_limits_train_and_val_but_never_test(make_folder: MakeFolder) -> None:
    root = make_folder({"a": 60, "b": 40})
    full, limited = Dataset.open(root), Dataset.open(root, DataOptions(per_class=3))
    counts = Counter((s.split, s.label) for s in limited.samples)
    assert {counts[split, name] for split in ("train", "val") for name in "ab"} == {3}
    tests = [[s for s in d.samples if s.split == "test"] for d in (full, limited)]
    assert tests[0] == tests[1]
    assert len(limited.samples) + len(limited.excluded) == 100
    assert set(limited.samples) <= set(full.samples)


def test_whole_makes_every_image_without_a_split_a_test_image(make_folder: MakeFolder) -> None:
    dataset = Dataset.open(make_folder({"a": 3}), DataOptions(per_class=1), whole=True)
    assert [sample.split for sample in dataset.samples] == ["test"] * 3
    given = Dataset.open(make_folder(SPLIT, name="given"), whole=True)
    assert Counter(s.split for s in given.samples) == {"train": 10, "val": 4, "test": 4}


def test_a_csv_gives_labels_groups_and_splits(make_folder: MakeFolder) -> None:
    root = make_folder({"images": 12})
    lines = ["file;finding;patient;part"]
    for number in range(12):
        split = ("train", "train", "valid", "test")[number // 3]
        lines.append(
            f"images/images_{number:03d}.png;{'ill' if number % 3 else 'well'};p{number};{split}"
        )
    (root / "x.csv").write_text("\n".join(lines), encoding="utf-8-sig")
    options = DataOptions(root / "x.csv", "file", "finding", "patient", "part")
    dataset = Dataset.open(root, options)
    assert dataset.class_names == ("ill", "well")
    assert Counter(s.split for s in dataset.samples) == {"train": 6, "val": 3, "test": 3}
    assert [s.group for s in dataset.samples] == [f"p{number}" for number in range(12)]
    assert dataset.summary().startswith("12 images of 12 groups in 2 classes (6 train, 3 val")


# IDX


def idx(array: NDArray[np.uint8]) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.tobytes()


def write_idx(root: Path, prefix: str, number: int, *, zipped: bool = False) -> None:
    root.mkdir(exist_ok=True)
    generator = np.random.default_rng(number)
    images = generator.integers(0, 256, (number, 6, 5), dtype=np.uint8)
    labels = np.arange(number, dtype=np.uint8) % 2
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        path = root / f"{prefix}-{name}-ubyte{'.gz' if zipped else ''}"
        path.write_bytes(gzip.compress(idx(array)) if zipped else idx(array))


@pytest.mark.parametrize("zipped", [False, True])
def test_a_folder_of_idx_files_is_a_dataset(tmp_path: Path, zipped: bool) -> None:
    write_idx(tmp_path, "train", 40, zipped=zipped)
    write_idx(tmp_path, "t10k", 8, zipped=zipped)
    dataset = Dataset.open(tmp_path)
    assert dataset.class_names == ("0", "1")
    assert Counter(s.split for s in dataset.samples) == {"train": 34, "val": 6, "test": 8}
    assert dataset.labels.tolist() == [row % 2 for row in (*range(8), *range(40))]
    cache, _ = Cache.build(dataset, (6, 5), 1)
    expected = np.random.default_rng(8).integers(0, 256, (8, 6, 5), dtype=np.uint8)
    np.testing.assert_array_equal(cache.images[dataset.rows("test"), :, :, 0], expected)


def test_idx_files_beside_their_zipped_originals_count_once(tmp_path: Path) -> None:
    for zipped in (False, True):  # as torchvision leaves them in `MNIST/raw`
        write_idx(tmp_path, "train", 40, zipped=zipped)
    assert len(Dataset.open(tmp_path, whole=True).samples) == 40


def test_a_linked_class_folder_is_told_and_never_dropped_silently(make_folder: MakeFolder) -> None:
    root = make_folder({"a": 8, "b": 8})
    elsewhere = make_folder({"c": 8}, name="elsewhere")
    (root / "c").symlink_to(elsewhere / "c")
    assert problems(root) == ("`c` is a link to a folder: links are not followed",)


def test_files_of_other_kinds_are_named_where_a_class_has_no_images(
    make_folder: MakeFolder,
) -> None:
    root = make_folder({"a": 8, "b": 8})
    (root / "c").mkdir()
    (root / "c" / "scan.jp2").write_bytes(b"J2")
    assert problems(root) == ("1 class folder has no images: `c`; files there end in `.jp2`",)


def test_broken_images_may_not_empty_a_class_or_a_split(make_folder: MakeFolder) -> None:
    root = make_folder(
        {"train/a": 6, "train/b": 6, "val/a": 2, "val/b": 2, "test/a": 2, "test/b": 2}
    )
    for file in (root / "val" / "b").iterdir():
        content = file.read_bytes()
        file.write_bytes(content[: len(content) - 40])  # a whole header, and too few pixels
    dataset = Dataset.open(root, DataOptions(allow=("unreadable",)))
    with pytest.raises(DataError, match="val shows only `a`: nothing can be told apart"):
        Cache.build(dataset, (8, 8), 1)


def test_an_idx_file_without_its_labels_is_named(tmp_path: Path) -> None:
    write_idx(tmp_path, "train", 6)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    assert problems(tmp_path) == (
        "`train-images-idx3-ubyte` has 6 images, `train-labels-idx1-ubyte` is missing",
    )


def test_git_lfs_pointers_and_saved_pages_are_counted_by_what_they_are(
    make_folder: MakeFolder,
) -> None:
    root = make_folder(TWO)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"
    for number in range(5):
        (root / f"a/pointer_{number}.png").write_text(pointer)
    (root / "b/page.jpg").write_text("<!DOCTYPE html><title>404</title>")
    (told,) = problems(root)
    assert told == (
        "6 files cannot be read: "
        "`a/pointer_0.png`, `a/pointer_1.png`, `a/pointer_2.png` and 2 more "
        "(not-an-image: a Git LFS pointer; run `git lfs pull`), `b/page.jpg` "
        "(not-an-image: an HTML page)"
    )
