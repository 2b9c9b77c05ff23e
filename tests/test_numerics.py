"""Numbers that are none, batches that are too small, memory that is too little."""

from collections.abc import Callable
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from regraft import api
from regraft.data.batches import shuffled_batches
from regraft.engine import Engine
from regraft.errors import EnvironmentFault, NumericError
from regraft.inputs import InputSpec
from regraft.models.backbone import Backbone
from regraft.models.classifier import Classifier
from regraft.run import Run
from regraft.training import loop
from regraft.training.feeds import Material
from regraft.training.loop import fit
from regraft.training.losses import Losses, Taken
from regraft.training.optim import scheduled_lr
from regraft.training.recipe import Phase, Recipe
from regraft.training.records import Epoch, Step

MakeShapes = Callable[..., Path]
ENGINE = Engine("cpu", "fp32")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, stride=2)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        maps: Tensor = self.norm(self.conv(images_BCHW)).relu()
        return maps.mean(dim=(2, 3))


def begun(number: int, **changes: Any) -> tuple[Classifier, Material, Recipe]:
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (number, 12, 12, 1), dtype=np.uint8)
    labels, rows = np.arange(number) % 2, np.arange(number)
    names = tuple(f"{row}.png" for row in rows)
    material = Material(images, labels, rows, rows[:0], names=names)
    inputs = InputSpec((12, 12), 1, 8, (0.5,), (0.3,))
    classifier = Classifier(Backbone("small.py:net", Small(), inputs), ("a", "b"))
    chosen: Any = {"batch_size": 4, "augment": "none", "optimizer": "sgd", **changes}
    recipe = Recipe(phases=(Phase(epochs=3, lr=0.1, batch_norm="train"),), **chosen)
    recipe = recipe.resolved(normalisation="batch", num_images=number, is_grey=True)
    return classifier, material, recipe


@pytest.mark.fault("J2")
@pytest.mark.parametrize("clip_norm", [1.0, 0.0])
def test_a_gradient_that_is_no_number_is_never_learned_from(
    monkeypatch: pytest.MonkeyPatch, clip_norm: float
) -> None:
    classifier, material, recipe = begun(12, clip_norm=clip_norm)
    backward, steps = Engine.backward, list[Step]()

    def broken(self: Engine, loss: Tensor) -> None:
        backward(self, loss)
        if len(steps) == 4:
            classifier.head.weight.grad[0, 0] = nan  # type: ignore[index]

    def run() -> None:
        for told in running:
            if isinstance(told, Step):
                steps.append(told)

    monkeypatch.setattr(Engine, "backward", broken)
    optimizer_step = torch.optim.SGD.step
    taken: list[int] = []

    def counted(self: torch.optim.SGD) -> None:
        taken.append(1)
        optimizer_step(self)

    monkeypatch.setattr(torch.optim.SGD, "step", counted)
    running = fit(classifier, material, recipe, ENGINE)
    with pytest.raises(NumericError) as error:
        run()
    assert error.value.exit_code == 7
    assert len(steps) == len(taken) == 4, "the optimiser has not seen the fifth"
    rate = scheduled_lr(recipe.phases[0], 4, 9)
    assert error.value.message == (
        f"the gradient of a finite training loss is nan in epoch 2 at learning rate {rate:.3g}"
    )
    rows = shuffled_batches(material.train_rows, batch_size=4, seed=0, epoch=1)[1]
    shown = ", ".join(f"`{row}.png`" for row in rows[:3])
    assert error.value.problems == (
        "step 5 of the phase, before anything was learned from it",
        f"its 4 images: {shown} and 1 more",
    )
    assert all(bool(t.isfinite().all()) for t in classifier.state_dict().values())


