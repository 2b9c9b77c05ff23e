"""What a transfer saves: how many target images training from scratch needs to do as well."""

from collections.abc import Mapping, Sequence
from math import exp, log
from typing import Any

from regraft.evaluation.compare import LOWER_IS_BETTER


def saved_images(curve: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any] | None:
    """Returns with how few images the transfer is as good as scratch with all of them.

    Between the shares that were trained, the score is taken to be linear in the logarithm of the
    number of images.

    Args:
        curve: `num_images`, and `transfer` and `scratch` with their `mean`; ascending.
        metric: What was measured.

    Returns:
        `images` (of the transfer), `of` (of scratch), `is_upper_bound` where the transfer does so
        with the fewest that were tried; None where it never does, or nothing was tried.
    """
    if len(curve) < 2:
        return None
    sign = -1 if metric in LOWER_IS_BETTER else 1
    target, most = sign * curve[-1]["scratch"]["mean"], curve[-1]["num_images"]
    before: tuple[int, float] | None = None
    for point in curve:
        number, score = point["num_images"], sign * point["transfer"]["mean"]
        if score >= target:
            if before is None:
                return {"images": number, "of": most, "is_upper_bound": True}
            share = (target - before[1]) / (score - before[1])
            needed = exp(log(before[0]) + share * (log(number) - log(before[0])))
            return {"images": round(needed), "of": most, "is_upper_bound": False}
        before = (number, score)
    return None
