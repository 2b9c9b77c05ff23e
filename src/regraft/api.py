"""The verbs. Each reads like the sentence it carries out; the nouns do the work.

`on_progress` is told `Note`, `Counting`, `Step` and `Epoch` records.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from regraft.data.cache import Cache
from regraft.data.dataset import Dataset
from regraft.data.listing import list_images
from regraft.delivery.report import write_report
from regraft.engine import Engine
from regraft.errors import DataError, UsageError, count, shorten
from regraft.evaluation.compare import LEAST_SEEDS, judge, summarise
from regraft.evaluation.metrics import METRICS, point
from regraft.evaluation.predictions import Predictions
from regraft.evaluation.testing import (
    fitting_channels,
    own_rows,
    predict_dataset,
    predict_files,
    record_evaluation,
    tabulate,
    test_images,
)
from regraft.inputs import InputSpec
from regraft.models.backbone import Backbone
from regraft.models.classifier import Classifier
from regraft.progress import Note, OnProgress, counting, quiet
from regraft.run import FINISHED, Run, refuse_existing, refuse_inside
from regraft.storage import write_json
from regraft.training.loop import Epoch
from regraft.training.probe import solve_head
from regraft.training.recipe import Recipe
from regraft.training.session import DEFAULT_SIZE, Session, Start, transplant_table

Data = str | Path | Dataset
Place = str | Path


def pretrain(
    data: Data,
    *,
    out: Place,
    arch: str = "vgg16_bn",
    recipe: Recipe | None = None,
    engine: Engine | None = None,
    on_progress: OnProgress = quiet,
) -> Run:
    """Trains a whole network from random weights.

    Example:
        >>> run = pretrain("chest_xray", out="runs/source", arch="vgg16_bn")
    """
    recipe = _fitting(recipe or Recipe.scratch(), "scratch")
    dataset = _opened(data, Path(out))
    size = DEFAULT_SIZE if recipe.image_size == "auto" else recipe.image_size
    channels = dataset.channels if recipe.channels == "auto" else recipe.channels
    inputs = InputSpec(size, channels, dataset.bit_depth)
    backbone = Backbone.create(arch, inputs, seed=recipe.seed)
    session = Session.prepare(dataset, inputs, engine or Engine(), on_progress)
    backbone.inputs = session.inputs
    recipe = session.resolved(recipe, backbone)
    session.estimate(backbone, [recipe])
    run, _ = session.train(backbone, recipe, Path(out), {"verb": "pretrain"})
    return run


def finetune(
    data: Data,
    *,
    out: Place,
    start: Place,
    arch: str | None = None,
    recipe: Recipe | None = None,
    adapt: Sequence[str] = (),
    engine: Engine | None = None,
    on_progress: OnProgress = quiet,
) -> Run:
    """Carries the backbone of `start` over to new data, under a new head.

    Example:
        >>> run = finetune("knees", out="runs/target", start="runs/source")
    """
    recipe = _fitting(recipe or Recipe.transfer(), "transfer")
    begun = _started(start, arch, adapt, on_progress)
    dataset = _opened(data, Path(out))
    begun.refuse_leak(dataset)
    backbone, moves = begun.backbone(begun.inputs(recipe, dataset), recipe.seed)
    session = Session.prepare(dataset, backbone.inputs, engine or Engine(), on_progress)
    recipe = session.resolved(recipe, backbone)
    record = begun.record(moves, session.dataset)
    on_progress(Note(transplant_table(record["transplant"])))
    session.estimate(backbone, [recipe])
    run, _ = session.train(backbone, recipe, Path(out), record)
    return run


def compare(
    data: Data,
    *,
    out: Place,
    start: Place,
    seeds: int = 6,
    metric: str = "balanced_accuracy",
    arch: str | None = None,
    recipe: Recipe | None = None,
    adapt: Sequence[str] = (),
    engine: Engine | None = None,
    on_progress: OnProgress = quiet,
) -> dict[str, Any]:
    """Trains transfer and scratch on the same data over several seeds, and judges.

    Returns:
        `verdict` (helped, hurt, cannot tell), `metric`, `difference`, `low`, `high`, `arms`, ...

    Example:
        >>> compare("knees", out="runs/verdict", start="runs/source")["verdict"]
    """
    if metric not in METRICS or seeds < 1:
        raise UsageError(
            f"`--metric {metric}` over {seeds} seeds is not possible",
            hint=f"use at least 1 seed and one of {', '.join(METRICS)}",
        )
    recipe, out = _fitting(recipe or Recipe.transfer(), "transfer"), Path(out)
    if seeds < LEAST_SEEDS:
        on_progress(Note(f"note: fewer than {LEAST_SEEDS} seeds never give a verdict"))
    begun = _started(start, arch, adapt, on_progress)
    dataset = _opened(data, out)
    begun.refuse_leak(dataset)
    inputs = begun.inputs(recipe, dataset)
    session = Session.prepare(dataset, inputs, engine or Engine(), on_progress)
    arms = _run_arms(session, begun, recipe, out, seeds, metric)
    comparison = _judged(session, arms, metric)
    if session.engine.is_main:
        write_json(out / "comparison.json", comparison)
        report([out], out=out / "report.html")
    return comparison


def evaluate(
    run: Place,
    data: Data,
    *,
    split: str = "test",
    arch: str | None = None,
    engine: Engine | None = None,
    on_progress: OnProgress = quiet,
) -> dict[str, Any]:
    """Judges a Run on its own test images, found by content, or on images it has never seen.

    Returns:
        Each metric as {value, low, high}, `n`, the confusion matrix and a table per class; also
        written to the Run, with predictions.csv.
    """
    opened, engine = Run.open(run), engine or Engine()
    _tell_unfinished(opened, on_progress)
    classifier = Classifier.load(opened.folder, arch=arch)
    if not isinstance(data, Dataset):
        data = Dataset.open(data, whole=True)
    dataset = test_images(opened, data, split)
    channels = fitting_channels(dataset, classifier.inputs.channels)
    told = counting(on_progress, "decoding")
    with engine.first_on_machine():
        cache, dataset = Cache.build(dataset, classifier.inputs.size, channels, told)
    engine.place(classifier)
    predictions = predict_dataset(classifier, dataset, cache, own_rows(dataset), engine)
    return record_evaluation(opened, predictions, dataset, cache, split, write=engine.is_main)


def predict(
    run: Place,
    images: Sequence[Place],
    *,
    arch: str | None = None,
    engine: Engine | None = None,
    on_progress: OnProgress = quiet,
) -> tuple[Predictions | None, list[tuple[str, str]]]:
    """Classifies image files and folders.

    Returns:
        The table (None if no image could be read), and the broken files with their reasons.
    """
    paths = [Path(image) for image in images]
    if missing := [path for path in paths if not path.exists()]:
        raise DataError(f"image or folder not found: `{missing[0]}`", hint="check the path")
    files, left_out = list_images(paths)
    if left_out:
        named = shorten(path for path, _ in left_out)
        on_progress(Note(f"{count(len(left_out), 'file')} left out, no images by name: {named}"))
    if not files:
        raise DataError(f"`{paths[0]}` holds no images", hint="name image files, or their folder")
    classifier, engine = Classifier.load(run, arch=arch), engine or Engine()
    engine.place(classifier)
    return predict_files(classifier, files, engine, on_progress)


def report(folders: Sequence[Place], *, out: Place) -> Path:
    """Writes one self-contained HTML page about Runs and comparisons."""
    return write_report([Path(folder) for folder in folders], Path(out))


def _opened(data: Data, out: Path) -> Dataset:
    refuse_existing(out)
    root = data.root if isinstance(data, Dataset) else Path(data)
    refuse_inside(out, root)
    return data if isinstance(data, Dataset) else Dataset.open(root)


def _started(start: Place, arch: str | None, adapt: Sequence[str], told: OnProgress) -> Start:
    begun = Start.load(Path(start), arch, adapt)
    if begun.run is not None:
        _tell_unfinished(begun.run, told)
    return begun


def _tell_unfinished(run: Run, told: OnProgress) -> None:
    if run.status["state"] != FINISHED:
        told(Note(f"note: `{run.folder}` is no finished training: {run.status['state']}"))


def _fitting(recipe: Recipe, goal: str) -> Recipe:
    """Returns the recipe, if it was made for this: rates and BatchNorm follow from its goal."""
    if recipe.goal != goal:
        raise UsageError(
            f'the recipe has goal = "{recipe.goal}"; this command needs "{goal}"',
            hint=f"make one with `regraft recipe {goal} > recipe.toml`",
        )
    return recipe


def _run_arms(
    session: Session,
    begun: Start,
    recipe: Recipe,
    out: Path,
    num_seeds: int,
    metric: str,
) -> dict[str, list[Predictions]]:
    """Trains and tests each arm with each seed; frozen features are probed beside them."""
    arms: dict[str, list[Predictions]] = {
        "transfer": [], "scratch": [], "probe_transplanted": [], "probe_random": [],
    }  # fmt: skip
    # What starts at random knows nothing of Dataset1: not even its mean and std.
    own = session.cache.with_statistics(session.inputs, session.dataset.rows("train"))
    for seed in range(recipe.seed, recipe.seed + num_seeds):
        backbone, moves = begun.backbone(session.inputs, seed)
        random = begun.random_backbone(own, seed)
        birth = deepcopy(random.state_dict())  # the probe changes its BatchNorm statistics
        arms["probe_random"].append(_probed(session, random))
        transfer = session.resolved(recipe.changed({"seed": seed}), backbone)
        # Each arm's learning rate, weight decay and BatchNorm policy follow its own goal; data,
        # splits, augmentation, batches and input size are the same.
        scratch = session.resolved(transfer.as_scratch(), random)
        record = begun.record(moves, session.dataset)
        if seed == recipe.seed:
            arms["probe_transplanted"].append(_probed(session, backbone))
            session.on_progress(Note(transplant_table(record["transplant"])))
            session.estimate(backbone, [transfer, scratch] * num_seeds)
        random.load_state_dict(birth)
        for arm, network, settled, kept in (
            ("transfer", backbone, transfer, record),
            ("scratch", random, scratch, {"verb": "pretrain"}),
        ):
            silent = replace(session, on_progress=_without_epochs(session.on_progress))
            run, classifier = silent.train(network, settled, out / f"{arm}-{seed}", kept)
            rows = session.dataset.rows("test")
            found = predict_dataset(
                classifier, session.dataset, session.cache, rows, session.engine
            )
            write = session.engine.is_main
            record_evaluation(run, found, session.dataset, session.cache, "test", write=write)
            arms[arm].append(found)
            value = point(found, metric)
            session.on_progress(Note(f"{arm:<8} seed {seed}: test {metric} {value:.3f}"))
    return arms


def _without_epochs(on_progress: OnProgress) -> OnProgress:
    """Twelve trainings of sixty epochs are not for reading: the bar and the results are."""
    return lambda record: None if isinstance(record, Epoch) else on_progress(record)


def _probed(session: Session, backbone: Backbone) -> Predictions:
    """Returns the test predictions of a linear probe on the backbone's frozen features."""
    dataset = session.dataset
    features, labels = session.features(backbone), dataset.labels
    train, val, test = (dataset.rows(split) for split in ("train", "val", "test"))
    solution = solve_head(features[train], labels[train], features[val], labels[val])
    return tabulate(solution.logits(features[test]), dataset, test)


def _judged(session: Session, arms: dict[str, list[Predictions]], metric: str) -> dict[str, Any]:
    judgement = judge(arms["transfer"], arms["scratch"], metric)
    chance = 1 / len(session.dataset.class_names)
    return {
        "schema": 1,
        **judgement,
        "arms": {
            arm: {name: summarise(runs, name) for name in METRICS} for arm, runs in arms.items()
        },
        "chance_balanced_accuracy": chance,
        "class_names": list(session.dataset.class_names),
        "data": {
            "name": session.dataset.root.resolve().name,
            "fingerprint": session.dataset.fingerprint,
            "splits": {s: len(session.dataset.rows(s)) for s in ("train", "val", "test")},
        },
    }
