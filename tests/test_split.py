"""Splits depend on contents alone, keep groups whole and every class in every split."""

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.data.split import SPLITS, assign_splits

few = settings(max_examples=60, deadline=None, database=None)
class_sizes = st.dictionaries(st.text(max_size=3), st.integers(5, 60), min_size=1, max_size=5)
members = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 12)), min_size=1, max_size=80)


def single_images(sizes: dict[str, int]) -> tuple[list[str], list[str]]:
    labels = [name for name, number in sizes.items() for _ in range(number)]
    return labels, [f"{label}-{row}" for row, label in enumerate(labels)]


@few
@given(class_sizes)
def test_every_class_of_single_images_is_in_every_split_in_its_share(sizes: dict[str, int]) -> None:
    labels, groups = single_images(sizes)
    counts = Counter(zip(labels, assign_splits(labels, groups), strict=True))
    for name, total in sizes.items():
        assert min(counts[name, split] for split in SPLITS) >= 1
        assert abs(counts[name, "test"] - 0.20 * total) <= 1
        assert abs(counts[name, "val"] - 0.15 * total) <= 1


@few
@given(members)
def test_a_patient_is_never_in_two_splits(rows: list[tuple[str, int]]) -> None:
    labels, groups = [label for label, _ in rows], [f"patient {number}" for _, number in rows]
    pairs = set(zip(groups, assign_splits(labels, groups), strict=True))
    assert len(pairs) == len(set(groups))


@few
@given(members, st.randoms(use_true_random=False))
def test_the_split_does_not_depend_on_the_order(rows: list[tuple[str, int]], order: Random) -> None:
    def split_of(rows: list[tuple[str, int]]) -> dict[str, str]:
        groups = [str(number) for _, number in rows]
        splits = assign_splits([label for label, _ in rows], groups)
        return dict(zip(groups, splits, strict=True))

    shuffled = list(rows)
    order.shuffle(shuffled)
    assert split_of(shuffled) == split_of(rows)


@few
@given(class_sizes, st.text("0123456789", min_size=1))
def test_one_more_image_moves_few_others(sizes: dict[str, int], added: str) -> None:
    labels, groups = single_images(sizes)
    before = assign_splits(labels, groups)
    after = assign_splits([*labels, labels[0]], [*groups, added])[:-1]
    moved = [row for row in range(len(labels)) if before[row] != after[row]]
    assert len(moved) <= 3
    assert {labels[row] for row in moved} <= {labels[0]}


def test_this_split_stays_the_same_in_every_version() -> None:
    labels, groups = ["a", "b"] * 10, [f"image {n}" for n in range(20)]
    letters = "".join(split[1] for split in assign_splits(labels, groups))
    assert letters == "arrerrrrareeraraerrr"


@pytest.mark.parametrize("wanted", [("val",), ("test",), ("val", "test")])
def test_only_the_splits_that_are_missing_are_made(wanted: tuple[str, ...]) -> None:
    labels, groups = single_images({"a": 20, "b": 20})
    assert set(assign_splits(labels, groups, wanted=wanted)) == {"train", *wanted}


def test_a_large_patient_does_not_overfill_a_small_split() -> None:
    groups = ["large"] * 60 + [f"single {number}" for number in range(40)]
    splits = assign_splits(["a"] * 100, groups)
    assert splits[0] == "train"
    assert Counter(splits) == {"train": 65, "test": 20, "val": 15}
