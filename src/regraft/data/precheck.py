"""The cheap part of a check: what decoding for a training tells anyway.

Copies across splits, exact and near, one picture under two labels, uneven classes; and, where a
backbone is carried over, test images that the Run it comes from has seen.
"""

import base64
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from regraft.data.cache import Cache
from regraft.data.copies import Copies
from regraft.data.dataset import Dataset, Sample, unusable
from regraft.data.decode import UnreadableImage
from regraft.data.duplicates import near_hashes
from regraft.data.finding import ERROR, WARNING, Finding
from regraft.data.looks import HASH_SIDE
from regraft.data.survey import Picture
from regraft.data.traits import class_findings

CODES = {"leak", "near-leak", "two-labels", "near-two-labels"}


@dataclass(frozen=True)
class Known:
    """Images that a Run has seen: content hash to split, and to perceptual hash if it is kept."""

    splits: Mapping[str, str]
    hashes: Mapping[str, str]


def precheck(dataset: Dataset, cache: Cache) -> tuple[Finding, ...]:
    """Returns the findings within a dataset, those allowed by name marked."""
    pictures = pictures_of(dataset, cache)
    exact: dict[bytes, list[int]] = defaultdict(list)
    for row, one in enumerate(pictures):
        # Uniform pictures are equal without being copies, unless the files are.
        exact[one.pixels if cache.hashes[row].any() else one.content].append(row)
    judged = np.array([row for row, one in enumerate(pictures) if one.split != "train"], np.int64)
    copies = Copies(pictures, dict(exact), near_hashes(np.asarray(cache.hashes), judged))
    found = [one for one in copies.findings() if one.code in CODES]
    found += class_findings(pictures, is_split=True)
    allowed = set(dataset.options.allow)
    return tuple(replace(one, allowed=one.code in allowed) for one in found)


def start_findings(
    pictures: Sequence[Picture], hashes: NDArray[np.int8], known: Known
) -> tuple[Finding, ...]:
    """Returns which test images a start has seen.

    Args:
        pictures: Of one dataset.
        hashes: Their perceptual hashes.
        known: The images of the start.
    """
    seen, seen_hashes = _seen(known)
    rows = [*seen, *(replace(one, place=1) for one in pictures)]
    exact: dict[bytes, list[int]] = defaultdict(list)
    for row, one in enumerate(rows):
        exact[one.content].append(row)
    asked = [row for row, one in enumerate(rows) if one.place == 1 and one.split == "test"]
    near = near_hashes(np.concatenate([seen_hashes, hashes]), np.array(asked, np.int64))
    found = Copies(rows, dict(exact), near).findings()
    return tuple(
        replace(
            one,
            told=one.told.replace(
                "are in the first dataset, whose backbone would have seen them",
                "were seen by the start",
            ),
            files=tuple(replace(ref, place=pictures[0].place) for ref in one.files),
            pairs=(),
        )
        for one in found
        if "transfer" in one.code
    )


def pictures_of(dataset: Dataset, cache: Cache) -> list[Picture]:
    """Returns what copies are found by, for each sample."""
    return [
        _picture(0, sample, cache.digests[row].tobytes())
        for row, sample in enumerate(dataset.samples)
    ]


def accepted(dataset: Dataset, findings: Sequence[Finding]) -> Dataset:
    """Returns the dataset, without the copies that the user allows to leave out.

    Raises:
        DataError: There are errors that nobody has allowed.
    """
    errors = [one for one in findings if one.severity == ERROR]
    if refused := [one for one in errors if not one.allowed]:
        ways = sorted({f"`--allow {one.code}`" for one in refused})
        raise unusable(
            dataset.root,
            [f"{one.told}, e.g. `{one.examples[0]}`" for one in refused],
            hint=f"see all with `regraft check`, mend the data, or accept them: {', '.join(ways)}",
        )
    late = {ref.path for one in errors if one.code == "leak" for ref in one.files}
    if not late:
        return dataset
    reason = UnreadableImage("copy", "the same pixels are in an earlier split")
    return dataset.without([(one, reason) for one in dataset.samples if one.path in late])


def told(findings: Sequence[Finding]) -> list[str]:
    """Returns the warnings, and what was allowed, one line each."""
    return [
        f"{'allowed' if one.allowed else 'warning'}: {one.told}"
        + (f", e.g. {one.examples[0]}" if one.pairs else "")
        + f" (`{one.code}`)"
        for one in findings
        if one.severity == WARNING or one.allowed
    ]


def encoded_hash(values: NDArray[np.int8]) -> str:
    """Returns a perceptual hash as text."""
    return base64.b64encode(values.tobytes()).decode("ascii")


def _seen(known: Known | None) -> tuple[list[Picture], NDArray[np.int8]]:
    if known is None:
        return [], np.zeros((0, HASH_SIDE**2 - 1), np.int8)
    pictures, hashes = [], []
    for sha256, split in known.splits.items():
        sample = Sample(f"image {sha256[:12]} of the start", "", split, sha256)
        pictures.append(_picture(0, sample, b""))
        hashes.append(_decoded(known.hashes.get(sha256, "")))
    return pictures, np.array(hashes, np.int8).reshape(-1, HASH_SIDE**2 - 1)


def _decoded(text: str) -> NDArray[np.int8]:
    values = np.frombuffer(base64.b64decode(text), np.int8)
    return values if len(values) == HASH_SIDE**2 - 1 else np.zeros(HASH_SIDE**2 - 1, np.int8)


def _picture(place: int, sample: Sample, digest: bytes) -> Picture:
    return Picture(
        place=place,
        path=sample.path,
        label=sample.label,
        split=sample.split,
        group=sample.group,
        content=bytes.fromhex(sample.sha256),
        pixels=digest,
    )
