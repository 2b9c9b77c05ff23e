"""The verbs. Each reads like the sentence it carries out; the nouns do the work.

`on_progress` is told `Note`, `Counting`, `Step`, `Epoch`, `Plan` and `Trial` records.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from pydantic import ValidationError

from regraft.data.cache import Cache
from regraft.data.dataset import Dataset
from regraft.data.listing import list_images
from regraft.delivery.report import write_report
from regraft.engine import Engine
from regraft.errors import ArtefactError, DataError, UsageError, count, shorten
from regraft.evaluation.compare import LEAST_SEEDS, judge, summarise
from regraft.evaluation.metrics import METRICS, point
from regraft.evaluation.predictions import Predictions
from regraft.evaluation.savings import saved_images
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
from regraft.storage import read_json, write_json
from regraft.training.loop import Epoch
from regraft.training.plan import Plan
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
    run = session.train(backbone, recipe, Path(out), {"verb": "pretrain"}).run
    session.on_progress(Note(_worth_of_features(run)))
    return run


def finetune(
    data: Data,
    *,
    out: Place,
    start: Place,
    arch: str | None = None,
    recipe: Recipe | None = None,
    adapt: Sequence[str] = (),
    plan: Plan | None = None,
    engine: Engine | None = None,
    on_progress: OnProgress = quiet,
) -> Run:
    """Carries the backbone of `start` over to new data, under a new head.

    Args:
        recipe: None: `Recipe.transfer()`, what held-out images like best.
        plan: Of an earlier search, to repeat it.

    Example:
        >>> run = finetune("knees", out="runs/target", start="runs/source")
    """
    recipe = _fitting(recipe or Recipe.transfer(), "transfer")
    begun = _started(start, arch, adapt, on_progress)
    dataset = _opened(data, Path(out))
    begun.refuse_leak(dataset)
    backbone, moves = begun.backbone(begun.inputs(recipe, dataset), recipe.seed)
    session = Session.prepare(dataset, backbone.inputs, engine or Engine(), on_progress)
    session = session.pooled(recipe)
    recipe = session.resolved(recipe, backbone)
    record = begun.record(moves, session.dataset)
    on_progress(Note(transplant_table(record["transplant"])))
    session.estimate(backbone, [recipe])

    def random() -> Backbone:
        return begun.random_backbone(session.own_inputs, recipe.seed)

    return session.train(backbone, recipe, Path(out), record, plan=plan, random=random).run


def compare(
    data: Data,
    *,
    out: Place,
    start: Place,
    seeds: int = 6,
    metric: str = "balanced_accuracy",
    fractions: Sequence[float] = (),
    arch: str | None = None,
    recipe: Recipe | None = None,
    adapt: Sequence[str] = (),
    engine: Engine | None = None,
    on_progress: OnProgress = quiet,
) -> dict[str, Any]:
    """Trains transfer and scratch on the same data over several seeds, and judges.

    Where the recipe searches, both arms do, once, with the first seed; the control's schedules are
    twice as long.

    Args:
        fractions: Shares of the training images on which both arms are trained too, as many epochs
            on each: how many images does the transfer save? Validation images stay whole.

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
    if not all(0 < share <= 1 for share in fractions):
        raise UsageError(
            f"`--fractions {','.join(map(str, fractions))}` are no shares of the training images",
            hint="write for example `--fractions 0.1,0.25,0.5,1`",
        )
    recipe, out = _fitting(recipe or Recipe.transfer(), "transfer"), Path(out)
    if seeds < LEAST_SEEDS:
        on_progress(Note(f"note: fewer than {LEAST_SEEDS} seeds never give a verdict"))
    begun = _started(start, arch, adapt, on_progress)
    dataset = _opened(data, out)
    begun.refuse_leak(dataset)
    inputs = begun.inputs(recipe, dataset)
    session = Session.prepare(dataset, inputs, engine or Engine(), on_progress).pooled(recipe)
    arms = _Arms(session, begun, recipe, out, metric)
    for seed in range(recipe.seed, recipe.seed + seeds):
        arms.run(seed)
    for share in sorted(set(fractions) - {1.0}):
        for seed in range(recipe.seed, recipe.seed + seeds):
            arms.run(seed, share)
    shares = sorted(set(fractions) | {1.0})
    comparison = _judged(arms, shares if len(shares) > 1 else [])
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


def read_plan(file: Place) -> Plan:
    """Returns the plan of an earlier search.

    Raises:
        ArtefactError: The file is missing, or no plan.
    """
    document = read_json(Path(file))
    try:
        return Plan.model_validate(document)
    except ValidationError as error:
        raise ArtefactError(
            f"`{file}` is no plan: {error.errors()[0]['msg']}",
            hint="name the plan.json or winner.json of a Run",
        ) from error


