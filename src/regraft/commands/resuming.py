"""The command that goes on with what was stopped."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from regraft.commands.training import finished
from regraft.errors import ArtefactError
from regraft.terminal import print_comparison, progress


def resume(
    run: Path,
    data: Path | None = None,
    /,
    *,
    start: Path | None = None,
    arch: str | None = None,
    allow_inexact: Annotated[bool, Parameter(negative="")] = False,
    device: str | None = None,
) -> None:
    """Go on with a training that was stopped or killed; on a processor to the very same bits.

    Parameters
    ----------
    run
        Folder of a Run, of a comparison, or of the demo.
    data
        Where its images lie now, if they have been moved.
    start
        Where the start of a comparison lies now, if it has been moved.
    arch
        Only to name your own network again (file.py:factory).
    allow_inexact
        Go on although versions, threads or the processor are others; the report tells.
    device
        Another device than at the beginning: auto, cpu, cuda, cuda:0 or mps.
    """
    from regraft import api, demo
    from regraft.engine import Engine
    from regraft.run import Run

    if not run.is_dir():
        raise ArtefactError(f"`{run}` does not exist", hint="name the folder of a training")
    engine = None if device is None else Engine(device)
    with progress() as told:
        if demo.is_story(run):
            print_comparison(demo.resume_story(run, told))
            print(f"\nreport: {run / 'comparison' / 'report.html'}")
            return
        api.resume(
            run,
            data,
            start=start,
            arch=arch,
            allow_inexact=allow_inexact,
            engine=engine,
            on_progress=told,
        )
    if (run / "run.json").is_file():
        finished(run, Run.open(run).status, data or Path("DATA"))
    else:
        print(f"report: {run / 'report.html'}")
