"""Predictions as rows: CSV for spreadsheets, records for JSON and JSON Lines."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regraft.evaluation.predictions import Predictions

Broken = Sequence[tuple[str, str]]  # path and reason
MARKS = {True: "yes", False: "no"}


def to_csv(predictions: Predictions | None, broken: Broken = (), top: int | None = None) -> str:
    """Returns a CSV (RFC 4180): path, truth if known, predicted, probability of each class, error.

    A cell that a spreadsheet would take for a formula is quoted with an apostrophe.

    Args:
        predictions: None where no image could be read.
        broken: Files that could not be read.
        top: Only so many classes of each image, the likeliest first.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\r\n")
    head = _head(predictions, top)
    writer.writerow([_safe(cell) for cell in head])
    if predictions is not None:
        for row, path in enumerate(predictions.paths):
            writer.writerow([_safe(path), *_cells(predictions, row, top), ""])
    for path, reason in broken:
        writer.writerow([_safe(path), *[""] * (len(head) - 2), _safe(reason)])
    return stream.getvalue()


def rows_to_csv(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns rows of names and numbers as such a CSV."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\r\n")
    writer.writerows([_safe(cell) for cell in row] for row in (head, *rows))
    return stream.getvalue()


def to_records(
    predictions: Predictions | None, broken: Broken, top: int | None = None
) -> list[dict[str, Any]]:
    """Returns the same rows for JSON."""
    rows: list[dict[str, Any]] = []
    for row, path in enumerate(predictions.paths if predictions is not None else ()):
        assert predictions is not None
        names, probabilities = predictions.class_names, predictions.probabilities[row]
        record: dict[str, Any] = {"path": path, "predicted": names[int(probabilities.argmax())]}
        if top is None:
            record["probabilities"] = dict(zip(names, probabilities.tolist(), strict=True))
        else:
            record["top"] = [
                {"class": names[place], "probability": float(probabilities[place])}
                for place in _likeliest(probabilities, top)
            ]
        marks = {"unsure": predictions.unsure, "unfamiliar": predictions.unfamiliar}
        record |= {key: bool(found[row]) for key, found in marks.items() if found is not None}
        rows.append(record)
    return rows + [{"path": path, "error": reason} for path, reason in broken]


def _head(predictions: Predictions | None, top: int | None) -> list[str]:
    if predictions is None:
        return ["path", "predicted", "probability", "error"]
    head = ["path", *(["truth"] if predictions.truth is not None else [])]
    head += ["predicted", "probability"]
    if top is None:
        head += [f"p({name})" for name in predictions.class_names]
    else:
        places = range(2, min(top, len(predictions.class_names)) + 1)
        head += [f"{word}_{place}" for place in places for word in ("predicted", "probability")]
    head += ["unsure"] if predictions.unsure is not None else []
    head += ["unfamiliar"] if predictions.unfamiliar is not None else []
    return [*head, "error"]


def _cells(predictions: Predictions, row: int, top: int | None) -> list[str]:
    names, probabilities = predictions.class_names, predictions.probabilities[row]
    known = [] if predictions.truth is None else [_safe(names[predictions.truth[row]])]
    places = _likeliest(probabilities, 1 if top is None else top)
    cells = [
        part for place in places for part in (_safe(names[place]), _number(probabilities, place))
    ]
    if top is None:
        cells += [_number(probabilities, place) for place in range(len(names))]
    marks = [found for found in (predictions.unsure, predictions.unfamiliar) if found is not None]
    return [*known, *cells, *(MARKS[bool(found[row])] for found in marks)]


def _likeliest(probabilities: NDArray[np.float64], most: int) -> list[int]:
    return [int(place) for place in np.argsort(-probabilities, kind="stable")[:most]]


def _number(probabilities: NDArray[np.float64], place: int) -> str:
    return f"{probabilities[place]:.6f}"


def _safe(cell: str) -> str:
    # CWE-1236: these start a formula in common spreadsheets.
    cell = cell.encode("utf-8", "backslashreplace").decode("utf-8")
    return f"'{cell}" if cell[:1] in ("=", "+", "-", "@", "\t", "\r", "\0") else cell
