"""Opening a dataset: list, hash, check and split, with all problems told at once."""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from regraft.data.dataset import DataOptions, Dataset, Sample, unreadable_problem, unusable
from regraft.data.decode import (
    Header,
    UnreadableImage,
    content_hash,
    map_in_threads,
    read_content,
    read_header,
)
from regraft.data.exclusions import Exclusions
from regraft.data.listing import Listed, Listing, list_folder
from regraft.data.split import SPLITS, assign_splits, split_problems
from regraft.data.tables import METADATA, Columns, list_metadata, list_table
from regraft.errors import UsageError, count, shorten

MIN_IMAGES = 5  # assumed: fewer cannot stand in train, val and test and still be learned
MOST = 3e38  # what a 32-bit float can hold
ALLOWABLE = ("unreadable", "leak", "two-labels", "group-leak", "spelling")


def open_dataset(root: Path, options: DataOptions, *, whole: bool) -> Dataset:
    """Returns the dataset; see `Dataset.open`."""
    if unknown := set(options.allow) - set(ALLOWABLE):
        raise UsageError(
            f"`--allow` does not know {shorten(sorted(unknown))}",
            hint=f"it takes {shorten(ALLOWABLE)}",
        )
    if options.per_class is not None and options.per_class < 1:
        raise UsageError(
            f"`--per-class {options.per_class}` leaves nothing to learn", hint="use at least 1"
        )
    if options.frames not in ("first", "fail"):
        raise UsageError(f"`--frames {options.frames}` is unknown", hint="use `first` or `fail`")
    if options.group_by not in (None, "patient"):
        raise UsageError(
            f"`--group-by {options.group_by}` is unknown",
            hint="use `patient`: those whom DICOM files name",
        )
    if options.intensity_range is not None:
        low, high = options.intensity_range
        if not -MOST < low < high < MOST:
            raise UsageError(
                f"`--intensity-range {low:g},{high:g}` is no range",
                hint="write the values that are black and white: `--intensity-range 0,4095`",
            )
    return Reading(root, options, whole).dataset()


