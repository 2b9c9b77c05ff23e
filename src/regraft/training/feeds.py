"""Feeds: where a phase gets its batches from, and networks from where these enter.

`Live` gives images to the whole network; `Stored` (activations.py) gives what its frozen part has
made of them. Both give the same numbers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regraft.data.augment import AUGMENTATIONS
from regraft.data.batches import (
    Images,
    Rows,
    Shard,
    augmented,
    eval_batches,
    normalised,
    plain_order,
    train_batches,
)
from regraft.data.split import most_folds, stratified_folds
from regraft.engine import Engine
from regraft.evaluation.predictions import eval_batch
from regraft.inputs import InputSpec
from regraft.models.backbone import Backbone
from regraft.models.classifier import Classifier
from regraft.training.recipe import Recipe

FOLDS = 3  # of cross-validation, where there are no validation images; assumed


@dataclass(frozen=True)
class Material:
    """What `fit` learns from: decoded images, and which rows are for what. No test rows.

    Attributes:
        images: (image, height, width, channel), see `Cache`.
        labels: Class index of every row.
        train_rows: Learned from.
        val_rows: Judge the epochs; none: the last epoch is kept.
        groups: Group index of every row (a patient); None: each image is its own.
        key: Names the images' content (see `Cache`), so that activations are found again; None:
            they are not stored.
        names: Paths of the images, for errors.
    """

    images: Images
    labels: NDArray[np.int64]
    train_rows: Rows
    val_rows: Rows
    groups: NDArray[np.int64] | None = None
    key: str | None = None
    names: tuple[str, ...] = ()

    @property
    def judged(self) -> Rows:
        """The rows on which candidates are compared: validation, or training ones in folds."""
        return self.val_rows if len(self.val_rows) else self.train_rows

    @property
    def train_groups(self) -> NDArray[np.int64]:
        """The group of each training row."""
        return self.train_rows if self.groups is None else self.groups[self.train_rows]

    def for_head(self) -> tuple[Rows, list[tuple[Rows, Rows]]]:
        """Returns the rows that a head is solved on, and places in them that learn and judge."""
        number, rows = len(self.train_rows), np.concatenate([self.train_rows, self.val_rows])
        learn = np.arange(number)
        if len(self.val_rows):
            return rows, [(learn, np.arange(number, len(rows)))]
        return rows, self.folds() or [(learn, learn)]

    def folds(self, wanted: int = FOLDS) -> list[tuple[Rows, Rows]]:
        """Returns places in `train_rows` that learn and that judge, for each fold.

        Fewer than wanted where a class has fewer groups; none where not even two can be made.
        """
        labels, groups = self.labels[self.train_rows], self.train_groups
        number = most_folds(labels, groups, wanted)
        return stratified_folds(labels, groups, number) if number else []


class Feed(Protocol):
    """Batches of a phase, and what a backbone makes of them."""

    def train_batches(self, epoch: int, skip: int = 0) -> Iterator[tuple[Tensor, Rows]]:
        """Yields this process's part of each batch but the first few, and the rows of all of it."""

    def plain_batches(self, rows: Rows) -> Iterator[Tensor]:
        """Yields this process's batches of these training or validation rows, not augmented."""

    def features(self, backbone: Backbone, batch: Tensor) -> Tensor:
        """Returns features_BD of a batch."""


@dataclass(frozen=True)
class Live:
    """Images, through the whole network."""

    material: Material
    inputs: InputSpec
    recipe: Recipe
    engine: Engine
    views: int | None = None

    @property
    def batch_size(self) -> int:
        """Of batches that are not for training."""
        return eval_batch(self.inputs.size, self.engine.device)

    def train_batches(self, epoch: int, skip: int = 0) -> Iterator[tuple[Tensor, Rows]]:
        return train_batches(
            self.material.images,
            self.material.train_rows,
            self.inputs,
            AUGMENTATIONS[self.recipe.augment],
            batch_size=int(self.recipe.batch_size),
            seed=self.recipe.seed,
            epoch=epoch,
            views=self.views,
            device=self.engine.device,
            shard=self.engine.shard,
            skip=skip,
        )

    def plain_batches(self, rows: Rows, shard: Shard | None = None) -> Iterator[Tensor]:
        images, engine = self.material.images, self.engine
        return eval_batches(
            images,
            rows,
            self.inputs,
            batch_size=self.batch_size,
            device=engine.device,
            shard=shard or engine.shard,
        )

    def view_batches(self, view: int) -> Iterator[Tensor]:
        """Yields one augmented view of the training images, in their order."""
        for own in plain_order(self.material.train_rows, self.batch_size, self.engine.shard):
            yield augmented(
                self.material.images,
                own,
                self.inputs,
                AUGMENTATIONS[self.recipe.augment],
                seed=self.recipe.seed,
                view=view,
                device=self.engine.device,
            )

    def example(self) -> Tensor:
        """Returns one plain image."""
        rows = self.material.train_rows[:1]
        return normalised(self.material.images[rows], self.inputs, self.engine.device)

    def features(self, backbone: Backbone, batch: Tensor) -> Tensor:
        return backbone(batch)  # type: ignore[no-any-return]


def own_share(recipe: Recipe, epoch: int, step: int) -> float:
    """Returns how much of itself each image of a batch keeps; 1 where none is mixed."""
    if not recipe.mixup:
        return 1.0
    generator = np.random.default_rng((recipe.seed, epoch, step))
    return float(generator.beta(recipe.mixup, recipe.mixup))


class Features(nn.Module):
    """The backbone, from where the batches of a feed enter it."""

    def __init__(self, backbone: Backbone, feed: Feed) -> None:
        super().__init__()
        self.backbone = backbone
        self.feed = feed

    def forward(self, batch: Tensor) -> Tensor:
        return self.feed.features(self.backbone, batch)


class Network(Features):
    """The classifier, likewise."""

    def __init__(self, classifier: Classifier, feed: Feed) -> None:
        super().__init__(classifier.backbone, feed)
        self.head = classifier.head

    def forward(self, batch: Tensor) -> Tensor:
        logits_BK: Tensor = self.head(super().forward(batch))
        return logits_BK


class Watched(Features):
    """The logits of a classifier, and behind them the features of all stages.

    Attributes:
        ends: Where logits and stages end, but for the last.
    """

    def __init__(self, classifier: Classifier, feed: Feed) -> None:
        super().__init__(classifier.backbone, feed)
        self.head = classifier.head
        self.ends: tuple[int, ...] = ()

    def forward(self, images_BCHW: Tensor) -> Tensor:
        stages = [each.float() for each in self.backbone.stage_features(images_BCHW)]
        parts = [self.head(stages[-1]).float(), *stages]
        self.ends = tuple(accumulate(each.shape[1] for each in parts))[:-1]
        return torch.cat(parts, dim=1)
