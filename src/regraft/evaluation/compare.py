"""Did the transfer help? The paired difference of two arms, and the verdict.

S seeds, R rows of weights, B blocks of test images.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from regraft.evaluation.metrics import METRICS, Array, point
from regraft.evaluation.predictions import Predictions
from regraft.evaluation.significance import (
    ROUNDING,
    Spread,
    blocks_of,
    delong_p,
    effective_number,
    jackknife,
    mcnemar_p,
    sign_flip_p,
    spread_of,
)

LOWER_IS_BETTER = frozenset({"nll", "ece"})
LEAST_SEEDS = 3  # for a verdict: below, the spread over seeds is not known
POWER_80 = 1.96 + 0.84  # standard errors that a true difference must have to be seen 4 times in 5
HELPED, HURT, CANNOT_TELL = "helped", "hurt", "cannot tell"


def judge(
    transfer: Sequence[Predictions], scratch: Sequence[Predictions], metric: str
) -> dict[str, Any]:
    """Returns the difference transfer - scratch with its 95 % interval, and the verdict.

    Both arms predict the same test images; run i of each has the same seed. The interval covers
    another training (seeds) and another test set (images, or whole groups) alike; of one seed,
    another test set alone.

    Returns:
        `verdict`, `metric`, `difference`, `low`, `high`, `std_error`, `degrees_of_freedom`;
        `per_seed`; `least_detectable`, the difference that this test set would show in 4 of 5
        cases, however many seeds were run; and p-values beside the verdict, see `_tests`. None is
        what these images cannot tell: the AUROC of one class, the spread of a single group.
    """
    assert len(transfer) == len(scratch) > 0
    assert all(arm.paths == transfer[0].paths for arm in (*transfer, *scratch))
    pairs = list(zip(transfer, scratch, strict=True))
    measured = [(METRICS[metric](ours), METRICS[metric](theirs)) for ours, theirs in pairs]

    def differences(weights_RN: Array) -> Array:
        return np.stack([ours(weights_RN) - theirs(weights_RN) for ours, theirs in measured])

    block_N = blocks_of(transfer[0])
    per_seed, table_SB = jackknife(differences, block_N)
    difference = float(per_seed.mean())
    spread = spread_of(table_SB, effective_number(block_N))
    low, high = difference - spread.half_width, difference + spread.half_width
    if metric != "nll":  # all others lie between 0 and 1
        low, high = max(low, -1.0), min(high, 1.0)
    numbers = {
        "difference": difference,
        "low": low,
        "high": high,
        "std_error": spread.std_error,
        "degrees_of_freedom": spread.degrees_of_freedom,
        "least_detectable": POWER_80 * spread.error_of_images,
    }
    return {
        "verdict": _verdict(low, high, spread, len(pairs), metric),
        "metric": metric,
        **{name: _told(number) for name, number in numbers.items()},
        "per_seed": [_told(number) for number in per_seed],
        "num_seeds": len(pairs),
        "num_images": len(block_N),
        **_tests(pairs, per_seed.tolist()),
    }


def _verdict(low: float, high: float, spread: Spread, seeds: int, metric: str) -> str:
    # One or two seeds say nothing of the next one, and images that all agree nothing of others.
    if seeds < LEAST_SEEDS or not spread.std_error > ROUNDING:
        return CANNOT_TELL
    better, worse = (HURT, HELPED) if metric in LOWER_IS_BETTER else (HELPED, HURT)
    return better if low > 0 else worse if high < 0 else CANNOT_TELL


def _tests(
    pairs: Sequence[tuple[Predictions, Predictions]], per_seed: Sequence[float]
) -> dict[str, Any]:
    """Returns p-values of the classical tests; the verdict does not use them.

    Returns:
        `mcnemar_p` (accuracy) and `delong_p` (AUROC of two classes): one for each seed, since the
        seeds share their images and may not be pooled. Both hold for independent images: None
        with groups. `sign_flip_p` is of the metric, over the seeds.
    """
    ours = pairs[0][0]
    independent, binary = ours.groups is None, len(ours.class_names) == 2
    return {
        "mcnemar_p": [mcnemar_p(*pair) for pair in pairs] if independent else None,
        "delong_p": [delong_p(*pair) for pair in pairs] if independent and binary else None,
        "sign_flip_p": sign_flip_p(per_seed),
    }


def _told(number: float) -> float | None:
    return float(number) if np.isfinite(number) else None


def summarise(arm: Sequence[Predictions], metric: str) -> dict[str, Any]:
    """Returns the values of one arm over the seeds: mean, spread, and all of them."""
    values = [point(run, metric) for run in arm]
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": spread, "values": values}
