"""Resuming a Run: the same training, on the same images, under the same contract."""

from dataclasses import dataclass
from pathlib import Path

from regraft.documents import sha256_of
from regraft.engine import Engine
from regraft.errors import ArtefactError, UsageError, count
from regraft.inputs import InputSpec
from regraft.locks import writing
from regraft.models.architectures import is_own
from regraft.models.backbone import Backbone
from regraft.models.classifier import Classifier
from regraft.progress import Note, OnProgress
from regraft.run import FINISHED, RUNNING, Run
from regraft.training.contract import (
    engine_like,
    refuse_other_conditions,
    refuse_other_splits,
    same_data,
)
from regraft.training.keeping import Trained
from regraft.training.plan import Plan
from regraft.training.recipe import Recipe
from regraft.training.session import Session


@dataclass(frozen=True)
class Resumption:
    """What a resume is asked for.

    Attributes:
        data: Where the data lies now; None: where it lay.
        arch: A user's own network once more, `file.py:factory`.
        allow_inexact: Whether other conditions are accepted; they are recorded.
        engine: None: as at the start.
    """

    data: Path | None = None
    arch: str | None = None
    allow_inexact: bool = False
    engine: Engine | None = None

    def session(self, run: Run, engine: Engine, on_progress: OnProgress) -> Session:
        """Returns the dataset of the Run, made ready again.

        Raises:
            DataError: It has changed, or is not found.
        """
        dataset = same_data(run.place, list(run.samples()), self.data, str(run.folder))
        inputs = InputSpec.from_dict(run.record["inputs"])
        session = Session.prepare(dataset, inputs, engine, on_progress)
        session = session.pooled(Recipe.model_validate(run.record["recipe"]))
        refuse_other_splits(run, session.dataset)
        return session


def resume_run(
    run: Run, asked: Resumption, on_progress: OnProgress, session: Session | None = None
) -> Trained | None:
    """Goes on with a training from where it was last saved; None: it has finished already.

    Args:
        run: Of any state.
        asked: How.
        on_progress: As of the verbs.
        session: Where its dataset is at hand already.

    Raises:
        ArtefactError: The Run was changed, or conditions are others.
        DataError: The images are others.
        BusyError: Another process is at it.
    """
    if run.status["state"] == FINISHED:
        return None
    engine = session.engine if session else asked.engine or engine_like(run.record["engine"])
    recipe = Recipe.model_validate(run.record["recipe"])
    different = _checked(run, engine, asked)
    session = session or asked.session(run, engine, on_progress)
    with writing(run.folder, here=engine.is_main):
        classifier = _origin(run, asked.arch)
        engine.place(classifier)
        keeper = session.keeper(run, classifier)
        if engine.is_main:
            state, skipped = run.states.recover()
        else:
            state, skipped = run.states.newest()
        assert state is not None  # the origin verified
        for problem in skipped:
            session.on_progress(Note(f"warning: {problem}"))
        was = run.status["state"]
        keeper.restore(state)
        if engine.is_main:
            run.log_resume({"record": state.number, "was": was, "inexact": different})
            run.set_status(RUNNING, **keeper.status)
        session.on_progress(Note(_where(run, was, keeper.number)))
        plan = run.plan()

        def random() -> Backbone:
            arch = asked.arch or classifier.backbone.arch
            return Backbone.create(arch, session.own_inputs, seed=recipe.seed)

        return session.carry_on(
            keeper,
            recipe,
            plan=None if plan is None else Plan.model_validate(plan),
            random=random if recipe.goal == "transfer" else None,
        )


def _checked(run: Run, engine: Engine, asked: Resumption) -> list[str]:
    record = {key: value for key, value in run.record.items() if key != "id"}
    if sha256_of(record)[:16] != run.record["id"]:
        raise ArtefactError(
            f"`{run.folder / 'run.json'}` was changed", hint="restore the file from a copy"
        )
    if "contract" not in record:
        raise ArtefactError(
            f"`{run.folder}` was begun by a version that could not resume",
            hint="train again, or use what it has learned: `regraft evaluate`",
        )
    if is_own(record["arch"]) and asked.arch is None:
        raise UsageError(
            f"`{run.folder}` has a network of your own, `{record['arch']}`",
            hint="name its code once more: `--arch file.py:factory`",
        )
    return refuse_other_conditions(
        record["contract"], engine, allow=asked.allow_inexact, what=f"`{run.folder}`"
    )


def _origin(run: Run, arch: str | None) -> Classifier:
    """Returns the classifier as it was before any training."""
    folder = run.states.path(0)
    if not folder.is_dir():
        raise ArtefactError(
            f"`{run.folder}` holds nothing to go on from", hint="restore it from a copy"
        )
    classifier = Classifier.load(folder, arch=arch)
    backbone, kept = classifier.backbone, run.record["random"]
    backbone.random = frozenset(backbone.state_dict() if kept == "all" else kept)
    return classifier


def _where(run: Run, was: str, number: int) -> str:
    how = "ended without a word (killed, or out of memory)" if was == RUNNING else was
    place = f"after {count(len(run.epochs()), 'epoch')}" if number else "at its beginning"
    return f"resume: `{run.folder}` was {how}; it goes on {place} (record {number})"
