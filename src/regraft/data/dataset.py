"""Dataset: a validated, read-only collection of labelled images, split for honest training."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regraft.data.decode import UnreadableImage
from regraft.data.exclusions import excluded_name
from regraft.data.split import SPLITS, split_problems
from regraft.documents import sha256_of
from regraft.errors import DataError, RegraftError, count, shorten


@dataclass(frozen=True)
class DataOptions:
    """How a folder is read.

    Attributes:
        csv: A CSV, TSV or JSON Lines file that names images (relative to the folder) and labels,
            instead of class folders.
        image_column: Its column of image paths.
        label_column: Its column of class names.
        group_column: Its column of groups (patients); a group is never divided between splits.
        split_column: Its column of splits (train, val, test).
        group_regex: Groups from file names: the first parenthesis, or the whole match.
        group_by: `patient`: groups from the patients that DICOM files name, as pseudonyms.
        intensity_range: The values that become 0 and 1; None: all of 8 bits, the real range of 16.
        frames: `first` of several frames or pages is read, or `fail`.
        relabel: New classes from old ones, as `even=0,2,4,6,8`; classes not named are left out.
        per_class: At most this many training and this many validation images of a class.
        allow: Findings to accept: `unreadable` leaves broken files out, `leak` leaves out
            validation and test images that are in an earlier split too; others are noted.
        exclude_from: JSON of a check, whose files are left out; `FILE:CODE,CODE` for some findings.
    """

    csv: Path | None = None
    image_column: str = "image"
    label_column: str = "label"
    group_column: str | None = None
    split_column: str | None = None
    group_regex: str | None = None
    group_by: str | None = None
    intensity_range: tuple[float, float] | None = None
    frames: str = "first"
    relabel: tuple[str, ...] = ()
    per_class: int | None = None
    allow: tuple[str, ...] = ()
    exclude_from: str | None = None

    def to_dict(self) -> dict[str, Any]:
        placeless = {
            "csv": None if self.csv is None else self.csv.name,
            "exclude_from": excluded_name(self.exclude_from),
        }
        return asdict(self) | placeless


@dataclass(frozen=True, slots=True)
class Sample:
    """One image: where it lies below the root, what it shows, whose it is, and its content."""

    path: str
    label: str
    split: str
    sha256: str
    group: str | None = None


@dataclass(frozen=True)
class Dataset:
    """Labelled images of one folder, ordered, split and fingerprinted; never written to.

    Attributes:
        root: The folder.
        class_names: In code-point order; the index of a name is its label everywhere.
        samples: Sorted by path.
        excluded: Everything found and not used, as (path, reason).
        channels: 1 or 3 (grey images among RGB ones are replicated), or n.
        pixel_types: Each type of pixels (uint8, uint16, int16, float32), and how many images have
            it; more than one only where an intensity range is given.
        notes: What was decided on the way, for people.
    """

    root: Path
    class_names: tuple[str, ...]
    samples: tuple[Sample, ...]
    excluded: tuple[tuple[str, str], ...]
    channels: int
    pixel_types: tuple[tuple[str, int], ...] = (("uint8", 0),)
    options: DataOptions = DataOptions()
    notes: tuple[str, ...] = ()

    @classmethod
    def open(
        cls, root: str | Path, options: DataOptions | None = None, *, whole: bool = False
    ) -> "Dataset":
        """Reads every file once (hash and header) and splits the images.

        Args:
            root: The folder.
            options: How to read it.
            whole: For evaluation: nothing is split or limited, and images without a split of
                their own are test images.

        Raises:
            DataError: The folder cannot be used; all its problems at once.
            UsageError: An option does not fit.
        """
        from regraft.data.opening import open_dataset  # it builds what this file defines

        return open_dataset(Path(root), options or DataOptions(), whole=whole)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of contents and class names: independent of the folder's place and of mtimes."""
        return sha256_of(sorted((sample.sha256, sample.label) for sample in self.samples))

    @property
    def pixel_type(self) -> str:
        """The narrowest type that holds the pixels of all images."""
        common = np.result_type(*(np.dtype(name) for name, _ in self.pixel_types)).name
        return common if common in ("uint8", "uint16", "int16") else "float32"

    @property
    def bit_depth(self) -> int:
        """8, 16 or 32: of `pixel_type`."""
        return np.dtype(self.pixel_type).itemsize * 8

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """Class index of each sample."""
        index = {name: position for position, name in enumerate(self.class_names)}
        return np.array([index[sample.label] for sample in self.samples], dtype=np.int64)

    def rows(self, split: str) -> NDArray[np.int64]:
        """Positions in `samples` of one split, in order."""
        rows = [row for row, sample in enumerate(self.samples) if sample.split == split]
        return np.array(rows, dtype=np.int64)

    def without(self, broken: Sequence[tuple[Sample, UnreadableImage]]) -> "Dataset":
        """Returns the dataset without these images; they are listed as excluded.

        Raises:
            DataError: Too little is left of a class or a split that was there.
        """
        out = {sample for sample, _ in broken}
        kept = tuple(sample for sample in self.samples if sample not in out)
        problems = []
        if gone := sorted(set(self.class_names) - {sample.label for sample in kept}):
            problems.append(f"no image of {shorten(gone)} can be read")
        if any(sample.split != "test" for sample in self.samples):
            labels, splits = [s.label for s in kept], [s.split for s in kept]
            problems += split_problems(labels, splits)[0]
        if problems:
            raise unusable(self.root, problems)
        left_out = tuple((sample.path, str(error)) for sample, error in broken)
        return replace(self, samples=kept, excluded=self.excluded + left_out)

    def summary(self) -> str:
        sizes = Counter(sample.split for sample in self.samples)
        parts = ", ".join(f"{sizes[split]:,} {split}" for split in SPLITS if sizes[split])
        names = shorten(path for path, _ in self.excluded)
        left_out = f"; {count(len(self.excluded), 'file')} left out: {names}" if names else ""
        grouped = len({sample.group for sample in self.samples if sample.group is not None})
        groups = f" of {count(grouped, 'group')}" if grouped else ""
        return (
            f"{count(len(self.samples), 'image')}{groups} in "
            f"{count(len(self.class_names), 'class', 'classes')} ({parts}){left_out}"
        )


