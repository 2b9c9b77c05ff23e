"""Did the transfer help? The paired difference of two arms, and the verdict.

S seeds, R resamples, N test images.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from regraft.evaluation.metrics import (
    METRICS,
    RESAMPLES,
    bootstrap_weights,
    known_truth,
)
from regraft.evaluation.predictions import Predictions

LOWER_IS_BETTER = frozenset({"nll", "ece"})
LEAST_SEEDS = 3  # for a verdict: below, the spread over seeds is not known
POWER_80 = 1.96 + 0.84  # standard errors that a true difference must have to be seen 4 times in 5
HELPED, HURT, CANNOT_TELL = "helped", "hurt", "cannot tell"


def judge(
    transfer: Sequence[Predictions], scratch: Sequence[Predictions], metric: str
) -> dict[str, Any]:
    """Returns the difference transfer - scratch with its 95 % interval, and the verdict.

    Both arms predict the same test images; run i of each has the same seed. The interval covers
    another training (seeds) and another test set (images, or whole groups) alike.

    Returns:
        `verdict`, `metric`, `difference`, `low`, `high`; `per_seed`; and `least_detectable`, the
        difference that this test set would show in 4 of 5 cases, however many seeds were run.
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
    resamples = bootstrap_weights(known_truth(first), first.groups, RESAMPLES)
    differences_SR = np.concatenate(
        [np.stack([ours(w) - theirs(w) for ours, theirs in pairs]) for w in resamples], axis=1
    )
    difference = float(np.mean(per_seed))
    error_of_images = float(np.nanstd(differences_SR.mean(axis=0)))
    half_width = _half_width(per_seed, error_of_images)
    low, high = difference - half_width, difference + half_width
    if metric != "nll":  # all others lie between 0 and 1
        low, high = max(low, -1.0), min(high, 1.0)
    better, worse = (HURT, HELPED) if metric in LOWER_IS_BETTER else (HELPED, HURT)
    verdict = better if low > 0 else worse if high < 0 else CANNOT_TELL
    if len(per_seed) < LEAST_SEEDS or half_width == 0:
        verdict = CANNOT_TELL  # one or two seeds say nothing of the next one
    return {
        "verdict": verdict,
        "metric": metric,
        "difference": difference,
        "low": low,
        "high": high,
        "per_seed": per_seed,
        "num_seeds": len(per_seed),
        "num_images": len(first.paths),
        "least_detectable": POWER_80 * error_of_images,
    }


def _half_width(per_seed: Sequence[float], error_of_images: float) -> float:
    """Returns half of the 95 % interval of the mean difference.

    The variance of the mean over seeds and the bootstrap variance over images add up; Student's t
    pays for the few seeds. A percentile bootstrap over seeds told equal arms apart in 9 to 16 % of
    simulated comparisons with 6 seeds, this in 2 to 5 % (docs/log.md 2026-11-24).
    """
    from scipy.stats import t as student_t

    seeds = len(per_seed)
    if seeds == 1:
        return 1.96 * error_of_images  # of the normal distribution
    variance = error_of_images**2 + float(np.var(per_seed, ddof=1)) / seeds
    return float(student_t.ppf(0.975, seeds - 1) * variance**0.5)


def summarise(arm: Sequence[Predictions], metric: str) -> dict[str, Any]:
    """Returns the values of one arm over the seeds: mean, spread, and all of them."""
    ones = np.ones((1, len(arm[0].paths)))
    values = [float(METRICS[metric](run)(ones)[0]) for run in arm]
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": spread, "values": values}
