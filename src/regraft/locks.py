"""One writer for each Run: a lock that the kernel frees when its holder dies, however it dies."""

import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from regraft import disk
from regraft.documents import to_json
from regraft.errors import BusyError, EnvironmentFault
from regraft.storage import remove_leftovers

LOCK = "lock"
MOST_BYTES = 4096  # of what a holder says of itself; assumed


@contextmanager
def writing(folder: Path, *, here: bool = True) -> Iterator[None]:
    """Holds a Run for writing, and removes what killed writers left half-written.

    Args:
        folder: Is made where there is none.
        here: Whether this process writes; of several, one does.

    Raises:
        BusyError: Another process holds it.
        EnvironmentFault: The folder cannot be written, or its file system has no locks.
    """
    if not here:
        yield
        return
    path = folder / LOCK
    with disk.told(path):
        disk.make_folder(folder)
        descriptor = disk.open_log(path)
    try:
        _take(descriptor, path)
        with disk.told(path), disk.held(folder):  # nobody replaces a file meanwhile
            remove_leftovers(folder)
        disk.truncate(descriptor, 0)
        disk.write(descriptor, memoryview(to_json(_myself()).encode("ascii")[:MOST_BYTES]))
        yield
    finally:
        os.close(descriptor)  # and with it the lock; the file stays: its name is no claim


def refuse_busy(folder: Path) -> None:
    """Refuses a Run that another process is writing.

    Raises:
        BusyError: One is.
    """
    path = folder / LOCK
    if path.is_file():
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _take(descriptor, path)
        finally:
            os.close(descriptor)


def _take(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BusyError(
            f"`{path.parent}` is being written by another process: {_holder(descriptor)}",
            hint="wait for it to end, or choose another folder; reading is possible meanwhile",
        ) from error
    except OSError as error:
        if error.errno not in disk.NO_LOCKS:
            raise
        raise EnvironmentFault(
            f"`{path}` cannot be locked: {error.strerror}",
            hint="put the run on a local disk: network file systems without locks are not served",
        ) from error


def _myself() -> dict[str, object]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "start": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv)[:1000],
    }


def _holder(descriptor: int) -> str:
    """Returns what the holder said of itself, as far as that can be printed."""
    text = os.pread(descriptor, MOST_BYTES, 0).decode("ascii", "replace")
    try:
        said = json.loads(text)
        parts = [f"{key} {str(said[key])[:200]}" for key in ("pid", "host", "start", "command")]
    except (ValueError, KeyError, TypeError):
        return "it has just begun"
    return "".join(c if c.isprintable() else "?" for c in ", ".join(parts))
