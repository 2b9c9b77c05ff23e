"""Other bits and bands train as 8-bit RGB does: the whole way, to the same figures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from regraft import api
from regraft.data.arrays import read_idx
from regraft.data.cache import Cache
from regraft.data.dataset import Dataset
from regraft.data.decode import read_content, read_whole
from regraft.models.classifier import Classifier
from regraft.training.recipe import Recipe

RECIPE = Recipe.scratch().changed({"image_size": 32, "epochs": 6, "batch_size": 16})
DIGITS, SIZES = 3, {"train": 60, "val": 15, "test": 40}
Writer = Callable[[Path, NDArray[np.uint16]], None]


def write_png(path: Path, values: NDArray[Any]) -> None:
    Image.fromarray(values).save(path.with_suffix(".png"))


def write_tiff(path: Path, values: NDArray[Any]) -> None:
    tifffile.imwrite(path.with_suffix(".tif"), values)


def write_dicom(path: Path, values: NDArray[Any]) -> None:
    from test_dicom import dicom

    path.with_suffix(".dcm").write_bytes(dicom(values, bits=12))


def digits(shared_data: Path) -> dict[tuple[str, str], NDArray[np.uint8]]:
    """Returns some images of each digit, for each split."""
    found = {}
    for prefix, splits in (("train", ("train", "val")), ("t10k", ("test",))):
        folder = shared_data / "mnist"
        images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
        for digit in range(DIGITS):
            rows, start = np.flatnonzero(labels == digit), 0
            for split in splits:
                found[split, str(digit)] = images[rows[start : start + SIZES[split]]]
                start += SIZES[split]
    return found


def written(
    root: Path, images: dict[tuple[str, str], NDArray[np.uint8]], write: Writer, *, deep: bool
) -> Path:
    for (split, digit), stack in images.items():
        folder = root / split / digit
        folder.mkdir(parents=True)
        for number, image in enumerate(stack):
            twelve_bits = np.rint(image * (4095 / 255)).astype(np.uint16)
            write(folder / f"{number:03d}", twelve_bits if deep else image)
    return root


@pytest.mark.fault("B13")
def test_12_bits_in_files_of_16_train_as_the_8_bit_original_does(
    shared_data: Path, tmp_path: Path
) -> None:
    images = digits(shared_data)
    plain = written(tmp_path / "plain", images, write_png, deep=False)
    deep = {
        write.__name__: written(tmp_path / write.__name__, images, write, deep=True)
        for write in (write_png, write_tiff, write_dicom)
    }
    caches = []
    for root in deep.values():
        dataset = Dataset.open(root)
        for sample in dataset.samples[::97]:  # exact, value by value
            split, digit, name = Path(sample.path).parts
            original = images[split, digit][int(Path(name).stem)]
            found = read_whole(read_content(root, sample.path))
            np.testing.assert_array_equal(found[..., 0], np.rint(original * (4095 / 255)))
        caches.append(Cache.build(dataset, (32, 32), 1)[0].images)
    for other in caches[1:]:
        np.testing.assert_array_equal(caches[0], other)

    def scored(root: Path, seed: int) -> tuple[Path, float]:
        out = tmp_path / f"{root.name}-{seed}"
        api.pretrain(root, out=out, arch="resnet10t", recipe=RECIPE.changed({"seed": seed}))
        return out, float(api.evaluate(out, root)["accuracy"]["value"])

    seeds = [scored(plain, seed)[1] for seed in range(2)]
    run, deep_score = scored(deep["write_png"], 0)
    inputs = Classifier.load(run).inputs
    assert (inputs.bit_depth, inputs.intensity_range) == (16, (0, 4095))
    spread = max(seeds) - min(seeds)
    assert min(seeds) > 0.6, "it must have learned something to compare"
    assert min(seeds) - spread - 0.05 <= deep_score <= max(seeds) + spread + 0.05
    for name in ("write_tiff", "write_dicom"):  # the same pixels, whatever holds them
        assert api.evaluate(run, deep[name])["accuracy"]["value"] == deep_score


def five_bands(root: Path, labels: tuple[str, ...], *, seed: int, flip: bool = False) -> Path:
    """Writes classes that differ in which of five bands is bright."""
    generator = np.random.default_rng(seed)
    for index, label in enumerate(labels):
        folder = root / label
        folder.mkdir(parents=True)
        for number in range(24):
            values = generator.normal(1500, 300, (24, 20, 5))
            values[..., 4 - index if flip else index] += 900
            stored = values.clip(0, 10_000).astype(np.uint16)
            options: dict[str, Any] = {"photometric": "minisblack", "planarconfig": "contig"}
            tifffile.imwrite(folder / f"{number:02d}.tif", stored, **options)
    return root


def test_five_bands_go_through_pretrain_finetune_evaluate_and_predict(tmp_path: Path) -> None:
    source = five_bands(tmp_path / "source", ("forest", "lake", "town"), seed=0)
    target = five_bands(tmp_path / "target", ("crop", "road"), seed=1, flip=True)
    start = api.pretrain(source, out=tmp_path / "start", arch="resnet10t", recipe=RECIPE)
    run = api.finetune(
        target, out=tmp_path / "run", start=start.folder, recipe=Recipe.transfer("lp-ft")
        .changed({"epochs": 3}),
    )  # fmt: skip
    inputs = Classifier.load(run.folder).inputs
    assert inputs.channels == 5
    assert inputs.intensity_range == (0, 4095)
    found = api.evaluate(run.folder, target)
    assert found["accuracy"]["value"] > 0.8
    table, broken = api.predict(run.folder, [target])
    assert broken == []
    assert table is not None
    truth = [Path(path).parent.name for path in table.paths]
    named = [table.class_names[index] for index in table.predicted]
    assert np.mean([a == b for a, b in zip(truth, named, strict=True)]) > 0.8
