"""CSV, TSV and JSON Lines: every row is an image, or left out with a reason, or a problem."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regraft.data.dataset import DataOptions, Dataset
from regraft.data.listing import Listed
from regraft.data.tables import Columns, list_metadata, list_table
from regraft.errors import DataError, RegraftError, UsageError

MakeFolder = Callable[..., Path]


def json_lines(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_json_lines_name_images_by_file_name(tmp_path: Path) -> None:
    rows = [
        {"file_name": "a.png", "label": 0},
        {"file_name": "./b/c.png", "label": "dog", "more": [1]},
        {"file_name": "d.png", "label": True},
    ]
    listing = list_table(tmp_path, json_lines(tmp_path / "x.jsonl", rows), Columns())
    assert listing.images == [
        Listed("a.png", "0"),
        Listed("b/c.png", "dog"),
        Listed("d.png", "true"),
    ]
    assert (listing.excluded, listing.problems) == ([], [])


def test_json_lines_have_the_columns_of_a_csv(tmp_path: Path) -> None:
    rows = [{"image": "a.png", "kind": "cat", "who": "p1", "set": "training"}]
    columns = Columns("image", "kind", "who", "set")
    listing = list_table(tmp_path, json_lines(tmp_path / "x.ndjson", rows), columns)
    assert listing.images == [Listed("a.png", "cat", "train", "p1")]


@pytest.mark.parametrize(
    ("line", "kind", "told"),
    [
        ("{", DataError, "line 2 is not JSON"),
        ("[1]", DataError, "line 2 is no JSON object"),
        ('"a"', DataError, "line 2 is no JSON object"),
        ("[" * 100_000, DataError, "line 2 is not JSON"),
    ],
)
def test_a_line_that_is_no_json_object_is_named(
    tmp_path: Path, line: str, kind: type[RegraftError], told: str
) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"file_name": "a.png", "label": "b"}\n' + line)
    with pytest.raises(kind) as caught:
        list_table(tmp_path, file, Columns())
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("row", "problem", "excluded"),
    [
        ({"file_name": "../a.png", "label": "b"}, "row 2: `../a.png` leads out of", ""),
        ({"file_name": "/a.png", "label": "b"}, "row 2: `/a.png` leads out of", ""),
        ({"file_name": "a\0.png", "label": "b"}, "leads out of", ""),
        ({"file_name": "./x.png", "label": "b"}, "row 2: `./x.png` is named twice", ""),
        ({"file_name": None, "label": "b"}, "", "x.jsonl row 2"),
        ({"file_name": "a.png", "label": [1]}, "", "x.jsonl row 2"),
        ({"label": "b"}, "", "x.jsonl row 2"),
    ],
)
def test_a_json_row_that_cannot_be_used_is_accounted_for(
    tmp_path: Path, row: Any, problem: str, excluded: str
) -> None:
    rows = [{"file_name": "x.png", "label": "b"}, row]
    listing = list_table(tmp_path, json_lines(tmp_path / "x.jsonl", rows), Columns())
    assert [image.path for image in listing.images] == ["x.png"]
    assert [part for part, _ in listing.excluded] == ([excluded] if excluded else [])
    assert len(listing.problems) == bool(problem)
    assert problem in "".join(listing.problems)


def metadata(folder: Path, *, without: int = 0) -> None:
    names = sorted(path.name for path in folder.glob("*.png"))[without:]
    rows = [{"file_name": name, "label": "ab"[index % 2]} for index, name in enumerate(names)]
    json_lines(folder / "metadata.jsonl", rows)


def test_a_folder_with_metadata_needs_no_option(make_folder: MakeFolder) -> None:
    root = make_folder({"": 20})
    metadata(root, without=2)
    (root / ".hidden").write_text("x")
    dataset = Dataset.open(root)
    assert dataset.class_names == ("a", "b")
    assert len(dataset.samples) == 18
    assert "labels are those of `metadata.jsonl`" in dataset.notes
    assert dict(dataset.excluded) == {
        "data_000.png": "not named in `metadata.jsonl`",
        "data_001.png": "not named in `metadata.jsonl`",
        ".hidden": "hidden file",
    } or set(dict(dataset.excluded).values()) == {"not named in `metadata.jsonl`", "hidden file"}


def test_metadata_of_split_folders_gives_the_splits(make_folder: MakeFolder) -> None:
    root = make_folder({"train": 8, "validation": 4, "test": 4})
    for name in ("train", "validation", "test"):
        metadata(root / name)
    dataset = Dataset.open(root)
    assert [len(dataset.rows(split)) for split in ("train", "val", "test")] == [8, 4, 4]


def test_metadata_without_labels_leaves_class_folders_as_they_are(make_folder: MakeFolder) -> None:
    root = make_folder({"a": 6, "b": 6})
    json_lines(root / "metadata.jsonl", [{"file_name": "a/a_000.png", "caption": "x"}])
    assert list_metadata(root, Columns()) is None
    assert Dataset.open(root).class_names == ("a", "b")


def test_a_name_with_a_newline_is_one_cell(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('image,label\n"a\nb,""c"".png",cat\n', newline="")
    listing = list_table(tmp_path, tmp_path / "x.csv", Columns())
    assert listing.images == [Listed('a\nb,"c".png', "cat")]


@pytest.mark.parametrize(
    ("text", "kind", "told"),
    [
        ("image,label,label\n1.png,a,b\n", UsageError, "more than one column `label`"),
        ("image,label\n" + "x" * 200_000 + ",a\n", DataError, "is no CSV: line 2: field larger"),
    ],
)
def test_a_csv_that_means_two_things_is_refused(
    tmp_path: Path, text: str, kind: type[RegraftError], told: str
) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(kind) as caught:
        list_table(tmp_path, tmp_path / "x.csv", Columns())
    assert told in str(caught.value)


def test_a_row_with_too_many_cells_is_a_problem_and_not_cut(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("image,label\nmy, cat.png,a\n")
    listing = list_table(tmp_path, tmp_path / "x.csv", Columns())
    assert listing.images == []
    assert listing.problems == ["row 2: 3 cells are more than the header has"]


# Of any text: what is written as a CSV comes back, and any bytes are read or refused by name.

NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12
).filter(lambda name: name.strip() and name.strip() not in (".", "..") and "/" not in name)
PLAIN = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@PLAIN
@given(st.lists(st.tuples(NAMES, NAMES), max_size=6), st.sampled_from(",;\t"))
def test_any_names_survive_a_csv(
    tmp_path: Path, rows: list[tuple[str, str]], delimiter: str
) -> None:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter=delimiter, lineterminator="\r\n")
    writer.writerows([("image", "label"), *rows])
    (tmp_path / "x.csv").write_bytes(stream.getvalue().encode())
    listing = list_table(tmp_path, tmp_path / "x.csv", Columns())
    expected = dict(reversed([(name.strip(), label.strip()) for name, label in rows]))
    assert {image.path: image.label for image in listing.images} == expected
    assert len(listing.images) + len(listing.problems) == len(rows)


@PLAIN
@given(st.binary(max_size=80), st.sampled_from(["x.csv", "x.tsv", "x.jsonl"]))
def test_any_bytes_are_a_table_or_an_error_with_a_hint(
    tmp_path: Path, content: bytes, name: str
) -> None:
    start = b'{"file_name": "a.png", "label": "b"}\n' if name == "x.jsonl" else b"image,label\n"
    (tmp_path / name).write_bytes(start + content)
    try:
        listing = list_table(tmp_path, tmp_path / name, Columns())
    except RegraftError as error:
        assert error.hint
        return
    assert all(image.path and image.label for image in listing.images)


def test_a_tsv_and_groups_reach_the_dataset(make_folder: MakeFolder) -> None:
    root = make_folder({"": 20})
    names = sorted(path.name for path in root.glob("*.png"))
    rows = [f"{name}\t{'ab'[i % 2]}\tp{i // 4}" for i, name in enumerate(names)]
    (root / "labels.tsv").write_text("image\tlabel\twho\n" + "\n".join(rows))
    options = DataOptions(csv=root / "labels.tsv", group_column="who")
    dataset = Dataset.open(root, options)
    assert {sample.group for sample in dataset.samples} == {"p0", "p1", "p2", "p3", "p4"}
