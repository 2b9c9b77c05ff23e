"""Manifests: which files a folder holds, with size and sha256 of each. Reads; writes nothing."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from regraft.documents import (
    MOST_JSON_BYTES,
    json_content,
    open_regular,
    parse_json,
    read_regular,
    sha256_of,
)
from regraft.errors import ArtefactError

MANIFEST = "manifest.json"
SCHEMA = 1
MOST_BYTES = 2**36  # of a file, 64 GiB: far more than the largest network of timm; assumed
MOST_FILES = 10_000  # of one manifest; assumed


@dataclass(frozen=True)
class Entry:
    """What a manifest says of a file.

    Attributes:
        size: In bytes.
        after: What it may be instead, while it is being replaced.
        grows: It is a log: only its first `size` bytes are vouched for.
    """

    size: int
    sha256: str
    after: "Entry | None" = None
    grows: bool = False


ABSENT = Entry(-1, "")
"""What stands for a file before it is first written by `replace_files`."""


@dataclass(frozen=True)
class Manifest:
    """Which files a folder holds, with size and sha256.

    It says the same of itself: any byte that differs from what `content` gives is found.
    """

    folder: Path
    entries: dict[str, Entry]

    @classmethod
    def open(cls, folder: Path) -> "Manifest":
        """Reads and checks the manifest itself, not the files.

        Raises:
            ArtefactError: There is none, it was changed, or a newer version wrote it.
        """
        path = folder / MANIFEST
        raw = read_regular(path, MOST_JSON_BYTES)
        document = parse_json(raw, path)
        wrote = document.get("written_by") if isinstance(document, dict) else None
        if isinstance(document, dict) and document.get("schema") not in (SCHEMA, None):
            raise ArtefactError(
                f"`{path}` was written by regraft {str(wrote)[:40]!r} in schema "
                f"{str(document['schema'])[:40]}; this version reads {SCHEMA}",
                hint="use the regraft version that wrote it",
            )
        try:
            files = document["files"].items()
            manifest = cls(folder, {plain_name(name): _entry(found) for name, found in files})
            is_whole = len(files) <= MOST_FILES and raw == manifest.content(document["written_by"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise _damaged(folder, [f"`{MANIFEST}` is no manifest of this version: {error!r}"]) \
                from error  # fmt: skip
        if not is_whole:
            raise _damaged(folder, [f"`{MANIFEST}` is not the file that was saved"])
        return manifest

    def content(self, written_by: str | None = None) -> bytes:
        document: dict[str, Any] = {
            "schema": SCHEMA,
            "written_by": written_by or version("regraft"),
            "files": {name: _entry_json(entry) for name, entry in self.entries.items()},
        }
        return json_content({**document, "sha256": sha256_of(document)})

    def read(self, name: str, most: int = MOST_JSON_BYTES) -> bytes:
        """Returns the content of a file, if it is what the manifest says.

        Args:
            name: Of a file in the manifest.
            most: Bytes that are accepted.

        Raises:
            ArtefactError: It is missing, too large, or not the file that was saved.
        """
        path = self.folder / name
        if name not in self.entries:
            raise _damaged(self.folder, [f"`{name}` is missing in `{MANIFEST}`"])
        if not os.path.lexists(path):
            raise _damaged(self.folder, [f"`{name}` is missing"])
        content = read_regular(path, most)
        if problem := _problem(name, self.entries[name], len(content), [content]):
            raise _damaged(self.folder, [problem])
        return content

    def problems(self) -> list[str]:
        """Returns what is wrong with the files, each verified by its hash."""
        return [problem for name in self.entries if (problem := self._problem_of(name))]

    def strangers(self) -> list[str]:
        """Returns the names in the folder that the manifest does not know; hidden ones are none."""
        known = {MANIFEST, *self.entries}
        names = sorted(path.name for path in self.folder.iterdir())
        return [name for name in names if name not in known and not name.startswith(".")]

    def refuse_strangers(self) -> None:
        """Refuses a folder with files that were not saved with the others.

        Raises:
            ArtefactError: There are some.
        """
        if strangers := self.strangers():
            raise _damaged(
                self.folder, [f"`{name}` was not saved with the others" for name in strangers[:3]]
            )

    def _problem_of(self, name: str) -> str | None:
        path, entry = self.folder / name, self.entries[name]
        if not os.path.lexists(path):
            return None if entry.size < 0 else f"`{name}` is missing"
        try:
            descriptor = open_regular(path)
        except ArtefactError as error:
            return error.message
        with open(descriptor, "rb", buffering=0) as stream:
            size = os.fstat(descriptor).st_size
            if size > MOST_BYTES:
                return f"`{name}` has {size:,} bytes; at most {MOST_BYTES:,} are accepted"
            return _problem(name, entry, size, iter(lambda: stream.read(2**20), b""))


def verify_manifest(folder: Path) -> Manifest:
    """Checks every file of a committed folder; returns its manifest.

    Raises:
        ArtefactError: The manifest or a file is missing, a size or hash differs, or there is a file
            that was not saved with them.
    """
    manifest = Manifest.open(folder)
    problems = manifest.problems()
    problems += [f"`{name}` was not saved with the others" for name in manifest.strangers()]
    if problems:
        raise _damaged(folder, problems)
    return manifest


def read_verified(folder: Path, name: str, most: int = MOST_JSON_BYTES) -> bytes:
    """Returns the content of a file that another process may be replacing at this moment.

    Raises:
        ArtefactError: It is missing, too large, or not the file that was saved.
    """
    while True:
        manifest = Manifest.open(folder)
        try:
            return manifest.read(name, most)
        except ArtefactError:
            if Manifest.open(folder) == manifest:  # nobody changes it: it is damaged
                raise


def read_document(folder: Path, name: str) -> Any:
    """Returns a JSON document that the manifest vouches for.

    Raises:
        ArtefactError: As `read_verified`, or it is not JSON.
    """
    return parse_json(read_verified(folder, name), folder / name)


def _damaged(folder: Path, problems: Sequence[str]) -> ArtefactError:
    return ArtefactError(
        f"`{folder}` is damaged or was changed",
        problems=problems,
        hint="restore the folder from a copy, or train again",
    )


def _problem(name: str, entry: Entry, size: int, parts: Iterable[bytes]) -> str | None:
    accepted = [each for each in (entry, entry.after) if each is not None and each.size >= 0]
    if not any(size == each.size or (each.grows and size > each.size) for each in accepted):
        return f"`{name}` has {size} bytes, not {accepted[0].size}"
    digests = {each.size: hashlib.sha256() for each in accepted}
    done = 0
    for part in parts:
        for upto, digest in digests.items():
            digest.update(part[: max(upto - done, 0)])
        done += len(part)
    for each in accepted:
        is_long_enough = done == each.size or (each.grows and done > each.size)
        if is_long_enough and digests[each.size].hexdigest() == each.sha256:
            return None
    return f"`{name}` is not the file that was saved (sha256 differs)"


def _entry(found: Any, depth: int = 0) -> Entry:
    size, sha256, after = found["size"], found["sha256"], found.get("after")
    if type(size) is not int or not isinstance(sha256, str) or depth > 1:
        raise TypeError("a size, or a hash")
    if size < 0 and (size, sha256, after is None) != (ABSENT.size, ABSENT.sha256, False):
        raise ValueError(f"a size of {size}")
    return Entry(
        size,
        sha256,
        None if after is None else _entry(after, depth + 1),
        bool(found.get("grows", False)),
    )


def _entry_json(entry: Entry) -> dict[str, Any]:
    document: dict[str, Any] = {"size": entry.size, "sha256": entry.sha256}
    if entry.grows:
        document["grows"] = True
    if entry.after is not None:
        document["after"] = _entry_json(entry.after)
    return document


def plain_name(name: str) -> str:
    """Returns the name if it is that of a file in the folder and nothing else."""
    if not name or len(name) > 200 or name.startswith(".") or name != Path(name).name:
        raise ValueError(f"a name {name[:40]!r}")
    return name
