"""fit: training as a generator of Step and Epoch records.

Progress, logging and stopping are bodies of an ordinary `for` loop over it; there are no callbacks.
Whenever the loop ends, also by `break` or an exception, the classifier holds the best epoch's
weights.

B batch, C channels, H height, W width, D features, K classes.
"""

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from math import inf, isfinite
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from regraft.data.batches import ONLY, ahead, num_batches, part_of
from regraft.engine import Engine
from regraft.evaluation.metrics import log_losses, point
from regraft.evaluation.predictions import Predictions, infer, softmax
from regraft.models.backbone import Backbone
from regraft.models.classifier import Classifier
from regraft.progress import Counting, Note
from regraft.training.activations import choose_feed
from regraft.training.feeds import Feed, Live, Material
from regraft.training.losses import Losses, StallDetector, diverged, label_entropy
from regraft.training.optim import (
    Average,
    adapt_batch_norm,
    freeze,
    learning_stages,
    make_optimizer,
    refuse_frozen_random,
    scheduled_lr,
    set_lr,
)
from regraft.training.probe import balanced, effective_rank, solve_head, solve_ridge
from regraft.training.recipe import Phase, Recipe

MOST_WATCHED = 1000  # validation images whose features are looked at each epoch: under 1 s


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
    """One pass over the training images, and how the averaged weights do on validation.

    A head that is solved is the epoch before the next one: 0 at the start. Without validation
    images the validation figures are None.

    Attributes:
        effective_rank: Of the features of the validation images, see `probe`; from scratch only.
        stage_probes: Balanced accuracy of a ridge head on the features of each stage, validation
            images left out in turn; from scratch only.
    """

    epoch: int
    num_epochs: int
    learns: str
    train_loss: float
    elapsed_s: float
    val_loss: float | None = None
    val_accuracy: float | None = None
    val_balanced_accuracy: float | None = None
    is_best: bool = False
    effective_rank: float | None = None
    stage_probes: tuple[float, ...] = ()


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
    feed: Feed = field(init=False)

    def loss(self, logits_BK: Tensor, rows: NDArray[np.int64]) -> Tensor:
        """Returns the mean loss of the whole batch `rows`, of which this process has a part.

        Weighted as if one process had it all: the mean over processes is the batch's loss.
        """
        shard = self.engine.shard
        labels = torch.from_numpy(self.material.labels[rows]).to(self.engine.device)
        weights = self.class_weights
        summed = functional.cross_entropy(
            logits_BK,
            part_of(labels, shard),
            weights,
            reduction="sum",
            label_smoothing=self.recipe.label_smoothing,
        )
        mass = len(rows) if weights is None else weights[labels].sum()
        mean: Tensor = summed * shard[1] / mass
        return mean

    @cached_property
    def class_weights(self) -> Tensor | None:
        if self.recipe.class_weights == "none":
            return None
        labels = self.material.labels[self.material.train_rows]
        counts = np.bincount(labels, minlength=len(self.classifier.class_names))
        weights = len(labels) / (len(counts) * np.maximum(counts, 1))
        return torch.tensor(weights, dtype=torch.float32, device=self.engine.device)

    @cached_property
    def moving(self) -> frozenset[str]:
        """Names of the tensors that some phase changes: the others need no copy of the best."""
        backbone = self.classifier.backbone
        stages = {s for p in self.recipe.phases for s in learning_stages(backbone, p)}
        frozen = {
            f"backbone.{name}"
            for stage, names in enumerate(backbone.stages)
            for name in names
            if stage not in stages
        }
        buffers = {name for name, _ in self.classifier.named_buffers()}
        return frozenset(self.classifier.state_dict()) - (frozen - buffers)

    def features(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        network = _Features(self.classifier.backbone, self.feed)
        return infer(network, self.feed.plain_batches(rows), self.engine)

    def close_epoch(self, network: Classifier, learns: str, train_loss: float) -> Epoch:
        """Validates, and keeps the weights if no earlier epoch had a lower validation loss."""
        self.epoch += learns != "head"
        told = Epoch(
            epoch=self.epoch,
            num_epochs=self.recipe.num_epochs,
            learns=learns,
            train_loss=train_loss,
            elapsed_s=time.monotonic() - self.started,
        )
        rows = self.material.val_rows
        if not len(rows):
            return told
        truth, names = self.material.labels[rows], self.classifier.class_names
        through = _Network(network, self.feed)
        probabilities = softmax(infer(through, self.feed.plain_batches(rows), self.engine))
        found = Predictions(tuple(str(row) for row in rows), names, probabilities, truth)
        val_loss = float(log_losses(probabilities, truth).mean())
        if not isfinite(val_loss):
            raise diverged("validation loss", val_loss, self.epoch, 0.0)
        if self.recipe.goal == "scratch" and isinstance(self.feed, Live):
            told = replace(told, **self._worth(network.backbone))
        is_best = val_loss < self.best_loss
        if is_best:
            self.best_loss = val_loss
            self.best_state = {
                name: tensor.detach().clone() if name in self.moving else tensor.detach()
                for name, tensor in network.state_dict().items()
            }
        return replace(
            told,
            val_loss=val_loss,
            val_accuracy=point(found, "accuracy"),
            val_balanced_accuracy=point(found, "balanced_accuracy"),
            is_best=is_best,
            elapsed_s=time.monotonic() - self.started,
        )

    def _worth(self, backbone: Backbone) -> dict[str, Any]:
        """Returns what the features of each stage would be worth to a new head."""
        rows = np.random.default_rng(0).permutation(self.material.val_rows)[:MOST_WATCHED]
        labels_N, own = self.material.labels[rows], np.arange(len(rows))
        through = _Stages(backbone)
        joined = infer(through, self.feed.plain_batches(rows), self.engine)
        stages = np.split(joined, through.ends, axis=1)
        logits = [solve_ridge(features_ND, labels_N, own)[1] for features_ND in stages]
        return {
            "effective_rank": effective_rank(stages[-1]),
            "stage_probes": tuple(balanced(each.argmax(axis=1), labels_N) for each in logits),
        }


def fit(
    classifier: Classifier, material: Material, recipe: Recipe, engine: Engine
) -> Generator[Step | Epoch | Note | Counting, None, None]:
    """Trains the classifier in place, phase by phase.

    The best epoch is the one with the lowest validation loss, and without validation images the
    last; test images are not at hand here.

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
            if phase.batch_norm == "adapt":
                plain = Live(material, classifier.inputs, recipe, engine)
                batches = plain.plain_batches(material.train_rows, ONLY)
                adapt_batch_norm(classifier.backbone, batches, engine)
            freeze(classifier, phase)
            live = Live(material, classifier.inputs, recipe, engine, recipe.views_of(phase))
            state.feed, obstacle = yield from choose_feed(live, classifier.backbone, phase)
            if obstacle:
                yield Note(f"the frozen part runs again at every step: {obstacle}")
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
    rows, folds = material.for_head()
    number = len(material.train_rows)
    features_ND, labels_N = state.features(rows), material.labels[rows]
    is_balanced = state.recipe.class_weights == "balanced"
    solution = solve_head(features_ND, labels_N, folds, balanced=is_balanced)
    solution.copy_to(classifier.head)
    losses = log_losses(softmax(solution.logits(features_ND[:number])), labels_N[:number])
    train_loss = float(losses.mean())
    yield state.close_epoch(classifier, phase.learns, train_loss)


def _train(state: _Fit, phase: Phase) -> Iterator[Step | Epoch]:
    recipe, engine = state.recipe, state.engine
    optimizer = make_optimizer(state.classifier, phase, recipe)
    network = engine.ready(_Network(state.classifier, state.feed))
    averaged = Average(state.classifier, recipe.ema_decay)
    steps_an_epoch = num_batches(len(state.material.train_rows), int(recipe.batch_size))
    num_steps = steps_an_epoch * int(phase.epochs)
    patience = recipe.stall_share * num_steps if recipe.stall_share < 1 else inf
    labels_N = state.material.labels[state.material.train_rows]
    entropy = label_entropy(labels_N, state.class_weights, recipe.label_smoothing)
    stall = StallDetector(entropy, patience)
    pace = _Pace(num_steps)
    for _ in range(int(phase.epochs)):
        losses = Losses(engine, state.epoch + 1)
        for batch, rows in ahead(state.feed.train_batches(state.epoch), engine.device):
            lr = scheduled_lr(phase, pace.step, num_steps)
            set_lr(optimizer, lr)
            with engine.seeded(recipe.seed, state.epoch, pace.step, engine.shard[0]):
                with engine.autocast():
                    logits_BK = network(batch)
                loss = state.loss(logits_BK, rows)
                engine.backward(loss)
            if recipe.clip_norm:
                nn.utils.clip_grad_norm_(network.parameters(), recipe.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            averaged.update()
            state.latest = averaged.module
            losses.add(loss, len(rows), lr)
            yield pace.told(state, len(rows), losses.latest, lr)
        mean = averaged.module
        engine.broadcast(mean)
        train_loss = losses.mean(lr)
        stall.check(train_loss, pace.step)
        yield state.close_epoch(mean, phase.learns, train_loss)


class _Features(nn.Module):
    """The backbone, from where the batches of a feed enter it."""

    def __init__(self, backbone: Backbone, feed: Feed) -> None:
        super().__init__()
        self.backbone = backbone
        self.feed = feed

    def forward(self, batch: Tensor) -> Tensor:
        return self.feed.features(self.backbone, batch)


class _Network(_Features):
    """The classifier, likewise."""

    def __init__(self, classifier: Classifier, feed: Feed) -> None:
        super().__init__(classifier.backbone, feed)
        self.head = classifier.head

    def forward(self, batch: Tensor) -> Tensor:
        logits_BK: Tensor = self.head(super().forward(batch))
        return logits_BK


class _Stages(nn.Module):
    """The features of all stages, side by side.

    Attributes:
        ends: Where each stage ends, but for the last.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.ends: tuple[int, ...] = ()

    def forward(self, images_BCHW: Tensor) -> Tensor:
        stages = [each.float() for each in self.backbone.stage_features(images_BCHW)]
        self.ends = tuple(accumulate(each.shape[1] for each in stages))[:-1]
        return torch.cat(stages, dim=1)


class _Pace:
    """Counts steps and images, and foretells the rest."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.step = self.images = 0
        self.began = time.monotonic()

    def told(self, state: _Fit, num_images: int, loss: float, lr: float) -> Step:
        self.step, self.images = self.step + 1, self.images + num_images
        elapsed_s = time.monotonic() - self.began
        left_s = (self.num_steps - self.step) * elapsed_s / self.step
        return Step(
            state.epoch + 1, state.recipe.num_epochs, self.step, self.num_steps, loss, lr,
            self.images / elapsed_s, left_s,
        )  # fmt: skip


def to_json(record: Epoch) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns what belongs into metrics.jsonl, and what into times.jsonl (wall-clock)."""
    fields = dict(vars(record))
    times = {"epoch": record.epoch, "elapsed_s": fields.pop("elapsed_s")}
    return fields, times
