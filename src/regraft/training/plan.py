"""Plan: what a search will try, and for how long; made once, repeatable, plain data."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from regraft.data.batches import num_batches
from regraft.documents import read_json
from regraft.engine import Engine
from regraft.errors import ArtefactError, UsageError, count
from regraft.models.backbone import Backbone
from regraft.progress import duration
from regraft.training.feeds import Material
from regraft.training.optim import refuse_missing_stages, refuse_single_images
from regraft.training.recipe import Phase, Recipe

Policy = Literal["frozen", "adapt"]
# Share of the winner's schedule on which candidates are compared. Measured: on a seventh of it high
# rates look worse than they are (docs/log.md 2026-11-25).
RUNGS = (0.3,)
LEAST_STEPS = 20  # of the shortest schedule: fewer teach nothing; assumed


class Candidate(BaseModel):
    """One way to train: what is tried beside others."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    phases: tuple[Phase, ...]

    @property
    def is_head(self) -> bool:
        """Whether a head is solved, and nothing else learns."""
        return all(phase.learns == "head" for phase in self.phases)

    @property
    def head(self) -> "Candidate | None":
        """The head alone, where the candidate begins with it."""
        first = self.phases[0]
        return Candidate(name="head", phases=(first,)) if first.learns == "head" else None


class Plan(BaseModel):
    """What will be tried. The clock has a say here and nowhere else: a plan gives one result.

    Attributes:
        folds: Parts of the training images that judge in turn; 0: the validation images judge.
        rungs: The share of the full schedule on which candidates are compared; empty: there is
            nothing to compare.
        epochs: Of the full schedule; each phase that iterates has so many.
        steps_per_epoch: On all training images.
        seconds_per_step: Measured.
        temperature: Of the winner, where it is known already.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    candidates: tuple[Candidate, ...] = Field(min_length=1)
    rungs: tuple[float, ...] = Field(RUNGS, max_length=1)
    folds: int = 0
    epochs: int
    steps_per_epoch: int
    seconds_per_step: float
    temperature: float | None = None

    @classmethod
    def read(cls, file: Path) -> "Plan":
        """Returns the plan of an earlier search.

        Raises:
            ArtefactError: The file is missing, or no plan.
        """
        document = read_json(file)
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            raise ArtefactError(
                f"`{file}` is no plan: {error.errors()[0]['msg']}",
                hint="name the plan.json or winner.json of a Run",
            ) from error

    @property
    def num_trained(self) -> int:
        """How many candidates iterate."""
        return sum(not candidate.is_head for candidate in self.candidates)

    @property
    def seconds(self) -> float:
        """How long all of it takes, the winner's full schedule included; a head has none."""
        if self.candidates[0].is_head:
            return 0.0
        passes = self.folds - 1 if self.folds else 1  # each fold learns from all parts but one
        schedules = 1 + passes * self.num_trained * sum(self.rungs)
        return schedules * self.epochs * self.steps_per_epoch * self.seconds_per_step

    def epochs_of(self, share: float) -> int:
        """Returns the epochs of a share of the full schedule."""
        return max(1, round(share * self.epochs))

    def within(self, seconds: float) -> "Plan":
        """Returns a plan that takes no longer: shorter schedules, then one candidate, then a head
        alone; from random weights one epoch is the least.
        """
        if self.seconds <= seconds:
            return self
        epochs, alone = 0, self.settled(self.candidates[0], None)
        for plan in (self, alone):
            epochs = int(plan.epochs * min(1.0, seconds / plan.seconds))
            shortest = min(plan.rungs, default=1.0) * epochs * plan.steps_per_epoch
            if shortest >= LEAST_STEPS:
                return plan.model_copy(update={"epochs": epochs})
        if head := self.candidates[0].head:
            return self.settled(head, None)  # `epochs` stay: they are the measure of the control's
        return alone.model_copy(update={"epochs": max(1, epochs)})

    def settled(self, winner: Candidate, temperature: float | None) -> "Plan":
        """Returns the plan of the winner alone: other seeds repeat no choice."""
        return self.model_copy(
            update={"candidates": (winner,), "rungs": (), "temperature": temperature}
        )

    def told(self) -> str:
        """Returns the plan for people."""
        judge = f"{self.folds}-fold cross-validation" if self.folds else "the validation images"
        lines = [f"plan: {count(len(self.candidates), 'candidate')}, judged by {judge}"]
        for candidate in self.candidates:
            phases = ", then ".join(
                phase.learns + ("" if phase.learns == "head" else f" at {float(phase.lr):.2g}")
                for phase in candidate.phases
            )
            bn = candidate.phases[-1].batch_norm
            lines.append(f"      {candidate.name:<8} {phases}; BatchNorm statistics {bn}")
        short = "".join(
            f"{self.num_trained} for {self.epochs_of(share)} epochs, " for share in self.rungs
        )
        lines.append(
            f"      {short}the best for {self.epochs} epochs: about {duration(self.seconds)}"
        )
        return "\n".join(lines)


