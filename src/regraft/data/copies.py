"""Findings about pictures that are the same: across splits, labels and datasets, and within one."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from regraft.data.duplicates import Pairs, joined_groups, near_pairs
from regraft.data.finding import ERROR, NOTE, WARNING, FileRef, Finding
from regraft.data.split import SPLITS
from regraft.data.survey import Picture, Survey
from regraft.errors import count
from regraft.parallel import one_thread

MANY_COPIES = 4  # of one picture: fewer are strays, not augmentation; assumed
AUGMENTED_SHARE = 0.2  # of a dataset that is copies of few pictures; assumed
ORDER = {split: place for place, split in enumerate(SPLITS)}


@dataclass(frozen=True)
class Copies:
    """Which pictures are the same, exactly or nearly."""

    pictures: Sequence[Picture]
    exact: dict[bytes, list[int]]
    near: Pairs

    @classmethod
    @one_thread
    def found(cls, survey: Survey, on_progress: Callable[[int, int], None]) -> "Copies":
        exact: dict[bytes, list[int]] = defaultdict(list)
        for row, one in enumerate(survey.pictures):
            # Uniform pictures are equal without being copies, unless the files are.
            exact[one.content if survey.looks.flat[row] else one.pixels].append(row)
        # One of each: a thousand equal points would fill the neighbourhood of each other.
        chosen = np.array([rows[0] for rows in exact.values()], np.int64)
        near = near_pairs(survey.looks, chosen, on_progress)
        return cls(survey.pictures, dict(exact), near)

    def findings(self) -> Iterator[Finding]:
        equal = [
            (one, other, "same")
            for rows in self.exact.values()
            if len(rows) > 1
            for one in rows
            for other in self._one_of_each_kind(rows)
            if one != other
        ]
        alike = [
            (one, other, how)
            for first, second, how in self.near
            if self._with_copies[first] is not self._with_copies[second]
            for rows, others in ((first, second), (second, first))
            for one in self._with_copies[rows]
            for other in self._one_of_each_kind(self._with_copies[others])
        ]
        taken: set[int] = set()
        yield from self._leaks(equal, "leak", ERROR, taken)
        yield from self._leaks(alike, "near-leak", WARNING, taken)
        taken = set()
        yield from self._transfer_leaks(equal, "transfer-leak", ERROR, taken)
        yield from self._transfer_leaks(alike, "near-transfer-leak", WARNING, taken)
        yield from self._labels(equal, "two-labels", ERROR)
        yield from self._labels(alike, "near-two-labels", WARNING)
        yield from self._within(equal, "copies", "with the same pixels as another image")
        yield from self._within(alike, "near-copies", "altered copies of another image")
        yield from self._augmented([*equal, *alike])

    @cached_property
    def _with_copies(self) -> dict[int, list[int]]:
        """The exact copies of each picture, itself among them."""
        return {row: rows for rows in self.exact.values() for row in rows}

    def _one_of_each_kind(self, rows: Sequence[int]) -> list[int]:
        """Returns the first row of each dataset, split and label: enough to tell all others by."""
        kinds: dict[tuple[int, str, str], int] = {}
        for row in rows:
            one = self.pictures[row]
            kinds.setdefault((one.place, one.split, one.label), row)
        return list(kinds.values())

    def _leaks(
        self, pairs: Iterable[tuple[int, int, str]], code: str, severity: str, taken: set[int]
    ) -> Iterator[Finding]:
        """Yields images of a later split that an earlier one of the same dataset holds too."""
        found: dict[int, tuple[int, str]] = {}
        for one, other, how in pairs:
            first, second = sorted((one, other), key=lambda row: ORDER[self.pictures[row].split])
            a, b = self.pictures[first], self.pictures[second]
            if a.place == b.place and a.split != b.split and second not in taken:
                found.setdefault(second, (first, how))
        taken |= set(found)
        if found:
            splits = Counter(
                f"{self.pictures[late].split} as in {self.pictures[early].split}"
                for late, (early, _) in found.items()
            )
            shown = ", ".join(f"{number} of {name}" for name, number in sorted(splits.items()))
            yield self._about(
                code,
                severity,
                found,
                f"found in an earlier split too ({shown})",
                "leave them out: a test on images that were learned tells nothing"
                + (": `--allow leak`" if code == "leak" else "; `--exclude-from check.json` does"),
            )

    def _transfer_leaks(
        self, pairs: Iterable[tuple[int, int, str]], code: str, severity: str, taken: set[int]
    ) -> Iterator[Finding]:
        """Yields test images of a later dataset that the first one learns from."""
        found: dict[int, tuple[int, str]] = {}
        overlap: dict[int, tuple[int, str]] = {}
        for pair in pairs:
            first, second = sorted(pair[:2], key=lambda row: self.pictures[row].place)
            a, b = self.pictures[first], self.pictures[second]
            if a.place == b.place or a.place != 0:
                continue
            is_leak = b.split == "test" and a.split != "test"
            (found if is_leak else overlap).setdefault(second, (first, pair[2]))
        found = {row: by for row, by in found.items() if row not in taken}
        taken |= set(found)
        overlap = {row: by for row, by in overlap.items() if row not in taken}
        if found:
            yield self._about(
                code,
                severity,
                found,
                "test images, are in the first dataset, whose backbone would have seen them",
                "pretrain without them, or leave them out of the test: `--exclude-from check.json`",
            )
        if overlap and severity == ERROR:
            yield self._about(
                "overlap",
                NOTE,
                overlap,
                "found in the first dataset too, where they spoil no test",
                "nothing; the two datasets are less different than they seem",
            )

    def _labels(
        self, pairs: Iterable[tuple[int, int, str]], code: str, severity: str
    ) -> Iterator[Finding]:
        """Yields pictures that stand under two labels of one dataset."""
        clashing = sorted(
            {
                (min(one, other), max(one, other), how)
                for one, other, how in pairs
                if self.pictures[one].place == self.pictures[other].place
                and self.pictures[one].label != self.pictures[other].label
            }
        )
        if not clashing:
            return
        first, second = (np.array([pair[side] for pair in clashing], np.int64) for side in (0, 1))
        groups = joined_groups(len(self.pictures), first, second)
        number = len(np.unique(groups[first]))
        rows = sorted({row for pair in clashing for row in pair[:2]})
        yield Finding(
            code,
            severity,
            number,
            f"{count(number, 'picture stands', 'pictures stand')} under more than one label",
            "decide which label is right and remove the other file",
            tuple(self._shown(one, other, how) for one, other, how in clashing),
            tuple(FileRef.to(self.pictures[row]) for row in rows),
            tuple(self._pair(one, other) for one, other, _ in clashing),
        )

    def _within(
        self, pairs: Iterable[tuple[int, int, str]], code: str, told: str
    ) -> Iterator[Finding]:
        """Yields images beside others of their split that show the same."""
        found: dict[int, tuple[int, str]] = {}
        for one, other, how in pairs:
            a, b = self.pictures[one], self.pictures[other]
            if (a.place, a.split) == (b.place, b.split):
                early, late = sorted((one, other))
                found.setdefault(late, (early, how))
        if found:
            yield self._about(
                code,
                WARNING,
                found,
                f"{told} of their split",
                "they count twice; `--exclude-from check.json` leaves one of each",
            )

    def _augmented(self, pairs: Sequence[tuple[int, int, str]]) -> Iterator[Finding]:
        """Yields datasets that are many altered copies of few pictures."""
        pairs = [p for p in pairs if self.pictures[p[0]].place == self.pictures[p[1]].place]
        first, second = (np.array([pair[side] for pair in pairs], np.int64) for side in (0, 1))
        groups = joined_groups(len(self.pictures), first, second)
        sizes = np.bincount(groups, minlength=1)
        places = np.array([one.place for one in self.pictures])
        for place in np.unique(places):
            own = np.unique(groups[places == place])
            many = own[sizes[own] >= MANY_COPIES]
            images, pictures = int(sizes[many].sum()), len(many)
            if not pictures or images < AUGMENTED_SHARE * (places == place).sum():
                continue
            example = [
                self.pictures[row].path for row in np.flatnonzero(groups == many[0]).tolist()
            ]
            yield Finding(
                "augmented",
                WARNING,
                images - pictures,
                f"{count(images, 'image')} are {count(pictures, 'picture')}, each altered "
                f"{images / pictures:.0f} times or so",
                "train on the pictures before they were altered; split by picture (`--group-regex`)"
                ", or test images are turned training images",
                (f"one picture: {', '.join(example[:MANY_COPIES])}, ...",),
                numbers={"images": images, "pictures": pictures},
            )

    def _about(
        self, code: str, severity: str, found: dict[int, tuple[int, str]], told: str, advice: str
    ) -> Finding:
        """Returns a finding about images, each with the one that it is a copy of."""
        shown = [(early, late, how) for late, (early, how) in sorted(found.items())]
        return Finding(
            code,
            severity,
            len(found),
            f"{count(len(found), 'image')}, {told}",
            advice,
            tuple(self._shown(*one) for one in shown),
            tuple(FileRef.to(self.pictures[late]) for _, late, _ in shown),
            tuple(self._pair(early, late) for early, late, _ in shown),
        )

    def _shown(self, one: int, other: int, how: str) -> str:
        names = []
        for row in (one, other):
            picture = self.pictures[row]
            place = f"[{picture.place + 1}] " if self.pictures[-1].place else ""
            names.append(f"{place}{picture.path}")
        return f"{names[0]} {'=' if how == 'same' else '~'} {names[1]}" + (
            "" if how in ("same", "plain") else f" ({how})"
        )

    def _pair(self, one: int, other: int) -> tuple[FileRef, FileRef]:
        return FileRef.to(self.pictures[one]), FileRef.to(self.pictures[other])
