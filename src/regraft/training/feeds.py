"""Feeds: where a phase gets its batches from. `Live` gives images to the whole network; `Stored`
(activations.py) gives what its frozen part has made of them. Both give the same numbers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from regraft.data.augment import AUGMENTATIONS
from regraft.data.batches import (
    Images,
    Rows,
    augmented,
    eval_batches,
    normalised,
    plain_order,
    train_batches,
)
from regraft.engine import Engine
from regraft.evaluation.predictions import EVAL_BATCH
from regraft.inputs import InputSpec
from regraft.models.backbone import Backbone
from regraft.training.recipe import Recipe


@dataclass(frozen=True)
class Material:
    """What `fit` learns from: decoded images, and which rows are for what. No test rows.

    Attributes:
        images: (image, height, width, channel), see `Cache`.
        labels: Class index of every row.
        key: Names the images' content (see `Cache`), so that activations are found again; None:
            they are not stored.
    """

    images: Images
    labels: NDArray[np.int64]
    train_rows: Rows
    val_rows: Rows
    key: str | None = None


class Feed(Protocol):
    """Batches of a phase, and what a backbone makes of them."""

    def train_batches(self, epoch: int) -> Iterator[tuple[Tensor, Rows]]:
        """Yields this process's part of each batch, and the rows of the whole batch."""

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

    def train_batches(self, epoch: int) -> Iterator[tuple[Tensor, Rows]]:
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
        )

    def plain_batches(self, rows: Rows) -> Iterator[Tensor]:
        images, engine = self.material.images, self.engine
        return eval_batches(
            images,
            rows,
            self.inputs,
            batch_size=EVAL_BATCH,
            device=engine.device,
            shard=engine.shard,
        )

    def view_batches(self, view: int) -> Iterator[Tensor]:
        """Yields one augmented view of the training images, in their order."""
        for own in plain_order(self.material.train_rows, EVAL_BATCH, self.engine.shard):
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
