"""Dataset: a validated, read-only collection of labelled images, split for honest training."""

import hashlib
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regraft.data.decode import Header, UnreadableImage, quiet_codecs, read_content, read_header
from regraft.data.listing import Listed, Listing, list_csv, list_folder
from regraft.data.split import SPLITS, assign_splits
from regraft.errors import DataError, RegraftError, UsageError, count, shorten
from regraft.storage import sha256_of

MIN_IMAGES = 5  # assumed: fewer cannot stand in train, val and test and still be learned
ALLOWABLE = ("unreadable", "leak")


@dataclass(frozen=True)
class DataOptions:
    """How a folder is read.

    Attributes:
        csv: A CSV that names images (relative to the folder) and labels, instead of class folders.
        image_column: Its column of image paths.
        label_column: Its column of class names.
        group_column: Its column of groups (patients); a group is never divided between splits.
        split_column: Its column of splits (train, val, test).
        group_regex: Groups from file names: the first parenthesis, or the whole match.
        relabel: New classes from old ones, as `even=0,2,4,6,8`; classes not named are left out.
        per_class: At most this many training and this many validation images of a class.
        allow: Findings to accept: `unreadable` leaves broken files out, `leak` leaves out
            validation and test images that are in an earlier split too.
    """

    csv: Path | None = None
    image_column: str = "image"
    label_column: str = "label"
    group_column: str | None = None
    split_column: str | None = None
    group_regex: str | None = None
    relabel: tuple[str, ...] = ()
    per_class: int | None = None
    allow: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"csv": None if self.csv is None else self.csv.name}


@dataclass(frozen=True)
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
        bit_depth: 8 or 16, the same for all.
        notes: What was decided on the way, for people.
    """

    root: Path
    class_names: tuple[str, ...]
    samples: tuple[Sample, ...]
    excluded: tuple[tuple[str, str], ...]
    channels: int
    bit_depth: int
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
        root, options = Path(root), options or DataOptions()
        if unknown := set(options.allow) - set(ALLOWABLE):
            raise UsageError(
                f"`--allow` does not know {shorten(sorted(unknown))}",
                hint=f"it takes {shorten(ALLOWABLE)}",
            )
        return _Reading(root, options, whole).dataset()

    @cached_property
    def fingerprint(self) -> str:
        """Hash of contents and class names: independent of the folder's place and of mtimes."""
        return sha256_of(sorted((sample.sha256, sample.label) for sample in self.samples))

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
        """Returns the dataset without these images; they are listed as excluded."""
        left = {sample for sample, _ in broken}
        return replace(
            self,
            samples=tuple(sample for sample in self.samples if sample not in left),
            excluded=self.excluded + tuple((sample.path, str(error)) for sample, error in broken),
        )

    def summary(self) -> str:
        sizes = Counter(sample.split for sample in self.samples)
        parts = ", ".join(f"{sizes[split]:,} {split}" for split in SPLITS if sizes[split])
        left_out = f"; {count(len(self.excluded), 'file')} left out" if self.excluded else ""
        grouped = len({sample.group for sample in self.samples if sample.group is not None})
        groups = f" of {count(grouped, 'group')}" if grouped else ""
        return (
            f"{count(len(self.samples), 'image')}{groups} in "
            f"{count(len(self.class_names), 'class', 'classes')} ({parts}){left_out}"
        )


