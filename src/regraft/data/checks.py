"""What is wrong with a dataset, or between two: findings, each with a stable code.

Errors would make a training useless or its test a lie; warnings may; notes are for knowing.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from regraft.data.copies import ORDER, Copies
from regraft.data.dataset import DataOptions
from regraft.data.finding import ERROR, NOTE, WARNING, FileRef, Finding
from regraft.data.precheck import Known, start_findings
from regraft.data.survey import Picture, Survey
from regraft.data.traits import trait_findings
from regraft.errors import count
from regraft.progress import Counting, quiet
from regraft.run import Run

SCHEMA = 1
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Checked:
    """The findings of one check, worst first, and the datasets they are about."""

    roots: tuple[Path, ...]
    num_images: tuple[int, ...]
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> list[Finding]:
        """Those that nobody has allowed."""
        return [one for one in self.findings if one.severity == ERROR and not one.allowed]

    def to_dict(self) -> dict[str, Any]:
        data = [
            {"name": root.resolve().name, "images": number}
            for root, number in zip(self.roots, self.num_images, strict=True)
        ]
        return {
            "schema": SCHEMA,
            "data": data,
            "findings": [finding.to_dict() for finding in self.findings],
        }


def check(
    roots: Sequence[Path],
    options: Sequence[DataOptions],
    on_progress: OnProgress = lambda _what, _done, _total: None,
    known: Known | None = None,
) -> Checked:
    """Returns the findings within each dataset, and those between the first and the others.

    Args:
        roots: The folders; the first is what a backbone is pretrained on.
        options: How each is read; `allow` accepts findings by code.
        on_progress: Told what is done, how far, and of how much.
        known: Images that a start has seen.

    Raises:
        DataError: A folder is missing, or holds no class folders.
        UsageError: An option does not fit.
    """
    survey = Survey.read(
        roots, options, lambda done, total: on_progress("reading and decoding", done, total)
    )
    copies = Copies.found(
        survey, lambda done, total: on_progress("looking for copies", done, total)
    )
    found = [*_reading_findings(survey), *copies.findings()]
    for place in range(len(roots)):
        rows = [row for row, one in enumerate(survey.pictures) if one.place == place]
        pictures = [survey.pictures[row] for row in rows]
        flat = survey.looks.flat[rows].tolist()
        if known is not None and rows:
            hashes = survey.looks.taken(np.array(rows, np.int64)).hashes()
            found += start_findings(pictures, hashes, known)
        found += _group_findings(pictures)
        is_scaled = options[place].intensity_range is not None
        found += trait_findings(
            pictures, flat, is_split=survey.is_split[place], is_scaled=is_scaled
        )
    allowed = {code for chosen in options for code in chosen.allow}
    found = [replace(one, allowed=one.code in allowed) for one in found]
    found.sort(key=lambda one: (ERROR, WARNING, NOTE).index(one.severity))
    numbers = Counter(one.place for one in survey.pictures)
    return Checked(tuple(roots), tuple(numbers[p] for p in range(len(roots))), tuple(found))


def check_data(
    data: Sequence[Path],
    options: DataOptions,
    *,
    start: Path | None = None,
    on_progress: Callable[[Any], None] = quiet,
) -> Checked:
    """Returns the findings of datasets that are read alike; see `check`.

    Args:
        data: The folders.
        options: How each is read.
        start: A Run whose weights are to be carried over.
        on_progress: Told `Counting` records.
    """
    known = None
    if start is not None:
        run = Run.open(start)
        known = Known(run.seen(), run.hashes())
    return check(
        data,
        [options] * len(data),
        lambda what, done, total: on_progress(Counting(what, done, total)),
        known,
    )


def _reading_findings(survey: Survey) -> Iterator[Finding]:
    for place, problems in enumerate(survey.problems):
        if problems:
            yield Finding(
                "structure",
                ERROR,
                len(problems),
                f"{count(len(problems), 'thing')} about the folders or the CSV of "
                f"`{survey.roots[place].name}`",
                "mend the folders, or the CSV",
                tuple(problems),
            )
    if broken := survey.unreadable:
        yield Finding(
            "unreadable",
            ERROR,
            len(broken),
            f"{count(len(broken), 'file')} cannot be read",
            "restore them from where they come from, or leave them out: `--allow unreadable`",
            tuple(f"{path}: {reason}" for _, path, _, reason in broken),
            files=tuple(FileRef(place, path, sha256) for place, path, sha256, _ in broken),
        )
    reasons = Counter(reason for excluded in survey.excluded for _, reason in excluded)
    if reasons:
        yield Finding(
            "ignored",
            NOTE,
            reasons.total(),
            f"{count(reasons.total(), 'file is', 'files are')} no image of a class, and not used",
            "nothing, unless one of them should be an image",
            tuple(f"{reason}: {number}" for reason, number in reasons.most_common()),
        )


def _group_findings(pictures: Sequence[Picture]) -> Iterator[Finding]:
    """Yields groups (patients) on both sides of a split."""
    splits: dict[str, set[str]] = defaultdict(set)
    for one in pictures:
        if one.group is not None:
            splits[one.group].add(one.split)
    crossing = {group for group, seen in splits.items() if len(seen) > 1}
    if not crossing:
        return
    first = {group: min(splits[group], key=ORDER.__getitem__) for group in crossing}
    late = [one for one in pictures if one.group in crossing and one.split != first[one.group]]
    yield Finding(
        "group-leak",
        ERROR,
        len(crossing),
        f"{count(len(crossing), 'group stands', 'groups stand')} in more than one split, with "
        f"{count(len(late), 'image')} that others of their group have taught",
        "move each group into one split, or remove the split folders: regraft then splits by group",
        tuple(f"{group}: {', '.join(sorted(splits[group]))}" for group in sorted(crossing)),
        files=tuple(map(FileRef.to, late)),
    )
