"""Validation: what a network says of held-out images, and what its features are worth.

N images, K classes, D features.
"""

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from regraft.data.batches import Rows
from regraft.engine import Engine, evaluating
from regraft.evaluation.predictions import inferring
from regraft.models.classifier import Classifier
from regraft.progress import Counting
from regraft.run import Run
from regraft.training.feeds import Features, Feed, Live, Material, Network, Watched
from regraft.training.probe import balanced, effective_rank, solve_ridge
from regraft.training.recipe import Recipe

Floats = NDArray[np.float32]
MOST_WATCHED = 1000  # validation images whose features are looked at each epoch: under 1 s


def outputs(
    through: Features, rows: Rows, engine: Engine, what: str
) -> Generator[Counting, None, Floats]:
    """Returns what a network gives for these rows, and tells how far it is."""
    batches = through.feed.plain_batches(rows)
    return (yield from inferring(through, batches, engine, what, len(rows)))


def validated(
    network: Classifier, feed: Feed, material: Material, recipe: Recipe, engine: Engine
) -> Generator[Counting, None, tuple[Floats, dict[str, Any]]]:
    """Returns logits_NK of the validation images, and of a network that is to be transferred what
    the features of each stage would be worth to a new head.
    """
    rows, plain = material.val_rows, Network(network, feed)
    if recipe.goal != "scratch" or not isinstance(feed, Live):
        return (yield from outputs(plain, rows, engine, "validation")), {}
    order = np.random.default_rng(0).permutation(len(rows))
    watched, others = np.sort(order[:MOST_WATCHED]), np.sort(order[MOST_WATCHED:])
    through = Watched(network, feed)
    joined = yield from outputs(through, rows[watched], engine, "validation")
    if not through.ends:  # among several processes one that got no image
        with evaluating(through), torch.inference_mode():
            through(feed.example())
    seen, *stages = np.split(joined, through.ends, axis=1)
    logits_NK = np.zeros((len(rows), seen.shape[1]), np.float32)
    logits_NK[watched] = seen
    if len(others):
        logits_NK[others] = yield from outputs(plain, rows[others], engine, "validation")
    if not np.isfinite(joined).all():  # the loss says it, if it is worth saying
        return logits_NK, {}
    return logits_NK, _worth(stages, material.labels[rows[watched]])


def _worth(stages: Sequence[Floats], labels_N: NDArray[np.int64]) -> dict[str, Any]:
    """Returns the fields of an Epoch about the features of each stage."""
    own = np.arange(len(labels_N))
    logits = [solve_ridge(features_ND, labels_N, own)[1] for features_ND in stages]
    return {
        "effective_rank": effective_rank(stages[-1]),
        "stage_probes": tuple(balanced(each.argmax(axis=1), labels_N) for each in logits),
    }


def worth_of_features(run: Run) -> str:
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