def _worth_of_features(run: Run) -> str:
    """Returns what the features of the last epoch promise for a transfer."""
    last, number = run.epochs()[-1], len(run.class_names)
    if last["effective_rank"] is None:
        return "features: nothing to tell, no validation images saw the whole network"
    probes = " ".join(f"{score:.3f}" for score in last["stage_probes"])
    told = (
        f"features: effective rank {last['effective_rank']:.1f}; balanced accuracy of a ridge head "
        f"on each stage, from the stem to the top: {probes}"
    )
    most = min(number, run.record["data"]["splits"]["val"])
    if last["effective_rank"] < most - 1:
        told += (
            f"\nwarning: the features use fewer directions than {number} classes need: they have "
            "collapsed, and other classes may find nothing in them"
        )
    return told


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


@dataclass
class _Arms:
    """The trainings of a comparison; all of one arm go by the plan of its first seed."""

    session: Session
    begun: Start
    recipe: Recipe
    out: Path
    metric: str
    plans: dict[str, Plan | None] = field(default_factory=dict)
    found: dict[str, list[Predictions]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def run(self, seed: int, share: float = 1.0) -> None:
        """Trains and tests both arms with one seed, on a share of the training images."""
        session, told = self.session, self.session.on_progress
        backbone, moves = self.begun.backbone(session.inputs, seed)
        random = self.begun.random_backbone(session.own_inputs, seed)
        record = self.begun.record(moves, session.dataset)
        if share == 1:
            birth = deepcopy(random.state_dict())  # the probe changes its BatchNorm statistics
            self._add("probe_random", _probed(session, random))
            random.load_state_dict(birth)
            if "probe_transplanted" not in self.found:
                self._add("probe_transplanted", _probed(session, backbone))
                told(Note(transplant_table(record["transplant"])))
        changes = {"seed": seed, "train_share": share}
        transfer = session.resolved(self.recipe.changed(changes), backbone)
        self._train("transfer", backbone, transfer, record)
        plan = self.plans["transfer"]
        # Each arm's learning rate, weight decay and BatchNorm policy follow its own goal; data,
        # splits, augmentation, batches and input size are the same.
        control = transfer.as_scratch(plan.epochs if plan else None)
        self._train("scratch", random, session.resolved(control, random), {"verb": "pretrain"})

    def _train(self, arm: str, network: Backbone, recipe: Recipe, record: dict[str, Any]) -> None:
        session = replace(self.session, on_progress=_without_epochs(self.session.on_progress))
        name = arm if recipe.train_share == 1 else f"{arm}@{recipe.train_share:g}"
        began, plan = monotonic(), self.plans.get(arm)
        folder = self.out / f"{name}-{recipe.seed}"
        trained = session.train(network, recipe, folder, record, plan=plan)
        if plan is not None or trained.plan is None:
            self.seconds.setdefault(name, []).append(monotonic() - began)  # without the search
        self.plans[arm] = trained.plan
        rows, dataset, cache = session.dataset.rows("test"), session.dataset, session.cache
        found = predict_dataset(trained.classifier, dataset, cache, rows, session.engine)
        record_evaluation(trained.run, found, dataset, cache, "test", write=session.engine.is_main)
        self._add(name, found)
        value = point(found, self.metric)
        session.on_progress(Note(f"{name:<8} seed {recipe.seed}: test {self.metric} {value:.3f}"))

    def _add(self, name: str, found: Predictions) -> None:
        self.found.setdefault(name, []).append(found)


def _without_epochs(on_progress: OnProgress) -> OnProgress:
    """Twelve trainings of sixty epochs are not for reading: the bar and the results are."""
    return lambda record: None if isinstance(record, Epoch) else on_progress(record)


def _probed(session: Session, backbone: Backbone) -> Predictions:
    """Returns the test predictions of a linear probe on the backbone's frozen features."""
    dataset = session.dataset
    features, test = session.features(backbone), dataset.rows("test")
    rows, folds = session.material().for_head()
    solution = solve_head(features[rows], dataset.labels[rows], folds)
    return tabulate(solution.logits(features[test]), dataset, test)


def _judged(arms: _Arms, shares: Sequence[float]) -> dict[str, Any]:
    session, found = arms.session, arms.found
    judgement = judge(found["transfer"], found["scratch"], arms.metric)
    curve = [
        {"share": share, "num_images": len(session.material(share).train_rows)}
        | {
            arm: summarise(found[arm if share == 1 else f"{arm}@{share:g}"], arms.metric)
            for arm in ("transfer", "scratch")
        }
        for share in shares
    ]
    return {
        "schema": 1,
        **judgement,
        "arms": {
            arm: {name: summarise(found[arm], name) for name in METRICS}
            for arm in ("transfer", "scratch", "probe_transplanted", "probe_random")
        },
        "seconds": {arm: float(np.mean(spent)) for arm, spent in arms.seconds.items()},
        "curve": curve,
        "saved_images": saved_images(curve, arms.metric),
        "chance_balanced_accuracy": 1 / len(session.dataset.class_names),
        "class_names": list(session.dataset.class_names),
        "data": {
            "name": session.dataset.root.resolve().name,
            "fingerprint": session.dataset.fingerprint,
            "splits": {s: len(session.dataset.rows(s)) for s in ("train", "val", "test")},
        },
    }
