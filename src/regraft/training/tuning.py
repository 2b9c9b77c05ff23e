"""The state of a search: what was tried, what is best, and how to go on from there.

N images, K classes.
"""

from collections.abc import Generator
from copy import deepcopy
from dataclasses import dataclass, field
from math import inf, isfinite
from time import monotonic

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regraft.data.batches import Rows
from regraft.engine import Engine
from regraft.evaluation.calibration import calibrated_loss, fit_temperature
from regraft.evaluation.predictions import inferring
from regraft.models.classifier import Classifier
from regraft.progress import Counting
from regraft.training.feeds import Live, Material
from regraft.training.plan import Candidate, Plan
from regraft.training.probe import balanced
from regraft.training.recipe import Recipe
from regraft.training.records import Trial
from regraft.training.state import Bookmark, Snapshot, restore

State = dict[str, Tensor]
Logits = NDArray[np.float32]  # NK
Judging = Generator[Counting, None, Logits]


@dataclass
class Trying:
    """A trial under way: what its held-out images got so far, by fold, and the first network."""

    logits_NK: Logits
    done: int = 0
    first: Classifier | None = None


@dataclass
class Tuning:
    """The state of one `tune`.

    Attributes:
        plan: None until the probe has ended; before that nothing is kept for a resume.
        found: Held-out logits of each candidate, the latest.
        tried: All trials that were told, the probe's too.
        trying: The trial under way.
        inner: Of the `fit` under way.
        has_diverged: Whether the winner did.
    """

    classifier: Classifier
    material: Material
    recipe: Recipe
    engine: Engine
    origin: State
    started: float = field(default_factory=monotonic)
    best: float = inf
    plan: Plan | None = None
    found: dict[str, Logits] = field(default_factory=dict)
    tried: list[Trial] = field(default_factory=list)
    trying: Trying | None = None
    inner: Bookmark = field(default_factory=Bookmark)
    has_diverged: bool = False
    is_calibrated: bool = False

    def told(self, name: str, share: float) -> Trial | None:
        """Returns a trial that was told before."""
        same = (t for t in self.tried if (t.candidate, t.share) == (name, share))
        return next(same, None)

    def begin(self) -> Bookmark:
        """Returns the bookmark of the next `fit`: where the last one was, if it goes on."""
        self.inner = Bookmark(self.inner.saved)
        return self.inner

    def end(self) -> None:
        """Forgets the `fit` that has ended."""
        self.inner = Bookmark()

    def snapshot(self) -> Snapshot | None:
        if self.plan is None:
            return None
        taken = Snapshot({
            "plan": self.plan.model_dump(mode="json"),
            "best": self.best if isfinite(self.best) else None,
            "tried": [vars(trial) for trial in self.tried],
            "has_diverged": self.has_diverged,
            "is_calibrated": self.is_calibrated,
            "elapsed_s": monotonic() - self.started,
        })  # fmt: skip
        taken.put("held", self.classifier.state_dict())
        taken.put("found", {name: torch.from_numpy(found) for name, found in self.found.items()})
        if self.trying is not None:
            taken.values["trying"] = self.trying.done
            taken.put("trying", {"logits": torch.from_numpy(self.trying.logits_NK)})
            if self.trying.first is not None:
                taken.put("first", self.trying.first.state_dict())
        inner = self.inner.describe() or self.inner.saved
        if inner is not None:
            taken.put_inner("fit", inner)
        return taken

    def restore(self, saved: Snapshot) -> None:
        """Goes back to where a snapshot was taken."""
        values = saved.values
        self.plan = Plan.model_validate(values["plan"])
        self.best = inf if values["best"] is None else values["best"]
        self.tried = [Trial(**trial) for trial in values["tried"]]
        self.has_diverged = values["has_diverged"]
        self.is_calibrated = values["is_calibrated"]
        self.started -= values["elapsed_s"]
        restore(self.classifier, saved.get("held"))
        self.found = {name: found.numpy() for name, found in saved.get("found").items()}
        if "trying" in values:
            first = self.fresh() if saved.get("first") else None
            if first is not None:
                restore(first, saved.get("first"))
            logits_NK = saved.get("trying")["logits"].numpy()
            self.trying = Trying(logits_NK, values["trying"], first)
        self.inner = Bookmark(saved.inner("fit"))

    def fresh(self) -> Classifier:
        """Returns a classifier as it was before any training."""
        fresh = deepcopy(self.classifier)
        fresh.load_state_dict(self.origin)
        return fresh

    def logits(self, network: Classifier, rows: Rows) -> Judging:
        """Returns what a network says of these rows, not augmented."""
        live = Live(self.material, network.inputs, self.recipe, self.engine)
        batches = live.plain_batches(rows)
        return (yield from inferring(network, batches, self.engine, "held-out", len(rows)))

    def held(self, name: str, share: float, logits_NK: Logits, network: Classifier) -> Trial:
        """Returns how held-out logits do; the classifier takes the network over if it is best."""
        loss, accuracy = self.judged(logits_NK)
        if is_best := loss < self.best:
            self.best = loss
            self.classifier.load_state_dict(network.state_dict())
        return self.note(Trial(name, share, loss, accuracy, self.elapsed_s, is_best))

    def note(self, trial: Trial) -> Trial:
        """Remembers a trial that is to be told."""
        self.tried.append(trial)
        return trial

    @property
    def elapsed_s(self) -> float:
        return monotonic() - self.started

    def judged(self, logits_NK: Logits) -> tuple[float, float]:
        """Returns loss and balanced accuracy of logits of the rows that judge."""
        labels_N = self.material.labels[self.material.judged]
        temperature = fit_temperature(logits_NK, labels_N)
        accuracy = balanced(logits_NK.argmax(axis=1), labels_N)
        return calibrated_loss(logits_NK, labels_N, temperature), accuracy

    def recipe_of(self, candidate: Candidate, epochs: int) -> Recipe:
        """Returns the recipe of a candidate on a schedule of so many epochs."""
        phases = [
            phase if phase.learns == "head" else phase.model_copy(update={"epochs": epochs})
            for phase in candidate.phases
        ]
        return self.recipe.changed({"phases": tuple(phases), "search": "none"})
