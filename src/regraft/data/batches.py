"""Batches of normalised images: shuffled and augmented for training, plain for evaluation.

B batch, C channels, H height, W width. `eval_batches` has no way to shuffle or augment: honest
evaluation is a property of its signature.
"""

from collections.abc import Iterator
from math import ceil
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regraft.data.augment import ORDER_DRAW, Augmentation, augment, uniform
from regraft.inputs import InputSpec

Images = NDArray[Any]  # uint8 or uint16, (image, height, width, channel)
Rows = NDArray[np.int64]


def train_batches(
    images: Images,
    rows: Rows,
    inputs: InputSpec,
    how: Augmentation,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, Rows]]:
    """Yields (images_BCHW, their rows), every row once, in an order given by (seed, epoch).

    Batches differ in size by one image at most, so with a batch size of 3 or more none is left
    with a single image, on which BatchNorm cannot compute a variance.
    """
    order = rows[
        np.argsort(uniform(seed, epoch, rows, ORDER_DRAW + 1)[:, ORDER_DRAW], kind="stable")
    ]
    for chosen in np.array_split(order, num_batches(len(rows), batch_size)):
        plain = normalised(images, chosen, inputs, device)
        yield augment(plain, chosen, how, seed=seed, epoch=epoch), chosen


def eval_batches(
    images: Images, rows: Rows, inputs: InputSpec, *, batch_size: int, device: torch.device
) -> Iterator[Tensor]:
    """Yields images_BCHW of the rows in their order, exactly as they are."""
    for start in range(0, len(rows), batch_size):
        yield normalised(images, rows[start : start + batch_size], inputs, device)


def num_batches(num_images: int, batch_size: int) -> int:
    return max(1, ceil(num_images / batch_size))


def normalised(images: Images, rows: Rows, inputs: InputSpec, device: torch.device) -> Tensor:
    """Returns images_BCHW as float32 with the mean and std of the InputSpec taken out."""
    # uint16 has few torch operations; float32 holds each of its values exactly.
    chosen = images[rows].astype(np.float32) if images.dtype == np.uint16 else images[rows]
    images_BHWC = torch.from_numpy(chosen).to(device, torch.float32)
    largest = float(np.iinfo(images.dtype).max)
    mean = torch.tensor(inputs.mean, dtype=torch.float32, device=device) * largest
    std = torch.tensor(inputs.std, dtype=torch.float32, device=device) * largest
    # The permuted view is channels-last already: no copy.
    return ((images_BHWC - mean) / std).permute(0, 3, 1, 2)
