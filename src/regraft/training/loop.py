"""fit: training as a generator of Step and Epoch records.

Progress, logging and stopping are bodies of an ordinary `for` loop over it; there are no callbacks.
Whenever the loop ends, also by `break` or an exception, the classifier holds the best epoch's
weights.

B batch, C channels, H height, W width, D features, K classes.
"""

import time
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

from regraft.data.augment import AUGMENTATIONS
from regraft.data.batches import Images, eval_batches, num_batches, train_batches
from regraft.engine import Engine
from regraft.errors import NumericError
from regraft.evaluation.metrics import log_losses, point
from regraft.evaluation.predictions import EVAL_BATCH, Predictions, infer, softmax
from regraft.models.classifier import Classifier
from regraft.training.optim import (
    Average,
    freeze,
    learning_stages,
    make_optimizer,
    refuse_frozen_random,
    scheduled_lr,
    set_lr,
)
from regraft.training.probe import solve_head
from regraft.training.recipe import Phase, Recipe

# A loss under 98 % of the entropy has left it: measured on plain VGG16, docs/log.md 2026-11-23.
LEFT_ENTROPY = 0.98
STALL_STEPS = 100  # measured likewise: He-initialised VGG16 leaves it within 80 steps


class Diverged(NumericError):
    """The loss is no number any more."""


@dataclass(frozen=True)
class Material:
    """What `fit` learns from: decoded images, and which rows are for what. No test rows.

    Attributes:
        images: (image, height, width, channel), see `Cache`.
        labels: Class index of every row.
    """

    images: Images
    labels: NDArray[np.int64]
    train_rows: NDArray[np.int64]
    val_rows: NDArray[np.int64]


@dataclass(frozen=True)
class Step:
    """One optimiser step."""

    epoch: int
    num_epochs: int
    step: int
    num_steps: int
    loss: float
    lr: float
    images_per_s: float
    left_s: float


@dataclass(frozen=True)
class Epoch:
    """One pass over the training images, and how the averaged weights do on validation."""

    epoch: int
    num_epochs: int
    learns: str
    train_loss: float
    val_loss: float
    val_accuracy: float
    val_balanced_accuracy: float
    is_best: bool
    elapsed_s: float


