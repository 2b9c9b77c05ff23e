"""auto: what a careful expert tries within the time given; a usable classifier at every moment.

A ridge head on frozen features is there after one pass. A Plan then says what is tried, and for how
long: the clock is asked once, before it is made. Candidates train on short schedules, each to its
end; the one that held-out images like best trains in full.

N images, K classes.
"""

from collections.abc import Callable, Generator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from math import inf
from time import monotonic
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regraft.data.batches import ONLY, Rows
from regraft.engine import Engine
from regraft.errors import NumericError
from regraft.evaluation.calibration import LEAST_IMAGES, calibrated_loss, fit_temperature
from regraft.evaluation.predictions import infer
from regraft.models.backbone import Backbone
from regraft.models.classifier import Classifier
from regraft.progress import Counting, Note
from regraft.training.feeds import Live, Material
from regraft.training.loop import Epoch, Step, fit
from regraft.training.optim import (
    adapt_batch_norm,
)
from regraft.training.plan import Candidate, Plan, Policy, make_plan
from regraft.training.probe import Probe, balanced, probe
from regraft.training.recipe import Recipe

State = dict[str, Tensor]
Logits = NDArray[np.float32]  # NK
BLENDS = (0.25, 0.5, 0.75)  # of the weights before and after training; assumed


