"""Real images, on which an export must give what regraft gives."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regraft.data.cache import Cache
from regraft.data.dataset import Dataset
from regraft.data.decode import Pixels, UnreadableImage, map_in_threads, read_content, read_input
from regraft.errors import DataError, UsageError
from regraft.inputs import InputSpec
from regraft.run import Run

USUAL_NUMBER = 64  # images that an export is checked on; assumed
# Of a Run's own images, the first ones first: what is fit for use was judged on these.
PREFERRED = {"val": "validation", "train": "training"}


@dataclass(frozen=True)
class RealImages:
    """Decoded images.

    Attributes:
        images: (image, height, width, channel), not normalised.
        told: Which they are, for people.
    """

    images: NDArray[Any]
    told: str


def cached_images(run: Run, inputs: InputSpec, most: int) -> RealImages:
    """Returns images of the Run that its training has decoded.

    Raises:
        UsageError: The cache no longer has them.
    """
    samples = [sample for sample in run.samples() if "sha256" in sample]
    hashes = [sample["sha256"] for sample in samples]
    cache = Cache.find(hashes, inputs.size, inputs.channels)
    if cache is None:
        raise UsageError(
            "an export is checked on real images, and those of the run are not in the cache",
            hint="say where they are: `--data DATA` (others of the same kind will do)",
        )
    splits = [sample["split"] for sample in samples]
    rows = _chosen(splits, most)
    told = f"{_counted([splits[row] for row in rows])} of the run, from the cache"
    return RealImages(cache.images[rows], told)


def images_in(dataset: Dataset, run: Run | None, inputs: InputSpec, most: int) -> RealImages:
    """Returns images of a dataset: the Run's own where it has them, otherwise any.

    Raises:
        DataError: One cannot be read.
    """
    known = {} if run is None else {s["sha256"]: s["split"] for s in run.samples() if "sha256" in s}
    splits: list[str] = [known.get(sample.sha256, "") for sample in dataset.samples]
    rows = _chosen(splits, most)
    told = f"{_counted([splits[row] for row in rows])} of the run" if len(rows) else ""
    if not len(rows):
        rows = _spread(np.arange(len(dataset.samples)), most)
        told = f"{len(rows)} images of `{dataset.root.name}`, none of them the run's"

    def read(row: int) -> Pixels | UnreadableImage:
        try:
            path = dataset.samples[row].path
            return read_input(read_content(dataset.root, path), inputs)
        except UnreadableImage as error:
            return error

    found = list(map_in_threads(read, [int(row) for row in rows]))
    if broken := [each for each in found if isinstance(each, UnreadableImage)]:
        raise DataError(
            f"`{dataset.root}` has images that cannot be read: {broken[0]}",
            hint="give other images of the same kind with `--data`",
        )
    return RealImages(np.stack([np.asarray(each, np.float32) for each in found]), told)


def _chosen(splits: Sequence[str], most: int) -> NDArray[np.int64]:
    """Returns rows of validation images, and of training images where these are few."""
    rows = np.zeros(0, dtype=np.int64)
    for split in PREFERRED:
        own = np.flatnonzero(np.array(splits) == split)
        rows = np.concatenate([rows, _spread(own, most - len(rows))])
    return rows


def _spread(rows: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Returns at most so many of the rows, of all classes where they are sorted by class."""
    if len(rows) <= most:
        return rows
    return rows[np.linspace(0, len(rows) - 1, most).astype(np.int64)]


def _counted(splits: Sequence[str]) -> str:
    numbers = Counter(splits)
    return (
        " and ".join(
            f"{numbers[split]} {word}" for split, word in PREFERRED.items() if numbers[split]
        )
        + " images"
    )
