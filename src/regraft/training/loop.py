"""fit: training as a generator of Step and Epoch records.

Progress, logging and stopping are bodies of an ordinary `for` loop over it; there are no callbacks.
Whenever the loop ends, also by `break` or an exception, the classifier holds the best epoch's
weights.

B batch, C channels, H height, W width, D features, K classes.
"""

import time
from collections.abc import Generator, Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf, isfinite

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from regraft.data.batches import ONLY, Rows, ahead, num_batches, part_of
from regraft.engine import Engine
from regraft.errors import UsageError
from regraft.evaluation.metrics import log_losses, mean_log_loss, point
from regraft.evaluation.predictions import Predictions, softmax
from regraft.models.classifier import Classifier
from regraft.progress import Counting, Note
from regraft.training.activations import choose_feed
from regraft.training.feeds import Features, Feed, Live, Material, Network, own_share
from regraft.training.losses import Losses, StallDetector, Taken, diverged, label_entropy
from regraft.training.optim import (
    Average,
    adapting_batch_norm,
    clipped,
    freeze,
    learning_stages,
    make_optimizer,
    refuse_frozen_random,
    scheduled_lr,
    set_lr,
)
from regraft.training.probe import solve_head
from regraft.training.recipe import Phase, Recipe
from regraft.training.records import Epoch, Step
from regraft.training.state import Bookmark, Snapshot, moments, restore, restore_moments
from regraft.training.validation import outputs, validated


@dataclass
class _Fit:
    """The state of one `fit`."""

    classifier: Classifier
    material: Material
    recipe: Recipe
    engine: Engine
    started: float = field(default_factory=time.monotonic)
    epoch: int = 0
    best_loss: float = inf
    best_state: dict[str, Tensor] | None = None
    latest: nn.Module | None = None
    feed: Feed = field(init=False)
    phase: int = 0
    stretch: "_Stretch | None" = None
    saved: Snapshot | None = None
    bookmark: Bookmark = field(default_factory=Bookmark)

    def leave(self, phase: Phase) -> None:
        """Ends a phase: what learned in it is random no more."""
        backbone = self.classifier.backbone
        for stage in learning_stages(backbone, phase):
            backbone.random -= set(backbone.stages[stage])
        self.phase, self.stretch = self.phase + 1, None

    def snapshot(self) -> Snapshot:
        taken = Snapshot({
            "phase": self.phase,
            "epoch": self.epoch,
            "best_loss": self.best_loss if isfinite(self.best_loss) else None,
            "random": sorted(self.classifier.backbone.random),
            "elapsed_s": time.monotonic() - self.started,
        })  # fmt: skip
        taken.put("weights", self.classifier.state_dict())
        taken.put("best", self.best_state or {})
        if self.bookmark.judged is not None:
            taken.put("judged", {"logits": torch.from_numpy(self.bookmark.judged)})
        taken.put("averaged", self.latest.state_dict() if self.latest else {})
        if self.saved is not None:  # of a phase that has not begun again yet
            taken.values["stretch"] = self.saved.values["stretch"]
            taken.put("moments", self.saved.get("moments"))
        elif self.stretch is not None:
            self.stretch.describe(taken, self.classifier)
        return taken

    def restore(self, saved: Snapshot) -> None:
        """Goes back to where a snapshot was taken."""
        values, device = saved.values, self.engine.device
        self.phase, self.epoch = values["phase"], values["epoch"]
        self.best_loss = inf if values["best_loss"] is None else values["best_loss"]
        self.classifier.backbone.random = frozenset(values["random"])
        self.started -= values["elapsed_s"]
        restore(self.classifier, saved.get("weights"))
        if judged := saved.get("judged"):
            self.bookmark.judged = judged["logits"].numpy()
        self.best_state = {n: t.to(device) for n, t in saved.get("best").items()} or None
        if averaged := saved.get("averaged"):
            self.latest = deepcopy(self.classifier)
            restore(self.latest, averaged)
        self.saved = saved if "stretch" in values else None

    def mixed_loss(self, logits_BK: Tensor, rows: Rows, share: float) -> Tensor:
        """Returns the loss of images that are their own to this share, else their mirror's."""
        own = self.loss(logits_BK, rows)
        if share == 1:
            return own
        return share * own + (1 - share) * self.loss(logits_BK, rows[::-1].copy())

    def loss(self, logits_BK: Tensor, rows: Rows) -> Tensor:
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

    def close_epoch(
        self, network: Classifier, learns: str, train_loss: float
    ) -> Generator[Counting, None, Epoch]:
        """Validates, and keeps the weights if no earlier epoch had a lower validation loss."""
        epoch = self.epoch + (learns != "head")
        told = Epoch(
            epoch=epoch,
            num_epochs=self.recipe.num_epochs,
            learns=learns,
            train_loss=train_loss,
            elapsed_s=time.monotonic() - self.started,
        )
        rows = self.material.val_rows
        if not len(rows):
            return told
        truth, names = self.material.labels[rows], self.classifier.class_names
        logits_NK, worth = yield from validated(
            network, self.feed, self.material, self.recipe, self.engine
        )
        probabilities = softmax(logits_NK)
        found = Predictions(tuple(str(row) for row in rows), names, probabilities, truth)
        recipe = self.recipe
        val_loss = mean_log_loss(  # what chooses is measured as what learns
            probabilities,
            truth,
            is_balanced=recipe.class_weights == "balanced",
            smoothing=recipe.label_smoothing,
        )
        if not isfinite(val_loss):
            raise diverged("validation loss", val_loss, epoch, 0.0)
        is_best = val_loss < self.best_loss
        if is_best:
            self.best_loss, self.bookmark.judged = val_loss, logits_NK
            self.best_state = {
                name: tensor.detach().clone() if name in self.moving else tensor.detach()
                for name, tensor in network.state_dict().items()
            }
        return replace(
            told,
            **worth,
            val_loss=val_loss,
            val_accuracy=point(found, "accuracy"),
            val_balanced_accuracy=point(found, "balanced_accuracy"),
            is_best=is_best,
            elapsed_s=time.monotonic() - self.started,
        )


