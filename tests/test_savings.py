from typing import Any

import pytest

from regraft.evaluation.savings import saved_images


def curve(*points: tuple[int, float, float]) -> list[dict[str, Any]]:
    return [
        {"num_images": number, "transfer": {"mean": ours}, "scratch": {"mean": theirs}}
        for number, ours, theirs in points
    ]


def test_images_saved_are_read_between_two_points_on_a_logarithmic_scale() -> None:
    found = saved_images(curve((100, 0.7, 0.5), (400, 0.9, 0.8)), "accuracy")
    assert found == {"images": 200, "of": 400, "is_upper_bound": False}


def test_the_fewest_that_were_tried_are_an_upper_bound() -> None:
    found = saved_images(curve((100, 0.9, 0.5), (400, 0.95, 0.8)), "accuracy")
    assert found == {"images": 100, "of": 400, "is_upper_bound": True}


def test_a_loss_is_saved_the_other_way_round() -> None:
    found = saved_images(curve((100, 0.7, 0.9), (400, 0.3, 0.5)), "nll")
    assert found is not None and found["images"] == pytest.approx(200, abs=1)


@pytest.mark.parametrize("points", [
    ((100, 0.6, 0.5), (400, 0.7, 0.8)),
    ((400, 0.9, 0.8),),
])  # fmt: skip
def test_nothing_is_claimed_where_the_transfer_never_gets_there_or_nothing_was_tried(
    points: tuple[tuple[int, float, float], ...],
) -> None:
    assert saved_images(curve(*points), "accuracy") is None
