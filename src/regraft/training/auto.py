"""auto: what a careful expert tries within the time given; a usable classifier at every moment.

A ridge head on frozen features is there after one pass. A Plan then says what is tried, and for how
long: the clock is asked once, before it is made. Candidates train on short schedules, each to its
end; the one that held-out images like best trains in full.

N images, K classes.
"""

from collections.abc import Callable, Generator, Iterator
from copy import deepcopy
from dataclasses import replace
from math import inf

import numpy as np
import torch

from regraft.data.batches import ONLY
from regraft.engine import Engine
from regraft.errors import NumericError
from regraft.evaluation.calibration import LEAST_IMAGES, fit_temperature, least_loss
from regraft.evaluation.predictions import inferring
from regraft.models.backbone import Backbone
from regraft.models.classifier import Classifier
from regraft.progress import Counting, Note
from regraft.training.feeds import Live, Material
from regraft.training.loop import fit
from regraft.training.optim import adapting_batch_norm
from regraft.training.plan import Candidate, Plan, Policy, make_plan
from regraft.training.probe import Probe, probe
from regraft.training.recipe import Recipe
from regraft.training.records import Epoch, Step, Trial
from regraft.training.state import Bookmark
from regraft.training.tuning import Judging, Trying, Tuning

# Share of a short trial's held-out loss that the full schedule leaves, a head has none: measured,
# 0.56 in the median and under 0.7 in 9 of 10 (docs/log.md 2026-11-25).
LEFT = 0.7
BLENDS = (0.25, 0.5, 0.75)  # of the weights before and after training; assumed


Told = Step | Epoch | Note | Counting | Trial | Plan


