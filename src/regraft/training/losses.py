"""Losses of a training: fetched from the device now and then, and watched.

A loss that is no number ends a training, and so does one that stays where no image is looked at.
"""

from collections import Counter
from dataclasses import dataclass
from math import isfinite, isnan, nan

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regraft.engine import Engine
from regraft.errors import NumericError

# A loss under 98 % of the entropy has left it: measured on plain VGG16, docs/log.md 2026-11-23.
LEFT_ENTROPY = 0.98
STALL_STEPS = 100  # measured likewise: He-initialised VGG16 leaves it within 80 steps
SYNC_STEPS = 10  # the device is asked for its losses this often; assumed


class Diverged(NumericError):
    """The loss is no number any more."""


class Losses:
    """The losses of an epoch, fetched from the device every few steps only."""

    def __init__(self, engine: Engine, epoch: int) -> None:
        self.engine = engine
        self.epoch = epoch
        self.waiting: list[Tensor] = []
        self.numbers: list[int] = []
        self.total = 0.0
        self.latest = nan

    def add(self, loss: Tensor, number: int, lr: float) -> None:
        self.waiting.append(loss.detach())
        self.numbers.append(number)
        if len(self.waiting) == SYNC_STEPS or isnan(self.latest):
            self._fetch(lr)

    def mean(self, lr: float) -> float:
        """Returns the mean over all images of the epoch."""
        self._fetch(lr)
        return self.total / sum(self.numbers)

    def _fetch(self, lr: float) -> None:
        if not self.waiting:
            return
        values = self.engine.mean(torch.stack(self.waiting)).tolist()
        if broken := [value for value in values if not isfinite(value)]:
            raise diverged("training loss", broken[0], self.epoch, lr)
        numbers = self.numbers[-len(values) :]
        self.total += sum(v * n for v, n in zip(values, numbers, strict=True))
        self.latest = values[-1]
        self.waiting.clear()


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


def diverged(what: str, value: float, epoch: int, lr: float) -> Diverged:
    return Diverged(
        f"the {what} is {value} in epoch {epoch} at learning rate {lr:.3g}",
        hint="use a smaller `--lr`; the best epoch before that, if there is one, is in the run",
    )
