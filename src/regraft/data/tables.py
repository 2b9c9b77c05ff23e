"""Tables that name images and labels: CSV, TSV and JSON Lines."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from regraft.data.listing import SPLIT_WORDS, Listed, Listing, walk
from regraft.errors import DataError, UsageError, shorten

JSON_LINES = (".jsonl", ".ndjson")
METADATA = "metadata.jsonl"  # as the image folders of Hugging Face name it
FILE_NAME = "file_name"


@dataclass(frozen=True)
class Columns:
    """Which column holds what; None: there is none."""

    image: str = "image"
    label: str = "label"
    group: str | None = None
    split: str | None = None

    @property
    def named(self) -> list[str]:
        return [column for column in (self.image, self.label, self.group, self.split) if column]


def list_table(root: Path, file: Path, columns: Columns) -> Listing:
    """Lists the rows of a table; image paths are relative to `root`.

    A CSV may be divided by comma, semicolon or tab; a file that ends in `.jsonl` has a JSON object
    on each line, with the image in `file_name` where no other key was named.

    Raises:
        UsageError: The table is missing or lacks a column.
        DataError: It is no such table in UTF-8.
    """
    if not root.is_dir():
        raise DataError(f"image folder not found: `{root}`", hint="check the path")
    text = _text(file)
    if file.suffix.lower() not in JSON_LINES:
        return _listed(root, file, columns, _csv_rows(text, file, columns))
    rows = _json_rows(text, file)
    if columns.image == Columns().image and rows and columns.image not in rows[0]:
        columns = Columns(FILE_NAME, columns.label, columns.group, columns.split)
    _refuse_missing(columns.named, list(rows[0]) if rows else [], file)
    return _listed(root, file, columns, rows)


def image_paths(file: Path, column: str) -> list[str]:
    """Returns the paths in one column of a table, as they stand there; labels are not needed.

    Raises:
        UsageError: The table is missing or lacks the column.
        DataError: It is no such table in UTF-8.
    """
    text, columns = _text(file), _OnlyImage(column)
    if file.suffix.lower() in JSON_LINES:
        rows = _json_rows(text, file)
        if column == Columns().image and rows and column not in rows[0]:
            column = FILE_NAME
        _refuse_missing([column], list(rows[0]) if rows else [], file)
    else:
        rows = list(_csv_rows(text, file, columns))
    return [name for row in rows if (name := _cell(row.get(column)))]


@dataclass(frozen=True)
class _OnlyImage(Columns):
    @property
    def named(self) -> list[str]:
        return [self.image]


def list_metadata(root: Path, columns: Columns) -> Listing | None:
    """Lists what the `metadata.jsonl` of a folder, or of its split folders, says of its images.

    Returns:
        None where there is none, or where it names no labels.
    """
    splits = [folder for folder in _folders(root) if folder.name.lower() in SPLIT_WORDS]
    files = [(root, ""), *((folder, folder.name) for folder in splits)]
    files = [(folder, word) for folder, word in files if (folder / METADATA).is_file()]
    whole = Listing()
    for folder, word in files:
        rows = _json_rows(_text(folder / METADATA), folder / METADATA)
        if not rows or FILE_NAME not in rows[0] or columns.label not in rows[0]:
            return None
        own = Columns(FILE_NAME, columns.label, columns.group, columns.split)
        found = _listed(folder, folder / METADATA, own, rows)
        split = SPLIT_WORDS[word.lower()] if word else None
        inside = PurePosixPath(word)
        whole.images += [
            Listed(str(inside / image.path), image.label, split or image.split, image.group)
            for image in found.images
        ]
        whole.excluded += [(str(inside / path), why) for path, why in found.excluded]
        whole.problems += found.problems
    if not files:
        return None
    named = {image.path for image in whole.images} | {path for path, _ in whole.excluded}
    rest = Listing()
    unnamed = [path for path in walk(root, root, rest) if path not in named]
    tables = {(folder / METADATA).relative_to(root).as_posix() for folder, _ in files}
    whole.excluded += [(path, f"not named in `{METADATA}`") for path in unnamed]
    whole.excluded += [(path, why) for path, why in rest.excluded if path not in tables]
    return whole


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")  # newlines in names stay what they are
    except OSError as error:
        raise UsageError(
            f"`{file}` cannot be read: {error.strerror}", hint="check `--csv`"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"`{file}` is not UTF-8: {error}", hint="save it as UTF-8") from error


def _csv_rows(text: str, file: Path, columns: Columns) -> Iterator[Mapping[str, Any]]:
    header = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=header.count)
    # Not by lines: a quoted name may hold a newline.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        found = next(reader, [])
        _refuse_missing(columns.named, found, file)
        if doubled := sorted({name for name in columns.named if found.count(name) > 1}):
            raise UsageError(
                f"`{file}` has more than one column {shorten(doubled)}",
                hint="name each column once",
            )
        for row in reader:
            if row:
                too_many = {"": len(row)} if len(row) > len(found) else {}
                yield dict(zip(found, row, strict=False)) | too_many
    except csv.Error as error:
        raise DataError(
            f"`{file}` is no CSV: line {reader.line_num}: {error}",
            hint="save it as a CSV with one row for each image",
        ) from error


def _json_rows(text: str, file: Path) -> list[Mapping[str, Any]]:
    rows: list[Mapping[str, Any]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"`{file}` line {number} is not JSON: {str(error)[:120]}",
                hint="write one JSON object on each line",
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                f"`{file}` line {number} is no JSON object",
                hint='write `{"file_name": "a.png", "label": "cat"}` on each line',
            )
        rows.append(row)
    return rows


def _refuse_missing(wanted: Sequence[str], found: Sequence[str], file: Path) -> None:
    if missing := [column for column in wanted if column not in found]:
        raise UsageError(
            f"`{file}` has no column {shorten(missing)}; it has {shorten(found, 20)}",
            hint="name the columns with `--image-column` and `--label-column`",
        )


def _listed(
    root: Path, file: Path, columns: Columns, rows: Iterator[Mapping[str, Any]] | list[Any]
) -> Listing:
    listing = Listing()
    seen: set[str] = set()
    for number, row in enumerate(rows, start=2 if isinstance(rows, Iterator) else 1):
        if "" in row and isinstance(row[""], int):
            listing.problems.append(f"row {number}: {row['']} cells are more than the header has")
            continue
        cells = {column: _cell(row.get(column)) for column in columns.named}
        name, label = cells[columns.image], cells[columns.label]
        split = _split(cells[columns.split], number, listing) if columns.split else None
        if not name or not label:
            listing.excluded.append((f"{file.name} row {number}", "no image or no label"))
        elif "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
            listing.problems.append(f"row {number}: `{name}` leads out of `{root}`")
        elif (place := Path(name).as_posix()) in seen:
            listing.problems.append(f"row {number}: `{name}` is named twice")
        else:
            seen.add(place)
            group = cells[columns.group] or None if columns.group else None
            listing.images.append(Listed(place, label, split, group))
    return listing


def _cell(value: Any) -> str:
    """Returns a cell as text: `1` and `true` are labels in JSON too; lists and objects are not."""
    if value is None or isinstance(value, (list, dict)):
        return ""
    return (json.dumps(value) if isinstance(value, bool) else str(value)).strip()


def _split(word: str, number: int, listing: Listing) -> str | None:
    if word.lower() not in SPLIT_WORDS:
        listing.problems.append(
            f"row {number}: split `{word.lower()}` is none of {sorted(SPLIT_WORDS)}"
        )
    return SPLIT_WORDS.get(word.lower())
