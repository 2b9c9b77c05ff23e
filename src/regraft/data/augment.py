"""Random transforms of a training batch, on tensors, on the device.

B batch, C channels, H height, W width. What happens to an image depends on (seed, epoch, sample)
alone: not on its place in a batch, on workers or on any global state.
"""

from dataclasses import dataclass
from math import ceil, pi

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

# Draws 0 to 12 transform an image. Its place in the epoch has a draw of its own, since a shared
# one would fill each batch with images turned by the same angle; so has the choice of a transform.
ORDER_DRAW, CHOICE_DRAW = 13, 14


@dataclass(frozen=True)
class Augmentation:
    """How far each transform may go; 0 switches it off.

    Attributes:
        rotate: Largest rotation in degrees.
        zoom: Largest relative change of scale.
        stretch: Largest relative change of the aspect ratio.
        shift: Largest shift as a share of the side.
        brightness: Largest change, in standard deviations of the dataset.
        contrast: Largest relative change.
        flip: Whether left and right may be exchanged.
        erase: Probability that a rectangle is blanked (arXiv:1708.04896).
        is_single: Whether an image gets only one of these (or none), beside the flip.
    """

    rotate: float = 0.0
    zoom: float = 0.0
    stretch: float = 0.0
    shift: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    flip: bool = False
    erase: float = 0.0
    is_single: bool = False


# Grey, medical, characters: left is not right, and small findings must not be erased.
# Ranges assumed.
GENTLE = Augmentation(rotate=10, zoom=0.1, stretch=0.05, shift=0.08, brightness=0.1, contrast=0.1)
AUGMENTATIONS = {
    "none": Augmentation(),
    "gentle": GENTLE,
    "medical": GENTLE,
    # Photographs. Erasing 0.25: arXiv:1708.04896; the ranges are assumed.
    "natural": Augmentation(
        rotate=5, zoom=0.2, stretch=0.1, shift=0.125, brightness=0.2, contrast=0.2,
        flip=True, erase=0.25,
    ),
    # Photographs, one strong transform at a time: TrivialAugment, arXiv:2103.10158, with the
    # transforms there are here; ranges assumed.
    "trivial": Augmentation(
        rotate=30, zoom=0.4, stretch=0.3, shift=0.3, brightness=0.8, contrast=0.8,
        flip=True, erase=1.0, is_single=True,
    ),
}  # fmt: skip
# Columns of the draws that belong together; a single transform is one of these, or none.
TRANSFORMS = ((0,), (1,), (2,), (4, 5), (6,), (7,), (12,), ())


def augment(
    images_BCHW: Tensor, samples: NDArray[np.int64], how: Augmentation, *, seed: int, epoch: int
) -> Tensor:
    """Returns transformed copies of normalised images (mean 0, std 1 for each channel)."""
    if how == Augmentation():
        return images_BCHW
    drawn = uniform(seed, epoch, samples, CHOICE_DRAW + 1)
    if how.is_single:
        _leave_one(drawn)
    draws = torch.from_numpy(drawn).to(images_BCHW)
    signed = 2 * draws - 1
    images_BCHW = _warp(images_BCHW, signed, how)
    gain, offset = 1 + how.contrast * signed[:, 6], how.brightness * signed[:, 7]
    images_BCHW.mul_(gain[:, None, None, None]).add_(offset[:, None, None, None])
    return _erase(images_BCHW, draws, how.erase) if how.erase else images_BCHW


def _leave_one(drawn: NDArray[np.float32]) -> None:
    """Puts all draws but those of one transform where they do nothing."""
    chosen = (drawn[:, CHOICE_DRAW] * len(TRANSFORMS)).astype(int)
    for number, columns in enumerate(TRANSFORMS):
        for column in columns:
            idle = 1.0 if column == 12 else 0.5  # an erasure happens below its probability
            drawn[chosen != number, column] = idle


def uniform(seed: int, epoch: int, samples: NDArray[np.int64], number: int) -> NDArray[np.float32]:
    """Returns numbers in [0, 1), shape (samples, number), a function of the arguments alone.

    Source: SplitMix64, Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195.
    """
    with np.errstate(over="ignore"):
        start = _mix(_mix(np.array([seed], np.uint64)) + np.array([epoch], np.uint64))
        state = _mix(start + samples.astype(np.uint64))[:, None]
        steps = np.arange(1, number + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        bits = _mix(state + steps[None, :])
    return ((bits >> np.uint64(40)).astype(np.float32)) / np.float32(2**24)


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _warp(images_BCHW: Tensor, signed: Tensor, how: Augmentation) -> Tensor:
    height, width = images_BCHW.shape[2:]
    angle = signed[:, 0] * how.rotate * pi / 180
    scale = 1 + signed[:, 1] * how.zoom
    aspect = 1 + signed[:, 2] * how.stretch
    mirror = torch.where(signed[:, 3] < 0, -1.0, 1.0) if how.flip else torch.ones_like(scale)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    # The grid spans [-1, 1] on each side: a rotation must undo the aspect of the image. Sums of a
    # row and a column: measured 6x faster than `affine_grid`'s product of matrices.
    columns, rows = (_centres(side, images_BCHW) for side in (width, height))
    x = (cos * aspect * mirror)[:, None] * columns, (-sin * height / width)[:, None] * rows
    y = (sin * mirror * width / height)[:, None] * columns, (cos / aspect)[:, None] * rows
    shift = 2 * how.shift * signed[:, 4:6, None]
    grid = images_BCHW.new_empty(len(images_BCHW), height, width, 2)
    torch.add(x[0][:, None, :], (x[1] + shift[:, 0])[:, :, None], out=grid[..., 0])
    torch.add(y[0][:, None, :], (y[1] + shift[:, 1])[:, :, None], out=grid[..., 1])
    return functional.grid_sample(images_BCHW, grid, padding_mode="border", align_corners=False)


def _centres(side: int, like: Tensor) -> Tensor:
    """Returns the centres of the pixels of one side, on [-1, 1]."""
    return (2 * torch.arange(side, dtype=like.dtype, device=like.device) + 1) / side - 1


def _erase(images_BCHW: Tensor, draws: Tensor, probability: float) -> Tensor:
    height, width = images_BCHW.shape[2:]
    for number in torch.nonzero(draws[:, 12] < probability)[:, 0].tolist():
        # Sides of 15 to 45 % of the image, so areas of 2 to 20 % (arXiv:1708.04896: 2 to 40 %).
        sizes, places = (0.15 + 0.3 * draws[number, 8:10]).tolist(), draws[number, 10:12].tolist()
        tall, wide = sizes[0] * height, sizes[1] * width
        top, left = places[0] * (height - tall), places[1] * (width - wide)
        rows, columns = slice(ceil(top), ceil(top + tall)), slice(ceil(left), ceil(left + wide))
        images_BCHW[number, :, rows, columns] = 0.0
    return images_BCHW