@dataclass
class Reading:
    """Opening a dataset, step by step; the steps collect problems so that all are told at once."""

    root: Path
    options: DataOptions
    whole: bool
    listing: Listing = field(default_factory=Listing)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.exclusions = Exclusions.read(self.options.exclude_from)

    def dataset(self) -> Dataset:
        self.list_files()
        images, hashes, headers = self._read_headers()
        channels = self._common_channels(headers)
        self._tell_frames(images, headers)
        if not self.whole:
            self._check_classes(images)
            self._check_labels(images, hashes)
        images = self.group(self.by_patient(images, headers))
        if self.whole:
            samples = [
                Sample(image.path, image.label, image.split or "test", sha256, image.group)
                for image, sha256 in zip(images, hashes, strict=True)
            ]
        else:
            samples = self._limit(self.split(images, hashes))
            if samples:
                self._check_splits(samples)
        self._refuse_problems()
        return Dataset(
            root=self.root,
            class_names=tuple(sorted({sample.label for sample in samples})),
            samples=tuple(sorted(samples, key=lambda sample: sample.path)),
            excluded=tuple(self.listing.excluded),
            channels=channels,
            pixel_types=tuple(Counter(header.pixel_type for header in headers).items()),
            options=self.options,
            notes=tuple(self.notes),
        )

    def list_files(self) -> None:
        """Finds the files, and gives them the classes that are asked for."""
        self.listing = self._list()
        self._relabel()

    def _list(self) -> Listing:
        options = self.options
        columns = Columns(
            options.image_column, options.label_column, options.group_column, options.split_column
        )
        if options.csv is not None:
            return list_table(self.root, options.csv, columns)
        if (found := list_metadata(self.root, columns)) is None:
            return list_folder(self.root)
        self.notes.append(f"labels are those of `{METADATA}`")
        return found

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
        def read(image: Listed) -> tuple[str, Header] | tuple[str, UnreadableImage]:
            sha256 = ""
            try:
                content = read_content(self.root, image.path)
                sha256 = content_hash(content).hex()
                return sha256, read_header(content)
            except UnreadableImage as error:
                return sha256, error

        images, hashes, headers, broken = [], [], [], []
        results = map_in_threads(read, self.listing.images)
        for image, (sha256, result) in zip(self.listing.images, results, strict=True):
            if self.is_excluded(image.path, sha256):
                continue
            if isinstance(result, UnreadableImage):
                broken.append((image.path, result))
            else:
                images.append(image)
                hashes.append(sha256)
                headers.append(result)
        self._tell_exclusions()
        if broken and "unreadable" in self.options.allow:
            self.listing.excluded += [(path, str(error)) for path, error in broken]
            self.notes.append(f"{count(len(broken), 'unreadable file')} left out (allowed)")
        elif broken:
            self.listing.problems.append(unreadable_problem(broken))
        return images, hashes, headers

    def _common_channels(self, headers: Sequence[Header]) -> int:
        channels = Counter(header.channels for header in headers)
        if set(channels) == {1, 3}:
            self.notes.append(f"{count(channels[1], 'grey image')} replicated to RGB")
        elif len(channels) > 1:
            told = ", ".join(f"{value} ({count(n, 'image')})" for value, n in channels.items())
            self.listing.problems.append(f"images differ in channels: {told}")
        return max(channels, default=3)

    def _tell_frames(self, images: Sequence[Listed], headers: Sequence[Header]) -> None:
        several = [
            image.path for image, header in zip(images, headers, strict=True) if header.has_frames
        ]
        if not several:
            return
        told = f"{count(len(several), 'file has', 'files have')} more than one frame or page"
        if self.options.frames == "fail":
            self.listing.problems.append(f"{told}: {shorten(several)}")
        else:
            self.notes.append(f"{told}, the first is read: {shorten(several)}")

    def by_patient(self, images: Sequence[Listed], headers: Sequence[Header]) -> list[Listed]:
        """Returns the images with the patients that DICOM files name as groups, if asked for."""
        patients = {header.patient for header in headers} - {None}
        if self.options.group_by is None:
            is_grouped = self.options.group_regex or self.options.group_column
            if 1 < len(patients) < len(images) and not is_grouped:
                self.notes.append(
                    f"the DICOM files name {count(len(patients), 'patient')}: `--group-by patient` "
                    "keeps each in one split"
                )
            return list(images)
        unknown = [
            image.path for image, header in zip(images, headers, strict=True) if not header.patient
        ]
        if unknown:
            self.listing.problems.append(
                f"{count(len(unknown), 'file names', 'files name')} no patient: {shorten(unknown)}"
            )
        return [
            replace(image, group=header.patient)
            for image, header in zip(images, headers, strict=True)
        ]

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
                self._refuse("spelling", f"classes that differ by spelling only: {shown}")

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
            self._refuse("two-labels", f"{noun} two labels with equal bytes: {shorten(pairs)}")

    def is_excluded(self, path: str, sha256: str) -> bool:
        """Whether an earlier check has found this file, which is then listed as left out."""
        reason = self.exclusions.reason(path, sha256)
        if reason is not None:
            self.listing.excluded.append((path, reason))
        return reason is not None

    def _tell_exclusions(self) -> None:
        left_out = sum(reason.startswith("found by a check") for _, reason in self.listing.excluded)
        if self.exclusions:
            self.notes.append(f"{count(left_out, 'file')} left out that a check has found")

    def group(self, images: Sequence[Listed]) -> list[Listed]:
        """Returns the images with their groups."""
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

    def split(self, images: Sequence[Listed], hashes: Sequence[str]) -> list[Sample]:
        """Returns the images with their splits: as given, or made."""
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
        self._check_copies(samples)
        labels, splits = [s.label for s in samples], [s.split for s in samples]
        problems, notes = split_problems(labels, splits)
        self.listing.problems += problems
        self.notes += notes
        divided = defaultdict(set)
        for sample in samples:
            if sample.group is not None:
                divided[sample.group].add(sample.split)
        if crossing := sorted(group for group, splits in divided.items() if len(splits) > 1):
            self._refuse(
                "group-leak",
                f"{count(len(crossing), 'group')} in more than one split: {shorten(crossing)}",
            )

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

    def _refuse(self, code: str, told: str) -> None:
        """Makes it a problem, or a note where the user accepts it."""
        if code in self.options.allow:
            self.notes.append(f"allowed: {told} (`{code}`)")
        else:
            self.listing.problems.append(told)

    def _refuse_problems(self) -> None:
        if self.listing.problems:
            raise unusable(self.root, self.listing.problems)