@dataclass(frozen=True)
class Trial:
    """One candidate tried, or the probe.

    Attributes:
        share: Of the full schedule; 0 for the probe, 1 for the winner.
        loss: Negative log-likelihood of held-out images at the best temperature; None: diverged.
        is_best: The classifier holds this one now.
    """

    candidate: str
    share: float
    loss: float | None
    balanced_accuracy: float | None
    elapsed_s: float
    is_best: bool = False

    def to_json(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns what belongs into trials.jsonl, and what into times.jsonl (wall-clock)."""
        fields = dict(vars(self))
        times = {"candidate": self.candidate, "elapsed_s": fields.pop("elapsed_s")}
        return fields, times


Told = Step | Epoch | Note | Counting | Trial | Plan


@dataclass
class _Tuning:
    """The state of one `tune`."""

    classifier: Classifier
    material: Material
    recipe: Recipe
    engine: Engine
    origin: State
    started: float = field(default_factory=monotonic)
    best: float = inf

    def fresh(self) -> Classifier:
        """Returns a classifier as it was before any training."""
        fresh = deepcopy(self.classifier)
        fresh.load_state_dict(self.origin)
        return fresh

    def logits(self, network: Classifier, rows: Rows) -> Logits:
        """Returns what a network says of these rows, not augmented."""
        live = Live(self.material, network.inputs, self.recipe, self.engine)
        return infer(network, live.plain_batches(rows), self.engine)

    def held(self, name: str, share: float, logits_NK: Logits, network: Classifier) -> Trial:
        """Returns how held-out logits do; the classifier takes the network over if it is best."""
        loss, accuracy = self.judged(logits_NK)
        if is_best := loss < self.best:
            self.best = loss
            self.classifier.load_state_dict(network.state_dict())
        return Trial(name, share, loss, accuracy, monotonic() - self.started, is_best)

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


def tune(
    classifier: Classifier,
    material: Material,
    recipe: Recipe,
    engine: Engine,
    *,
    plan: Plan | None = None,
    random: Callable[[], Backbone] | None = None,
) -> Generator[Told, None, None]:
    """Trains the classifier in place by the best of several candidates.

    Whenever it ends, also by `break` or an exception, the classifier holds the best weights so far;
    Trials that say `is_best` tell when they change. The Plan is told before the first trial, and
    last of all that of the winner alone.

    Args:
        classifier: On a transplanted or random backbone, on the engine's device.
        material: Rows that learn and rows that judge; no test rows.
        recipe: Resolved, but for its phases.
        engine: Where and how to compute.
        plan: To repeat; None: one is made.
        random: Gives the architecture with random weights, probed beside the transplanted ones.
    """
    origin = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    state = _Tuning(classifier, material, recipe, engine, origin)
    policy: Policy = "frozen"
    try:
        if recipe.goal == "transfer":
            policy = yield from _probe(state, random)
        plan = plan or make_plan(classifier.backbone, material, recipe, engine, policy)
        yield plan
        winner, temperature = yield from _search(state, plan)
        settled = plan.settled(winner, temperature)
        yield from _finish(state, settled)
    finally:
        classifier.eval()
    classifier.backbone.random = frozenset()
    yield settled


def _probe(
    state: _Tuning, random: Callable[[], Backbone] | None
) -> Generator[Trial | Note, None, Policy]:
    """Heads on frozen features: a first classifier, the BatchNorm policy, an early warning."""
    own = deepcopy(state.classifier)
    first = _probed(state, own.backbone)
    first.solution.copy_to(own.head)
    yield state.held("probe", 0, _held_out(state, own, first), own)
    yield Note(f"probe: transplanted features, {first.told()}")
    policy: Policy = "frozen"
    if own.backbone.normalisation == "batch":
        _adapt(state, own.backbone)
        adapted = _probed(state, own.backbone)
        adapted.solution.copy_to(own.head)
        yield state.held("adapted", 0, _held_out(state, own, adapted), own)
        yield Note(f"probe: with BatchNorm statistics of these images, {adapted.told()}")
        policy = "adapt" if adapted.loss < first.loss else "frozen"
        first = min(first, adapted, key=lambda found: found.loss)
    if random is not None:
        fresh = random()
        state.engine.place(fresh)
        _adapt(state, fresh)
        chance = _probed(state, fresh)
        yield Note(f"probe: features of random weights, {chance.told()}")
        if first.loss >= chance.loss:
            yield Note(
                "warning: the transplanted features serve these classes no better than random "
                "ones: this transfer may hurt (`regraft compare` tells)"
            )
    return policy


def _probed(state: _Tuning, backbone: Backbone) -> Probe:
    """Returns the probe of the backbone's features of the training images."""
    live = Live(state.material, backbone.inputs, state.recipe, state.engine)
    rows = state.material.train_rows
    features_ND = infer(backbone, live.plain_batches(rows), state.engine)
    return probe(features_ND, state.material.labels[rows], state.material.train_groups)


def _held_out(state: _Tuning, network: Classifier, found: Probe) -> Logits:
    """Returns logits of the rows that judge, by a head that has not seen them."""
    rows = state.material.val_rows
    return state.logits(network, rows) if len(rows) else found.logits_NK


def _adapt(state: _Tuning, backbone: Backbone) -> None:
    live = Live(state.material, backbone.inputs, state.recipe, state.engine)
    adapt_batch_norm(backbone, live.plain_batches(state.material.train_rows, ONLY), state.engine)


def _search(state: _Tuning, plan: Plan) -> Generator[Told, None, tuple[Candidate, float | None]]:
    """Returns the winner, and its temperature if all images were held out in turn.

    In folds nothing is left to compare a full training with: where no candidate was better than the
    probe, the head alone wins.
    """
    probed = state.best
    alive, found = list(plan.candidates), dict[str, Logits]()
    losses: dict[str, float] = {}
    for share, number in plan.trials():
        losses = {}
        for candidate in alive[:number]:
            epochs = max(1, round(share * plan.epochs))
            trial = yield from _trial(state, plan, candidate, epochs, share, found)
            losses[candidate.name] = inf if trial.loss is None else trial.loss
            yield trial
        # What differs by less is equal, and the first is most often right.
        tried = sorted(alive[:number], key=lambda each: round(losses[each.name], 3))
        alive = [each for each in tried if losses[each.name] < inf] or tried[:1]
    winner = alive[0]
    is_better = bool(found) and round(min(losses.values()), 3) < round(probed, 3)
    if plan.folds and plan.rungs and not is_better:
        winner = winner.head or winner
    labels_N = state.material.labels[state.material.judged]
    if plan.folds and winner.name in found and len(labels_N) >= LEAST_IMAGES:
        return winner, fit_temperature(found[winner.name], labels_N)
    return winner, plan.temperature


def _trial(
    state: _Tuning,
    plan: Plan,
    candidate: Candidate,
    epochs: int,
    share: float,
    found: dict[str, Logits],
) -> Generator[Told, None, Trial]:
    """Trains a candidate on a short schedule; its held-out logits go into `found`."""
    material = state.material
    recipe = state.recipe_of(candidate, epochs)
    judged = [(material, material.val_rows, np.arange(len(material.val_rows)))]
    if plan.folds:
        nobody = material.val_rows[:0]
        judged = [
            (replace(material, train_rows=material.train_rows[learn], val_rows=nobody),
             material.train_rows[judge], judge)
            for learn, judge in material.folds(plan.folds)
        ]  # fmt: skip
    logits_NK = np.zeros((len(material.judged), len(state.classifier.class_names)), np.float32)
    networks = []
    try:
        for part, rows, places in judged:
            networks.append(state.fresh())
            for told in fit(networks[-1], part, recipe, state.engine):
                if isinstance(told, Step | Counting):
                    yield told
            logits_NK[places] = state.logits(networks[-1], rows)
    except NumericError as error:
        yield Note(f"{candidate.name}: {str(error).splitlines()[0]}")
        return Trial(candidate.name, share, None, None, monotonic() - state.started)
    found[candidate.name] = logits_NK
    return state.held(candidate.name, share, logits_NK, networks[0])


def _finish(state: _Tuning, plan: Plan) -> Generator[Told, None, None]:
    """Trains the winner in full; what its validation images like better is kept."""
    winner, material = plan.candidates[0], state.material
    network = state.fresh()
    ended = False
    try:
        yield from fit(network, material, state.recipe_of(winner, plan.epochs), state.engine)
        ended = True
    except NumericError as error:
        if state.best == inf:
            raise
        yield Note(f"{winner.name}: {str(error).splitlines()[0]}; what was best before is kept")
    finally:
        # Without validation images an unfinished training cannot be told from a better one.
        if len(material.val_rows):
            trial = state.held(winner.name, 1, state.logits(network, material.val_rows), network)
        elif ended:
            state.classifier.load_state_dict(network.state_dict())
            trial = Trial(winner.name, 1, None, None, monotonic() - state.started, is_best=True)
        else:
            trial = Trial(winner.name, 1, None, None, monotonic() - state.started)
    yield trial
    if ended and len(material.val_rows):
        yield from _blend(state, winner, network)
    labels_N = material.labels[material.val_rows]
    temperature = plan.temperature
    if len(labels_N) >= LEAST_IMAGES:
        temperature = fit_temperature(state.logits(state.classifier, material.val_rows), labels_N)
    if temperature is None:
        yield Note("probabilities are as trained: too few images were held out to calibrate them")
        return
    with torch.no_grad():
        for parameter in state.classifier.head.parameters():
            parameter.div_(temperature)
    yield Note(f"probabilities calibrated: temperature {temperature:.2f}, held-out images")


def _blend(state: _Tuning, winner: Candidate, network: Classifier) -> Generator[Told, None, None]:
    """Weights between those before and after training, if validation likes them better.

    Source: Wortsman et al. 2022, arXiv:2109.01903.
    """
    starts_with_head = len(winner.phases) > 1 and winner.phases[0].learns == "head"
    if not starts_with_head or state.classifier.backbone.random:
        return
    before = state.fresh()
    head = Candidate(name="head", phases=winner.phases[:1])
    for _ in fit(before, state.material, state.recipe_of(head, 1), state.engine):
        pass
    low, high = before.state_dict(), network.state_dict()
    for share in BLENDS:
        blended = state.fresh()
        blended.load_state_dict({
            name: low[name].lerp(high[name], share) if low[name].is_floating_point() else high[name]
            for name in high
        })  # fmt: skip
        if winner.phases[-1].batch_norm == "train":
            _adapt(state, blended.backbone)
        logits_NK = state.logits(blended, state.material.val_rows)
        yield state.held(f"{share:.0%} of {winner.name}", 1, logits_NK, blended)