@dataclass
class _Reading:
    """Opening a dataset, step by step; the steps collect problems so that all are told at once."""

    root: Path
    options: DataOptions
    whole: bool
    listing: Listing = field(default_factory=Listing)
    notes: list[str] = field(default_factory=list)

    def dataset(self) -> Dataset:
        self.listing = self._list()
        self._relabel()
        images, hashes, headers = self._read_headers()
        channels, bit_depth = self._common_form(images, headers)
        if not self.whole:
            self._check_classes(images)
            self._check_labels(images, hashes)
        images = self._group(images)
        if self.whole:
            samples = [
                Sample(image.path, image.label, image.split or "test", sha256, image.group)
                for image, sha256 in zip(images, hashes, strict=True)
            ]
        else:
            samples = self._limit(self._split(images, hashes))
            self._check_splits(samples)
        self._refuse_problems()
        return Dataset(
            root=self.root,
            class_names=tuple(sorted({sample.label for sample in samples})),
            samples=tuple(sorted(samples, key=lambda sample: sample.path)),
            excluded=tuple(self.listing.excluded),
            channels=channels,
            bit_depth=bit_depth,
            options=self.options,
            notes=tuple(self.notes),
        )

    def _list(self) -> Listing:
        options = self.options
        if options.csv is None:
            return list_folder(self.root)
        return list_csv(
            self.root,
            options.csv,
            options.image_column,
            options.label_column,
            options.group_column,
            options.split_column,
        )

    def _relabel(self) -> None:
        if not self.options.relabel:
            return
        new_name: dict[str, str] = {}
        for entry in self.options.relabel:
            name, separator, old_names = entry.partition("=")
            if not separator or not name or not old_names:
                raise UsageError(
                    f"`--relabel {entry}` is not understood",
                    hint="write `--relabel even=0,2,4,6,8`",
                )
            for old in map(str.strip, old_names.split(",")):
                if old in new_name:
                    raise UsageError(
                        f"`--relabel` gives `{old}` to `{new_name[old]}` and to `{name.strip()}`",
                        hint="name each class once",
                    )
                new_name[old] = name.strip()
        known = {image.label for image in self.listing.images}
        if unknown := sorted(set(new_name) - known):
            self.listing.problems.append(
                f"`--relabel` names {shorten(unknown)}, which do not exist"
            )
        kept = []
        for image in self.listing.images:
            if image.label in new_name:
                kept.append(replace(image, label=new_name[image.label]))
            else:
                self.listing.excluded.append((image.path, "class not named by --relabel"))
        self.listing.images = kept

    def _read_headers(self) -> tuple[list[Listed], list[str], list[Header]]:
        def read(image: Listed) -> tuple[str, Header] | UnreadableImage:
            try:
                content = read_content(self.root, image.path)
                header = read_header(content, image.path)
            except UnreadableImage as error:
                return error
            raw = content if isinstance(content, bytes) else content.tobytes()
            return hashlib.sha256(raw).hexdigest(), header

        with quiet_codecs(), ThreadPoolExecutor(os.cpu_count()) as pool:
            results = list(pool.map(read, self.listing.images))
        images, hashes, headers, broken = [], [], [], []
        for image, result in zip(self.listing.images, results, strict=True):
            if isinstance(result, UnreadableImage):
                broken.append((image.path, result))
            else:
                images.append(image)
                hashes.append(result[0])
                headers.append(result[1])
        if broken and "unreadable" in self.options.allow:
            self.listing.excluded += [(path, str(error)) for path, error in broken]
            self.notes.append(f"{count(len(broken), 'unreadable file')} left out (allowed)")
        elif broken:
            self.listing.problems.append(unreadable_problem(broken))
        return images, hashes, headers

    def _common_form(self, images: Sequence[Listed], headers: Sequence[Header]) -> tuple[int, int]:
        channels = Counter(header.channels for header in headers)
        depths = Counter(header.bit_depth for header in headers)
        if set(channels) == {1, 3}:
            self.notes.append(f"{count(channels[1], 'grey image')} replicated to RGB")
        elif len(channels) > 1:
            self.listing.problems.append(f"images differ in channels: {_tally(channels)}")
        if len(depths) > 1:
            self.listing.problems.append(f"images differ in bits per channel: {_tally(depths)}")
        assert len(images) == len(headers)
        return max(channels, default=3), max(depths, default=8)

    def _check_classes(self, images: Sequence[Listed]) -> None:
        names = sorted({image.label for image in images})
        if len(names) < 2 and not self.listing.problems:
            found = f"only the class {shorten(names)}" if names else "no images at all"
            self.listing.problems.append(f"there is {found}; a classifier needs at least 2 classes")
        spelling = defaultdict(list)
        for name in names:
            spelling[unicodedata.normalize("NFC", name).casefold()].append(name)
        for same in spelling.values():
            if len(same) > 1:
                shown = ", ".join(f"{name!a}" for name in same)
                self.listing.problems.append(f"classes that differ by spelling only: {shown}")

    def _check_labels(self, images: Sequence[Listed], hashes: Sequence[str]) -> None:
        first: dict[str, Listed] = {}
        for image, sha256 in zip(images, hashes, strict=True):
            first.setdefault(sha256, image)
        pairs = [
            f"{first[sha256].path}` = `{image.path}"
            for image, sha256 in zip(images, hashes, strict=True)
            if first[sha256].label != image.label
        ]
        if pairs:
            noun = count(len(pairs), "image has", "images have")
            self.listing.problems.append(f"{noun} two labels with equal bytes: {shorten(pairs)}")

    def _group(self, images: Sequence[Listed]) -> list[Listed]:
        if self.options.group_regex is None:
            return list(images)
        try:
            pattern = re.compile(self.options.group_regex)
        except re.error as error:
            raise UsageError(
                f"`--group-regex {self.options.group_regex}` is no regular expression: {error}",
                hint="for `patient7_img3.png` write `^([^_]+)_`",
            ) from error
        grouped, unmatched = [], []
        for image in images:
            match = pattern.search(Path(image.path).name)
            if match is None or (pattern.groups and match[1] is None):
                unmatched.append(image.path)
            else:
                grouped.append(replace(image, group=match[1] if pattern.groups else match[0]))
        if unmatched:
            self.listing.problems.append(
                f"`--group-regex` does not match {count(len(unmatched), 'file')}, "
                f"e.g. {shorten(unmatched)}"
            )
        self._refuse_problems()
        return grouped

    def _split(self, images: Sequence[Listed], hashes: Sequence[str]) -> list[Sample]:
        # A single image is its own group by content, so a copy of it can never be divided.
        groups = [
            image.group if image.group is not None else sha256
            for image, sha256 in zip(images, hashes, strict=True)
        ]
        given = {image.split for image in images if image.split}
        missing = [split for split in SPLITS if split not in given]
        free = [row for row, image in enumerate(images) if image.split in (None, "train")]
        labels = [images[row].label for row in free]
        if missing:
            small = {name: n for name, n in Counter(labels).items() if n < MIN_IMAGES}
            if small:
                shown = ", ".join(f"`{name}` ({n})" for name, n in sorted(small.items())[:3])
                noun = count(len(small), "class has", "classes have")
                self.listing.problems.append(f"{noun} fewer than {MIN_IMAGES} images: {shown}")
            made = assign_splits(labels, [groups[row] for row in free], wanted=missing)
            split_of = dict(zip(free, made, strict=True))
            if given:
                self.notes.append(f"{' and '.join(missing[-2:])} taken from train, by stable hash")
        else:
            split_of = {}
        return [
            Sample(
                image.path,
                image.label,
                split_of.get(row) or image.split or "train",
                sha,
                image.group,
            )
            for row, (image, sha) in enumerate(zip(images, hashes, strict=True))
        ]

    def _limit(self, samples: list[Sample]) -> list[Sample]:
        if self.options.per_class is None:
            return samples
        kept, seen = [], Counter[tuple[str, str]]()
        for sample in sorted(samples, key=lambda sample: (sample.sha256, sample.path)):
            seen[sample.split, sample.label] += 1
            if sample.split == "test" or seen[sample.split, sample.label] <= self.options.per_class:
                kept.append(sample)
            else:
                self.listing.excluded.append((sample.path, "beyond --per-class"))
        return kept

    def _check_splits(self, samples: list[Sample]) -> None:
        names = {split: {s.label for s in samples if s.split == split} for split in SPLITS}
        for split in ("val", "test"):
            if extra := sorted(names[split] - names["train"]):
                self.listing.problems.append(
                    f"{split} has classes that train lacks: {shorten(extra)}"
                )
            if lacking := sorted(names["train"] - names[split]):
                note = f"{split} has no images of {shorten(lacking)}"
                (self.notes if names[split] else self.listing.problems).append(note)
        divided = defaultdict(set)
        for sample in samples:
            if sample.group is not None:
                divided[sample.group].add(sample.split)
        if crossing := sorted(group for group, splits in divided.items() if len(splits) > 1):
            self.listing.problems.append(
                f"{count(len(crossing), 'group')} in more than one split: {shorten(crossing)}"
            )
        self._check_copies(samples)

    def _check_copies(self, samples: list[Sample]) -> None:
        first: dict[str, Sample] = {}
        copies = []
        for sample in sorted(samples, key=lambda sample: SPLITS.index(sample.split)):
            original = first.setdefault(sample.sha256, sample)
            if original.split != sample.split:
                copies.append((sample, original))
        if not copies:
            return
        if "leak" in self.options.allow:
            for sample, original in copies:
                samples.remove(sample)
                self.listing.excluded.append((sample.path, f"same bytes as `{original.path}`"))
            self.notes.append(
                f"{count(len(copies), 'copy', 'copies')} across splits left out (allowed)"
            )
            return
        sample, original = copies[0]
        self.listing.problems.append(
            f"{count(len(copies), 'image is', 'images are')} in {original.split} and "
            f"{sample.split} with equal bytes, e.g. `{original.path}` = `{sample.path}`"
        )

    def _refuse_problems(self) -> None:
        if self.listing.problems:
            raise unusable(self.root, self.listing.problems)


def unusable(root: Path, problems: Sequence[str]) -> RegraftError:
    """Returns the one error for a dataset that cannot be used."""
    number = count(len(problems), "problem")
    return DataError(
        f"`{root}` cannot be used: {number}",
        problems=problems,
        hint="mend these, or leave broken files and copies out with "
        "`--allow unreadable` and `--allow leak`; nothing was created",
    )


def unreadable_problem(broken: Sequence[tuple[str, UnreadableImage]]) -> str:
    """Returns one line for all files that cannot be read."""
    examples = ", ".join(f"`{path}` ({error})" for path, error in broken[:3])
    more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
    return f"{count(len(broken), 'file')} cannot be read: {examples}{more}"


def _tally(counts: Counter[int]) -> str:
    return ", ".join(f"{value} ({count(number, 'image')})" for value, number in counts.items())
