"""The only file that writes: create, write, sync, rename, remove, each once and in no other place.

What must survive a crash is composed of these in `storage`; tests replace them here, one by one, to
record what a run does to a disk or to break the protocol.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from regraft.errors import EnvironmentFault

HINT = "check the place, its permissions and the free space; what was committed before is intact"
LEAST_FREE_BYTES = 16 * 2**20  # for manifests, logs and folders; assumed
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""What a file system says that has no locks."""
REFUSALS = frozenset({
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO,
    errno.EXDEV, errno.EMFILE, errno.ENFILE, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP,
    errno.ENAMETOOLONG, errno.EBUSY, errno.ESTALE, *NO_LOCKS,
})  # fmt: skip
"""Where the machine refuses, rather than we make a mistake."""


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Turns a refusal of the machine into an error that says what could not be written.

    Raises:
        EnvironmentFault: The disk is full, or the place is forbidden, gone or broken.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        raise EnvironmentFault(
            f"`{path}` cannot be written: {error.strerror}",
            hint=HINT,
        ) from error


def create(path: Path) -> int:
    """Returns a descriptor of a new file; whatever stands there already is refused."""
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
    return os.open(path, flags, 0o666)  # less the umask of the user


def open_log(path: Path) -> int:
    """Returns a descriptor of a file that grows; it need not exist."""
    return os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC, 0o666)


def write(descriptor: int, data: memoryview) -> None:
    """Writes all of it, however little the system takes at a time."""
    while data:
        data = data[os.write(descriptor, data) :]


def sync(descriptor: int) -> None:
    """Waits until the disk has it. An error is final: a second fsync would report success."""
    os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Waits until the disk has the names in the folder."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    os.rename(source, target)


def remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def truncate(descriptor: int, size: int) -> None:
    os.ftruncate(descriptor, size)


def make_folder(folder: Path, mode: int = 0o777) -> None:
    """Makes the folder and those above it that are missing, and waits until the disk has them."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(mode, exist_ok=True)
    sync_folder(folder.parent)


def make_one_folder(folder: Path) -> None:
    folder.mkdir()


def remove_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def create_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> Any:
    """Returns a new file in numpy's format, to be written through memory.

    Its space is taken at once: a full disk is told here; later it would end the process by SIGBUS.
    """
    import numpy as np

    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    _reserve(path, path.stat().st_size)
    return array


def _reserve(path: Path, size: int) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if size and hasattr(os, "posix_fallocate"):  # macOS has none
            os.posix_fallocate(descriptor, 0, size)
    finally:
        os.close(descriptor)


def free_bytes(folder: Path) -> int:
    """Returns the free space where this folder lies or will lie."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def require_space(folder: Path, needed: int) -> None:
    """Refuses early what would not fit.

    Raises:
        EnvironmentFault: Less is free.
    """
    free = free_bytes(folder)
    if free < needed + LEAST_FREE_BYTES:
        raise EnvironmentFault(
            f"`{folder}` needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free",
            hint=HINT,
        )


def require_writable(folder: Path) -> None:
    """Refuses early a place where nothing can be made.

    Raises:
        EnvironmentFault: It is one.
    """
    place = folder
    while not os.path.lexists(place):
        place = place.parent
    if not os.access(place, os.W_OK | os.X_OK):
        raise EnvironmentFault(
            f"`{folder}` cannot be written: no permission to write in `{place}`", hint=HINT
        )


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Holds a file or folder; waits while another process does. Freed by the kernel on death.

    Raises:
        FileNotFoundError: It is gone, or was when its turn came.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if not os.path.samestat(os.fstat(descriptor), os.stat(path)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        yield
    finally:
        os.close(descriptor)


@contextmanager
def held_if_free(path: Path) -> Iterator[bool]:
    """Holds a file or folder if nobody does; yields whether it does."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:  # gone, or not ours
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)
