"""Commands that use a trained Classifier."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from regraft.commands.arguments import DataArguments, Flag, Json, parse_range
from regraft.errors import DataError, UsageError, count, spelled
from regraft.terminal import print_evaluation, print_json, progress, tell

if TYPE_CHECKING:
    from regraft.evaluation.predictions import Predictions

JSON_LINES = (".jsonl", ".ndjson")
Images = Annotated[list[Path], Parameter(allow_leading_hyphen=True)]


def evaluate(
    run: Path,
    data: Path,
    /,
    *,
    split: str = "test",
    arch: str | None = None,
    device: str = "auto",
    json_: Json = False,
    reading: DataArguments = DataArguments(),
) -> None:
    """Judge a Run on its own test images, found by content, or on images it has never seen.

    Parameters
    ----------
    run
        Folder of the Run.
    data
        Its dataset, wherever that lies now, or another one with the same class names.
    split
        test or val.
    arch
        Only to name your own network again (file.py:factory).
    device
        auto, cpu, cuda, cuda:0 or mps.
    json_
        Print one JSON document.
    """
    from regraft import api
    from regraft.data.dataset import Dataset
    from regraft.engine import Engine

    options = reading.options_as_in(run)
    with progress() as told:
        dataset = Dataset.open(data, options, whole=True)
        document = api.evaluate(
            run, dataset, split=split, arch=arch, engine=Engine(device), on_progress=told
        )
    if json_:
        print_json(document)
        return
    print_evaluation(document)
    print(f"\nnext: regraft report {run} --out {run / 'report.html'}")


def predict(
    run: Path,
    images: Images = [],  # noqa: B006  never changed
    /,
    *,
    csv: Path | None = None,
    image_column: str = "image",
    out: Path | None = None,
    top: int | None = None,
    error_rate: float = 0.05,
    embeddings: Path | None = None,
    intensity_range: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    arch: str | None = None,
    device: str = "auto",
    json_: Json = False,
    jsonl: Flag = False,
) -> None:
    """Classify images. Broken files become rows with a reason, and exit code 3 at the end.

    Parameters
    ----------
    run
        Folder of the Run.
    images
        Image files or folders; `-` reads paths from stdin, one a line.
    csv
        A CSV or JSON Lines that names images; paths are relative to its folder.
    image_column
        Its column of image paths.
    out
        A file to write: CSV, or JSON Lines where it ends in .jsonl; otherwise CSV goes to stdout.
    top
        Only so many classes of each image, the likeliest first.
    error_rate
        Of images that are not `unsure`, at most so many are to be wrong: 0.01, 0.02, 0.05, 0.1 or
        0.2, as validation images allow.
    embeddings
        Features too, to this .npy or .parquet, a row for each image that could be read.
    intensity_range
        The values that are black and white, as 0,4095, where they are not those of the training.
    arch
        Only to name your own network again (file.py:factory).
    device
        auto, cpu, cuda, cuda:0 or mps.
    json_
        Print one JSON document instead of CSV.
    jsonl
        JSON Lines instead of CSV.
    """
    from regraft import api
    from regraft.changing import write_listed
    from regraft.engine import Engine
    from regraft.evaluation.embeddings import refuse_unknown_form, write_embeddings
    from regraft.evaluation.rows import to_records
    from regraft.run import refuse_existing, refuse_inside

    if top is not None and top < 1:
        raise UsageError(f"`--top {top}` is no number of classes", hint="write `--top 3`")
    for file in (out, embeddings):
        if file is not None:
            refuse_existing(file)
            for image in images:
                refuse_inside(file, image)
    if embeddings is not None:
        refuse_unknown_form(embeddings)
    with progress() as told:
        table, broken = api.predict(
            run,
            images,
            csv=csv,
            image_column=image_column,
            lines=_lines(),
            error_rate=error_rate,
            intensity_range=parse_range(intensity_range),
            arch=arch,
            engine=Engine(device),
            on_progress=told,
        )
    if embeddings is not None:
        write_embeddings(embeddings, table)
    lines = jsonl or (out is not None and out.suffix in JSON_LINES)
    if json_:
        print_json({"predictions": to_records(table, broken, top)})
    if out is not None:
        text = _written(table, broken, top, lines=lines)
        write_listed(out, text.encode("utf-8", "surrogateescape"))
        tell(f"{count(len(table.paths) if table else 0, 'prediction')} in {out}")
    elif not json_:
        text = _written(table, broken, top, lines=lines)
        # Names are exact in a file; on a terminal they must not move the cursor.
        sys.stdout.write(text if lines else spelled(text.replace("\r\n", "\n")))
    if broken:
        tell(f"{count(len(broken), 'file')} could not be read; see the column `error`")
        sys.exit(DataError.exit_code)


def explain(
    run: Path,
    images: list[Path],
    /,
    *,
    out: Path,
    label: Annotated[str | None, Parameter(name="--class")] = None,
    stage: int | None = None,
    arch: str | None = None,
) -> None:
    """Show where in images the evidence for a class was seen (Grad-CAM), as pictures.

    Parameters
    ----------
    run
        Folder of the Run.
    images
        Image files or folders.
    out
        New folder for a picture of each image, and explained.csv, which says what they show.
    label
        The class; left out: the one predicted for each image.
    stage
        Whose maps, counted from 0 at the stem; left out: the last that is not too coarse.
    arch
        Only to name your own network again (file.py:factory).
    """
    from regraft import api

    with progress() as told:
        number, broken = api.explain(
            run, images, out=out, label=label, stage=stage, arch=arch, on_progress=told
        )
    print(f"{count(number, 'picture')} in {out}; explained.csv says what they show")
    if broken:
        tell(f"{count(len(broken), 'file')} could not be read; see the column `error`")
        sys.exit(DataError.exit_code)


def report(folders: list[Path], /, *, out: Path) -> None:
    """Write one self-contained HTML page about Runs and comparisons.

    Parameters
    ----------
    folders
        Folders of Runs, or of a comparison.
    out
        The page to write.
    """
    from regraft import api

    print(api.report(folders, out=out))


def verify(
    run: Path,
    /,
    *,
    json_: Json = False,
) -> None:
    """Check every file by its hash, and show where the weights come from.

    Parameters
    ----------
    run
        Folder of a Run, of a comparison, or of a classifier.
    json_
        Print one JSON document.
    """
    from regraft import api
    from regraft.delivery.verification import told

    document = api.verify(run)
    if json_:
        print_json(document)
        return
    print(told(document))


def _lines() -> Iterator[str]:
    """Yields the lines of stdin; names that are no valid Unicode keep their bytes."""
    for line in sys.stdin.buffer:
        yield line.decode("utf-8", "surrogateescape")


def _written(
    table: "Predictions | None", broken: list[tuple[str, str]], top: int | None, *, lines: bool
) -> str:
    """Returns the table as CSV, or as JSON Lines."""
    from regraft.documents import json_lines_content
    from regraft.evaluation.rows import to_csv, to_records

    if lines:
        return json_lines_content(to_records(table, broken, top)).decode("ascii")
    return to_csv(table, broken, top)