def fit(
    classifier: Classifier,
    material: Material,
    recipe: Recipe,
    engine: Engine,
    *,
    bookmark: Bookmark | None = None,
) -> Generator[Step | Epoch | Note | Counting, None, None]:
    """Trains the classifier in place, phase by phase.

    The best epoch is the one with the lowest validation loss, and without validation images the
    last; test images are not at hand here.

    Args:
        classifier: Placed on the engine's device.
        material: Training and validation rows.
        recipe: Resolved: no field is `auto`.
        engine: Where and how to compute.
        bookmark: Where to go on from, and where it is (see `Bookmark`). A training that went on
            any number of times gives the same bits as one that was never interrupted.

    Raises:
        UsageError: Random weights would stay frozen, or several processes are to mix images.
        Diverged: The loss is not finite; the classifier holds the best epoch before that.
        NumericError: The loss never leaves the entropy of the labels.
    """
    refuse_frozen_random(classifier.backbone, recipe)
    if recipe.mixup and engine.shard[1] > 1:
        raise UsageError("mixup mixes the images of one process", hint="set mixup = 0")
    bookmark = bookmark or Bookmark()
    state = _Fit(classifier, material, recipe, engine, bookmark=bookmark)
    if bookmark.saved is not None:
        state.restore(bookmark.saved)
    bookmark.describe = state.snapshot
    try:
        while state.phase < len(recipe.phases):
            phase = recipe.phases[state.phase]
            if phase.batch_norm == "adapt" and state.saved is None:
                plain, rows = Live(material, classifier.inputs, recipe, engine), material.train_rows
                batches = plain.plain_batches(rows, ONLY)
                yield from adapting_batch_norm(classifier.backbone, batches, engine, len(rows))
            freeze(classifier, phase)
            live = Live(material, classifier.inputs, recipe, engine, recipe.views_of(phase))
            state.feed, obstacle = yield from choose_feed(live, classifier.backbone, phase)
            if obstacle:
                yield Note(f"the frozen part runs again at every step: {obstacle}")
            yield from (_solve if phase.learns == "head" else _train)(state, phase)
    finally:
        kept = state.best_state or (state.latest and state.latest.state_dict())
        if kept:
            classifier.load_state_dict(kept)
        classifier.requires_grad_(True)
        classifier.eval()


def _solve(state: _Fit, phase: Phase) -> Iterator[Epoch | Counting]:
    """A linear probe to convergence: one pass for the features, then a convex problem."""
    classifier, material = state.classifier, state.material
    rows, folds = material.for_head()
    number = len(material.train_rows)
    through = Features(classifier.backbone, state.feed)
    features_ND = yield from outputs(through, rows, state.engine, "features")
    labels_N = material.labels[rows]
    is_balanced = state.recipe.class_weights == "balanced"
    solution = solve_head(features_ND, labels_N, folds, balanced=is_balanced)
    solution.copy_to(classifier.head)
    losses = log_losses(softmax(solution.logits(features_ND[:number])), labels_N[:number])
    train_loss = float(losses.mean())
    told = yield from state.close_epoch(classifier, phase.learns, train_loss)
    state.leave(phase)
    yield told


