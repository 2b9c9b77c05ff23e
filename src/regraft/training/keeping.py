"""A training under way: what it tells goes into its Run, and now and then what a resume needs."""

import signal
from collections.abc import Generator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from torch import Tensor

from regraft.changing import cut_log
from regraft.documents import json_content, parse_json
from regraft.engine import Engine
from regraft.errors import EnvironmentFault, RegraftError
from regraft.models.classifier import Classifier
from regraft.progress import OnProgress
from regraft.run import CUT_BACK, FAILED, FINISHED, INTERRUPTED, Run
from regraft.signals import Ended, Noted, noted
from regraft.storage import Step as Committed
from regraft.storage import remove_folder
from regraft.tensors import MOST_BYTES, packed, unpacked
from regraft.training.losses import SYNC_STEPS, Diverged
from regraft.training.plan import Plan
from regraft.training.records import Epoch, Step, Trial
from regraft.training.state import Bookmark, completed, differing

# Of the time since it began, a training may spend so much on saving: 3 % at most, and what steps
# leave of it is for the ends of trials and phases, before which more would be lost.
SHARE, SHARE_AT_ENDS = 0.02, 0.03
LEAST_S = 5.0  # between two saves of steps: more often protects little; assumed
FIRST_COST = 6.0  # of a whole state, in writes of the weights alone: moments, averages, the best
VALUES, TENSORS = "state.json", "state.safetensors"
SCHEMA = 1


class Stopped(RegraftError):
    """A signal ended the training; where it was, and the best so far, is saved."""

    code = "stopped"

    def __init__(self, run: Run, number: int, best: int | None) -> None:
        what = f"epoch {best}, the best so far, is" if best else "what was learned so far is"
        super().__init__(
            f"stopped by {signal.Signals(number).name}; {what} saved in `{run.folder}`",
            hint=f"it goes on with `regraft resume {run.folder}`, and can be used as it is: "
            f"`regraft evaluate {run.folder} DATA`",
        )
        self.exit_code = 128 + number  # type: ignore[misc]


@dataclass(frozen=True)
class Trained:
    """What a training leaves.

    Attributes:
        run: On disk.
        classifier: That in the Run.
        plan: Of a search's winner.
        seconds: How long it took, all of its parts together.
    """

    run: Run
    classifier: Classifier
    plan: Plan | None
    seconds: float | None


