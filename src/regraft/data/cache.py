"""Cache: every image decoded once, at one size, never augmented, memory-mapped on disk.

It lies in the user's cache folder (`REGRAFT_CACHE`), never in the data, and is keyed by content
and decode rule: the same images in another folder find it again.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regraft.data.dataset import Dataset, Sample, unreadable_problem, unusable
from regraft.data.decode import (
    CHUNK,
    UnreadableImage,
    content_hash,
    map_in_threads,
    read_content,
    read_whole,
    with_channels,
)
from regraft.data.looks import HASH_SIDE, TOGETHER, perceptual_hashes
from regraft.data.pictures import resized
from regraft.disk import create_array, require_space
from regraft.documents import read_json, sha256_of
from regraft.errors import ArtefactError, EnvironmentFault, UsageError
from regraft.inputs import DECODER, InputSpec
from regraft.parallel import one_thread
from regraft.storage import (
    cache_home,
    committed_folder,
    is_whole,
    make_cache,
    remove_folder,
    remove_leftovers,
    write_json,
)

MOST_IN_MEMORY = 4 * 2**30  # bytes of an array of images, where the disk is full; assumed
DIGEST_BYTES = 16  # of a SHA-256: two of 200,000 images agree by chance once in 1e28
PIXEL_TYPES = ("uint8", "uint16", "int16", "float32")


@dataclass(frozen=True)
class Cache:
    """Decoded pixels of one Dataset.

    Attributes:
        images: Memory-mapped (image, height, width, channel), uint8, uint16, int16 or float32, in
            the order of `Dataset.samples`.
        is_grey: All channels of all images are equal (grey content, however it was stored).
        key: Names contents and decode rule.
        ends: The smallest and largest value of each image before it was resized.
        digests: Hash of each image's pixels, 16 bytes.
        hashes: Perceptual hash of each image (`looks.perceptual_hashes`).
    """

    images: NDArray[Any]
    is_grey: bool
    key: str
    ends: NDArray[np.float64]
    digests: NDArray[np.uint8]
    hashes: NDArray[np.int8]

    @classmethod
    def build(
        cls,
        dataset: Dataset,
        size: tuple[int, int],
        channels: int,
        on_progress: Callable[[int, int], None] | None = None,
        on_note: Callable[[str], None] = lambda _text: None,
    ) -> tuple["Cache", Dataset]:
        """Decodes what no earlier run has decoded, or what is damaged; that is told to `on_note`.

        Returns:
            The cache, and the dataset without the images that turned out to be broken, where the
            user allowed to leave such images out (`--allow unreadable`).

        Raises:
            DataError: Images cannot be decoded; all of them are named.
        """
        if cache_home().resolve().is_relative_to(dataset.root.resolve()):
            raise UsageError(
                f"the cache `{cache_home()}` lies inside the data, which is never written to",
                hint="set REGRAFT_CACHE to another folder",
            )
        hashes = [sample.sha256 for sample in dataset.samples]
        folder = cache_home() / _key(hashes, size, channels, dataset.pixel_type)
        while (cached := _load(folder)) is None:  # again, where another process removed it
            make_cache(folder.parent)
            remove_leftovers(folder.parent)
            if folder.is_dir() and not is_whole(folder):  # and nobody committed it just now
                on_note(f"warning: the cache `{folder}` was damaged: decoding again")
                remove_folder(folder)
            try:
                try:
                    _fill(folder, dataset, size, channels, on_progress)
                except EnvironmentFault as fault:
                    try:
                        cached = _decoded(_in_memory, dataset, size, channels, on_progress)
                    except MemoryError:
                        raise fault from None
                    on_note(f"warning: {fault.message}; the images stay in memory this time")
                    return replace(cached, key=folder.name), dataset
            except _BrokenImages as found:
                if "unreadable" not in dataset.options.allow:
                    problem = unreadable_problem([(s.path, error) for s, error in found.broken])
                    raise unusable(dataset.root, [problem]) from found
                return cls.build(
                    dataset.without(found.broken), size, channels, on_progress, on_note
                )
        return cached, dataset

    @classmethod
    def find(cls, hashes: Sequence[str], size: tuple[int, int], channels: int) -> "Cache | None":
        """Returns what was decoded before of the images with these contents, in their order."""
        for pixel_type in PIXEL_TYPES:
            cached = _load(cache_home() / _key(hashes, size, channels, pixel_type))
            if cached is not None:
                return cached
        return None

    def extremes(self, rows: NDArray[np.int64]) -> tuple[float, float]:
        """Returns the smallest and the largest value of these images."""
        return float(self.ends[rows, 0].min()), float(self.ends[rows, 1].max())

    def with_statistics(self, inputs: InputSpec, rows: NDArray[np.int64]) -> InputSpec:
        """Returns the specification with mean and std measured over these (training) rows."""
        moments = self._moments_of_floats if self.images.dtype == np.float32 else self._moments
        mean, square = moments(inputs, rows)
        # The floor keeps constant images (std 0) from dividing by nothing.
        std = np.sqrt(np.maximum(square - mean**2, 1e-8))
        return replace(inputs, mean=tuple(mean.tolist()), std=tuple(std.tolist()))

    def _moments(
        self, inputs: InputSpec, rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Returns the means of the values and of their squares, of each channel, on [0, 1]."""
        ends, channels = np.iinfo(self.images.dtype), self.images.shape[-1]
        number = int(ends.max) - int(ends.min) + 1
        # How often each value stands in each channel: exact, and measured 4x faster than floats.
        counts = np.zeros((channels, number), dtype=np.int64)
        for start in range(0, len(rows), CHUNK):
            chunk = self.images[rows[start : start + CHUNK]].reshape(-1, channels)
            chunk = chunk.astype(np.int32) - int(ends.min) if ends.min < 0 else chunk
            for channel in range(channels):
                counts[channel] += np.bincount(chunk[:, channel], minlength=number)
        share = counts / counts.sum(axis=1, keepdims=True)
        values = inputs.scaled(np.arange(int(ends.min), int(ends.max) + 1, dtype=np.float64))
        return share @ values, share @ values**2

    def _moments_of_floats(
        self, inputs: InputSpec, rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        sums = np.zeros((2, self.images.shape[-1]))
        for start in range(0, len(rows), CHUNK):
            chunk = self.images[rows[start : start + CHUNK]].astype(np.float64)
            values = inputs.scaled(chunk.reshape(-1, sums.shape[1]))
            sums += [values.sum(axis=0), (values**2).sum(axis=0)]
        mean, square = sums / (len(rows) * self.images[0, ..., 0].size)
        return mean, square


def _load(folder: Path) -> Cache | None:
    """Returns the entry, or None where there is none or it is damaged."""
    if not is_whole(folder):
        return None
    try:
        images = np.load(folder / "images.npy", mmap_mode="r")
        ends = np.load(folder / "ends.npy")
        is_grey = bool(read_json(folder / "cache.json")["is_grey"])
        digests, hashes = np.load(folder / "digests.npy"), np.load(folder / "hashes.npy")
        return Cache(images, is_grey, folder.name, ends, digests, hashes)
    except (OSError, ValueError, KeyError, TypeError, ArtefactError):
        return None


def _key(hashes: Sequence[str], size: tuple[int, int], channels: int, pixel_type: str) -> str:
    return sha256_of([3, DECODER, list(size), channels, pixel_type, list(hashes)])


class _BrokenImages(Exception):
    def __init__(self, broken: list[tuple[Sample, UnreadableImage]]) -> None:
        super().__init__(f"{len(broken)} images")
        self.broken = broken


def _fill(
    folder: Path,
    dataset: Dataset,
    size: tuple[int, int],
    channels: int,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    """Commits the entry, or nothing."""
    needed = len(dataset.samples) * size[0] * size[1] * channels
    require_space(folder.parent, needed * np.dtype(dataset.pixel_type).itemsize)
    mapped = []
    with committed_folder(folder, "cache") as temporary:

        def make(name: str, dtype: Any, shape: tuple[int, ...]) -> NDArray[Any]:
            mapped.append(create_array(temporary / f"{name}.npy", dtype, shape))
            return mapped[-1]  # type: ignore[no-any-return]

        is_grey = _decoded(make, dataset, size, channels, on_progress).is_grey
        for array in mapped:
            array.flush()
        write_json(temporary / "cache.json", {"schema": 1, "is_grey": is_grey})


def _in_memory(name: str, dtype: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    size_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if size_bytes > MOST_IN_MEMORY:
        raise MemoryError(f"{name} of {size_bytes:,} bytes")
    return np.zeros(shape, dtype)


@one_thread
def _decoded(
    make: Callable[[str, Any, tuple[int, ...]], NDArray[Any]],
    dataset: Dataset,
    size: tuple[int, int],
    channels: int,
    on_progress: Callable[[int, int], None] | None,
) -> Cache:
    """Decodes all images into arrays that `make` makes.

    Raises:
        _BrokenImages: Some cannot be decoded.
    """
    broken = []
    is_grey = True
    number = len(dataset.samples)
    images = make("images", np.dtype(dataset.pixel_type), (number, *size, channels))
    ends = make("ends", np.float64, (number, 2))
    digests = make("digests", np.uint8, (number, DIGEST_BYTES))
    hashes = make("hashes", np.int8, (number, HASH_SIDE**2 - 1))

    def decode(row: int) -> bool | UnreadableImage:
        """Stores an image, and returns whether it is grey; threads work side by side."""
        sample = dataset.samples[row]
        try:
            content = read_content(dataset.root, sample.path)
            if content_hash(content).hex() != sample.sha256:
                raise UnreadableImage("changed", "not the bytes that were listed")
            whole = read_whole(content, size=size)
            pixels = with_channels(resized(whole, size), channels)
        except UnreadableImage as error:
            return error
        images[row] = pixels
        digest = hashlib.sha256(pixels.tobytes()).digest()[:DIGEST_BYTES]
        digests[row] = np.frombuffer(digest, np.uint8)
        ends[row] = (0, 255) if whole.dtype == np.uint8 else (whole.min(), whole.max())
        return whole.shape[2] == 1 or bool((pixels == pixels[..., :1]).all())

    for row, found in enumerate(map_in_threads(decode, range(number))):
        if isinstance(found, UnreadableImage):
            broken.append((dataset.samples[row], found))
        else:
            is_grey = is_grey and found
        if row % TOGETHER == TOGETHER - 1 or row == number - 1:
            own = slice(row - row % TOGETHER, row + 1)
            hashes[own] = perceptual_hashes(images[own])
        if on_progress is not None:
            on_progress(row + 1, number)
    if broken:
        raise _BrokenImages(broken)  # nothing incomplete is committed under the key
    return Cache(images, is_grey, "", ends, digests, hashes)
