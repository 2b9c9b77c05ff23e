"""The verbs. Each reads like the sentence it carries out; the nouns do the work.

`on_progress` is told `Note`, `Counting`, `Step`, `Epoch`, `Plan` and `Trial` records.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from regraft.changing import replace_files
from regraft.data.cache import Cache
from regraft.data.checks import Checked, check_data
from regraft.data.dataset import DataOptions, Dataset
from regraft.data.intensity import refuse_other_scales
from regraft.data.requested import requested
from regraft.delivery.deployed import Agreement
from regraft.delivery.export import export_classifier
from regraft.delivery.gate import granted
from regraft.delivery.real_images import USUAL_NUMBER, cached_images, images_in
from regraft.delivery.report import write_report
from regraft.delivery.service import Service, web_part
from regraft.delivery.verification import verify as verified
from regraft.disk import require_writable
from regraft.documents import json_content
from regraft.engine import Engine
from regraft.errors import UsageError
from regraft.evaluation.compare import LEAST_SEEDS
from regraft.evaluation.explain import write_explanations
from regraft.evaluation.judging import refuse_unmeasured
from regraft.evaluation.predicting import predict_files
from regraft.evaluation.predictions import Predictions
from regraft.evaluation.testing import (
    fitting_channels,
    own_rows,
    predict_dataset,
    record_evaluation,
    test_images,
)
from regraft.inputs import InputSpec
from regraft.locks import refuse_busy, writing
from regraft.models.backbone import Backbone
from regraft.models.classifier import Classifier
from regraft.models.doubt import DEFAULT_RATE
from regraft.models.foreign import Import, import_classifier
from regraft.progress import Note, OnProgress, counting, quiet
from regraft.run import FINISHED, Run, elsewhere, refuse_existing, refuse_inside
from regraft.storage import remove_folder
from regraft.training.arms import Arms
from regraft.training.comparing import (
    Asked,
    again,
    asked_before,
    begin,
    found_start,
    is_comparison,
    is_complete,
)
from regraft.training.contract import engine_like
from regraft.training.plan import Plan
from regraft.training.recipe import Recipe
from regraft.training.resuming import Resumption, resume_run
from regraft.training.session import DEFAULT_SIZE, Session
from regraft.training.start import Start, transplant_table
from regraft.training.validation import worth_of_features

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
    session.caution(recipe)
    session.estimate(backbone, recipe)
    run = session.train(backbone, recipe, Path(out), {"verb": "pretrain"}).run
    session.on_progress(Note(worth_of_features(run)))
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
    dataset = begun.unseen(_opened(data, Path(out)))
    backbone, moves = begun.backbone(begun.inputs(recipe, dataset), recipe.seed)
    told = engine or Engine(), on_progress, begun.known
    session = Session.prepare(dataset, backbone.inputs, *told).pooled(recipe)
    backbone.inputs = session.inputs
    recipe = session.resolved(recipe, backbone)
    record = begun.record(moves, session.dataset)
    on_progress(Note(transplant_table(record["transplant"])))
    session.caution(recipe)
    session.estimate(backbone, recipe)

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
    recipe, out = _fitting(recipe or Recipe.transfer(), "transfer"), Path(out)
    asked = Asked(
        seeds=seeds, metric=metric, fractions=tuple(fractions), recipe=recipe, adapt=tuple(adapt)
    ).checked()
    if seeds < LEAST_SEEDS:
        on_progress(Note(f"note: fewer than {LEAST_SEEDS} seeds never give a verdict"))
    begun = _started(start, arch, adapt, on_progress)
    dataset = begun.unseen(_opened(data, out))
    inputs = begun.inputs(recipe, dataset)
    told = engine or Engine(), on_progress, begun.known
    session = Session.prepare(dataset, inputs, *told).pooled(recipe)
    return _compared(Arms(session, begun, asked, out))


def _compared(arms: Arms) -> dict[str, Any]:
    """Trains and judges what is not done yet, and writes the comparison and its report."""
    out, is_main = arms.out, arms.session.engine.is_main
    with writing(out, here=is_main):
        begin(out, arms.asked, arms.session, arms.begun)
        comparison = arms.run_all()
        if is_main:
            replace_files(out, {"comparison.json": json_content(comparison)})
            report([out], out=out / "report.html")
            remove_folder(arms.ledger.folder)
    return comparison


def import_weights(
    file: Place,
    *,
    out: Place,
    source: str,
    arch: str | None = None,
    image_size: int | None = None,
    class_names: Sequence[str] = (),
    preprocessing: str | None = None,
    numbers: Mapping[str, Any] | None = None,
    on_progress: OnProgress = quiet,
) -> Classifier:
    """Makes a start from weights that Keras, torch or timm saved; code in a file is never run.

    Args:
        source: Where the weights are from, in words; every model that comes of them says it.
        preprocessing: keras-rescale, caffe, tf, torch or none.
        numbers: `mean`, `std`, `scale`, instead of the preprocessing's.

    Example:
        >>> import_weights("first_try.h5", out="start", arch="vgg16", source="own training")
    """
    refuse_existing(Path(out))
    side = None if image_size is None else (image_size, image_size)
    asked = Import(Path(file), source, arch, side, tuple(class_names), preprocessing, numbers)
    classifier, notes = import_classifier(asked)
    classifier.save(Path(out))
    for note in notes:
        on_progress(Note(f"import: {note}"))
    return classifier


def resume(
    folder: Place,
    data: Place | None = None,
    *,
    start: Place | None = None,
    arch: str | None = None,
    allow_inexact: bool = False,
    engine: Engine | None = None,
    on_progress: OnProgress = quiet,
) -> None:
    """Goes on with a Run or a comparison that was stopped or killed; a finished one stays as it is.

    On a processor a Run ends with the bytes it would have had without the interruption.

    Args:
        data: Where its images lie now; None: where they lay.
        start: Of a comparison, where it lies now.
        allow_inexact: Go on under other conditions too; the report tells.
        engine: None: like that of the beginning.

    Example:
        >>> resume("runs/target")
    """
    folder = Path(folder)
    how = Resumption(Path(data) if data else None, arch, allow_inexact, engine)
    if is_comparison(folder):
        is_done = is_complete(folder) or _compared_again(folder, start, how, on_progress) is None
    else:
        is_done = resume_run(Run.open(folder), how, on_progress) is None
    if is_done:
        on_progress(Note(f"`{folder}` is complete already: nothing to do"))


def _compared_again(
    folder: Path, start: Place | None, how: Resumption, on_progress: OnProgress
) -> dict[str, Any]:
    document = asked_before(folder)
    asked = Asked.model_validate(document["asked"])
    refuse_busy(folder)
    begun = found_start(folder, Path(start) if start else None, asked, how.arch)
    engine = how.engine or engine_like(document["engine"])
    session, different = again(folder, asked, begun, how, engine, on_progress)
    if different:
        on_progress(Note(f"warning: not exact: {'; '.join(different)}"))
        if session.engine.is_main:
            Run(folder).log_resume({"inexact": different})
    return _compared(Arms(session, begun, asked, folder, how))


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
    given = dataset.options.intensity_range
    classifier.backbone.inputs = classifier.inputs.with_given_range(given)
    channels = fitting_channels(dataset, classifier.inputs.channels)
    told = counting(on_progress, "decoding")
    with engine.first_on_machine():
        cache, dataset = Cache.build(
            dataset, classifier.inputs.size, channels, told, lambda text: on_progress(Note(text))
        )
    refuse_other_scales(classifier.inputs, dataset, cache)
    engine.place(classifier)
    predictions = predict_dataset(classifier, dataset, cache, own_rows(dataset), engine)
    return record_evaluation(
        opened, predictions, dataset, cache, split, classifier=classifier, write=engine.is_main
    )


def predict(
    run: Place,
    images: Sequence[Place] = (),
    *,
    csv: Place | None = None,
    image_column: str = "image",
    lines: Iterable[str] = (),
    error_rate: float = DEFAULT_RATE,
    intensity_range: tuple[float, float] | None = None,
    arch: str | None = None,
    engine: Engine | None = None,
    on_progress: OnProgress = quiet,
) -> tuple[Predictions | None, list[tuple[str, str]]]:
    """Classifies images, and says of which it is unsure and which are like none it has seen.

    Args:
        images: Files and folders; `-` stands for `lines`.
        csv: A table that names images; paths are relative to its folder.
        lines: Paths, one a line.
        error_rate: Of images that are not unsure, at most so many are to be wrong.
        intensity_range: The values that are black and white; None: those of the training.

    Returns:
        The table (None if no image could be read), and the broken files with their reasons.
    """
    paths, table = [Path(image) for image in images], None if csv is None else Path(csv)
    files = requested(paths, table, image_column, lines, on_progress)
    classifier, engine = Classifier.load(run, arch=arch), engine or Engine()
    refuse_unmeasured(classifier, error_rate, on_progress)
    classifier.backbone.inputs = classifier.inputs.with_given_range(intensity_range)
    engine.place(classifier)
    return predict_files(classifier, files, engine, on_progress, error_rate)


def explain(
    run: Place,
    images: Sequence[Place],
    *,
    out: Place,
    label: str | None = None,
    stage: int | None = None,
    arch: str | None = None,
    on_progress: OnProgress = quiet,
) -> tuple[int, list[tuple[str, str]]]:
    """Writes pictures that show where in images the evidence for a class was seen (Grad-CAM).

    Args:
        images: Files and folders.
        out: New folder: a picture of each image, and `explained.csv`, which says what they show.
        label: The class; None: the one predicted for each image.
        stage: Whose maps, counted from the stem; None: the last that is not too coarse.

    Returns:
        How many were written, and the broken files with their reasons.
    """
    paths, folder = [Path(image) for image in images], Path(out)
    refuse_existing(folder)
    for path in paths:
        refuse_inside(folder, path)
    files = requested(paths, None, "image", (), on_progress)
    classifier = Classifier.load(run, arch=arch)
    return write_explanations(classifier, files, folder, label, stage, on_progress)


def serve(
    run: Place,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    allow_hosts: Sequence[str] = (),
    insecure: bool = False,
    arch: str | None = None,
    engine: Engine | None = None,
    on_progress: OnProgress = quiet,
) -> None:
    """Answers over HTTP what `predict` would say, until a signal asks to stop.

    Args:
        host: Of others than this machine's own address, a token is asked for.
        port: 0: a free one.
        allow_hosts: Names besides `localhost` by which the server is known.
        insecure: All who reach it may ask.
    """
    access = granted(host, token, allow_hosts, insecure)
    web = web_part()
    listener = web.listening_socket(host, port)

    def tell(line: str) -> None:
        on_progress(Note(line))

    service = Service.of(Path(run), access, tell, arch=arch, engine=engine or Engine())
    web.run(service, listener)


def check(
    data: Sequence[Place],
    *,
    options: DataOptions | None = None,
    start: Place | None = None,
    on_progress: OnProgress = quiet,
) -> Checked:
    """Finds what would spoil a training: broken files, copies, leaks, wrong labels, shortcuts.

    Args:
        data: Folders; the first is what a backbone is pretrained on.
        options: How they are read.
        start: A Run: test images that its weights have seen are leaks.

    Example:
        >>> check(["chest_xray", "knees"]).errors
    """
    folders, run = [Path(folder) for folder in data], None if start is None else Path(start)
    return check_data(folders, options or DataOptions(), start=run, on_progress=on_progress)


def export(
    run: Place,
    *,
    to: str,
    out: Place,
    data: Data | None = None,
    images: int = USUAL_NUMBER,
    license: str = "unknown",
    arch: str | None = None,
    on_progress: OnProgress = quiet,
) -> Agreement:
    """Writes the model for other programs, with a model card, if it says there what it says here.

    Args:
        run: A Run, or a bare Classifier folder.
        to: onnx, timm or torch.
        out: New file, or folder of timm.
        data: Images to check it on; None: the Run's own, as its training has decoded them.
        images: How many of them, at most.
        license: Of the weights, in Hugging Face's words; yours to say.
    """
    classifier = Classifier.load(run, arch=arch)
    own = Run.open(run) if (Path(run) / "run.json").is_file() else None
    if data is not None:
        dataset = data if isinstance(data, Dataset) else Dataset.open(data, whole=True)
        real = images_in(dataset, own, classifier.inputs, images)
        refuse_inside(Path(out), dataset.root)
    elif own is not None:
        real = cached_images(own, classifier.inputs, images)
    else:
        raise UsageError("an export is checked on real images", hint="give some: `--data DATA`")
    on_progress(Note(f"checking on {real.told}"))
    return export_classifier(classifier, to, Path(out), real, own, license)


def report(folders: Sequence[Place], *, out: Place) -> Path:
    """Writes one self-contained HTML page about Runs and comparisons."""
    return write_report([Path(folder) for folder in folders], Path(out))


def verify(folder: Place) -> dict[str, Any]:
    """Checks every file of a Run, a comparison or a classifier folder by its hash.

    Returns:
        `files`, `bytes`, `not_vouched_for`, `lineage` and `weights_from_elsewhere`.
    """
    return verified(Path(folder)).to_json()


def _opened(data: Data, out: Path) -> Dataset:
    require_writable(out)
    refuse_busy(out)
    refuse_existing(out)
    root = data.root if isinstance(data, Dataset) else Path(data)
    refuse_inside(out, root)
    return data if isinstance(data, Dataset) else Dataset.open(root)


def _started(start: Place, arch: str | None, adapt: Sequence[str], told: OnProgress) -> Start:
    begun = Start.load(Path(start), arch, adapt)
    if begun.run is not None:
        _tell_unfinished(begun.run, told)
    for source in elsewhere(begun.classifier.lineage):
        told(Note(f"start: weights from elsewhere: {source}; what they have seen is not known"))
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
