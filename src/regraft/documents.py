"""Reading what may have been changed by anyone: regular files, strict JSON, caps; and hashes."""

import errno
import hashlib
import io
import json
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from regraft.errors import ArtefactError

MOST_JSON_BYTES = 2**28  # plenty for the samples of a million images; assumed
MOST_DEPTH = 50  # of JSON; ours is 6 deep; assumed
CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)


def json_content(document: Any) -> bytes:
    return (to_json(document, indent=2) + "\n").encode("ascii")


def to_json(document: Any, indent: int | None = None) -> str:
    # ensure_ascii keeps undecodable file names (surrogates) inside valid UTF-8.
    return json.dumps(document, indent=indent, allow_nan=False, ensure_ascii=True)


def json_lines_content(documents: Iterable[Any]) -> bytes:
    stream = io.BytesIO()
    for document in documents:
        stream.write(to_json(document).encode("ascii") + b"\n")
    return stream.getvalue()


def read_json(path: Path, most: int = MOST_JSON_BYTES) -> Any:
    """Returns the document.

    Raises:
        ArtefactError: The file is missing, is no regular file, is too large, or is not JSON.
    """
    return parse_json(read_regular(path, most), path)


def sealed_content(document: dict[str, Any]) -> bytes:
    """Returns a JSON document that vouches for itself; `read_sealed` gives it back."""
    return json_content({**document, "sha256": sha256_of(document)})


def read_sealed(path: Path) -> dict[str, Any]:
    """Returns what `sealed_content` was given.

    Raises:
        ArtefactError: A byte of it differs.
    """
    content = read_regular(path, MOST_JSON_BYTES)
    found = parse_json(content, path)
    document = {k: v for k, v in found.items() if k != "sha256"} if isinstance(found, dict) else {}
    if content != sealed_content(document):
        raise ArtefactError(
            f"`{path}` is not the file that was saved", hint="restore the file from a copy"
        )
    return document


def parse_json(content: bytes, path: Path) -> Any:
    try:
        return _parsed(content)
    except (ValueError, RecursionError) as error:
        raise ArtefactError(
            f"`{path}` is not valid JSON: {error}", hint="restore the file from a copy"
        ) from error


def _parsed(content: bytes) -> Any:
    """Returns a document without duplicate keys, NaN, or depth beyond all reason."""
    document = json.loads(
        content.decode("utf-8"), object_pairs_hook=once, parse_constant=_refuse_constant
    )
    level = [document] if isinstance(document, dict | list) else []
    for _ in range(MOST_DEPTH):
        parts = [each.values() if isinstance(each, dict) else each for each in level]
        level = [each for part in parts for each in part if isinstance(each, dict | list)]
    if level:
        raise ValueError(f"more than {MOST_DEPTH} levels deep")
    return document


def read_regular(path: Path, most: int) -> bytes:
    """Returns the content of a regular file, which no link stands for.

    It is a copy: what becomes of the file later does not matter.

    Raises:
        ArtefactError: It is missing, something else, or larger than `most` bytes.
    """
    with open(open_regular(path), "rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > most:
            raise ArtefactError(
                f"`{path}` has {size:,} bytes; at most {most:,} are accepted",
                hint="check where it comes from",
            )
        return stream.readall()[:most]


def open_regular(path: Path) -> int:
    try:
        # Not following links; not waiting for the other end of a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ArtefactError(
            f"`{path}` is missing",
            hint="name a folder that `regraft pretrain`, `finetune` or `compare` has written",
        ) from error
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
        raise _irregular(path) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _irregular(path)
    return descriptor


def _irregular(path: Path) -> ArtefactError:
    return ArtefactError(
        f"`{path}` is a link, a folder or a device; expected a file",
        hint="put the file itself there",
    )


def sha256_of_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of(document: Any) -> str:
    """Returns the hash of a JSON document in its canonical form."""
    digest = hashlib.sha256()
    for text in _canonical(document):
        digest.update(text.encode("ascii"))
    return digest.hexdigest()


def _canonical(document: Any) -> Iterator[str]:
    """Yields the text, of lists item by item: that of all images takes ten times its size."""
    if not isinstance(document, list):
        yield CANONICAL.encode(document)
        return
    yield "["
    for number, item in enumerate(document):
        if number:
            yield ","
        yield from _canonical(item)
    yield "]"


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns an object of JSON in which no key stands twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def cut_off(content: bytes) -> bytes:
    """Returns what stands at the end of a log and is no whole line: an append that a crash cut off.

    After a power loss it may have zeros for bytes, and still end a line.
    """
    start = content.rfind(b"\n", 0, -1) + 1
    last = content[start:]
    try:
        if last.endswith(b"\n") and _parsed(last) is not None:
            return b""
    except (ValueError, RecursionError):
        pass
    return last


def parse_json_lines(content: bytes, path: Path) -> Iterator[Any]:
    """Yields the documents one by one: all at once take ten times the memory of their text.

    A last line without an end is left out.

    Raises:
        ArtefactError: A line is not JSON.
    """
    for number, line in enumerate(io.BytesIO(content), start=1):
        if not line.endswith(b"\n"):
            return
        try:
            document = _parsed(line)
        except (ValueError, RecursionError) as error:
            raise ArtefactError(
                f"`{path}` line {number} is not valid JSON: {error}",
                hint="restore the file from a copy",
            ) from error
        yield document