@dataclass
class _Fit:
    """The state of one `fit`."""

    classifier: Classifier
    material: Material
    recipe: Recipe
    engine: Engine
    started: float = field(default_factory=time.monotonic)
    epoch: int = 0
    best_loss: float = float("inf")
    best_state: dict[str, Tensor] | None = None
    latest: nn.Module | None = None

    def class_weights(self) -> Tensor | None:
        if self.recipe.class_weights == "none":
            return None
        labels = self.material.labels[self.material.train_rows]
        counts = np.bincount(labels, minlength=len(self.classifier.class_names))
        weights = len(labels) / (len(counts) * np.maximum(counts, 1))
        return torch.tensor(weights, dtype=torch.float32, device=self.engine.device)

    def outputs(self, network: nn.Module, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        batches = eval_batches(
            self.material.images,
            rows,
            self.classifier.inputs,
            batch_size=EVAL_BATCH,
            device=self.engine.device,
        )
        return infer(network, batches, self.engine)

    def close_epoch(self, network: nn.Module, learns: str, train_loss: float) -> Epoch:
        """Validates, and keeps the weights if no earlier epoch had a lower validation loss."""
        self.epoch += 1
        rows = self.material.val_rows
        probabilities = softmax(self.outputs(network, rows))
        truth = self.material.labels[rows]
        names = self.classifier.class_names
        found = Predictions(tuple(str(row) for row in rows), names, probabilities, truth)
        val_loss = float(log_losses(probabilities, truth).mean())
        if not isfinite(val_loss):
            raise _diverged("validation loss", val_loss, self.epoch, 0.0)
        is_best = val_loss < self.best_loss
        if is_best:
            self.best_loss = val_loss
            self.best_state = {name: t.detach().clone() for name, t in network.state_dict().items()}
        return Epoch(
            epoch=self.epoch,
            num_epochs=self.recipe.num_epochs,
            learns=learns,
            train_loss=train_loss,
            val_loss=val_loss,
            val_accuracy=point(found, "accuracy"),
            val_balanced_accuracy=point(found, "balanced_accuracy"),
            is_best=is_best,
            elapsed_s=time.monotonic() - self.started,
        )


def fit(
    classifier: Classifier, material: Material, recipe: Recipe, engine: Engine
) -> Generator[Step | Epoch, None, None]:
    """Trains the classifier in place, phase by phase.

    The best epoch is the one with the lowest validation loss; test images are not at hand here.

    Args:
        classifier: Placed on the engine's device.
        material: Training and validation rows.
        recipe: Resolved: no field is `auto`.
        engine: Where and how to compute.

    Raises:
        UsageError: Random weights would stay frozen.
        Diverged: The loss is not finite; the classifier holds the best epoch before that.
        NumericError: The loss never leaves the entropy of the labels.
    """
    refuse_frozen_random(classifier.backbone, recipe)
    state = _Fit(classifier, material, recipe, engine)
    try:
        for phase in recipe.phases:
            freeze(classifier, phase)
            yield from (_solve if phase.learns == "head" else _train)(state, phase)
            for stage in learning_stages(classifier.backbone, phase):
                classifier.backbone.random -= set(classifier.backbone.stages[stage])
    finally:
        kept = state.best_state or (state.latest and state.latest.state_dict())
        if kept:
            classifier.load_state_dict(kept)
        classifier.requires_grad_(True)
        classifier.eval()


def _solve(state: _Fit, phase: Phase) -> Iterator[Epoch]:
    """A linear probe to convergence: one pass for the features, then a convex problem."""
    classifier, material = state.classifier, state.material
    features_ND = state.outputs(classifier.backbone, material.train_rows)
    labels_N = material.labels[material.train_rows]
    solution = solve_head(
        features_ND,
        labels_N,
        state.outputs(classifier.backbone, material.val_rows),
        material.labels[material.val_rows],
        balanced=state.recipe.class_weights == "balanced",
    )
    solution.copy_to(classifier.head)
    train_loss = float(log_losses(softmax(solution.logits(features_ND)), labels_N).mean())
    yield state.close_epoch(classifier, phase.learns, train_loss)


def _train(state: _Fit, phase: Phase) -> Iterator[Step | Epoch]:
    classifier, material, recipe, engine = (
        state.classifier, state.material, state.recipe, state.engine,
    )  # fmt: skip
    optimizer = make_optimizer(classifier, phase, recipe)
    learning = [p for group in optimizer.param_groups for p in group["params"]]
    weights = state.class_weights()
    labels = torch.from_numpy(material.labels).to(engine.device)
    steps_an_epoch = num_batches(len(material.train_rows), int(recipe.batch_size))
    num_steps = steps_an_epoch * int(phase.epochs)
    averaged = AveragedModel(classifier, multi_avg_fn=Average(recipe.ema_decay), use_buffers=True)
    patience = recipe.stall_share * num_steps if recipe.stall_share < 1 else inf
    stall = _StallDetector(label_entropy(state), patience)
    step = images_done = 0
    began = time.monotonic()
    for _ in range(int(phase.epochs)):
        losses = []
        for images_BCHW, rows in train_batches(
            material.images,
            material.train_rows,
            classifier.inputs,
            AUGMENTATIONS[recipe.augment],
            batch_size=int(recipe.batch_size),
            seed=recipe.seed,
            epoch=state.epoch,
            device=engine.device,
        ):
            lr = scheduled_lr(phase, step, num_steps)
            set_lr(optimizer, lr)
            with engine.seeded(recipe.seed, state.epoch, step):
                with engine.autocast():
                    logits_BK = classifier(images_BCHW)
                loss = functional.cross_entropy(
                    logits_BK, labels[rows], weights, label_smoothing=recipe.label_smoothing
                )
                engine.backward(loss)
            value = float(loss.detach())
            if not isfinite(value):
                raise _diverged("training loss", value, state.epoch + 1, lr)
            if recipe.clip_norm:
                nn.utils.clip_grad_norm_(learning, recipe.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            averaged.update_parameters(classifier)
            state.latest = averaged.module
            losses.append((value, len(rows)))
            step, images_done = step + 1, images_done + len(rows)
            speed = images_done / (time.monotonic() - began)
            left_s = (num_steps - step) * images_done / step / speed
            number = state.epoch + 1
            yield Step(number, recipe.num_epochs, step, num_steps, value, lr, speed, left_s)
        train_loss = sum(loss * number for loss, number in losses) / len(material.train_rows)
        stall.check(train_loss, step)
        yield state.close_epoch(averaged.module, phase.learns, train_loss)


def label_entropy(state: _Fit) -> float:
    """Returns the loss of the best constant prediction: the entropy of the (weighted) labels.

    ln K where K classes are balanced.
    """
    labels = state.material.labels[state.material.train_rows]
    counts = Counter(labels.tolist())
    weights = state.class_weights()
    mass = np.array([counts[c] * (1.0 if weights is None else float(weights[c])) for c in counts])
    share = mass / mass.sum()
    smoothing = state.recipe.label_smoothing
    share = (1 - smoothing) * share + smoothing / len(share)
    return float(-(share * np.log(share)).sum())


@dataclass
class _StallDetector:
    entropy: float
    patience: float
    left_at: int = 0

    def check(self, train_loss: float, step: int) -> None:
        """Raises NumericError where the training does not, or no longer, tell images apart."""
        if train_loss < LEFT_ENTROPY * self.entropy:
            self.left_at = step
        if step - self.left_at < max(STALL_STEPS, self.patience):
            return
        raise NumericError(
            f"training is stuck: after {step} steps the loss is {train_loss:.4f}, and always "
            f"answering with the class frequencies gives {self.entropy:.4f}; the network does not "
            "look at its images",
            hint="use an architecture with BatchNorm (`--arch vgg16_bn`), the default optimiser "
            "(`--set optimizer=sgd`) or a smaller `--lr`; if classes are very uneven, "
            "`--set class_weights=balanced`",
        )


def _diverged(what: str, value: float, epoch: int, lr: float) -> Diverged:
    return Diverged(
        f"the {what} is {value} in epoch {epoch} at learning rate {lr:.3g}",
        hint="use a smaller `--lr`; the best epoch before that, if there is one, is in the run",
    )


def to_json(record: Epoch) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns what belongs into metrics.jsonl, and what into times.jsonl (wall-clock)."""
    fields = dict(vars(record))
    times = {"epoch": record.epoch, "elapsed_s": fields.pop("elapsed_s")}
    return fields, times
