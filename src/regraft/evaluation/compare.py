"""Did the transfer help? The paired difference of two arms, and the verdict.

S seeds, R resamples, N test images.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from regraft.evaluation.metrics import (
    METRICS,
    RESAMPLES,
    SEED,
    Array,
    bootstrap_weights,
    known_truth,
)
from regraft.evaluation.predictions import Predictions

LOWER_IS_BETTER = frozenset({"nll", "ece"})
HELPED, HURT, CANNOT_TELL = "helped", "hurt", "cannot tell"


def judge(
    transfer: Sequence[Predictions], scratch: Sequence[Predictions], metric: str
) -> dict[str, Any]:
    """Returns the difference transfer - scratch with its 95 % interval, and the verdict.

    Both arms predict the same test images; run i of each has the same seed. The interval is a
    crossed bootstrap: images (whole groups, where there are groups) and seeds are drawn together,
    so it covers another test set and another training alike.

    Returns:
        `verdict`, `metric`, `difference`, `low`, `high`; `per_seed`; and `least_detectable`, the
        smallest difference that this test set could tell from none, however many seeds were run.
    """
    assert len(transfer) == len(scratch) > 0
    assert all(arm.paths == transfer[0].paths for arm in (*transfer, *scratch))
    first = transfer[0]
    ones = np.ones((1, len(first.paths)))
    pairs = [
        (METRICS[metric](ours), METRICS[metric](theirs))
        for ours, theirs in zip(transfer, scratch, strict=True)
    ]
    per_seed = [float((ours(ones) - theirs(ones))[0]) for ours, theirs in pairs]
    chunks = bootstrap_weights(known_truth(first), first.groups, RESAMPLES)
    differences_SR = np.stack(
        [np.concatenate([ours(w) - theirs(w) for w in chunks]) for ours, theirs in pairs]
    )
    low, high = np.nanpercentile(_crossed(differences_SR), [2.5, 97.5])
    better, worse = (HURT, HELPED) if metric in LOWER_IS_BETTER else (HELPED, HURT)
    verdict = better if low > 0 else worse if high < 0 else CANNOT_TELL
    return {
        "verdict": verdict,
        "metric": metric,
        "difference": float(np.mean(per_seed)),
        "low": float(low),
        "high": float(high),
        "per_seed": per_seed,
        "num_seeds": len(per_seed),
        "num_images": len(first.paths),
        # 1.96 standard errors of the test set alone: the half-width that is left with all seeds.
        "least_detectable": float(1.96 * np.nanstd(differences_SR.mean(axis=0))),
    }


def _crossed(differences_SR: Array) -> Array:
    """Averages, for each resample of the images, over seeds drawn with replacement."""
    seeds, resamples = differences_SR.shape
    drawn = np.random.default_rng(SEED).integers(0, seeds, size=(seeds, resamples))
    averaged: Array = np.take_along_axis(differences_SR, drawn, axis=0).mean(axis=0)
    return averaged


def summarise(arm: Sequence[Predictions], metric: str) -> dict[str, Any]:
    """Returns the values of one arm over the seeds: mean, spread, and all of them."""
    ones = np.ones((1, len(arm[0].paths)))
    values = [float(METRICS[metric](run)(ones)[0]) for run in arm]
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": spread, "values": values}
