"""What a picture looks like in few numbers, whatever its encoding, size and contrast.

Two views of every picture, both of its grey values. The thumb is the whole picture at 32 x 32: it
finds a picture that was cropped. The disc holds the rings of its inscribed circle: a turned or
mirrored copy has the same rings, shifted or reversed. A perceptual hash is the thumb in 99 numbers,
for those who have the picture no more.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from mmap import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[Any]  # float32, but for what the FFT gives
Rows = NDArray[np.int64]

SIDE = 32  # of a thumb
SEEN = 96  # least pixels of the shorter side that are looked at
REDUCED = 64  # what both views are read from; measured: docs/log.md 2026-11-25
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, by which Pillow makes grey pictures
RINGS, ANGLES = 16, 64
HASH_SIDE = 10  # frequencies of each axis in a hash
TOGETHER = 32  # pictures that are looked at in one call of numpy; assumed
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
        """Returns room for so many, in memory that forked processes share."""
        flat = _shared((number,), np.bool_)
        flat[:] = True
        thumbs = _shared((number, SIDE, SIDE), np.uint8)
        return cls(thumbs, _shared((number, RINGS, ANGLES), np.uint8), flat)

    def part(self, start: int, number: int) -> "Looks":
        """Returns a view of some of them, one after the other."""
        rows = slice(start, start + number)
        return Looks(self.thumbs[rows], self.discs[rows], self.flat[rows])

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

    def hashes(self) -> NDArray[np.int8]:
        """Returns the perceptual hash of each picture, from its thumb."""
        return _hashes(self.thumbs.astype(np.float32), self.flat)

    def set(self, rows: Rows, seen: Sequence["Seen"]) -> NDArray[np.float64]:
        """Stores what pictures look like, those of one form together.

        Returns:
            Of each, the mean brightness of the whole and of its border.
        """
        alike: dict[tuple[tuple[int, int], str], list[int]] = defaultdict(list)
        for place, one in enumerate(seen):
            alike[one.size, one.pixel_type].append(place)
        means = np.zeros((len(seen), 2))
        for (size, pixel_type), places in alike.items():
            reduced = _reduced([seen[place] for place in places])
            means[places, 0] = reduced.mean(axis=(1, 2))
            edges = (reduced[:, 0], reduced[:, -1], reduced[:, :, 0], reduced[:, :, -1])
            means[places, 1] = np.concatenate(edges, axis=1).mean(axis=1)
            is_flat = _is_flat(reduced, pixel_type)
            shown = rows[places][~is_flat]
            self.flat[rows[places]] = is_flat
            grey = _stretched(reduced[~is_flat])
            self.thumbs[shown] = _thumbs(grey)
            self.discs[shown] = np.rint(_rings(grey, *size))
        return means


@dataclass(frozen=True, slots=True)
class Seen:
    """The grey values of every so many-th pixel of a picture, as its looks need no more.

    Attributes:
        grey: (height, width), what is left still being averaged over.
        size: (height, width) of the whole picture.
        pixel_type: Of the whole picture.
    """

    grey: Floats
    size: tuple[int, int]
    pixel_type: str

    @classmethod
    def of(cls, pixels: NDArray[Any], pixel_type: str) -> "Seen":
        """Takes a (height, width, channels) picture; bands that are not RGB weigh the same."""
        height, width, channels = pixels.shape
        stride = max(1, min(height, width) // SEEN)
        seen = pixels[::stride, ::stride]
        weights = LUMA if channels == 3 else (1 / channels,) * channels
        grey = weights[0] * seen[..., 0].astype(np.float32)
        for weight, channel in zip(weights[1:], range(1, channels), strict=True):
            grey += np.float32(weight) * seen[..., channel]
        return cls(grey, (height, width), pixel_type)


def perceptual_hashes(pixels: NDArray[Any]) -> NDArray[np.int8]:
    """Returns what (picture, height, width, channels) look like in 99 numbers each.

    They are the lowest frequencies (DCT) of a thumb, the higher ones raised, as all pictures agree
    in the lowest. A mirror changes signs, a quarter turn also the order. All are 0 of a picture
    that shows nothing.
    """
    pixel_type = pixels.dtype.name
    reduced = _reduced([Seen.of(one, pixel_type) for one in pixels])
    return _hashes(_thumbs(_stretched(reduced)), _is_flat(reduced, pixel_type))


def _hashes(thumbs: Floats, is_flat: NDArray[np.bool_]) -> NDArray[np.int8]:
    waves = cosines(HASH_SIDE)
    values = ((waves @ thumbs @ waves.T) * _raised()).reshape(len(thumbs), -1)[:, 1:]
    largest = np.maximum(abs(values).max(axis=1, keepdims=True), 1e-6)
    hashes: NDArray[np.int8] = np.rint(values * (127 / largest)).astype(np.int8)
    hashes[is_flat] = 0
    return hashes


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


def _shared(shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
    """Returns zeros that processes forked from here see and fill too."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(mmap(-1, max(size, 1)), dtype, int(np.prod(shape))).reshape(shape)


def _is_flat(grey: Floats, pixel_type: str) -> NDArray[np.bool_]:
    # A 12-bit picture uses a sixteenth of its file's range; others have a range of their own.
    unit = {"uint8": 1, "uint16": 16}.get(pixel_type, 0)
    return np.asarray(grey.std(axis=(1, 2)) <= FLAT * unit)


def _stretched(grey: Floats) -> Floats:
    """Returns the grey values of each picture from 0 to 255."""
    low = grey.min(axis=(1, 2), keepdims=True)
    high = grey.max(axis=(1, 2), keepdims=True)
    stretched: Floats = (grey - low) * (255 / np.maximum(high - low, 1e-12)).astype(np.float32)
    return stretched


def _thumbs(grey: Floats) -> Floats:
    small = resampling(REDUCED, SIDE)
    thumbs: Floats = np.rint(small @ grey @ small.T)
    return thumbs


def _reduced(seen: Sequence[Seen]) -> Floats:
    """Returns the grey values of pictures of one size at 64 x 64."""
    grey = np.stack([one.grey for one in seen])
    height, width = grey.shape[1:]
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
    """Returns pictures along circles round their middle, as large as the shorter side allows."""
    y, x, y_share, x_share = _ring_places(height, width)
    above = grey[:, y, x] * (1 - x_share) + grey[:, y, x + 1] * x_share
    below = grey[:, y + 1, x] * (1 - x_share) + grey[:, y + 1, x + 1] * x_share
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
