"""Every image is decoded once, whole or not at all, and keyed by its content."""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any, NoReturn

import numpy as np
import pytest
from PIL import Image

from regraft.data.cache import Cache
from regraft.data.dataset import DataOptions, Dataset
from regraft.errors import DataError
from regraft.inputs import InputSpec
from regraft.storage import cache_home

MakeFolder = Callable[..., Path]
TWO = {"a": 8, "b": 8}


def entries() -> list[str]:
    home = cache_home()
    return sorted(os.listdir(home)) if home.exists() else []


@pytest.fixture
def no_decoding(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def refuse(*_args: Any, **_options: Any) -> NoReturn:
        raise AssertionError("an image was decoded again")

    return lambda: monkeypatch.setattr("regraft.data.cache.read_whole", refuse)


def break_pixels(path: Path) -> None:
    """Leaves the header whole, so that only decoding can find it."""
    path.write_bytes(path.read_bytes()[:-40])


def test_a_second_build_decodes_nothing(
    make_folder: MakeFolder, no_decoding: Callable[[], None]
) -> None:
    dataset = Dataset.open(make_folder(TWO))
    first, _ = Cache.build(dataset, (6, 5), 1)
    no_decoding()
    second, _ = Cache.build(dataset, (6, 5), 1)
    np.testing.assert_array_equal(first.images, second.images)
    assert first.is_grey == second.is_grey


def test_the_same_images_in_another_folder_find_the_cache_again(
    make_folder: MakeFolder, no_decoding: Callable[[], None]
) -> None:
    root = make_folder(TWO)
    Cache.build(Dataset.open(root), (6, 5), 1)
    other = shutil.copytree(root, root.with_name("elsewhere"))
    shutil.rmtree(root)
    no_decoding()
    Cache.build(Dataset.open(other), (6, 5), 1)
    assert len(entries()) == 1


@pytest.mark.fault("H6")
def test_another_size_channels_or_content_is_another_entry(make_folder: MakeFolder) -> None:
    root = make_folder(TWO)
    for size, channels in (((6, 5), 1), ((5, 6), 1), ((6, 5), 3)):
        cache, _ = Cache.build(Dataset.open(root), size, channels)
        assert cache.images.shape == (16, *size, channels)
    shutil.copy(root / "a/a_001.png", root / "a/a_000.png")
    Cache.build(Dataset.open(root), (6, 5), 1)
    assert len(entries()) == 4


def test_rows_are_in_the_order_of_the_samples(make_folder: MakeFolder) -> None:
    dataset = Dataset.open(make_folder(TWO))
    cache, _ = Cache.build(dataset, (12, 10), 1)
    for row, sample in enumerate(dataset.samples):
        expected = np.asarray(Image.open(dataset.root / sample.path))
        np.testing.assert_array_equal(cache.images[row, :, :, 0], expected)


def test_16_bit_stays_16_bit(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(5):
            ramp = generator.permutation(65536).astype(np.uint16).reshape(256, 256)
            Image.fromarray(ramp).save(tmp_path / name / f"{number}.png")
    cache, _ = Cache.build(Dataset.open(tmp_path), (256, 256), 1)
    assert cache.images.dtype == np.uint16
    assert [len(np.unique(image)) for image in cache.images] == [65536] * 10
    full = InputSpec((256, 256), 1, 16, intensity_range=(0, 65535))
    measured = cache.with_statistics(full, np.arange(10))
    assert measured.mean == pytest.approx([0.5])
    assert measured.std == pytest.approx([12**-0.5], rel=1e-4)


def test_statistics_are_those_of_the_train_rows_alone(make_folder: MakeFolder) -> None:
    dataset = Dataset.open(make_folder({"a": 20, "b": 20}, mode="RGB"))
    cache, _ = Cache.build(dataset, (12, 10), 3)
    train = [np.asarray(Image.open(dataset.root / s.path)) / 255
             for s in dataset.samples if s.split == "train"]  # fmt: skip
    inputs = cache.with_statistics(InputSpec((12, 10), 3), dataset.rows("train"))
    assert inputs.mean == pytest.approx(np.mean(train, axis=(0, 1, 2)))
    assert inputs.std == pytest.approx(np.std(train, axis=(0, 1, 2)))
    everything = cache.with_statistics(inputs, np.arange(40))
    assert inputs.mean != pytest.approx(everything.mean)


def test_constant_images_do_not_make_a_std_of_zero(tmp_path: Path) -> None:
    for name, value in (("a", 7), ("b", 7)):
        (tmp_path / name).mkdir()
        for number in range(5):
            Image.new("L", (4 + number, 4), value).save(tmp_path / name / f"{number}.png")
    cache, _ = Cache.build(Dataset.open(tmp_path, whole=True), (4, 4), 1)
    inputs = cache.with_statistics(InputSpec((4, 4), 1), np.arange(10))
    assert inputs.mean == pytest.approx([7 / 255])
    assert inputs.std == pytest.approx([1e-4])


@pytest.mark.parametrize("coloured", [False, True])
def test_grey_content_is_recognised_however_it_is_stored(
    make_folder: MakeFolder, coloured: bool
) -> None:
    root = make_folder(TWO)
    for path in root.rglob("*.png"):
        Image.open(path).convert("RGB").save(path)
    if coloured:
        image = Image.open(root / "b/b_007.png")
        image.putpixel((0, 0), (1, 2, 3))
        image.save(root / "b/b_007.png")
    dataset = Dataset.open(root)
    assert dataset.channels == 3
    cache, _ = Cache.build(dataset, (12, 10), 3)
    assert cache.is_grey is not coloured


def test_images_found_broken_at_decoding_are_named_and_nothing_is_kept(
    make_folder: MakeFolder,
) -> None:
    root = make_folder(TWO)
    for number in (2, 5):
        break_pixels(root / f"b/b_{number:03d}.png")
    dataset = Dataset.open(root)
    with pytest.raises(DataError) as caught:
        Cache.build(dataset, (6, 5), 1)
    (told,) = caught.value.problems
    assert told.startswith("2 files cannot be read: `b/b_002.png`, `b/b_005.png` (truncated: ")
    assert entries() == []


def test_broken_images_that_are_allowed_are_left_out_and_listed(make_folder: MakeFolder) -> None:
    root = make_folder(TWO)
    break_pixels(root / "b/b_002.png")
    dataset = Dataset.open(root, DataOptions(allow=("unreadable",)))
    cache, remaining = Cache.build(dataset, (12, 10), 1)
    assert {s.path for s in dataset.samples} - {s.path for s in remaining.samples} == {
        "b/b_002.png"
    }
    ((path, reason),) = remaining.excluded
    assert (path, reason.split(":")[0]) == ("b/b_002.png", "truncated")
    assert len(cache.images) == len(remaining.samples) == len(remaining.labels) == 15
    assert len(entries()) == 1


def test_two_builders_at_once_both_end_well(make_folder: MakeFolder) -> None:
    dataset = Dataset.open(make_folder(TWO))
    both = Barrier(2, timeout=20)

    def meet_at_the_end(done: int, total: int) -> None:
        if done == total:
            both.wait()

    with ThreadPoolExecutor(2) as pool:
        builds = [pool.submit(Cache.build, dataset, (6, 5), 1, meet_at_the_end) for _ in range(2)]
        first, second = (build.result()[0] for build in builds)
    np.testing.assert_array_equal(first.images, second.images)
    assert first.images.max() > first.images.min()
    assert len(entries()) == 1, "no temporary folder is left"


@pytest.mark.parametrize("file", ["images.npy", "cache.json"])
def test_a_damaged_entry_is_decoded_again(make_folder: MakeFolder, file: str) -> None:
    dataset = Dataset.open(make_folder(TWO))
    first, _ = Cache.build(dataset, (6, 5), 1)
    expected = np.array(first.images)
    path = cache_home() / entries()[0] / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    second, _ = Cache.build(dataset, (6, 5), 1)
    np.testing.assert_array_equal(second.images, expected)


@pytest.mark.fault("B7", "B28")
def test_a_file_that_changed_after_it_was_hashed_is_not_kept_under_the_old_hash(
    make_folder: MakeFolder,
) -> None:
    root = make_folder(TWO)
    dataset = Dataset.open(root)
    shutil.copy(root / "a/a_001.png", root / "a/a_000.png")
    with pytest.raises(DataError, match=r"`a/a_000\.png`"):
        Cache.build(dataset, (6, 5), 1)
    assert entries() == []
