"""Which values become 0 and 1: the real range, the same in training, evaluation and prediction."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from regraft import api
from regraft.data.batches import normalised
from regraft.data.cache import Cache
from regraft.data.dataset import DataOptions, Dataset
from regraft.data.intensity import refuse_other_scales, refuse_unclear, with_range
from regraft.errors import DataError, UsageError
from regraft.inputs import InputSpec
from regraft.models.classifier import Classifier
from regraft.progress import Note
from regraft.training.recipe import Recipe

FRESH = InputSpec((8, 8), 1)
START = InputSpec((8, 8), 1, 16, (0.5,), (0.2,), intensity_range=(0.0, 4095.0))
TINY = Recipe.scratch().changed({"image_size": 32, "epochs": 1})


def folder_of(root: Path, kind: str, low: float, high: float, *, number: int = 8) -> Path:
    """Writes two classes of random arrays whose values reach from `low` to `high`."""
    generator = np.random.default_rng(0)
    for label in ("a", "b"):
        (root / label).mkdir(parents=True, exist_ok=True)
        for index in range(number):
            values = generator.uniform(low, high, (8, 8))
            values[0, 0], values[0, 1] = low, high
            np.save(root / label / f"{kind}_{index}.npy", values.astype(kind))
    return root


def ranged(inputs: InputSpec, dataset: Dataset) -> InputSpec:
    refuse_unclear(dataset, inputs)
    cache, dataset = Cache.build(dataset, (8, 8), 1)
    return with_range(inputs, dataset, cache)


def refusal(function: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        function()
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "low", "high", "found"),
    [
        ("uint8", 10, 200, (0, 255)),
        ("uint16", 0, 255, (0, 255)),
        ("uint16", 5, 3000, (0, 4095)),
        ("uint16", 0, 4095, (0, 4095)),
        ("uint16", 0, 4096, (0, 16383)),
        ("uint16", 0, 65535, (0, 65535)),
        ("int16", -1024, 3071, (-1024, 3071)),
    ],
)
def test_the_range_is_the_real_one(
    tmp_path: Path, kind: str, low: float, high: float, found: tuple[float, float]
) -> None:
    inputs = ranged(FRESH, Dataset.open(folder_of(tmp_path, kind, low, high)))
    assert inputs.intensity_range == found
    assert not inputs.clips


@pytest.mark.parametrize("kind", ["float32", "float64", "int32", "uint32"])
@pytest.mark.fault("B14")
def test_floats_and_32_bits_need_a_range(tmp_path: Path, kind: str) -> None:
    root = folder_of(tmp_path, kind, 0, 1000)
    told = refusal(lambda: ranged(FRESH, Dataset.open(root)))
    assert "images hold floats or 32-bit integers, which have no largest value" in told
    assert "hint: `--intensity-range LOW,HIGH` says which values are black and white" in told
    inputs = ranged(FRESH, Dataset.open(root, DataOptions(intensity_range=(0, 500))))
    assert (inputs.intensity_range, inputs.clips, inputs.bit_depth) == ((0, 500), True, 32)


@pytest.mark.fault("B15")
def test_mixed_bit_depths_are_refused_with_counts_until_a_range_is_given(tmp_path: Path) -> None:
    root = folder_of(tmp_path, "uint8", 0, 255)
    folder_of(root, "uint16", 0, 4095, number=2)
    told = refusal(lambda: api.pretrain(root, out=tmp_path.parent / "out", recipe=TINY))
    assert "images differ in bits per channel: uint16 (4 images), uint8 (16 images)" in told
    assert "hint: `--intensity-range LOW,HIGH`" in told
    assert not (tmp_path.parent / "out").exists()
    dataset = Dataset.open(root, DataOptions(intensity_range=(0, 4095)))
    cache, _ = Cache.build(dataset, (8, 8), 1)
    assert cache.images.dtype == np.uint16
    assert ranged(FRESH, dataset).intensity_range == (0, 4095)


@pytest.mark.parametrize(
    ("high", "found"),
    [(900, (0, 4095)), (4095, (0, 4095)), (9000, (0, 16383))],
    ids=["darker", "equal", "beyond"],
)
def test_a_start_keeps_its_range_where_the_values_fit(
    tmp_path: Path, high: int, found: tuple[float, float]
) -> None:
    dataset = Dataset.open(folder_of(tmp_path, "uint16", 0, high))
    assert ranged(START, dataset).intensity_range == found


def test_8_bit_images_have_their_own_range_whatever_the_start_was(tmp_path: Path) -> None:
    dataset = Dataset.open(folder_of(tmp_path, "uint8", 0, 200))
    inputs = ranged(replace(START, clips=True), dataset)
    assert (inputs.intensity_range, inputs.bit_depth, inputs.clips) == ((0, 255), 8, False)


@pytest.mark.parametrize(
    ("inputs", "kind", "high", "told"),
    [
        (START, "uint8", 255, "images have 8 bits per channel where the network was trained on 16"),
        (START, "uint16", 65535, "16 images have values far from 0 to 4095, on which the network"),
        (FRESH, "uint16", 255, "images have 16 bits per channel where the network was trained on"),
        (START, "uint16", 8190, ""),
        (replace(START, clips=True), "uint8", 255, ""),
    ],
)
def test_a_network_is_not_judged_on_another_scale(
    tmp_path: Path, inputs: InputSpec, kind: str, high: int, told: str
) -> None:
    dataset = Dataset.open(folder_of(tmp_path, kind, 0, high), whole=True)
    cache, _ = Cache.build(dataset, (8, 8), 1)
    if told:
        assert told in refusal(lambda: refuse_other_scales(inputs, dataset, cache))
    else:
        refuse_other_scales(inputs, dataset, cache)


@pytest.mark.parametrize("low_high", [(5, 5), (9, 1), (float("nan"), 1), (0, float("inf"))])
def test_what_is_no_range_is_a_usage_error(tmp_path: Path, low_high: tuple[float, float]) -> None:
    root = folder_of(tmp_path, "uint8", 0, 255)
    with pytest.raises(UsageError, match=r"`--intensity-range .*` is no range"):
        Dataset.open(root, DataOptions(intensity_range=low_high))


@pytest.mark.parametrize("kind", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("clips", [False, True])
def test_statistics_and_batches_agree_on_the_range(tmp_path: Path, kind: str, clips: bool) -> None:
    dataset = Dataset.open(folder_of(tmp_path, kind, 0, 250))
    cache, _ = Cache.build(dataset, (8, 8), 1)
    rows = np.arange(len(dataset.samples))
    inputs = replace(FRESH, intensity_range=(50.0, 150.0), clips=clips)
    measured = cache.with_statistics(inputs, rows)
    share = (cache.images.astype(np.float64) - 50) / 100
    expected: NDArray[np.float64] = share.clip(0, 1) if clips else share
    assert measured.mean == pytest.approx([expected.mean()])
    assert measured.std == pytest.approx([expected.std()], rel=1e-5)
    batch = normalised(cache.images[rows], measured, torch.device("cpu")).numpy()[:, 0]
    wanted = (expected[..., 0] - expected.mean()) / expected.std()
    np.testing.assert_allclose(batch, wanted, rtol=0, atol=2e-5)


def test_a_given_range_is_stored_and_used_by_evaluate_and_predict(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "data", "float32", -1.0, 1.0, number=12)
    dataset = Dataset.open(root, DataOptions(intensity_range=(-1, 1)))
    notes: list[str] = []

    def tell(record: object) -> None:
        notes.extend([record.text] if isinstance(record, Note) else [])

    run = api.pretrain(
        dataset, out=tmp_path / "run", arch="resnet10t", recipe=TINY, on_progress=tell
    )
    assert "data: values from -1 to 1 become 0 to 1 (given; values beyond become 0 or 1)" in notes
    record = json.loads((run.folder / "run.json").read_text())
    assert record["data"]["options"]["intensity_range"] == [-1, 1]
    inputs = Classifier.load(run.folder).inputs
    assert (inputs.intensity_range, inputs.clips, inputs.bit_depth) == ((-1, 1), True, 32)
    assert record["inputs"] == json.loads(json.dumps(inputs.to_dict()))
    found = api.evaluate(run.folder, root)  # without saying the range again
    table, broken = api.predict(run.folder, [root])
    assert broken == []
    assert table is not None
    assert len(table.paths) == 24
    assert found["n"] == len(dataset.rows("test"))
    other = folder_of(tmp_path / "other", "float32", -0.5, 0.5, number=12)
    head = Recipe.transfer("head")
    tuned = api.finetune(other, out=tmp_path / "tuned", start=run.folder, recipe=head)
    assert Classifier.load(tuned.folder).inputs.intensity_range == (-1, 1)


def test_predict_refuses_another_scale_by_name_until_a_range_is_given(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "data", "uint16", 0, 4095, number=12)
    run = api.pretrain(root, out=tmp_path / "run", arch="resnet10t", recipe=TINY)
    other = tmp_path / "other"
    other.mkdir()
    np.save(other / "bright.npy", np.full((8, 8), 60_000, np.uint16))
    np.save(other / "narrow.npy", np.full((8, 8), 200, np.uint8))
    table, broken = api.predict(run.folder, [other])
    assert table is None
    reasons = {Path(path).name: reason for path, reason in broken}
    assert reasons["bright.npy"] == (
        "intensity: has values from 60000 to 60000 where the network was trained on 0 to 4095"
    )
    assert reasons["narrow.npy"].startswith(
        "bit-depth: has 8 bits per channel where the network was trained on 16; "
        "`--intensity-range LOW,HIGH` says"
    )
    table, broken = api.predict(run.folder, [other], intensity_range=(0, 65535))
    assert broken == []
    assert table is not None
