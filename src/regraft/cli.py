"""Arguments to verbs, and errors to exit codes: the only file that exits.

torch is imported by the verbs, inside the commands: `regraft --help` answers at once.
"""

import io
import os
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

from cyclopts import App, CycloptsError, Parameter

from regraft.arguments import DataArguments, TrainingArguments, parse_shares, required_start
from regraft.errors import EnvironmentFault, RegraftError, UsageError, count
from regraft.terminal import (
    print_comparison,
    print_error,
    print_evaluation,
    print_json,
    progress,
    speaks,
    tell,
)

app = App(
    name="regraft",
    help="Train image classifiers from your own images, carry the weights over to other classes, "
    "and learn whether that helped. No weights of anybody else are ever used.",
    version=f"regraft {version('regraft')}",
)
ALONE = ("demo", "predict", "recipe", "report")  # commands of one process


@app.command
def pretrain(
    data: Path,
    /,
    *,
    out: Path,
    arch: str = "vgg16_bn",
    reading: DataArguments = DataArguments(),
    training: TrainingArguments = TrainingArguments(),
) -> None:
    """Train a whole network on your images, from random weights.

    Parameters
    ----------
    data
        Folder of class folders, with or without train/val/test above them.
    out
        Folder of the Run; new.
    arch
        Any architecture of timm, or your own network as file.py:factory.
    """
    from regraft import api
    from regraft.training.recipe import Recipe

    chosen = training.settled(Recipe.scratch())  # a mistake there is told before data is read
    with progress() as told:
        run = api.pretrain(
            reading.open(data, told),
            out=out,
            arch=arch,
            recipe=chosen,
            engine=training.engine(),
            on_progress=told,
        )
    _finished(run.folder, run.status, data)


@app.command
def finetune(
    data: Path,
    /,
    *,
    out: Path,
    start: Path | None = None,
    strategy: str | None = None,
    arch: str | None = None,
    adapt: Annotated[tuple[str, ...], Parameter(negative="", show_default=False)] = (),
    plan: Path | None = None,
    reading: DataArguments = DataArguments(),
    training: TrainingArguments = TrainingArguments(),
) -> None:
    """Carry trained weights over to other images and classes.

    Parameters
    ----------
    data
        The new images, in class folders.
    out
        Folder of the Run; new.
    start
        The Run whose backbone is carried over.
    strategy
        auto (default): what held-out images like best, within --time-budget; or head, last:N
        (stages), lp-ft (the head, then everything gently), or full.
    plan
        plan.json or winner.json of an earlier search, to repeat it.
    arch
        Only to name your own network again (file.py:factory).
    adapt
        Exceptions from the exact merge: `channels`, or new:PATTERN of tensors.
    """
    from regraft import api

    start = required_start(start, strategy)
    chosen = training.transfer(strategy)
    repeated = None if plan is None else api.read_plan(plan)
    with progress() as told:
        run = api.finetune(
            reading.open(data, told),
            out=out,
            start=start,
            arch=arch,
            recipe=chosen,
            adapt=adapt,
            plan=repeated,
            engine=training.engine(),
            on_progress=told,
        )
    _finished(run.folder, run.status, data)


@app.command
def compare(
    data: Path,
    /,
    *,
    out: Path,
    start: Path,
    seeds: int = 6,
    metric: str = "balanced_accuracy",
    fractions: str = "",
    strategy: str | None = None,
    arch: str | None = None,
    adapt: Annotated[tuple[str, ...], Parameter(negative="", show_default=False)] = (),
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
    reading: DataArguments = DataArguments(),
    training: TrainingArguments = TrainingArguments(),
) -> None:
    """Did the transfer help? Train it and a from-scratch control over several seeds, and judge.

    Parameters
    ----------
    data
        The new images, in class folders.
    out
        Folder of the comparison; new.
    start
        The Run whose backbone is carried over.
    seeds
        Trainings of each arm.
    metric
        What is compared: balanced_accuracy, accuracy, macro_f1, auroc, nll or ece.
    fractions
        Shares of the training images to train on too, as 0.1,0.25,0.5,1: how many images are saved?
    strategy
        As for finetune.
    arch
        As for finetune.
    adapt
        As for finetune.
    json_
        Print one JSON document.
    """
    from regraft import api

    chosen, shares = training.transfer(strategy), parse_shares(fractions)
    with progress() as told:
        comparison = api.compare(
            reading.open(data, told),
            out=out,
            start=start,
            seeds=seeds,
            metric=metric,
            fractions=shares,
            arch=arch,
            recipe=chosen,
            adapt=adapt,
            engine=training.engine(),
            on_progress=told,
        )
    if json_:
        print_json(comparison)
        return
    print_comparison(comparison)
    print(f"\nreport: {out / 'report.html'}")


