"""Commands that use a trained Classifier."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from regraft.commands.arguments import DataArguments, parse_range
from regraft.errors import DataError, count, spelled
from regraft.terminal import print_evaluation, print_json, progress, tell


def evaluate(
    run: Path,
    data: Path,
    /,
    *,
    split: str = "test",
    arch: str | None = None,
    device: str = "auto",
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
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
    images: Annotated[list[Path], Parameter(allow_leading_hyphen=False)],
    /,
    *,
    out: Path | None = None,
    intensity_range: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    arch: str | None = None,
    device: str = "auto",
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Classify image files and folders. Broken files become rows with a reason, and exit code 3.

    Parameters
    ----------
    run
        Folder of the Run.
    images
        Image files or folders.
    out
        A CSV to write; otherwise it goes to stdout.
    intensity_range
        The values that are black and white, as 0,4095, where they are not those of the training.
    arch
        Only to name your own network again (file.py:factory).
    device
        auto, cpu, cuda, cuda:0 or mps.
    json_
        Print one JSON document instead of CSV.
    """
    from regraft import api
    from regraft.engine import Engine
    from regraft.evaluation.predictions import to_csv, to_records
    from regraft.run import refuse_existing, refuse_inside
    from regraft.storage import write_listed

    if out is not None:
        refuse_existing(out)
        for image in images:
            refuse_inside(out, image)
    with progress() as told:
        table, broken = api.predict(
            run,
            images,
            intensity_range=parse_range(intensity_range),
            arch=arch,
            engine=Engine(device),
            on_progress=told,
        )
    if json_:
        print_json({"predictions": to_records(table, broken)})
    elif out is None:
        # Names are exact in a file; on a terminal they must not move the cursor.
        sys.stdout.write(spelled(to_csv(table, broken).replace("\r\n", "\n")))
    if out is not None:
        write_listed(out, to_csv(table, broken).encode("utf-8", "surrogateescape"))
        tell(f"{count(len(table.paths) if table else 0, 'prediction')} in {out}")
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
