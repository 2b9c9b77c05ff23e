"""What long work tells on the way, besides the Step and Epoch records of `fit`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Note:
    """One line for people: a decision, an estimate, a table."""

    text: str


@dataclass(frozen=True)
class Counting:
    """Progress of a countable work."""

    what: str
    done: int
    total: int


OnProgress = Callable[[Any], None]


def quiet(_record: Any) -> None:
    """Tells nobody."""


def counting(on_progress: OnProgress, what: str) -> Callable[[int, int], None]:
    return lambda done, total: on_progress(Counting(what, done, total))


def duration(seconds: float) -> str:
    """Returns `0.36 s`, `40 s`, `12 min` or `3.5 h`."""
    if seconds < 1:
        return f"{seconds:.2g} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
