"""What a picture looks like in few numbers, whatever its encoding, size and contrast.

Two views of every picture, both of its grey values. The thumb is the whole picture at 32 x 32: it
finds a picture that was cropped. The disc holds the rings of its inscribed circle: a turned or
mirrored copy has the same rings, shifted or reversed. A perceptual hash is the thumb in 99 numbers,
for those who have the picture no more.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[Any]  # float32, but for what the FFT gives
Rows = NDArray[np.int64]

SIDE = 32  # of a thumb
REDUCED = 96  # what both views are read from
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, by which Pillow makes grey pictures
RINGS, ANGLES = 16, 64
HASH_SIDE = 10  # frequencies of each axis in a hash
FLAT = 2.0  # grey values of 255: what varies less shows nothing to compare; assumed


@dataclass(frozen=True)
class Looks:
    """What many pictures look like.

    Attributes:
        thumbs: (picture, 32, 32), each stretched to the range 0 to 255.
        discs: (picture, ring, angle), likewise.
        flat: Which show nothing: uniform pictures are equal without being copies.
    """

    thumbs: NDArray[np.uint8]
    discs: NDArray[np.uint8]
    flat: NDArray[np.bool_]

    @classmethod
    def empty(cls, number: int) -> "Looks":
        return cls(
            np.zeros((number, SIDE, SIDE), np.uint8),
            np.zeros((number, RINGS, ANGLES), np.uint8),
            np.ones(number, np.bool_),
        )

    def taken(self, rows: Rows) -> "Looks":
        return Looks(self.thumbs[rows], self.discs[rows], self.flat[rows])

    def kept(self, rows: Rows) -> "Looks":
        """Returns those of these rows, in rising order, in the place of all: nothing is doubled."""
        if len(rows) == len(self.flat):
            return self
        for array in (self.thumbs, self.discs, self.flat):
            for start in range(0, len(rows), 4096):
                part = rows[start : start + 4096]
                array[start : start + len(part)] = array[part]
        return Looks(self.thumbs[: len(rows)], self.discs[: len(rows)], self.flat[: len(rows)])

    def set(self, row: int, pixels: NDArray[Any]) -> tuple[float, float]:
        """Stores how a (height, width, channels) picture looks.

        Returns:
            Mean brightness of the whole, and of its border.
        """
        reduced = _reduced(pixels)
        edges = (reduced[0], reduced[-1], reduced[:, 0], reduced[:, -1])
        means = float(reduced.mean()), float(np.concatenate(edges).mean())
        grey = _stretched(reduced, pixels.dtype.name)
        self.flat[row] = grey is None
        if grey is None:
            return means
        self.thumbs[row] = _thumb(grey)
        self.discs[row] = np.rint(_rings(grey, pixels.shape[0], pixels.shape[1]))
        return means


def perceptual_hash(pixels: NDArray[Any]) -> NDArray[np.int8]:
    """Returns what a picture looks like in 99 numbers; all 0 for one that shows nothing.

    They are the lowest frequencies (DCT) of its thumb, the higher ones raised, as all pictures
    agree in the lowest. A mirror changes signs, a quarter turn also the order.
    """
    grey = _stretched(_reduced(pixels), pixels.dtype.name)
    if grey is None:
        return np.zeros(HASH_SIDE**2 - 1, np.int8)
    waves = cosines(HASH_SIDE)
    return _hash(waves @ _thumb(grey) @ waves.T)


def perceptual_hashes(looks: Looks) -> NDArray[np.int8]:
    """Returns the perceptual hash of each picture, from its thumb."""
    waves = cosines(HASH_SIDE)
    hashes = np.zeros((len(looks.flat), HASH_SIDE**2 - 1), np.int8)
    for row in np.flatnonzero(~looks.flat):
        hashes[row] = _hash(waves @ looks.thumbs[row].astype(np.float32) @ waves.T)
    return hashes


def _hash(frequencies: Floats) -> NDArray[np.int8]:
    values = (frequencies * _raised()).ravel()[1:]
    return np.rint(values * (127 / max(float(abs(values).max()), 1e-6))).astype(np.int8)


def orientations(hashes: Floats) -> Iterator[Floats]:
    """Yields the hashes of the 8 ways to turn and mirror the pictures."""
    square = np.concatenate([np.zeros((len(hashes), 1), np.float32), hashes], axis=1)
    square = square.reshape(-1, HASH_SIDE, HASH_SIDE)
    signs = np.where(np.arange(HASH_SIDE) % 2, -1, 1).astype(np.float32)
    for view in (square, square.transpose(0, 2, 1)):
        for down, across in product((1, signs[:, None]), (1, signs)):
            yield (view * down * across).reshape(len(hashes), -1)[:, 1:]


@lru_cache(maxsize=1)
def _raised() -> Floats:
    steps = np.arange(HASH_SIDE, dtype=np.float32)
    return np.asarray(np.hypot(steps[:, None], steps))


def _stretched(grey: Floats, pixel_type: str) -> Floats | None:
    """Returns the grey values from 0 to 255; None for a picture that shows nothing."""
    # A 12-bit picture uses a sixteenth of its file's range; others have a range of their own.
    unit = {"uint8": 1, "uint16": 16}.get(pixel_type, 0)
    if grey.std() <= FLAT * unit:
        return None
    low, high = float(grey.min()), float(grey.max())
    stretched: Floats = (grey - low) * np.float32(255 / (high - low))
    return stretched


def _thumb(grey: Floats) -> Floats:
    small = resampling(REDUCED, SIDE)
    thumb: Floats = np.rint(small @ grey @ small.T)
    return thumb


def _reduced(pixels: NDArray[Any]) -> Floats:
    """Returns the grey values at 96 x 96; bands that are not RGB weigh the same."""
    stride = max(1, min(pixels.shape[:2]) // REDUCED)  # what is left is still averaged over
    seen = pixels[::stride, ::stride]
    channels = seen.shape[2]
    weights = LUMA if channels == 3 else (1 / channels,) * channels
    grey = weights[0] * seen[..., 0].astype(np.float32)
    for weight, channel in zip(weights[1:], range(1, channels), strict=True):
        grey += np.float32(weight) * seen[..., channel]
    height, width = grey.shape
    reduced: Floats = resampling(height, REDUCED) @ grey @ resampling(width, REDUCED).T
    return reduced


@lru_cache(maxsize=512)
def resampling(number: int, wanted: int, low: float = 0.0, high: float = 1.0) -> Floats:
    """Returns the matrix that resamples [low, high] of `number` values, antialiased."""
    scale = (high - low) * number / wanted
    centres = low * number + (np.arange(wanted) + 0.5) * scale
    apart = np.abs(np.arange(number) + 0.5 - centres[:, None])
    weights = np.maximum(0, 1 - apart / max(scale, 1.0))
    normed: Floats = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return normed


def _rings(grey: Floats, height: int, width: int) -> Floats:
    """Returns the picture along circles round its middle, as large as its shorter side allows."""
    y, x, y_share, x_share = _ring_places(height, width)
    above = grey[y, x] * (1 - x_share) + grey[y, x + 1] * x_share
    below = grey[y + 1, x] * (1 - x_share) + grey[y + 1, x + 1] * x_share
    rings: Floats = above * (1 - y_share) + below * y_share
    return rings


@lru_cache(maxsize=512)
def _ring_places(height: int, width: int) -> tuple[Rows, Rows, Floats, Floats]:
    radius = ((np.arange(RINGS) + 0.5) / RINGS)[:, None] * min(height, width) / 2
    angle = 2 * np.pi * np.arange(ANGLES) / ANGLES
    y = (0.5 + radius * np.sin(angle) / height) * REDUCED - 0.5
    x = (0.5 + radius * np.cos(angle) / width) * REDUCED - 0.5
    y, x = np.clip(y, 0, REDUCED - 1.001), np.clip(x, 0, REDUCED - 1.001)
    corner = y.astype(np.int64), x.astype(np.int64)
    return *corner, (y - corner[0]).astype(np.float32), (x - corner[1]).astype(np.float32)


@lru_cache(maxsize=2)
def cosines(number: int) -> Floats:
    """Returns the lowest `number` waves of the DCT (type II, orthonormal) of a thumb's side."""
    steps = np.arange(number)[:, None]
    waves = np.cos(np.pi * (2 * np.arange(SIDE) + 1) * steps / (2 * SIDE))
    waves *= np.where(steps == 0, np.sqrt(1 / SIDE), np.sqrt(2 / SIDE))
    return np.asarray(waves, np.float32)
