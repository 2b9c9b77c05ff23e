"""Commands that train: from random weights, from a Run, and both side by side."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from regraft.commands.arguments import (
    DataArguments,
    Flag,
    Json,
    Many,
    Track,
    TrainingArguments,
    parse_shares,
    required_start,
)
from regraft.errors import ArtefactError, UsageError
from regraft.terminal import print_comparison, print_json, progress


def pretrain(
    data: Path,
    /,
    *,
    out: Path,
    arch: str = "vgg16_bn",
    track: Track = None,
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
    track
        Show epochs there too; it is to be installed. TensorBoard's files are in tensorboard,
        beside the Run; MLflow's where MLFLOW_TRACKING_URI says.
    """
    from regraft import api
    from regraft.training.recipe import Recipe
    from regraft.training.tracking import tracked

    chosen = training.settled(Recipe.scratch())  # a mistake there is told before data is read
    engine = training.engine()
    with progress() as seen, tracked(seen, track, out) as told:
        run = api.pretrain(
            reading.open(data, told),
            out=out,
            arch=arch,
            recipe=chosen,
            engine=engine,
            on_progress=told,
        )
    finished(run.folder, run.status, data)


def finetune(
    data: Path,
    /,
    *,
    out: Path,
    start: Path | None = None,
    strategy: str | None = None,
    arch: str | None = None,
    adapt: Many = (),
    plan: Path | None = None,
    track: Track = None,
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
    track
        As for pretrain; what a search tries, too.
    arch
        Only to name your own network again (file.py:factory).
    adapt
        Exceptions from the exact merge: `channels`, or new:PATTERN of tensors.
    """
    from regraft import api
    from regraft.training.plan import Plan
    from regraft.training.tracking import tracked

    start = required_start(start, strategy)
    chosen = training.transfer(strategy)
    repeated = None if plan is None else Plan.read(plan)
    engine = training.engine()
    with progress() as seen, tracked(seen, track, out) as told:
        run = api.finetune(
            reading.open(data, told),
            out=out,
            start=start,
            arch=arch,
            recipe=chosen,
            adapt=adapt,
            plan=repeated,
            engine=engine,
            on_progress=told,
        )
    finished(run.folder, run.status, data)


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
    adapt: Many = (),
    json_: Json = False,
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


def resume(
    run: Path,
    data: Path | None = None,
    /,
    *,
    start: Path | None = None,
    arch: str | None = None,
    allow_inexact: Flag = False,
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


def finished(folder: Path, status: dict[str, Any], data: Path) -> None:
    best, chosen = status["best_epoch"], status.get("chosen")
    kept = f"best epoch {best}" if best else "the last epoch, or the head as solved"
    print(f"run: {folder} ({f'chosen: {chosen}' if chosen else kept})")
    print(f"next: regraft evaluate {folder} {data}")