def tune(
    classifier: Classifier,
    material: Material,
    recipe: Recipe,
    engine: Engine,
    *,
    plan: Plan | None = None,
    random: Callable[[], Backbone] | None = None,
    bookmark: Bookmark | None = None,
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
        bookmark: See `fit`; the classifier is as before any training, whatever is gone on from.
    """
    origin = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    state = Tuning(classifier, material, recipe, engine, origin)
    bookmark = bookmark or Bookmark()
    if bookmark.saved is not None:
        state.restore(bookmark.saved)
    bookmark.describe = state.snapshot
    try:
        if state.plan is None:
            policy: Policy = "frozen"
            if recipe.goal == "transfer":
                policy = yield from _probe(state, random)
            state.plan = plan or make_plan(classifier.backbone, material, recipe, engine, policy)
            yield state.plan
        winner, temperature = yield from _search(state, state.plan)
        settled = state.plan.settled(winner, temperature)
        yield from _finish(state, settled)
    finally:
        classifier.eval()
    classifier.backbone.random = frozenset()
    yield settled


def _probe(
    state: Tuning, random: Callable[[], Backbone] | None
) -> Generator[Trial | Note | Counting, None, Policy]:
    """Heads on frozen features: a first classifier, the BatchNorm policy, an early warning."""
    own = deepcopy(state.classifier)
    first = yield from _probed(state, own.backbone)
    first.solution.copy_to(own.head)
    yield state.held("probe", 0, (yield from _held_out(state, own, first)), own)
    yield Note(f"probe: transplanted features, {first.told()}")
    policy: Policy = "frozen"
    if own.backbone.normalisation == "batch":
        yield from _adapt(state, own.backbone)
        adapted = yield from _probed(state, own.backbone)
        adapted.solution.copy_to(own.head)
        yield state.held("adapted", 0, (yield from _held_out(state, own, adapted)), own)
        yield Note(f"probe: with BatchNorm statistics of these images, {adapted.told()}")
        policy = "adapt" if adapted.loss < first.loss else "frozen"
        first = min(first, adapted, key=lambda found: found.loss)
    if random is not None:
        fresh = random()
        state.engine.place(fresh)
        yield from _adapt(state, fresh)
        chance = yield from _probed(state, fresh)
        yield Note(f"probe: features of random weights, {chance.told()}")
        if first.loss >= chance.loss:
            yield Note(
                "warning: the transplanted features serve these classes no better than random "
                "ones: this transfer may hurt (`regraft compare` tells)"
            )
    return policy


def _probed(state: Tuning, backbone: Backbone) -> Generator[Counting, None, Probe]:
    """Returns the probe of the backbone's features of the training images."""
    live = Live(state.material, backbone.inputs, state.recipe, state.engine)
    rows = state.material.train_rows
    batches = live.plain_batches(rows)
    features_ND = yield from inferring(backbone, batches, state.engine, "features", len(rows))
    return probe(features_ND, state.material.labels[rows], state.material.train_groups)


def _held_out(state: Tuning, network: Classifier, found: Probe) -> Judging:
    """Returns logits of the rows that judge, by a head that has not seen them."""
    rows = state.material.val_rows
    return (yield from state.logits(network, rows)) if len(rows) else found.logits_NK


def _adapt(state: Tuning, backbone: Backbone) -> Iterator[Counting]:
    live = Live(state.material, backbone.inputs, state.recipe, state.engine)
    rows = state.material.train_rows
    yield from adapting_batch_norm(
        backbone, live.plain_batches(rows, ONLY), state.engine, len(rows)
    )


def _search(state: Tuning, plan: Plan) -> Generator[Told, None, tuple[Candidate, float | None]]:
    """Returns the winner, and its temperature if all images were held out in turn."""
    winner, found = plan.candidates[0], state.found
    least = least_loss(len(state.material.judged), len(state.classifier.class_names))

    def promised(candidate: Candidate) -> tuple[float, bool]:
        loss, left = losses[candidate.name], 1.0 if candidate.is_head else LEFT
        # What differs by less is equal: then the head, or what is most often right.
        return round(least + left * (loss - least), 3), not candidate.is_head

    for share in plan.rungs:
        losses: dict[str, float] = {}
        for candidate in plan.candidates:
            trial = state.told(candidate.name, share)
            if trial is None:
                trial = yield from _trial(state, plan, candidate, share)
            losses[candidate.name] = inf if trial.loss is None else trial.loss
        winner = min(plan.candidates, key=promised)
    labels_N = state.material.labels[state.material.judged]
    if plan.folds and winner.name in found and len(labels_N) >= LEAST_IMAGES:
        return winner, fit_temperature(found[winner.name], labels_N)
    return winner, plan.temperature


def _trial(
    state: Tuning,
    plan: Plan,
    candidate: Candidate,
    share: float,
) -> Generator[Told, None, Trial]:
    """Trains a candidate on a short schedule; its held-out logits go into `state.found`."""
    material = state.material
    recipe = state.recipe_of(candidate, plan.epochs_of(share))
    judged = [(material, material.val_rows, np.arange(len(material.val_rows)))]
    if plan.folds:
        nobody = material.val_rows[:0]
        judged = [
            (replace(material, train_rows=material.train_rows[learn], val_rows=nobody),
             material.train_rows[judge], judge)
            for learn, judge in material.folds(plan.folds)
        ]  # fmt: skip
    shape = (len(material.judged), len(state.classifier.class_names))
    trying = state.trying = state.trying or Trying(np.zeros(shape, np.float32))
    problem = None
    try:
        for part, rows, places in judged[trying.done :]:
            network = state.fresh()
            for told in fit(network, part, recipe, state.engine, bookmark=state.begin()):
                if isinstance(told, Step | Counting):
                    yield told
            trying.logits_NK[places] = yield from state.logits(network, rows)
            trying.first, trying.done = trying.first or network, trying.done + 1
            state.end()
    except NumericError as error:
        problem = Note(f"{candidate.name}: {str(error).splitlines()[0]}")
    state.trying = None
    state.end()
    if problem is not None:
        trial = state.note(Trial(candidate.name, share, None, None, state.elapsed_s))
    else:
        assert trying.first is not None
        state.found[candidate.name] = trying.logits_NK
        trial = state.held(candidate.name, share, trying.logits_NK, trying.first)
    yield trial
    if problem is not None:
        yield problem
    return trial


def _finish(state: Tuning, plan: Plan) -> Generator[Told, None, None]:
    """Trains the winner in full; what its validation images like better is kept."""
    winner, material = plan.candidates[0], state.material
    if state.is_calibrated:  # that was the last of it
        return
    network = state.fresh()
    if not state.has_diverged:
        yield from _full(state, winner, plan.epochs, network)
    if not state.has_diverged and state.told(winner.name, 1) is None:
        if len(material.val_rows):
            logits_NK = yield from state.logits(network, material.val_rows)
            yield state.held(winner.name, 1, logits_NK, network)
        else:
            state.classifier.load_state_dict(network.state_dict())
            yield state.note(Trial(winner.name, 1, None, None, state.elapsed_s, is_best=True))
    if not state.has_diverged and len(material.val_rows):
        yield from _blend(state, winner, network)
    labels_N = material.labels[material.val_rows]
    temperature = plan.temperature
    if len(labels_N) >= LEAST_IMAGES:
        logits_NK = yield from state.logits(state.classifier, material.val_rows)
        temperature = fit_temperature(logits_NK, labels_N)
    if temperature is None:
        yield Note("probabilities are as trained: too few images were held out to calibrate them")
        return
    with torch.no_grad():
        for parameter in state.classifier.head.parameters():
            parameter.div_(temperature)
    state.is_calibrated = True
    yield Note(f"probabilities calibrated: temperature {temperature:.2f}, held-out images")


def _full(
    state: Tuning, winner: Candidate, epochs: int, network: Classifier
) -> Generator[Told, None, None]:
    """Trains the winner; if it is stopped or diverges, its best epoch may still be the best."""
    recipe, bookmark = state.recipe_of(winner, epochs), state.begin()
    try:
        yield from fit(network, state.material, recipe, state.engine, bookmark=bookmark)
    except GeneratorExit:
        if bookmark.judged is not None:
            state.held(winner.name, 1, bookmark.judged, network)
        raise
    except NumericError as error:
        if state.best == inf and bookmark.judged is None:
            raise
        state.has_diverged = True
        state.end()
        if bookmark.judged is None:
            yield state.note(Trial(winner.name, 1, None, None, state.elapsed_s))
        else:
            yield state.held(winner.name, 1, bookmark.judged, network)
        yield Note(f"{winner.name}: {str(error).splitlines()[0]}; what was best before is kept")


def _blend(state: Tuning, winner: Candidate, network: Classifier) -> Generator[Told, None, None]:
    """Weights between those before and after training, if validation likes them better.

    Source: Wortsman et al. 2022, arXiv:2109.01903.
    """
    starts_with_head = len(winner.phases) > 1 and winner.phases[0].learns == "head"
    if not starts_with_head or state.classifier.backbone.random:
        return
    before = state.fresh()
    head = Candidate(name="head", phases=winner.phases[:1])
    for told in fit(before, state.material, state.recipe_of(head, 1), state.engine):
        if isinstance(told, Counting):
            yield told
    low, high = before.state_dict(), network.state_dict()
    for share in BLENDS:
        name = f"{share:.0%} of {winner.name}"
        if state.told(name, 1) is not None:
            continue
        blended = state.fresh()
        blended.load_state_dict({
            key: low[key].lerp(high[key], share) if low[key].is_floating_point() else high[key]
            for key in high
        })  # fmt: skip
        if winner.phases[-1].batch_norm == "train":
            yield from _adapt(state, blended.backbone)
        logits_NK = yield from state.logits(blended, state.material.val_rows)
        yield state.held(name, 1, logits_NK, blended)