def make_plan(
    backbone: Backbone, material: Material, recipe: Recipe, engine: Engine, policy: Policy
) -> Plan:
    """Returns what to try within the recipe's time budget; the clock is asked here alone."""
    norm, number = backbone.normalisation, len(material.train_rows)
    folds = 0 if len(material.val_rows) else len(material.folds())
    candidates: dict[tuple[Phase, ...], Candidate] = {}
    for name, phases in _candidates(recipe, policy, with_head=folds > 0):
        chosen = recipe.changed({"phases": phases, "search": "none"})
        settled = chosen.resolved(normalisation=norm, num_images=number, is_grey=False).phases
        refuse_single_images(backbone, chosen.changed({"phases": settled}), number)
        candidates.setdefault(settled, Candidate(name=name, phases=settled))
    epochs = max(int(p.epochs) for each in candidates for p in each)
    size, batch = backbone.inputs.size, int(recipe.batch_size)
    steps = num_batches(number, batch)
    seconds = batch * engine.seconds_per_image(backbone, backbone.inputs.channels, size, batch)
    seconds = float(engine.mean(torch.tensor(seconds, device=engine.device))) / engine.shard[1]
    plan = Plan(
        candidates=tuple(candidates.values()),
        rungs=RUNGS if folds or len(material.val_rows) else (),
        folds=folds,
        epochs=epochs,
        steps_per_epoch=steps,
        seconds_per_step=seconds,
    )
    return plan.within(recipe.time_budget)


def refuse_unfitting_plan(
    plan: Plan, recipe: Recipe, material: Material, backbone: Backbone
) -> None:
    """Refuses a plan that was made for other data, another network or no search.

    Raises:
        UsageError: It does not fit.
    """
    if recipe.search == "none":
        raise UsageError("a plan is of a search", hint="leave `--strategy` out, or `--plan`")
    for candidate in plan.candidates:
        fixed = {"phases": candidate.phases, "search": "none"}
        refuse_missing_stages(backbone, recipe.changed(fixed))
    folds = 0 if len(material.val_rows) else len(material.folds(max(2, plan.folds)))
    if plan.rungs and plan.folds != folds:
        raise UsageError(
            f"the plan is judged in {plan.folds} folds, these images in {folds}",
            hint="leave `--plan` out: it was made for other images",
        )


def _candidates(
    recipe: Recipe, policy: Policy, *, with_head: bool
) -> Iterator[tuple[str, tuple[Phase, ...]]]:
    """Yields names and phases, what is most often right first (docs/log.md 2026-11-25).

    The head alone is among them in folds, where all are judged by networks that have learned from
    fewer images; validation images have judged it before the plan was made.
    """
    base = recipe.phases[-1]
    if recipe.goal == "scratch":
        for name, factor in (("lr x1", 1.0), ("lr x3", 3.0), ("lr x1/3", 1 / 3)):
            yield name, (base.model_copy(update={"lr_factor": factor}),)
        return
    head = Phase(learns="head", epochs=1, batch_norm=policy)
    follows = "train" if int(recipe.batch_size) > 2 else policy  # a batch of one has no variance
    for name, changes in (
        ("bold", {"lr_factor": 30.0, "batch_norm": follows, "layer_decay": 1.0}),
        ("firm", {"lr_factor": 3.0, "batch_norm": policy}),
    ):
        yield name, (head, base.model_copy(update=changes))
    if with_head:
        yield "head", (head,)
