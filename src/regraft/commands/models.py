"""Commands that use a trained Classifier."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from regraft.commands.arguments import DataArguments
from regraft.terminal import print_evaluation, print_json, progress


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
