"""A training that went on from any of its steps gives the bits of one never interrupted."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from regraft.data.cache import Cache
from regraft.data.dataset import Dataset
from regraft.engine import Engine
from regraft.inputs import InputSpec
from regraft.models.backbone import Backbone
from regraft.models.classifier import Classifier
from regraft.progress import Counting, Note
from regraft.training import keeping
from regraft.training.auto import tune
from regraft.training.feeds import Material
from regraft.training.loop import fit
from regraft.training.plan import Plan
from regraft.training.recipe import Phase, Recipe
from regraft.training.records import Epoch, Step, Trial
from regraft.training.state import Bookmark, Snapshot, completed, differing

MakeShapes = Callable[..., Path]
NAMES = ("a", "b")


class Tiny(nn.Module):
    """BatchNorm and dropout in little space."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        self.middle = nn.Sequential(nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12), nn.Dropout(0.3))
        self.top = nn.Sequential(nn.Conv2d(12, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU())
        self.end = nn.Dropout(0.3)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        maps: Tensor = self.top(self.middle(self.stem(images_BCHW)))
        pooled: Tensor = self.end(maps.mean(dim=(2, 3)))
        return pooled


@pytest.fixture
def bars(make_shapes: MakeShapes) -> tuple[Material, InputSpec]:
    dataset = Dataset.open(make_shapes(NAMES, 20, side=16))
    cache, dataset = Cache.build(dataset, (16, 16), 3)
    inputs = cache.with_statistics(InputSpec((16, 16), 3), dataset.rows("train"))
    rows = (dataset.rows("train"), dataset.rows("val"))
    return Material(cache.images, dataset.labels, *rows, key=cache.key), inputs


def network(inputs: InputSpec, *, seed: int = 0, trained: bool = True) -> Classifier:
    torch.manual_seed(seed)
    backbone = Backbone("tiny.py:net", Tiny(), inputs)
    backbone.random = frozenset() if trained else backbone.random
    return Classifier(backbone, NAMES)


def copied(snapshot: Snapshot, origin: dict[str, Tensor]) -> Snapshot:
    """As it comes back from the disk."""
    kept = {n: t.clone().contiguous() for n, t in differing(snapshot, origin).items()}
    return completed(snapshot.values, list(snapshot.tensors), kept, origin)


def timeless(record: Any) -> Any:
    if isinstance(record, Epoch | Trial):
        return replace(record, elapsed_s=0)
    if isinstance(record, Step):
        return replace(record, images_per_s=0, left_s=0)
    return record


PHASES = {
    "pretrain": (Phase(epochs=8, lr=0.1, batch_norm="train"),),
    "head": (Phase(learns="head", epochs=1, batch_norm="adapt"),),
    "last:1": (
        Phase(learns="head", epochs=1, batch_norm="frozen"),
        Phase(learns="last:1", epochs=5, lr=0.1, batch_norm="frozen"),
        Phase(learns="all", epochs=4, lr=0.05, layer_decay=0.7, batch_norm="adapt"),
    ),
    "full": (Phase(epochs=8, lr=0.1, batch_norm="adapt"),),
}


@pytest.mark.fault("F9", "F14", "F15")
@pytest.mark.parametrize(
    ("kind", "optimizer", "precision"),
    [
        ("pretrain", "sgd", "fp32"),
        ("pretrain", "adamw", "bf16"),
        ("head", "sgd", "fp32"),
        ("last:1", "adamw", "fp32"),
        ("last:1", "sgd", "bf16"),
        ("full", "sgd", "fp32"),
    ],
)
def test_going_on_from_every_step_gives_the_same_bits(
    bars: tuple[Material, InputSpec], kind: str, optimizer: str, precision: str
) -> None:
    material, inputs = bars
    engine = Engine("cpu", precision)
    goal = "scratch" if kind == "pretrain" else "transfer"
    chosen: Any = {"optimizer": optimizer, "ema_decay": 0.9, "batch_size": 10, "goal": goal}
    recipe = Recipe(phases=PHASES[kind], **chosen).resolved(
        normalisation="batch", num_images=len(material.train_rows), is_grey=True
    )

    def begun() -> Classifier:
        classifier = network(inputs, trained=kind != "pretrain")
        engine.place(classifier)
        return classifier

    whole = begun()
    origin = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    bookmark = Bookmark()
    told, places = [], []
    for record in fit(whole, material, recipe, engine, bookmark=bookmark):
        if isinstance(record, Step | Epoch):
            told.append(timeless(record))
            now = bookmark.describe()
            assert now is not None
            places.append(copied(now, origin))
    assert kind == "head" or len(places) >= 20
    for number, place in enumerate(places, start=1):
        again = begun()
        rest = list(fit(again, material, recipe, engine, bookmark=Bookmark(place)))
        assert [timeless(r) for r in rest if isinstance(r, Step | Epoch)] == told[number:], number
        pairs = zip(whole.state_dict().items(), again.state_dict().values(), strict=True)
        assert [name for (name, one), other in pairs if not torch.equal(one, other)] == [], number
        assert again.backbone.random == whole.backbone.random


@pytest.mark.fault("F9", "F14")
@pytest.mark.parametrize("folded", [False, True])
def test_a_search_goes_on_from_anywhere_to_the_same_bits(
    bars: tuple[Material, InputSpec], folded: bool
) -> None:
    material, inputs = bars
    if folded:
        both = np.concatenate([material.train_rows, material.val_rows])
        material = replace(material, train_rows=np.sort(both), val_rows=both[:0])
    recipe = Recipe.transfer("auto").changed({"epochs": 4, "batch_size": 10, "ema_decay": 0.9})
    recipe = recipe.resolved(
        normalisation="batch", num_images=len(material.train_rows), is_grey=True
    )
    engine = Engine("cpu", "fp32")

    def begun() -> Classifier:
        classifier = network(inputs)
        engine.place(classifier)
        return classifier

    whole = begun()
    origin = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    bookmark = Bookmark()
    told, places = [], []
    for record in tune(whole, material, recipe, engine, bookmark=bookmark):
        told.append(timeless(record))
        now = bookmark.describe()
        if now is not None:
            places.append((len(told), copied(now, origin)))
    kinds = {type(told[number - 1]) for number, _ in places}
    assert {Step, Epoch, Trial, Plan} <= kinds
    for number, place in places[:-1:3]:  # after the last the winner is told once more
        again = begun()
        running = tune(again, material, recipe, engine, bookmark=Bookmark(place))
        rest = [timeless(record) for record in running]
        assert [r for r in rest if not skipped(r)] == [
            r for r in told[number:] if not skipped(r)
        ], number
        pairs = zip(whole.state_dict().items(), again.state_dict().values(), strict=True)
        assert [name for (name, one), other in pairs if not torch.equal(one, other)] == [], number


def skipped(record: Any) -> bool:
    """What is not for files may be told again."""
    return isinstance(record, Note | Counting)


@pytest.mark.fault("F15")
@pytest.mark.parametrize("cost_s", [0.01, 0.4, 9.0])
def test_saving_takes_three_parts_in_a_hundred_of_the_time_at_most(
    monkeypatch: pytest.MonkeyPatch, cost_s: float
) -> None:
    now, spent, saves = 0.0, 0.0, []
    monkeypatch.setattr(keeping, "monotonic", lambda: now)
    keeper = keeping.Keeper(
        None, None, {}, Engine("cpu", "fp32"), began=0.0, latest=0.0, cost_s=cost_s,  # type: ignore[arg-type]
    )  # fmt: skip
    step = Step(1, 1, 1, 1, 0.0, 0.0, 0.0, 0.0)
    for number in range(20_000):
        now += 0.1
        record = Trial("bold", 0.3, None, None, 0.0) if number % 500 == 0 else step
        if keeper.is_due(record):
            now, spent = now + cost_s, spent + cost_s
            keeper.latest, keeper.spent_s = now, spent
            saves.append(now)
        assert spent <= 0.03 * now
    assert saves and saves[0] < max(6.0, 60 * cost_s)