@dataclass
class Keeper:
    """Writes what a training tells into its Run.

    Attributes:
        origin: The classifier before any training, on the processor.
        engine: The main process writes.
        number: Of records so far that count: a step of the Run's states.
        saved: The number of the last state on disk.
        seconds: How long earlier parts of this training took.
        latest: When it was last saved, or begun.
        cost_s: Of the next save, foretold from the last one.
        spent_s: On saving, in this part.
    """

    run: Run
    classifier: Classifier
    origin: dict[str, Tensor]
    engine: Engine
    bookmark: Bookmark = field(default_factory=Bookmark)
    best: int | None = None
    chosen: str | None = None
    plan: Plan | None = None
    number: int = 0
    saved: int = 0
    seconds: float = 0.0
    began: float = field(default_factory=monotonic)
    latest: float = field(default_factory=monotonic)
    cost_s: float = 0.0
    spent_s: float = 0.0

    @property
    def status(self) -> dict[str, Any]:
        return {"best_epoch": self.best} | ({"chosen": self.chosen} if self.chosen else {})

    @property
    def elapsed_s(self) -> float:
        """How long this training has taken, earlier parts too."""
        return self.seconds + monotonic() - self.began

    def take(self, told: object) -> None:
        writes = self.engine.is_main
        self.number += isinstance(told, Step | Epoch | Trial | Plan)
        if isinstance(told, Epoch):
            self.best = told.epoch if told.is_best else self.best
            if writes:
                self.run.append_epoch(*told.to_json())
        elif isinstance(told, Trial):
            self.chosen = told.candidate if told.is_best else self.chosen
            if writes:
                self.run.append_trial(*told.to_json())
                if told.is_best:  # from here on the Run holds a classifier, whatever comes
                    self.run.keep_best(self.classifier.contents())
        elif isinstance(told, Plan):
            if writes:
                name = "plan.json" if self.plan is None else "winner.json"
                self.run.write(name, told.model_dump(mode="json"))
            self.plan = told

    def is_due(self, told: object) -> bool:
        """Whether what would be lost is worth the time that a save takes."""
        if not self.engine.is_main:  # the main process knows what it costs
            return False
        now, share = monotonic(), SHARE_AT_ENDS
        if isinstance(told, Step):
            share = SHARE
            if now - self.latest < LEAST_S:
                return False
        elif not isinstance(told, Epoch | Trial | Plan):
            return False
        return self.spent_s + self.cost_s <= share * (now - self.began)

    def save(self) -> None:
        """Commits what a resume needs, if there is a place to go on from."""
        snapshot = self.bookmark.describe() if self.number > self.saved else None
        if snapshot is None:
            return
        if self.engine.is_main:
            began = monotonic()
            document = {
                "schema": SCHEMA,
                "kept": self.status,
                "plan": None if self.plan is None else self.plan.model_dump(mode="json"),
                "seconds": self.elapsed_s,
                "logs": {name: self._size(name) for name in CUT_BACK},
                "tensors": list(snapshot.tensors),
                "training": snapshot.values,
            }
            tensors = packed(differing(snapshot, self.origin))
            states = self.run.states
            states.commit(self.number, {VALUES: json_content(document), TENSORS: tensors})
            states.prune(also={0})
            self.latest = monotonic()
            self.cost_s = self.latest - began
            self.spent_s += self.cost_s
        self.saved = self.number

    def _size(self, name: str) -> int:
        path = self.run.folder / name
        return path.stat().st_size if path.exists() else 0

    def restore(self, state: Committed) -> None:
        """Goes back to where a state was saved; what the logs say of later goes."""
        document: dict[str, Any] = {}
        if state.number:
            document = parse_json(state.read(VALUES), state.manifest.folder / VALUES)
            path = state.manifest.folder / TENSORS
            tensors = unpacked(state.manifest.read(TENSORS, MOST_BYTES), path)
            names, values = document["tensors"], document["training"]
            self.bookmark.saved = completed(values, names, tensors, self.origin)
            self.best = document["kept"]["best_epoch"]
            self.chosen = document["kept"].get("chosen")
            self.plan = document["plan"] and Plan.model_validate(document["plan"])
            self.seconds = document["seconds"]
        self.number = self.saved = state.number
        if self.engine.is_main:
            for name in CUT_BACK:
                cut_log(self.run.folder / name, document.get("logs", {}).get(name, 0))

    def drive(self, training: Generator[Any, None, None], on_progress: OnProgress) -> Trained:
        """Runs the training to its end, or to a signal.

        Raises:
            Stopped: A signal came; all that was done is saved.
        """
        with noted() as signals:
            try:
                with closing(training):  # closed, it leaves the best weights
                    self._run(training, on_progress, signals)
                with signals.writing():
                    self._end(signals.caught)
            except BaseException as error:  # whatever ends it: no Run stays `running`
                self._fail(error)
                raise
        self.engine.wait()
        if signals.caught:
            raise Stopped(self.run, signals.caught[0], self.best)
        return Trained(self.run, self.classifier, self.plan, self.elapsed_s)

    def _run(
        self, training: Generator[Any, None, None], on_progress: OnProgress, signals: Noted
    ) -> None:
        for told in training:
            with signals.writing():
                self.take(told)
            on_progress(told)
            stops = self._agreed(bool(signals.caught), told)
            if stops and not signals.caught:
                signals.caught.append(signal.SIGTERM)  # it came to another process
            if stops or self._agreed(self.is_due(told), told):
                with signals.writing():
                    self.save()
            if stops:
                return

    def _agreed(self, flag: bool, told: object) -> bool:
        """Whether to do it: several processes must agree, and at the same step."""
        if self.engine.shard[1] == 1:
            return flag
        if not isinstance(told, Step) or told.step % SYNC_STEPS:
            return False
        return self.engine.any(flag)

    def _end(self, caught: list[int]) -> None:
        if not self.engine.is_main:
            return
        if caught:
            self.run.keep_best(self.classifier.contents())
            self.run.set_status(INTERRUPTED, **self.status)
            return
        remove_folder(self.run.final)  # of a training that was killed before it was finished
        self.classifier.save(self.run.final)
        self.run.set_status(FINISHED, **self.status)
        self.run.drop_states()

    def _fail(self, error: BaseException) -> None:
        if not self.engine.is_main:
            return
        with suppress(EnvironmentFault):  # a full disk holds no reasons; the first error is told
            if self.best is not None and isinstance(error, Diverged):
                self.run.keep_best(self.classifier.contents())
            reason = str(error).split("\n")[0] or repr(error)
            is_stop = isinstance(error, Ended | KeyboardInterrupt)
            self.run.set_status(INTERRUPTED if is_stop else FAILED, reason=reason, **self.status)