@pytest.mark.fault("J1")
def test_a_loss_that_is_no_number_leaves_the_best_epoch_and_says_where(
    make_shapes: MakeShapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, count = loop._Fit.loss, [0]

    def broken(self: Any, logits_BK: Tensor, rows: Any) -> Tensor:
        count[0] += 1
        return loss(self, logits_BK, rows) * (nan if count[0] == 6 else 1)

    monkeypatch.setattr(loop._Fit, "loss", broken)
    recipe = Recipe.scratch().changed({"image_size": 32, "epochs": 3, "batch_size": 8})
    data, out = make_shapes(("a", "b"), 20), tmp_path / "run"
    with pytest.raises(NumericError, match="the training loss is nan in epoch 2") as error:
        api.pretrain(data, out=out, arch="resnet10t", recipe=recipe)
    assert error.value.problems[0] == "step 6 of the phase, before anything was learned from it"
    images = [line["path"] for line in Run.open(out).samples() if line["split"] == "train"]
    assert any(f"`{path}`" in error.value.problems[1] for path in images)
    assert Run.open(out).status["state"] == "failed"
    assert api.evaluate(out, data, split="val")["n"] > 0, "the best epoch before that is there"
    monkeypatch.setattr(loop._Fit, "loss", loss)
    api.resume(out)
    assert Run.open(out).status["state"] == "finished", "and where it was saved is intact"


def test_where_the_device_is_asked_seldom_nothing_is_learned_any_more() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=1.0, momentum=0.9, nesterov=True, fused=True)
    losses = Losses(ENGINE, optimizer, ())
    losses.at_once, losses.latest = False, 0.0  # as on a GPU
    rows = np.arange(2)
    for step, slope in enumerate([1.0, nan, 1.0], start=1):
        parameter.grad = torch.full((3,), slope)
        norm = parameter.grad.norm()
        losses.add(torch.tensor(1.0), norm, Taken(step, 1, 0.1, rows))
        optimizer.step()
        if step == 1:
            after = parameter.detach().clone()
    assert torch.equal(parameter.detach(), after)
    with pytest.raises(
        NumericError, match="the gradient of a finite training loss is nan"
    ) as error:
        losses.mean()
    assert "step 2 of the phase" in error.value.problems[0]


@pytest.mark.fault("J4")
@pytest.mark.parametrize("number", [9, 13, 5])
def test_no_batch_of_one_image_meets_batch_norm(number: int) -> None:
    classifier, material, recipe = begun(number)
    sizes = [len(b) for b in shuffled_batches(material.train_rows, batch_size=4, seed=0, epoch=0)]
    assert sum(sizes) == number and min(sizes) >= 2
    assert [e.epoch for e in fit(classifier, material, recipe, ENGINE) if isinstance(e, Epoch)] == [
        1, 2, 3,
    ]  # fmt: skip


@pytest.mark.fault("J5")
def test_fewer_images_than_a_batch_are_one_batch() -> None:
    classifier, material, recipe = begun(3, batch_size=32)
    told = list(fit(classifier, material, recipe, ENGINE))
    assert [(s.step, s.num_steps) for s in told if isinstance(s, Step)] == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.fault("J7")
def test_the_same_command_twice_gives_the_same_bytes(
    make_shapes: MakeShapes, tmp_path: Path
) -> None:
    data = make_shapes(("a", "b"), 12)
    recipe = Recipe.scratch().changed({"image_size": 32, "epochs": 2})
    found = []
    for name in ("one", "two"):
        out = tmp_path / name
        api.pretrain(data, out=out, arch="resnet10t", recipe=recipe)
        api.evaluate(out, data)
        files = [*(out / "final").iterdir(), out / "metrics.jsonl", out / "predictions.csv"]
        found.append({path.name: path.read_bytes() for path in files})
    assert found[0] == found[1] and len(found[0]) == 7


@pytest.mark.fault("G9")
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"
        ),
        torch.OutOfMemoryError("CUDA out of memory."),
    ],
)
def test_too_little_memory_names_the_batch_an_estimate_and_a_smaller_one(
    make_shapes: MakeShapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(_engine: Engine, _loss: Tensor) -> None:
        raise error

    monkeypatch.setattr(Engine, "backward", full)
    recipe = Recipe.scratch().changed({"image_size": 32, "epochs": 1, "batch_size": 16})
    with pytest.raises(EnvironmentFault) as refused:
        api.pretrain(
            make_shapes(("a", "b"), 20), out=tmp_path / "run", arch="resnet10t", recipe=recipe
        )
    assert refused.value.exit_code == 5
    assert "too little memory for batches of 16 images of 32x32 px: about 0." in str(refused.value)
    assert "use `--batch-size 8` or `--image-size 32`" in refused.value.hint
    assert not list((tmp_path / "run").rglob(".*.tmp"))


def test_another_mistake_is_not_taken_for_too_little_memory(
    make_shapes: MakeShapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(_engine: Engine, _loss: Tensor) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(Engine, "backward", wrong)
    recipe = Recipe.scratch().changed({"image_size": 32, "epochs": 1})
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        api.pretrain(
            make_shapes(("a", "b"), 12), out=tmp_path / "run", arch="resnet10t", recipe=recipe
        )
