"""Cache: every image decoded once, at one size, never augmented, memory-mapped on disk.

It lies in the user's cache folder (`REGRAFT_CACHE`), never in the data, and is keyed by content
and decode rule: the same images in another folder find it again.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from regraft.data.dataset import Dataset, Sample, unreadable_problem, unusable
from regraft.data.decode import (
    CHUNK,
    UnreadableImage,
    map_in_threads,
    read_content,
    read_pixels,
)
from regraft.disk import create_array
from regraft.errors import ArtefactError, UsageError
from regraft.inputs import DECODER, InputSpec
from regraft.storage import (
    cache_home,
    committed_folder,
    is_whole,
    make_cache,
    read_json,
    remove_folder,
    remove_leftovers,
    sha256_of,
    write_json,
)


@dataclass(frozen=True)
class Cache:
    """Decoded pixels of one Dataset.

    Attributes:
        images: Memory-mapped (image, height, width, channel), uint8 or uint16, in the order of
            `Dataset.samples`.
        is_grey: All channels of all images are equal (grey content, however it was stored).
        key: Names contents and decode rule.
    """

    images: NDArray[np.uint8] | NDArray[np.uint16]
    is_grey: bool
    key: str

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
        folder = cache_home() / _key(dataset, size, channels)
        while (cached := _load(folder)) is None:  # again, where another process removed it
            make_cache(folder.parent)
            remove_leftovers(folder.parent)
            if folder.is_dir():
                on_note(f"warning: the cache `{folder}` was damaged: decoding again")
                remove_folder(folder)
            try:
                _fill(folder, dataset, size, channels, on_progress)
            except _BrokenImages as found:
                if "unreadable" not in dataset.options.allow:
                    problem = unreadable_problem([(s.path, error) for s, error in found.broken])
                    raise unusable(dataset.root, [problem]) from found
                return cls.build(
                    dataset.without(found.broken), size, channels, on_progress, on_note
                )
        return cached, dataset

    def statistics(self, rows: NDArray[np.int64]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Returns mean and standard deviation of each channel over these rows, on [0, 1]."""
        largest, channels = int(np.iinfo(self.images.dtype).max), self.images.shape[-1]
        # How often each value stands in each channel: exact, and measured 4x faster than floats.
        counts = np.zeros((channels, largest + 1), dtype=np.int64)
        for start in range(0, len(rows), CHUNK):
            chunk = self.images[rows[start : start + CHUNK]].reshape(-1, channels)
            for channel in range(channels):
                counts[channel] += np.bincount(chunk[:, channel], minlength=largest + 1)
        share = counts / counts.sum(axis=1, keepdims=True)
        values = np.arange(largest + 1) / largest
        mean = share @ values
        # The floor keeps constant images (std 0) from dividing by nothing.
        std = np.sqrt(np.maximum(share @ values**2 - mean**2, 1e-8))
        return tuple(mean.tolist()), tuple(std.tolist())

    def with_statistics(self, inputs: InputSpec, rows: NDArray[np.int64]) -> InputSpec:
        """Returns the specification with mean and std measured over these (training) rows."""
        mean, std = self.statistics(rows)
        return replace(inputs, mean=mean, std=std)


def _load(folder: Path) -> Cache | None:
    """Returns the entry, or None where there is none or it is damaged."""
    if not is_whole(folder):
        return None
    try:
        images = np.load(folder / "images.npy", mmap_mode="r")
        is_grey = bool(read_json(folder / "cache.json")["is_grey"])
        return Cache(images, is_grey, folder.name)
    except (OSError, ValueError, KeyError, TypeError, ArtefactError):
        return None


def _key(dataset: Dataset, size: tuple[int, int], channels: int) -> str:
    contents = [sample.sha256 for sample in dataset.samples]
    return sha256_of([1, DECODER, list(size), channels, dataset.bit_depth, contents])


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
    broken = []
    is_grey = True
    with committed_folder(folder, "cache") as temporary:
        images = create_array(
            temporary / "images.npy",
            dtype=np.uint16 if dataset.bit_depth == 16 else np.uint8,
            shape=(len(dataset.samples), *size, channels),
        )

        def decode(row: int) -> bool | UnreadableImage:
            """Stores an image, and returns whether it is grey; threads work side by side."""
            sample = dataset.samples[row]
            try:
                content = read_content(dataset.root, sample.path)
                raw = content if isinstance(content, bytes) else content.tobytes()
                if hashlib.sha256(raw).hexdigest() != sample.sha256:
                    raise UnreadableImage("changed", "not the bytes that were listed")
                pixels = read_pixels(content, sample.path, size=size, channels=channels)
            except UnreadableImage as error:
                return error
            images[row] = pixels
            return bool((pixels == pixels[..., :1]).all())

        for row, found in enumerate(map_in_threads(decode, range(len(dataset.samples)))):
            if isinstance(found, UnreadableImage):
                broken.append((dataset.samples[row], found))
            else:
                is_grey = is_grey and found
            if on_progress is not None:
                on_progress(row + 1, len(dataset.samples))
        if broken:
            raise _BrokenImages(broken)  # nothing incomplete is committed under the key
        images.flush()
        write_json(temporary / "cache.json", {"schema": 1, "is_grey": is_grey})
