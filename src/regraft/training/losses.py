"""Losses of a training: fetched from the device and watched.

A loss or gradient that is no number ends a training before anything is learned from it; so does a
loss that stays where no image is looked at.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, isnan, nan

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from regraft.engine import Engine
from regraft.errors import NumericError, count, shorten

# A loss under 98 % of the entropy has left it: measured on plain VGG16, docs/log.md 2026-11-23.
LEFT_ENTROPY = 0.98
STALL_STEPS = 100  # measured likewise: He-initialised VGG16 leaves it within 80 steps
SYNC_STEPS = 10  # the device is asked for its losses this often, where that is slow; assumed


class Diverged(NumericError):
    """The loss is no number any more."""


@dataclass(frozen=True)
class Taken:
    """What an error must know of a step: number (in its phase), epoch, rate, and images by row."""

    step: int
    epoch: int
    lr: float
    rows: NDArray[np.int64]


class Losses:
    """The losses of an epoch; asked for at each step on a processor, now and then on other devices.

    Where they are asked for later, the optimiser is told on the device to change nothing any more.
    """

    def __init__(self, engine: Engine, optimizer: Optimizer, names: Sequence[str]) -> None:
        self.engine = engine
        self.optimizer = optimizer
        self.names = names
        self.at_once = engine.device.type != "cuda" and engine.shard[1] == 1
        self.waiting: list[tuple[Tensor, Tensor, Taken]] = []
        self.total = 0.0
        self.number = 0
        self.latest = nan

    def add(self, loss: Tensor, norm: Tensor, taken: Taken) -> None:
        """Takes the loss and the gradient's norm of a step, before the optimiser does.

        Raises:
            Diverged: One is not finite.
        """
        if self.at_once:
            self._take(float(loss.detach()), float(norm), taken)
            return
        self.waiting.append((loss.detach(), norm.detach(), taken))
        # For good: weights stay those before the first step that went wrong.
        broken = (~torch.isfinite(norm)).float()
        before = getattr(self.optimizer, "found_inf", broken)
        self.optimizer.found_inf = torch.maximum(before, broken)  # type: ignore[attr-defined]
        if len(self.waiting) == SYNC_STEPS or isnan(self.latest):
            self.fetch()

    def mean(self) -> float:
        """Returns the mean over all images of the epoch."""
        self.fetch()
        return self.total / self.number

    def clear(self) -> None:
        """Begins the next epoch."""
        self.total, self.number, self.latest = 0.0, 0, nan

    def fetch(self) -> None:
        """Asks the device; of several processes, all must."""
        if not self.waiting:
            return
        losses = self.engine.mean(torch.stack([loss for loss, _, _ in self.waiting])).tolist()
        norms = torch.stack([norm for _, norm, _ in self.waiting]).tolist()
        for loss, norm, (_, _, taken) in zip(losses, norms, self.waiting, strict=True):
            self._take(loss, norm, taken)
        self.waiting.clear()

    def _take(self, loss: float, norm: float, taken: Taken) -> None:
        if not isfinite(loss):
            raise self._diverged("training loss", loss, taken)
        if not isfinite(norm):
            raise self._diverged("gradient of a finite training loss", norm, taken)
        self.total += loss * len(taken.rows)
        self.number += len(taken.rows)
        self.latest = loss

    def _diverged(self, what: str, value: float, taken: Taken) -> Diverged:
        rows = taken.rows.tolist()
        images = shorten(self.names[row] if self.names else f"row {row}" for row in rows)
        return diverged(
            what,
            value,
            taken.epoch,
            taken.lr,
            problems=[
                f"step {taken.step} of the phase, before anything was learned from it",
                f"its {count(len(rows), 'image')}: {images}",
            ],
        )


def label_entropy(labels: NDArray[np.int64], weights: Tensor | None, smoothing: float) -> float:
    """Returns the loss of the best constant prediction: the entropy of the (weighted) labels.

    ln K where K classes are balanced.
    """
    counts = Counter(labels.tolist())
    mass = np.array([counts[c] * (1.0 if weights is None else float(weights[c])) for c in counts])
    share = mass / mass.sum()
    share = (1 - smoothing) * share + smoothing / len(share)
    return float(-(share * np.log(share)).sum())


@dataclass
class StallDetector:
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


def diverged(
    what: str, value: float, epoch: int, lr: float, problems: Sequence[str] = ()
) -> Diverged:
    return Diverged(
        f"the {what} is {value} in epoch {epoch} at learning rate {lr:.3g}",
        problems=problems,
        hint="use a smaller `--lr`; the best epoch before that, if there is one, is in the run",
    )