def unusable(root: Path, problems: Sequence[str], hint: str = "") -> RegraftError:
    """Returns the one error for a dataset that cannot be used.

    Args:
        root: Its folder.
        problems: All that is wrong.
        hint: What to do; empty: mend these, or allow what can be allowed.
    """
    told = "\n".join(problems)
    ways = [
        f"{what} with `--allow {code}`"
        for sign, what, code in (
            ("cannot be read", "leave broken files out", "unreadable"),
            ("with equal bytes, e.g.", "leave copies out", "leak"),
        )
        if sign in told
    ]
    if "`--group-regex`" in told:
        ways.append("change `--group-regex`: it is searched in the file name")
    return DataError(
        f"`{root}` cannot be used: {count(len(problems), 'problem')}",
        problems=problems,
        hint=hint or ", or ".join(["mend the data", *ways]),
    )


def unreadable_problem(broken: Sequence[tuple[str, UnreadableImage]]) -> str:
    """Returns one line for all files that cannot be read."""
    reasons: dict[str, list[str]] = {}
    for path, error in broken:
        reasons.setdefault(str(error), []).append(path)
    most = sorted(reasons.items(), key=lambda item: -len(item[1]))
    told = ", ".join(f"{shorten(paths)} ({reason})" for reason, paths in most[:3])
    others = sum(len(paths) for _, paths in most[3:])
    more = f" and {count(others, 'other')}" if others else ""
    return f"{count(len(broken), 'file')} cannot be read: {told}{more}"
