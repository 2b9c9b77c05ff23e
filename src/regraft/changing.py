"""Files that change under their names, in a folder whose manifest verifies at every moment.

`replace_files` gives them other contents; a log grows by a line, and may be cut back.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from regraft import disk, faults
from regraft.documents import (
    MOST_JSON_BYTES,
    cut_off,
    parse_json_lines,
    read_regular,
    to_json,
)
from regraft.errors import ArtefactError
from regraft.manifests import ABSENT, MANIFEST, Entry, Manifest, plain_name, read_verified
from regraft.storage import Content, entry_of, write_file


def replace_files(
    folder: Path, contents: Mapping[str, Content], logs: Sequence[str] = (), *, grow: bool = True
) -> None:
    """Commits files of a folder whose manifest verifies at every moment between.

    The manifest first says what each file may be from now on, then the files change, in this order,
    then it says what they are.

    Args:
        folder: Exists.
        contents: Of each file.
        logs: Files that are appended to (see `append_json_line`), vouched for as far as they are.
        grow: Whether the logs may go on.
    """
    coming = {plain_name(name): entry_of(content) for name, content in contents.items()}
    disk.require_space(folder, sum(entry.size for entry in coming.values()))
    with disk.told(folder / MANIFEST), disk.held(folder):
        entries = _settled(folder)
        for name, after in coming.items():
            entries[name] = dataclasses.replace(entries.get(name, ABSENT), after=after)
        if contents:
            _write_manifest(folder, entries)
        for name, content in contents.items():
            entries[name] = write_file(folder / name, content)
        for name in logs:
            if (folder / name).is_file():
                entries[name] = _log_entry(folder / name, None, grow)
        _write_manifest(folder, entries)


def _settled(folder: Path) -> dict[str, Entry]:
    """Returns the entries, those of a replacement that was cut off as their files are now."""
    if not (folder / MANIFEST).is_file():
        return {}
    manifest = Manifest.open(folder)
    settled = {}
    for name, entry in manifest.entries.items():
        if entry.after is None:
            settled[name] = entry
            continue
        for each in (entry.after, dataclasses.replace(entry, after=None)):
            alone = Manifest(folder, {name: each})
            if each.size >= 0 and not alone.problems():
                settled[name] = each
    return settled


def _write_manifest(folder: Path, entries: dict[str, Entry]) -> None:
    write_file(folder / MANIFEST, Manifest(folder, entries).content())


def _log_entry(path: Path, size: int | None, grow: bool) -> Entry:
    return dataclasses.replace(entry_of(path.read_bytes()[:size]), grows=grow)


def write_listed(path: Path, content: bytes) -> None:
    """Commits a file; where its folder has a manifest, that vouches for it too."""
    if (path.parent / MANIFEST).is_file():
        replace_files(path.parent, {path.name: content})
    else:
        write_file(path, content)


# Logs


def append_json_line(path: Path, document: Any) -> int:
    """Commits a line at the end of a log; returns its size then, for `cut_log`.

    A line that a crash had cut off goes first.
    """
    kind = faults.kind_of(path)
    faults.failpoint(f"{kind}.begun")
    with disk.told(path):
        is_new = not path.exists()
        descriptor = disk.open_log(path)
        try:
            end = _whole_lines(path)
            if end < os.fstat(descriptor).st_size:
                disk.truncate(descriptor, end)
            line = to_json(document).encode("ascii") + b"\n"
            try:
                disk.write(descriptor, memoryview(line[: len(line) // 2]))
                faults.failpoint(f"{kind}.half")
                disk.write(descriptor, memoryview(line[len(line) // 2 :]))
                faults.failpoint(f"{kind}.written")
                disk.sync(descriptor)
            except OSError:
                disk.truncate(descriptor, end)
                raise
            faults.failpoint(f"{kind}.synced")
        finally:
            os.close(descriptor)
        if is_new:
            disk.sync_folder(path.parent)
        faults.failpoint(f"{kind}.settled")
    return end + len(line)


def cut_log(path: Path, size: int) -> None:
    """Drops what was appended after the log had `size` bytes, as the state of a step says.

    Raises:
        ArtefactError: It has fewer.
    """
    if not path.exists() and not size:
        return
    if not path.exists() or path.stat().st_size < size:
        raise ArtefactError(
            f"`{path}` has lost lines: expected {size} bytes", hint="restore the file from a copy"
        )
    folder = path.parent
    with disk.told(path), disk.held(folder):
        entries = _settled(folder)
        if path.name in entries and entries[path.name].size > size:
            entries[path.name] = _log_entry(path, size, grow=True)
            _write_manifest(folder, entries)
        descriptor = disk.open_log(path)
        try:
            disk.truncate(descriptor, size)
            disk.sync(descriptor)
        finally:
            os.close(descriptor)


def _whole_lines(path: Path) -> int:
    """Returns the size of the log without a last line that was cut off."""
    content = path.read_bytes()
    return len(content) - len(cut_off(content))


def read_log(path: Path) -> list[Any]:
    """Returns the documents of a log, none where it does not exist yet.

    What a crash has cut off at its end is left out, but not what the manifest vouches for.

    Raises:
        ArtefactError: A line is not JSON, or not what was saved.
    """
    if not path.exists():
        return []
    if (path.parent / MANIFEST).is_file() and path.name in Manifest.open(path.parent).entries:
        content = read_verified(path.parent, path.name)
    else:
        content = read_regular(path, MOST_JSON_BYTES)
    return list(parse_json_lines(content[: len(content) - len(cut_off(content))], path))
