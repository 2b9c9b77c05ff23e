"""The one commit protocol: every durable write of the product goes through here.

A file appears under its name whole or not at all: it is written beside its destination, synced,
renamed, and its folder synced. Files that count together lie in a folder that appears likewise,
with a manifest (size and sha256 of each, taken while they are written) as its last file. A `Store`
keeps such folders by step. What a crash leaves is found by its hash, never by its time or a link.
"""

import errno
import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

from regraft import disk, faults
from regraft.documents import json_content, sha256_of_file
from regraft.errors import ArtefactError
from regraft.manifests import MANIFEST, Entry, Manifest, verify_manifest

Content = bytes | Sequence[bytes | memoryview]
"""What a file is to hold: bytes, or buffers one after the other, as of `tensors.packed`."""

HOLDING_ATTEMPTS = 20  # each is lost only to a process that starts in the same microsecond; assumed


def cache_home() -> Path:
    """Returns `REGRAFT_CACHE`, or `regraft` in the user's cache folder."""
    if chosen := os.environ.get("REGRAFT_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "regraft"


# One file


def write_file(path: Path, content: Content) -> Entry:
    """Commits a file.

    Raises:
        EnvironmentFault: The machine refuses; what stood under the name still does.
    """
    kind = faults.kind_of(path)
    with disk.told(path), _temporary_file(path) as (temporary, descriptor):
        entry = _fill(descriptor, content, kind)
        _appear(temporary, path, kind)
    return entry


@contextmanager
def committed(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what is written there becomes `path` on success.

    For writers that want a path; `write_file` does with what is at hand.
    """
    kind = faults.kind_of(path)
    with disk.told(path), _temporary_file(path) as (temporary, descriptor):
        mode = os.fstat(descriptor).st_mode & 0o777
        yield temporary
        os.chmod(temporary, mode)  # that of the umask: safetensors leaves 0600 whatever it says
        _sync_file(temporary)
        faults.failpoint(f"{kind}.synced")
        _appear(temporary, path, kind)


def write_json(path: Path, document: Any) -> None:
    """Commits a JSON document: strict (no NaN), sorted by nothing, indented for people."""
    write_file(path, json_content(document))


@contextmanager
def _temporary_file(path: Path) -> Iterator[tuple[Path, int]]:
    """Yields a new file beside `path`, held for as long as this process is at work on it."""
    faults.failpoint(f"{faults.kind_of(path)}.begun")
    with _held_new(path, lambda new: os.close(disk.create(new))) as temporary:
        faults.failpoint(f"{faults.kind_of(path)}.created")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CLOEXEC)
        try:
            yield temporary, descriptor
        finally:
            os.close(descriptor)


@contextmanager
def _held_new(path: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """Makes something under a temporary name, and holds it: what is not held is a leftover.

    It goes in the end, unless it has got another name.
    """
    with ExitStack() as stack:
        for _ in range(HOLDING_ATTEMPTS):
            temporary = _temporary_name(path)
            make(temporary)
            stack.callback(_remove, temporary)
            try:
                stack.enter_context(disk.held(temporary))
            except FileNotFoundError:  # taken for a leftover before it was held: another name
                continue
            yield temporary
            return
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


def _remove(path: Path) -> None:
    disk.remove_folder(path) if path.is_dir() else disk.remove(path)


def _temporary_name(path: Path) -> Path:
    return path.parent / f".{path.name}.{token_hex(4)}.tmp"


def _fill(descriptor: int, content: Content, kind: str) -> Entry:
    """Writes and syncs the content of a new file; returns its size and hash."""
    buffers = [content] if isinstance(content, bytes) else content
    views = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
    size = sum(len(view) for view in views)
    digest, written = hashlib.sha256(), 0
    for view in views:
        middle = min(max(size // 2 - written, 0), len(view))
        for part in (view[:middle], view[middle:]):
            digest.update(part)
            disk.write(descriptor, part)
            written += len(part)
            if written == size // 2:
                faults.failpoint(f"{kind}.half")
    faults.failpoint(f"{kind}.written")
    disk.sync(descriptor)
    faults.failpoint(f"{kind}.synced")
    return Entry(size, digest.hexdigest())


def _appear(temporary: Path, path: Path, kind: str) -> None:
    disk.rename(temporary, path)
    faults.failpoint(f"{kind}.renamed")
    disk.sync_folder(path.parent)
    faults.failpoint(f"{kind}.settled")


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        disk.sync(descriptor)
    finally:
        os.close(descriptor)


# A folder of files that count together


@contextmanager
def committed_folder(path: Path, kind: str = "file", *, replaces: bool = False) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; it becomes `path` on success, and goes otherwise.

    Its manifest is written last, over whatever files it has got. Where another process was first,
    its folder stays: only equal content shares a name.

    Args:
        path: In a folder that exists.
        kind: How failpoints call it.
        replaces: Whether it takes the place of the one that is there.
    """
    with disk.told(path), _temporary_folder(path, kind) as temporary:
        yield temporary
        entries = {}
        for file in sorted(temporary.iterdir()):
            _sync_file(file)
            entries[file.name] = Entry(file.stat().st_size, sha256_of_file(file))
        _seal(temporary, path, entries, kind, replaces=replaces)


def make_cache(folder: Path) -> None:
    """Makes a folder of the cache, which only its user may enter: whoever can write there can also
    write a manifest.

    Raises:
        EnvironmentFault: The machine refuses.
    """
    with disk.told(folder):
        disk.make_folder(cache_home(), 0o700)
        disk.make_folder(folder)


def is_whole(folder: Path) -> bool:
    """Whether a committed folder lies there, each file verified by its hash."""
    try:
        verify_manifest(folder)
    except (ArtefactError, OSError):  # damaged, absent, or removed by another process meanwhile
        return False
    return True


def make_folder(folder: Path) -> None:
    """Makes the folder and those above it that are missing.

    Raises:
        EnvironmentFault: The machine refuses.
    """
    with disk.told(folder):
        disk.make_folder(folder)


def holds(folder: Path, contents: Mapping[str, Content]) -> bool:
    """Whether the folder is committed and holds these files and no others."""
    if not (folder / MANIFEST).is_file():
        return False
    entries = {name: entry_of(content) for name, content in contents.items()}
    return verify_manifest(folder).entries == entries


def write_folder(path: Path, contents: Mapping[str, Content], kind: str = "file") -> None:
    """Commits files as a folder, with their manifest; see `committed_folder`."""
    disk.require_space(path.parent, sum(_size(content) for content in contents.values()))
    with disk.told(path), _temporary_folder(path, kind) as temporary:
        entries = {name: _write_in(temporary / name, contents[name], kind) for name in contents}
        _seal(temporary, path, entries, kind)


def _write_in(path: Path, content: Content, kind: str) -> Entry:
    descriptor = disk.create(path)
    try:
        return _fill(descriptor, content, kind)
    finally:
        os.close(descriptor)


@contextmanager
def _temporary_folder(path: Path, kind: str) -> Iterator[Path]:
    faults.failpoint(f"{kind}.begun")
    with _held_new(path, disk.make_one_folder) as temporary:
        faults.failpoint(f"{kind}.created")
        yield temporary


def _seal(
    temporary: Path, path: Path, entries: Mapping[str, Entry], kind: str, *, replaces: bool = False
) -> None:
    """Adds the manifest, and gives the folder its name."""
    _write_in(temporary / MANIFEST, Manifest(temporary, dict(entries)).content(), kind)
    disk.sync_folder(temporary)
    faults.failpoint(f"{kind}.sealed")
    if replaces:
        remove_folder(path)
    try:
        disk.rename(temporary, path)
    except OSError:
        if not path.is_dir():  # another process may have committed the same folder first
            raise
    faults.failpoint(f"{kind}.renamed")
    disk.sync_folder(path.parent)
    faults.failpoint(f"{kind}.settled")


def remove_folder(path: Path) -> None:
    """Removes a committed folder: at once for everyone who looks for it.

    Raises:
        EnvironmentFault: The machine refuses.
    """
    temporary = _temporary_name(path)
    with disk.told(path):
        try:
            disk.rename(path, temporary)
        except FileNotFoundError:  # as it should be
            return
        disk.remove_folder(temporary)


def remove_file(path: Path) -> None:
    with disk.told(path):
        disk.remove(path)


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes left half-written, and nothing that is still at work."""
    for path in folder.glob(".*.tmp"):
        with disk.held_if_free(path) as is_leftover:
            if is_leftover:
                _remove(path)


def _size(content: Content) -> int:
    return (
        len(content) if isinstance(content, bytes) else sum(memoryview(b).nbytes for b in content)
    )


def entry_of(content: Content) -> Entry:
    """Returns the size and hash of what a file is to hold."""
    buffers = [content] if isinstance(content, bytes) else content
    digest = hashlib.sha256()
    for buffer in buffers:
        digest.update(buffer)
    return Entry(_size(content), digest.hexdigest())


# Folders by step


@dataclass(frozen=True)
class Step:
    """A committed step that verified when it was found."""

    number: int
    manifest: "Manifest"

    def read(self, name: str) -> bytes:
        return self.manifest.read(name)


@dataclass(frozen=True)
class Store:
    """Steps of work, each a folder of files that count together: `000420/`.

    One process writes (it holds the Run); any may read. A step is acknowledged when `commit`
    returns: from then on a crash, also of the machine, leaves it or a newer one. Only then may
    older ones be pruned.

    Attributes:
        folder: Exists; where it is gone, a commit fails rather than begins anew.
        kind: How failpoints call its steps.
    """

    folder: Path
    kind: str = "state"

    def commit(self, number: int, contents: Mapping[str, Content]) -> None:
        """Writes a step, hashed on the way; a damaged one of that number gives place.

        Raises:
            EnvironmentFault: The machine refuses; earlier steps are as they were.
        """
        path = self.path(number)
        remove_folder(path)
        write_folder(path, contents, self.kind)

    def recover(self) -> tuple[Step | None, list[str]]:
        """Returns the newest step that verifies, and what is wrong with those after it.

        For the process that writes: what was half-written, and newer steps that are damaged, go.
        """
        remove_leftovers(self.folder)
        step, skipped = self.newest()
        for number in self.numbers():
            if step is None or number > step.number:
                remove_folder(self.path(number))
        return step, skipped

    def newest(self) -> tuple[Step | None, list[str]]:
        """Returns the newest step that verifies, and what is wrong with those after it."""
        skipped: list[str] = []
        for number in reversed(self.numbers()):
            path = self.path(number)
            try:
                manifest = verify_manifest(path)
            except ArtefactError as error:
                reasons = error.problems or (error.message,)
                skipped.append(f"`{path}` is passed over: {'; '.join(reasons)}")
            else:
                return Step(number, manifest), skipped
        return None, skipped

    def path(self, number: int) -> Path:
        return self.folder / f"{number:06d}"

    def numbers(self) -> list[int]:
        """Returns the steps there are, in order, verified or not."""
        if not self.folder.is_dir():
            return []
        names = [path.name for path in self.folder.iterdir()]
        return sorted(int(name) for name in names if name.isascii() and name.isdecimal())

    def prune(self, keep: int = 2, also: Collection[int] = ()) -> None:
        """Removes all but the newest steps; call it after a commit has returned.

        Args:
            keep: So many of the newest stay: one may rot.
            also: Steps that stay besides, as the best.
        """
        for number in self.numbers()[:-keep]:
            if number not in also:
                remove_folder(self.path(number))
                faults.failpoint(f"{self.kind}.pruned")
