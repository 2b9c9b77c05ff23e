"""Frozen work is done once, and changes no number."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from regraft.data.cache import Cache
from regraft.data.dataset import Dataset
from regraft.engine import Engine
from regraft.inputs import InputSpec
from regraft.models.backbone import Backbone
from regraft.models.classifier import Classifier
from regraft.models.stages import Cut
from regraft.progress import Counting, Note
from regraft.storage import cache_home
from regraft.training import activations
from regraft.training.feeds import Material
from regraft.training.loop import fit
from regraft.training.recipe import Recipe
from regraft.training.records import Epoch

MakeShapes = Callable[..., Path]
NAMES = ("a", "b")


@pytest.fixture
def material(make_shapes: MakeShapes) -> tuple[Material, InputSpec]:
    dataset = Dataset.open(make_shapes(NAMES, 48))
    cache, dataset = Cache.build(dataset, (32, 32), 3)
    inputs = cache.with_statistics(InputSpec((32, 32), 3), dataset.rows("train"))
    rows = dataset.rows("train"), dataset.rows("val")
    return Material(cache.images, dataset.labels, *rows, key=cache.key), inputs


def trained(
    arch: str,
    material: Material,
    inputs: InputSpec,
    strategy: str,
    precision: str = "bf16",
    **changes: object,
) -> tuple[list[object], dict[str, torch.Tensor]]:
    backbone = Backbone.create(arch, inputs)
    backbone.random = frozenset()
    classifier = Classifier(backbone, NAMES)
    engine = Engine("cpu", precision)
    engine.place(classifier)
    recipe = Recipe.transfer(strategy).changed({"batch_size": 16, **changes})
    recipe = recipe.resolved(
        normalisation=backbone.normalisation, num_images=len(material.train_rows), is_grey=True
    )
    told: list[object] = list(fit(classifier, material, recipe, engine))
    return told, classifier.state_dict()


def epochs(told: list[object]) -> list[Epoch]:
    return [replace(record, elapsed_s=0) for record in told if isinstance(record, Epoch)]


@pytest.mark.parametrize(
    ("arch", "strategy", "augment", "precision"),
    [
        ("vgg11_bn", "last:1", "none", "bf16"),
        ("resnet10t", "last:2", "natural", "bf16"),
        ("resnet10t", "head", "natural", "bf16"),
        ("convnext_atto", "last:1", "gentle", "bf16"),
        # The AMX units of a processor give a product of bf16 matrices other bits in a batch of 64
        # than in one of 16, so a transformer is held to its bits in fp32.
        ("vit_tiny_patch16_224", "last:3", "gentle", "fp32"),
    ],
)
def test_stored_activations_give_the_same_bits_as_the_whole_network(
    material: tuple[Material, InputSpec], arch: str, strategy: str, augment: str, precision: str
) -> None:
    images, inputs = material
    changes: dict[str, object] = {"augment": augment, "views": 2}
    if strategy != "head":
        changes["epochs"] = 3
    stored, after_stored = trained(arch, images, inputs, strategy, precision, **changes)
    unnamed = replace(images, key=None)
    live, after_live = trained(arch, unnamed, inputs, strategy, precision, **changes)
    assert any(isinstance(record, Counting) for record in stored)
    assert "frozen part" not in [r.what for r in live if isinstance(r, Counting)]
    assert epochs(stored) == epochs(live)
    assert all(torch.equal(after_stored[name], after_live[name]) for name in after_live)


def test_the_frozen_part_runs_once_whatever_the_seed(
    material: tuple[Material, InputSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, inputs = material
    seen = []
    below = Backbone.below

    def counted(self: Backbone, cut: Cut, batch: torch.Tensor) -> torch.Tensor:
        seen.append(len(batch))
        return below(self, cut, batch)

    monkeypatch.setattr(Backbone, "below", counted)
    first, _ = trained("resnet10t", images, inputs, "head")
    number = len(images.train_rows) + len(images.val_rows)
    assert sum(seen) == number
    again, _ = trained("resnet10t", images, inputs, "head", seed=7)
    assert sum(seen) == number
    assert epochs(first) == epochs(again)


@pytest.mark.fault("H5")
def test_other_weights_have_other_activations(material: tuple[Material, InputSpec]) -> None:
    images, inputs = material
    folders = []
    for seed in (0, 1):
        backbone = Backbone.create("resnet10t", inputs, seed=seed)
        backbone.random = frozenset()
        classifier = Classifier(backbone, NAMES)
        recipe = Recipe.transfer("head").resolved(
            normalisation="batch", num_images=len(images.train_rows), is_grey=True
        )
        list(fit(classifier, images, recipe, Engine("cpu", "fp32")))
        folders.append({folder.name for folder in (cache_home() / "activations").iterdir()})
    assert len(folders[1] - folders[0]) == 1


def test_without_room_the_frozen_part_runs_again_and_says_so(
    material: tuple[Material, InputSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "BUDGET_BYTES", 1000)
    told, _ = trained("resnet10t", *material, "last:1", epochs=1)
    notes = [record.text for record in told if isinstance(record, Note)]
    assert len(notes) == 2  # of the head, and of the last stage
    assert "the frozen part runs again at every step: its activations need" in notes[0]
    assert not list((cache_home() / "activations").iterdir())


def test_a_network_that_is_no_chain_is_told(material: tuple[Material, InputSpec]) -> None:
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.high = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1)

        def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
            low: torch.Tensor = self.low(images_BCHW)
            return torch.cat([low, self.high(low)], dim=1)

    images, inputs = material
    backbone = Backbone("net.py:skipping", Skipping(), inputs)
    assert backbone.cut(1) is None
    backbone.random = frozenset()
    recipe = Recipe.transfer("last:1").changed({"epochs": 1})
    recipe = recipe.resolved(normalisation="none", num_images=62, is_grey=True)
    told = list(fit(Classifier(backbone, NAMES), images, recipe, Engine("cpu", "fp32")))
    notes = [record.text for record in told if isinstance(record, Note)]
    assert notes == [
        "the frozen part runs again at every step: `net.py:skipping` is no chain of modules below "
        "what learns"
    ]


def test_the_oldest_activations_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in enumerate(("old", "newer", "newest")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "values.npy").write_bytes(bytes(400))
        os.utime(tmp_path / name, (number, number))
    monkeypatch.setattr(activations, "BUDGET_BYTES", 1200)
    assert activations._make_room(tmp_path, 2000) == 1200
    assert len(list(tmp_path.iterdir())) == 3, "nothing goes where it would not help"
    assert activations._make_room(tmp_path, 500) == 1200
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["newest"]


@pytest.mark.parametrize(
    "arch", ["vgg16", "resnet18", "efficientnet_b0", "densenet121", "swin_tiny_patch4_window7_224"]
)
def test_common_architectures_can_be_cut_between_any_stages(arch: str) -> None:
    backbone = Backbone.create(arch, InputSpec((32, 32), 3))
    before = torch.get_rng_state()
    assert all(backbone.cut(number) for number in range(1, len(backbone.stages) + 1))
    assert torch.equal(before, torch.get_rng_state())
