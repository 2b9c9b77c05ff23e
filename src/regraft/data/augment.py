"""Random transforms of a training batch, on tensors, on the device.

B batch, C channels, H height, W width. What happens to an image depends on (seed, epoch, sample)
alone: not on its place in a batch, on workers or on any global state.
"""

from dataclasses import dataclass
from math import pi

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

# Draws 0 to 12 transform an image; its place in the epoch has a draw of its own, since a shared
# one would fill each batch with images turned by the same angle.
ORDER_DRAW = 13


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
    """

    rotate: float = 0.0
    zoom: float = 0.0
    stretch: float = 0.0
    shift: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    flip: bool = False
    erase: float = 0.0


AUGMENTATIONS = {
    "none": Augmentation(),
    # Grey, medical, characters: left is not right, and small findings must not be erased.
    # Ranges assumed; that they help is measured: docs/log.md 2026-11-23.
    "gentle": Augmentation(
        rotate=10, zoom=0.1, stretch=0.05, shift=0.08, brightness=0.1, contrast=0.1
    ),
    # Photographs. Erasing 0.25: arXiv:1708.04896; the ranges are assumed.
    "natural": Augmentation(
        rotate=5, zoom=0.2, stretch=0.1, shift=0.125, brightness=0.2, contrast=0.2,
        flip=True, erase=0.25,
    ),
}  # fmt: skip


def augment(
    images_BCHW: Tensor, samples: NDArray[np.int64], how: Augmentation, *, seed: int, epoch: int
) -> Tensor:
    """Returns transformed copies of normalised images (mean 0, std 1 for each channel)."""
    if how == Augmentation():
        return images_BCHW
    draws = torch.from_numpy(uniform(seed, epoch, samples, ORDER_DRAW)).to(images_BCHW)
    signed = 2 * draws - 1
    images_BCHW = _warp(images_BCHW, signed, how)
    if how.contrast or how.brightness:
        gain = 1 + how.contrast * signed[:, 6, None, None, None]
        images_BCHW = images_BCHW * gain + how.brightness * signed[:, 7, None, None, None]
    return _erase(images_BCHW, draws, how.erase) if how.erase else images_BCHW


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
    mirror = torch.where(signed[:, 3] < 0, -1.0, 1.0) if how.flip else 1.0
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    # affine_grid works on [-1, 1] for each side: a rotation must undo the aspect of the image.
    theta = torch.stack(
        [
            torch.stack(
                [cos * aspect * mirror, -sin * height / width, how.shift * 2 * signed[:, 4]], 1
            ),
            torch.stack(
                [sin * mirror * width / height, cos / aspect, how.shift * 2 * signed[:, 5]], 1
            ),
        ],
        dim=1,
    )
    grid = functional.affine_grid(theta, list(images_BCHW.shape), align_corners=False)
    return functional.grid_sample(images_BCHW, grid, padding_mode="border", align_corners=False)


def _erase(images_BCHW: Tensor, draws: Tensor, probability: float) -> Tensor:
    height, width = images_BCHW.shape[2:]
    device = images_BCHW.device
    # Sides of 15 to 45 % of the image, so areas of 2 to 20 % (arXiv:1708.04896: 2 to 40 %).
    tall, wide = (0.15 + 0.3 * draws[:, 8]) * height, (0.15 + 0.3 * draws[:, 9]) * width
    top, left = draws[:, 10] * (height - tall), draws[:, 11] * (width - wide)
    rows = torch.arange(height, device=device)[None, :]
    columns = torch.arange(width, device=device)[None, :]
    in_rows = (rows >= top[:, None]) & (rows < (top + tall)[:, None])
    in_columns = (columns >= left[:, None]) & (columns < (left + wide)[:, None])
    hit = in_rows[:, :, None] & in_columns[:, None, :]
    hit &= (draws[:, 12] < probability)[:, None, None]
    return images_BCHW.masked_fill(hit[:, None], 0.0)