def _train(state: _Fit, phase: Phase) -> Iterator[Step | Epoch | Counting]:
    recipe, engine = state.recipe, state.engine
    stretch = state.stretch = _Stretch(state, phase)
    optimizer, averaged, losses = stretch.optimizer, stretch.averaged, stretch.losses
    network = stretch.network
    parameters = [p for p in network.parameters() if p.requires_grad]
    steps_an_epoch = stretch.num_steps // int(phase.epochs)
    pace = _Pace(stretch)
    while stretch.epochs < int(phase.epochs):
        done = stretch.step - stretch.epochs * steps_an_epoch
        coming = state.feed.train_batches(state.epoch, done)
        for batch, rows in ahead(coming, engine.device):
            share = own_share(recipe, state.epoch, stretch.step)
            if share < 1:  # each image with the one as far from the end as it is from the start
                batch = torch.lerp(batch.flip(0), batch, share)
            lr = scheduled_lr(phase, stretch.step, stretch.num_steps)
            set_lr(optimizer, lr)
            with engine.seeded(recipe.seed, state.epoch, stretch.step, engine.shard[0]):
                with engine.autocast():
                    logits_BK = network(batch)
                loss = state.mixed_loss(logits_BK, rows, share)
                engine.backward(loss)
            norm = clipped(parameters, recipe.clip_norm)
            losses.add(loss, norm, Taken(stretch.step + 1, state.epoch + 1, lr, rows))
            optimizer.step()
            optimizer.zero_grad()
            averaged.update()
            stretch.step += 1
            state.latest = averaged.module
            yield pace.told(state, len(rows), losses.latest, lr)
        mean = averaged.module
        engine.broadcast(mean)
        train_loss = losses.mean()
        stretch.stall.check(train_loss, stretch.step)
        told = yield from state.close_epoch(mean, phase.learns, train_loss)
        state.epoch += 1
        stretch.epochs += 1
        losses.clear()
        if stretch.epochs == int(phase.epochs):
            state.leave(phase)
        yield told


class _Stretch:
    """A phase that iterates, under way.

    Attributes:
        step: Steps done.
        epochs: Epochs that have ended.
    """

    def __init__(self, state: _Fit, phase: Phase) -> None:
        recipe, material = state.recipe, state.material
        self.num_steps = int(phase.epochs) * num_batches(
            len(material.train_rows), int(recipe.batch_size)
        )
        self.optimizer = make_optimizer(state.classifier, phase, recipe)
        self.network = state.engine.ready(Network(state.classifier, state.feed))
        # Not before: among several processes `ready` gives parameters another place in memory.
        self.averaged = Average(state.classifier, recipe.ema_decay)
        self.losses = Losses(state.engine, self.optimizer, material.names)
        patience = recipe.stall_share * self.num_steps if recipe.stall_share < 1 else inf
        labels_N = material.labels[material.train_rows]
        entropy = label_entropy(labels_N, state.class_weights, recipe.label_smoothing)
        self.stall = StallDetector(entropy, patience)
        self.step = self.epochs = 0
        if state.saved is not None:
            self._restore(state.saved, state.classifier)
            state.saved = None

    def describe(self, into: Snapshot, classifier: Classifier) -> None:
        self.losses.fetch()
        into.values["stretch"] = {
            "step": self.step,
            "epochs": self.epochs,
            "averaged_steps": self.averaged.steps,
            "loss": [self.losses.total, self.losses.number],
            "left_at": self.stall.left_at,
        }
        into.put("moments", moments(self.optimizer, classifier))

    def _restore(self, saved: Snapshot, classifier: Classifier) -> None:
        values = saved.values["stretch"]
        self.step, self.epochs = values["step"], values["epochs"]
        self.averaged.steps, self.stall.left_at = values["averaged_steps"], values["left_at"]
        self.losses.total, self.losses.number = values["loss"]
        restore_moments(self.optimizer, classifier, saved.get("moments"))
        if averaged := saved.get("averaged"):
            restore(self.averaged.module, averaged)


class _Pace:
    """Counts images since it began, and foretells the rest."""

    def __init__(self, stretch: _Stretch) -> None:
        self.stretch = stretch
        self.first, self.images = stretch.step, 0
        self.began = time.monotonic()

    def told(self, state: _Fit, num_images: int, loss: float, lr: float) -> Step:
        step, num_steps = self.stretch.step, self.stretch.num_steps
        self.images += num_images
        elapsed = time.monotonic() - self.began
        left_s = (num_steps - step) * elapsed / (step - self.first)
        return Step(
            state.epoch + 1, state.recipe.num_epochs, step, num_steps, loss, lr,
            self.images / elapsed, left_s,
        )  # fmt: skip
