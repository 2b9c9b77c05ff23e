"""Failpoints: named places where a test makes this process die, fail or wait.

`REGRAFT_FAULT=final.renamed:1:kill` kills the process when it passes `final.renamed` for the first
time. Several are divided by commas. The name may be a pattern (`*.synced`). Actions: `kill`,
`raise` (an input/output error; `raise=ENOSPC` another one, `raise=MemoryError` that), `sleep=0.5`.
Nothing else reads the variable, the command line warns while it is set, and unset a failpoint costs
one comparison.
"""

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from time import sleep

from regraft.errors import UsageError

VARIABLE = "REGRAFT_FAULT"
KINDS = (
    "run", "samples", "lineage", "status", "manifest", "metrics", "times", "trials", "plan",
    "winner", "state", "best", "final", "evaluation", "predictions", "mistakes", "comparison",
    "report", "cache", "activations", "file",
)  # fmt: skip
"""What is written; `file` is anything without a name of its own."""
POINTS = (
    "begun", "created", "half", "written", "synced", "sealed", "renamed", "settled", "pruned",
)  # fmt: skip
"""From before the first byte to the synced folder; `sealed`: a folder's manifest is in it."""
FAILPOINTS = tuple(f"{kind}.{point}" for kind in KINDS for point in POINTS)


@dataclass
class _Fault:
    name: str
    left: int
    action: str
    value: str


def _parsed(text: str) -> list[_Fault]:
    faults = []
    for part in filter(None, text.split(",")):
        name, _, rest = part.partition(":")
        number, _, action = rest.partition(":")
        action, _, value = action.partition("=")
        if not number.isdecimal() or action not in ("kill", "raise", "sleep"):
            raise UsageError(
                f"`{VARIABLE}={part}` is no failpoint; expected name:count:action",
                hint="unset it: it exists for tests alone",
            )
        faults.append(_Fault(name, int(number), action, value))
    return faults


_armed = _parsed(os.environ.get(VARIABLE, ""))


def is_armed() -> bool:
    return bool(_armed)


@contextmanager
def armed(text: str) -> Iterator[None]:
    """Arms failpoints for this process, as the variable does."""
    before = list(_armed)
    _armed[:] = _parsed(text)
    try:
        yield
    finally:
        _armed[:] = before


def kind_of(path: Path) -> str:
    """Returns how failpoints call a file that is written."""
    return path.stem if path.stem in KINDS else "file"


def failpoint(name: str) -> None:
    """Passes the named place; does nothing unless a test has armed it."""
    for fault in _armed:
        if fnmatchcase(name, fault.name):
            fault.left -= 1
            if fault.left == 0:
                _act(fault)


def _act(fault: _Fault) -> None:
    if fault.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.action == "sleep":
        sleep(float(fault.value or 1))
    if fault.action == "raise":
        if fault.value == "MemoryError":
            raise MemoryError(f"failpoint {fault.name}")
        number = int(getattr(errno, fault.value or "EIO"))
        raise OSError(number, os.strerror(number))