@app.command
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


@app.command
def predict(
    run: Path,
    images: Annotated[list[Path], Parameter(allow_leading_hyphen=False)],
    /,
    *,
    out: Path | None = None,
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
    from regraft.storage import write_text

    if out is not None:
        refuse_existing(out)
        for image in images:
            refuse_inside(out, image)
    with progress() as told:
        table, broken = api.predict(run, images, arch=arch, engine=Engine(device), on_progress=told)
    if json_:
        print_json({"predictions": to_records(table, broken)})
    elif out is None:
        sys.stdout.write(to_csv(table, broken).replace("\r\n", "\n"))
    if out is not None:
        write_text(out, to_csv(table, broken))
        tell(f"{count(len(table.paths) if table else 0, 'prediction')} in {out}")
    if broken:
        tell(f"{count(len(broken), 'file')} could not be read; see the column `error`")
        sys.exit(3)


@app.command
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


@app.command
def recipe(goal: str, /) -> None:
    """Print a recipe with a comment on every key, to edit and give to `--recipe`.

    Parameters
    ----------
    goal
        scratch, or transfer.
    """
    from regraft.training.recipe import Recipe

    made: dict[str, Callable[[], Recipe]] = {"scratch": Recipe.scratch, "transfer": Recipe.transfer}
    if goal not in made:
        raise UsageError(f"there is no recipe `{goal}`", hint="use `scratch` or `transfer`")
    print(made[goal]().to_toml())


@app.command
def demo(*, out: Path = Path("regraft-demo"), seeds: int = 6) -> None:
    """The whole story on handwritten digits that come with scikit-learn, in about two minutes.

    Parameters
    ----------
    out
        Folder for its images, Runs and report; new.
    seeds
        Trainings of each arm.
    """
    from regraft.demo import tell_story

    with progress() as told:
        comparison = tell_story(out, seeds, told)
    print_comparison(comparison)
    print(f"\nreport: {out / 'comparison' / 'report.html'}")
    print("next:   regraft pretrain YOUR_IMAGES --out runs/source")


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs a command line and exits: 0 done, otherwise as the error says."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names that are no valid Unicode
    given = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in given
    try:
        _settle_processes(given)
        tokens = [argument for argument in given if argument != "--debug"]
        app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    except RegraftError as error:
        print_error(error)
        if debug:
            traceback.print_exc()
        sys.exit(error.exit_code)
    except CycloptsError as error:
        print_error(_as_usage_error(error))
        sys.exit(2)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone; there is nobody to tell
        sys.exit(0)
    except OSError as error:
        place = f"`{error.filename}`: " if error.filename else ""
        hint = "check the place, its permissions and the free space"
        print_error(EnvironmentFault(f"{place}{error.strerror or error}", hint=hint))
        if debug:
            traceback.print_exc()
        sys.exit(5)
    except KeyboardInterrupt:
        tell("stopped")
        sys.exit(130)
    except Exception:  # noqa: BLE001  the last resort: a mistake of ours is shown whole
        traceback.print_exc()
        tell("error: a mistake in regraft itself; please report the lines above")
        sys.exit(70)
    sys.exit(0)


def _settle_processes(given: list[str]) -> None:
    """Under `torchrun` one process speaks for all (see `Engine`)."""
    # Idle threads of OpenMP spin. Beside another job on the same 2 cores, without spinning: 3 to 16
    # times as fast, and no slower alone (docs/log.md 2026-11-24). Read when torch is imported.
    os.environ.setdefault("KMP_BLOCKTIME", "0")
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return
    if given and given[0] in ALONE:
        raise UsageError(
            f"`regraft {given[0]}` works in one process", hint="start it without `torchrun`"
        )
    if not speaks():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  until the process ends


def _finished(folder: Path, status: dict[str, Any], data: Path) -> None:
    best, chosen = status["best_epoch"], status.get("chosen")
    kept = f"best epoch {best}" if best else "the last epoch, or the head as solved"
    print(f"run: {folder} ({f'chosen: {chosen}' if chosen else kept})")
    print(f"next: regraft evaluate {folder} {data}")


def _as_usage_error(error: CycloptsError) -> UsageError:
    text = " ".join(str(error).split())
    return UsageError(text, hint="`regraft COMMAND --help` shows what it takes")
