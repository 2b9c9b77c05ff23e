"""The one commit protocol: every durable write of the product goes through here.

A file appears under its name whole or not at all: it is written beside its destination, synced,
renamed, and its folder synced. A manifest (size and sha256 of each file) is always written last,
so a folder whose manifest verifies is complete.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any, BinaryIO

from regraft.errors import ArtefactError, EnvironmentFault

MANIFEST = "manifest.json"


def cache_home() -> Path:
    """Returns `REGRAFT_CACHE`, or `regraft` in the user's cache folder."""
    if chosen := os.environ.get("REGRAFT_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "regraft"


@contextmanager
def committed(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what is written there becomes `path` on success."""
    temporary = path.parent / f".{path.name}.{token_hex(4)}.tmp"
    try:
        yield temporary
        # 0o666 under the user's umask: safetensors leaves 0600 whatever the umask says.
        os.chmod(temporary, 0o666 & ~_umask())
        _sync(temporary)
        temporary.rename(path)
        _sync(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
            raise EnvironmentFault(
                f"`{path}` cannot be written: {error.strerror}",
                hint="free space or choose another place; everything committed before is intact",
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def committed_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; it becomes `path` on success, and goes otherwise.

    Where another process was first, its folder stays: only equal content shares a name.
    """
    temporary = path.parent / f".{path.name}.{token_hex(4)}.tmp"
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.iterdir():
            _sync(file)
        try:
            temporary.rename(path)
        except OSError:
            if not path.is_dir():  # another process may have committed the same folder first
                raise
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Commits `text` (UTF-8; names that are no valid Unicode keep their bytes)."""
    with committed(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "surrogateescape"))


def write_bytes(path: Path, content: bytes) -> None:
    with committed(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, document: Any) -> None:
    """Commits a JSON document: strict (no NaN), sorted by nothing, indented for people."""
    write_text(path, to_json(document, indent=2) + "\n")


def to_json(document: Any, indent: int | None = None) -> str:
    # ensure_ascii keeps undecodable file names (surrogates) inside valid UTF-8.
    return json.dumps(document, indent=indent, allow_nan=False, ensure_ascii=True)


def to_json_lines(documents: Iterable[Any]) -> str:
    return "".join(to_json(document) + "\n" for document in documents)


def read_json(path: Path) -> Any:
    """Returns the document.

    Raises:
        ArtefactError: The file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ArtefactError(
            f"`{path}` is missing",
            hint="name a folder that `regraft pretrain`, `finetune` or `compare` has written",
        ) from error
    except ValueError as error:
        raise ArtefactError(
            f"`{path}` is not valid JSON: {error}", hint="restore the file from a copy"
        ) from error


def append_json_line(path: Path, document: Any) -> None:
    with path.open("ab+") as stream:
        _drop_cut_off_line(stream)
        stream.write(to_json(document).encode("ascii") + b"\n")


def read_json_lines(path: Path) -> list[Any]:
    """Returns the documents; none if the file does not exist yet.

    A last line without its newline is an append that was cut off, and is left out.

    Raises:
        ArtefactError: Another line is not JSON.
    """
    if not path.exists():
        return []
    documents = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            documents.append(json.loads(line))
        except ValueError as error:
            raise ArtefactError(
                f"`{path}` line {number} is not valid JSON: {error}",
                hint="restore the file from a copy",
            ) from error
    return documents


def _drop_cut_off_line(stream: BinaryIO) -> None:
    """Cuts an append that was cut off, so that the next line stands alone."""
    end = stream.seek(0, os.SEEK_END)
    if end and (stream.seek(end - 1), stream.read(1))[1] != b"\n":
        stream.seek(0)
        stream.truncate(stream.read().rfind(b"\n") + 1)


def sha256_of_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of(document: Any) -> str:
    """Returns the hash of a JSON document in its canonical form."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def write_manifest(folder: Path, names: Sequence[str]) -> None:
    """Commits the size and sha256 of the named files; call it after they are all committed."""
    files = {
        name: {"size": (folder / name).stat().st_size, "sha256": sha256_of_file(folder / name)}
        for name in names
    }
    write_json(folder / MANIFEST, {"schema": 1, "files": files})


def verify_manifest(folder: Path) -> None:
    """Checks every file that the manifest lists.

    Raises:
        ArtefactError: The manifest or a file is missing, or a size or hash differs.
    """
    problems = []
    for name, size, sha256 in _read_manifest(folder / MANIFEST):
        path = folder / name
        if Path(name).name != name or not path.is_file():
            problems.append(f"`{name}` is missing")
        elif path.stat().st_size != size:
            problems.append(f"`{name}` has {path.stat().st_size} bytes, not {size}")
        elif sha256_of_file(path) != sha256:
            problems.append(f"`{name}` is not the file that was saved (sha256 differs)")
    if problems:
        raise ArtefactError(
            f"`{folder}` is damaged or was changed",
            problems=problems,
            hint="restore the folder from a copy, or train again",
        )


def _read_manifest(path: Path) -> list[tuple[str, int, str]]:
    try:
        files = read_json(path)["files"]
        return [(name, entry["size"], entry["sha256"]) for name, entry in files.items()]
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtefactError(
            f"`{path}` is no manifest of this version: {error!r}",
            hint="restore the folder from a copy",
        ) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
