"""Stratified train/val/test splits by stable hash, whole groups kept together."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from regraft.errors import shorten

SPLITS = ("train", "val", "test")
VAL_SHARE = 0.15  # assumed: 15 % to choose the epoch,
TEST_SHARE = 0.20  # 20 % to judge; both are stratified by class


def assign_splits(
    labels: Sequence[str], groups: Sequence[str], *, wanted: Sequence[str] = SPLITS
) -> list[str]:
    """Returns the split of each image.

    Each group stands at a fixed place given by the hash of its name, and the test and validation
    shares are filled from the front. So the answer depends on contents only, never on the order
    of files or on a seed, and adding images moves few others.

    Args:
        labels: Class name of each image.
        groups: What must stay together: a patient, or the content hash of a single image.
        wanted: The splits to make; a split that the folder already has is left out.
    """
    labels_of: dict[str, list[str]] = defaultdict(list)
    for label, group in zip(labels, groups, strict=True):
        labels_of[group].append(label)
    totals = Counter(labels)
    shares = {"test": TEST_SHARE, "val": VAL_SHARE}
    room = {
        split: {name: max(1.0, share * total) for name, total in totals.items()}
        for split, share in shares.items()
        if split in wanted
    }
    split_of: dict[str, str] = {}
    for group in sorted(labels_of, key=_place):
        members = Counter(labels_of[group])
        split_of[group] = "train"
        for split, left in room.items():
            fits = sum(min(number, left[name]) for name, number in members.items())
            # At least half of a group must fit: large groups may not overfill a small share.
            if fits >= 0.5 * members.total():
                split_of[group] = split
                for name, number in members.items():
                    left[name] = max(0.0, left[name] - number)
                break
    return [split_of[group] for group in groups]


def stratified_folds(
    labels: NDArray[np.int64], groups: NDArray[np.int64], number: int
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Returns (places that learn, places that judge) of each fold; groups stay together."""
    from sklearn.model_selection import StratifiedGroupKFold

    folds = StratifiedGroupKFold(number, shuffle=True, random_state=0)
    return list(folds.split(labels, labels, groups))


def most_folds(labels: NDArray[np.int64], groups: NDArray[np.int64], wanted: int) -> int:
    """Returns in how many folds every class can be shown; 0 where not even two."""
    least = min(len(np.unique(groups[labels == label])) for label in np.unique(labels))
    return min(wanted, least) if least > 1 else 0


def split_problems(labels: Sequence[str], splits: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns what forbids to learn and judge with these splits, and what is only worth a note."""
    names: dict[str, set[str]] = {split: set() for split in SPLITS}
    for label, split in zip(labels, splits, strict=True):
        names[split].add(label)
    problems, notes = [], []
    for split in ("val", "test"):
        if extra := sorted(names[split] - names["train"]):
            problems.append(f"{split} has classes that train lacks: {shorten(extra)}")
        if len(names[split]) < 2:
            shown = f"only `{min(names[split])}`" if names[split] else "no images"
            problems.append(f"{split} shows {shown}: nothing can be told apart")
        elif lacking := sorted(names["train"] - names[split]):
            notes.append(f"{split} has no images of {shorten(lacking)}")
    return problems, notes


def _place(group: str) -> str:
    return hashlib.sha256(
        b"regraft split 1\0" + group.encode("utf-8", "surrogateescape")
    ).hexdigest()
