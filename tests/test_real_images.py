"""The real images beside the project (see conftest): skipped, with the reason, where missing."""

import json
from collections import Counter
from pathlib import Path

import pytest

from regraft import api
from regraft.data.cache import Cache
from regraft.data.dataset import DataOptions, Dataset
from regraft.models.classifier import Classifier
from regraft.training.recipe import Recipe

DATASETS = [
    ("cxr_kermany_1k", 990, 3, 3),
    ("cxr_hannover_224", 243, 2, 1),
    ("cifar10_6k", 6000, 10, 3),
    ("clothing_128", 1231, 10, 3),
    ("bccd_cells", 1233, 3, 3),
    ("fashion_mnist_10k", 20000, 10, 1),
]


@pytest.mark.parametrize(("name", "images", "classes", "channels"), DATASETS)
def test_real_datasets_are_read_whole(
    shared_data: Path, name: str, images: int, classes: int, channels: int
) -> None:
    dataset = Dataset.open(shared_data / name)
    assert (len(dataset.samples), len(dataset.class_names)) == (images, classes)
    assert dataset.channels == channels
    assert all(len(dataset.rows(split)) for split in ("train", "val", "test"))


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("clothing_128", False),
        ("cxr_kermany_1k", False),
        pytest.param("mnist", True, marks=pytest.mark.slow),
        pytest.param("fashion_mnist_10k", True, marks=pytest.mark.slow),
    ],
)
def test_no_image_of_a_set_as_shipped_is_called_a_leak(
    shared_data: Path, name: str, near: bool
) -> None:
    checked = api.check([shared_data / name])
    assert checked.errors == []
    codes = {one.code for one in checked.findings if one.severity == "warning"}
    assert ("near-leak" in codes) == near, "small simple pictures resemble each other"


def test_patients_of_real_x_rays_stay_together(shared_data: Path) -> None:
    dataset = Dataset.open(shared_data / "cxr_hannover_224", DataOptions(group_regex="^([^_]+)_"))
    splits: dict[str | None, set[str]] = {}
    classes: dict[str | None, set[str]] = {}
    for sample in dataset.samples:
        splits.setdefault(sample.group, set()).add(sample.split)
        classes.setdefault(sample.group, set()).add(sample.label)
    assert len(splits) == 71
    assert sum(len(found) == 2 for found in classes.values()) == 7
    assert all(len(found) == 1 for found in splits.values())
    counts = Counter((sample.split, sample.label) for sample in dataset.samples)
    assert min(counts.values()) >= 5
    assert len(counts) == 6


def test_mnist_becomes_even_and_odd(shared_data: Path) -> None:
    parity = ("even=0,2,4,6,8", "odd=1,3,5,7,9")
    dataset = Dataset.open(shared_data / "mnist", DataOptions(relabel=parity, per_class=100))
    sizes = {split: len(dataset.rows(split)) for split in ("train", "val", "test")}
    assert sizes == {"train": 200, "val": 200, "test": 10_000}
    assert len(dataset.samples) + len(dataset.excluded) >= 70_000


@pytest.mark.parametrize("name", ["cxr_kermany_1k", "cxr_hannover_224"])
def test_real_x_rays_are_known_to_be_grey(shared_data: Path, name: str) -> None:
    dataset = Dataset.open(shared_data / name)
    cache, _ = Cache.build(dataset, (32, 32), 3)
    assert cache.is_grey


def test_the_story_runs_on_real_x_rays(shared_data: Path, tmp_path: Path) -> None:
    source = Dataset.open(shared_data / "cxr_kermany_1k")
    recipe = Recipe.scratch().changed({"image_size": 32, "epochs": 2})
    start = api.pretrain(source, out=tmp_path / "source", arch="resnet10t", recipe=recipe)
    target = Dataset.open(shared_data / "cxr_hannover_224", DataOptions(group_regex="^([^_]+)_"))
    run = api.finetune(
        target,
        out=tmp_path / "target",
        start=start.folder,
        recipe=Recipe.transfer("lp-ft").changed({"image_size": 48, "epochs": 1}),
    )
    assert Classifier.load(run.folder).class_names == ("ap", "pa")
    found = api.evaluate(run.folder, shared_data / "cxr_hannover_224")
    again = api.evaluate(run.folder, shared_data / "cxr_hannover_224")
    assert json.dumps(found) == json.dumps(again)
    assert found["n"] == len(target.rows("test"))
