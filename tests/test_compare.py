"""The verdict against independent computations, and in simulated comparisons of known truth.

T trials, 2 arms, S seeds, N images, B blocks, P positives, Q negatives.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom, binomtest, nct, norm, ttest_rel
from scipy.stats import t as student_t

from regraft.evaluation.compare import judge, summarise
from regraft.evaluation.metrics import METRICS, Array, point
from regraft.evaluation.predictions import Predictions
from regraft.evaluation.significance import (
    MOST_BLOCKS,
    blocks_of,
    delong_p,
    effective_number,
    jackknife,
    mcnemar_p,
    sign_flip_p,
    spread_of,
)

Arms = tuple[list[Predictions], list[Predictions]]


@dataclass(frozen=True)
class World:
    """Two arms whose true difference is known.

    An image is right where its margin is positive: the arm's skill, plus what its seed, the image
    (equally hard for both arms) and this arm's eye for this image or patient add, plus noise; all
    normal, the image and the noise with a spread of 1.
    """

    skill: tuple[float, float] = (1.0, 1.0)
    seeds: int = 3
    images: int = 120
    classes: int = 2
    between_seeds: float = 0.0
    between_images: float = 0.0
    patients: int = 0

    @property
    def patient_N(self) -> NDArray[np.int64]:
        """Some have four times the images of others."""
        shares = np.linspace(1, 4, self.patients)
        return np.searchsorted(
            np.cumsum(shares / shares.sum()), np.arange(self.images) / self.images
        )

    def margins(self, trials: int, seed: int) -> Array:
        """Returns margins Tx2xSxN."""
        draw = np.random.default_rng(seed).normal
        eye = draw(0, self.between_images, (trials, 2, 1, self.patients or self.images))
        return (
            np.array(self.skill).reshape(2, 1, 1)
            + draw(0, self.between_seeds, (trials, 2, self.seeds, 1))
            + draw(0, 1, (trials, 1, 1, self.images))
            + (eye[..., self.patient_N] if self.patients else eye)
            + draw(0, 1, (trials, 2, self.seeds, self.images))
        )

    def expected(self, metric: str) -> float:
        """Returns the true difference of all seeds on all images."""
        skills, alone = np.array(self.skill), 2 + self.between_images**2
        if metric == "auroc":  # a pair is in order where its two margins add up to more than 0
            values = norm.cdf(2 * skills / np.sqrt(4 * self.between_seeds**2 + 2 * alone))
        else:
            values = norm.cdf(skills / np.sqrt(self.between_seeds**2 + alone))
        return float(values[0] - values[1])

    def arms(self, margins_2SN: Array) -> Arms:
        truth = np.arange(self.images) % self.classes
        logits = np.full((2, self.seeds, self.images, self.classes), -3.0)
        rows = np.arange(self.images)
        logits[:, :, rows, (truth + 1) % self.classes] = 0
        logits[:, :, rows, truth] = margins_2SN
        odds = np.exp(logits)
        probabilities = odds / odds.sum(axis=-1, keepdims=True)
        groups = tuple(f"patient {p}" for p in self.patient_N) if self.patients else None
        names = tuple("abc"[: self.classes])
        paths = tuple(f"{row}.png" for row in rows)
        transfer, scratch = (
            [Predictions(paths, names, run, truth, groups) for run in arm] for arm in probabilities
        )
        return transfer, scratch

    def trials(self, number: int, metric: str = "accuracy", seed: int = 0) -> list[dict[str, Any]]:
        return [judge(*self.arms(margins), metric) for margins in self.margins(number, seed)]


def one_trial(world: World, seed: int = 0) -> Arms:
    return world.arms(world.margins(1, seed)[0])


# The verdict.


@pytest.mark.parametrize(
    ("skill", "verdict"),
    [((2.5, 0.5), "helped"), ((0.5, 2.5), "hurt"), ((1.0, 1.0), "cannot tell")],
)
def test_the_verdict_follows_the_difference(skill: tuple[float, float], verdict: str) -> None:
    found = judge(*one_trial(World(skill, images=300, classes=3)), "balanced_accuracy")
    assert found["verdict"] == verdict
    assert found["low"] < found["difference"] < found["high"]
    assert found["difference"] == pytest.approx(np.mean(found["per_seed"]))


def test_a_lower_loss_is_help_too() -> None:
    assert judge(*one_trial(World((2.5, 0.5))), "nll")["verdict"] == "helped"


@pytest.mark.parametrize("metric", METRICS)
def test_fewer_than_three_seeds_never_give_a_verdict(metric: str) -> None:
    for seeds in (1, 2):
        found = judge(*one_trial(World((4.0, 0.0), seeds=seeds)), metric)
        assert found["verdict"] == "cannot tell"
        assert found["std_error"] > 0


def test_images_that_all_agree_give_no_verdict() -> None:
    world = World(seeds=3)
    right, wrong = world.arms(np.stack([np.full((3, 120), 2.0), np.full((3, 120), -2.0)]))
    found = judge(right, wrong, "accuracy")
    assert (found["difference"], found["verdict"]) == (1.0, "cannot tell")
    assert found["std_error"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("metric", METRICS)
def test_networks_that_say_one_class_break_nothing(metric: str) -> None:
    transfer, scratch = one_trial(World(seeds=6, images=400))
    says_a = np.tile([0.9, 0.1], (400, 1))
    constant = [replace(run, probabilities=says_a) for run in scratch]
    for ours, theirs in [(transfer, constant), (constant, constant)]:
        found = judge(ours, theirs, metric)
        assert json.loads(json.dumps(found, allow_nan=False)) == found
        assert found["low"] <= found["difference"] <= found["high"]
    assert found["verdict"] == "cannot tell"


@pytest.mark.fault("J9")
def test_what_images_cannot_tell_is_none_and_gives_no_verdict() -> None:
    transfer, scratch = one_trial(World((3.0, 0.0)))

    def judged(metric: str, **changes: Any) -> dict[str, Any]:
        arms = ([replace(run, **changes) for run in arm] for arm in (transfer, scratch))
        return judge(next(arms), next(arms), metric)

    one_class, one_image = np.zeros(120, np.int64), np.eye(120, dtype=np.int64)[0]
    assert judged("auroc", truth=one_class)["difference"] is None
    assert judged("auroc", truth=one_image)["difference"] is not None
    for found in (
        judged("auroc", truth=one_class),
        judged("auroc", truth=one_image),
        judged("accuracy", groups=("one patient",) * 120),
    ):
        for name in ("low", "high", "std_error", "degrees_of_freedom", "least_detectable"):
            assert found[name] is None, name
        assert found["verdict"] == "cannot tell"


def test_a_larger_test_set_shows_smaller_differences() -> None:
    small, large = (
        judge(*one_trial(World((1.0, 0.9), images=number)), "accuracy") for number in (100, 900)
    )
    assert large["least_detectable"] < 0.6 * small["least_detectable"]


def test_an_arm_is_summarised_by_mean_and_spread() -> None:
    arm, _ = one_trial(World())
    values = [point(run, "accuracy") for run in arm]
    found = summarise(arm, "accuracy")
    assert found["values"] == values
    assert found["mean"] == pytest.approx(np.mean(values))
    assert found["std"] == pytest.approx(np.std(values, ddof=1))
    assert summarise(arm[:1], "accuracy")["std"] is None


# Its parts, against independent computations.


def test_of_one_seed_the_interval_is_the_paired_t_interval_of_the_images() -> None:
    (ours,), (theirs,) = one_trial(World((1.3, 0.9), seeds=1))
    right, other = (1.0 * (arm.predicted == arm.truth) for arm in (ours, theirs))
    expected = ttest_rel(right, other)
    found, interval = judge([ours], [theirs], "accuracy"), expected.confidence_interval()
    assert (found["low"], found["high"]) == pytest.approx(interval)
    assert found["degrees_of_freedom"] == pytest.approx(expected.df)


def weighted_means(values_SN: Array) -> Callable[[Array], Array]:
    return lambda weights_RN: values_SN @ weights_RN.T / weights_RN.sum(axis=1)


def test_pseudo_values_of_a_mean_are_the_values() -> None:
    values_SN = np.random.default_rng(0).normal(size=(3, 40))
    plain_S, table_SB = jackknife(weighted_means(values_SN), np.arange(40))
    assert plain_S == pytest.approx(values_SN.mean(axis=1))
    assert table_SB == pytest.approx(values_SN)


def test_variance_components_are_those_computed_by_hand() -> None:
    # Seeds add -1, 0, 1 and images -2 to 2; the rest is +-1 in four of fifteen cells.
    table_SB = np.array([[-2.0, -3, -1, 0, 1], [-3, 0, 0, 1, 2], [-1, 0, 1, 2, 3]])
    # Mean squares: seeds 5 x 2 / 2, images 3 x 10 / 4, rest 4 / 8.
    found = spread_of(table_SB, blocks=5)
    assert found.std_error**2 == pytest.approx((5 + 7.5 - 0.5) / 15)
    doubt = 5**2 * 4 / 2**2 + 7.5**2 * 6 / 4**2 + 0.5**2 * 10 / 8**2
    assert found.degrees_of_freedom == pytest.approx(12**2 / doubt)
    assert found.error_of_images**2 == pytest.approx(7.5 / 15)


def test_a_sum_of_nothing_falls_back_to_the_largest_mean_square() -> None:
    found = spread_of(np.array([[1.0, -1.0], [-1.0, 1.0]]), blocks=2)  # only the rest: 4
    assert found.std_error**2 == pytest.approx(4 / 4)
    assert found.degrees_of_freedom == pytest.approx(1)


def test_blocks_of_unequal_size_leave_mean_and_error_unbiased() -> None:
    generator = np.random.default_rng(0)
    block_N = np.repeat(np.arange(40), generator.permutation(np.arange(40) % 4 + 1))
    values = generator.normal(1, 1, (4000, len(block_N)))
    errors = []
    for values_N in values:
        plain_S, table_SB = jackknife(weighted_means(values_N[None]), block_N)
        errors.append(spread_of(table_SB, 40).std_error ** 2)
        assert table_SB.mean() == pytest.approx(plain_S[0]) == pytest.approx(values_N.mean())
    assert np.mean(errors) == pytest.approx(1 / len(block_N), rel=0.06)  # independent images
    assert effective_number(block_N) == pytest.approx(100**2 / (10 * (1 + 4 + 9 + 16)))
    assert effective_number(np.arange(40)) == 40


def test_many_images_make_blocks_with_their_share_of_each_class() -> None:
    truth = np.repeat([0, 1], [MOST_BLOCKS * 3, MOST_BLOCKS])
    names = tuple(map(str, range(len(truth))))
    found = Predictions(names, ("a", "b"), np.eye(2)[truth], truth)
    block_N = blocks_of(found)
    assert np.bincount(block_N).tolist() == [4] * MOST_BLOCKS
    assert np.bincount(block_N, weights=truth).tolist() == [1] * MOST_BLOCKS
    assert len(np.unique(np.diff(block_N))) > 10, "blocks are dealt at random"
    patients = tuple(str(row // 2) for row in range(len(truth)))  # 600
    block_N = blocks_of(replace(found, groups=patients))
    assert sorted(np.bincount(block_N)) == [2 * 2] * MOST_BLOCKS
    assert (block_N[::2] == block_N[1::2]).all(), "a patient stays together"


def test_blocks_change_the_error_little() -> None:
    arms = one_trial(World((1.3, 0.9), images=900))
    for metric in METRICS:
        joined = judge(*arms, metric)["std_error"]
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("regraft.evaluation.significance.MOST_BLOCKS", 900)
            assert joined == pytest.approx(judge(*arms, metric)["std_error"], rel=0.1), metric


def test_mcnemar_is_the_exact_binomial_test_less_half_of_its_own_case() -> None:
    for seed in range(20):
        (ours,), (theirs,) = one_trial(World((1.2, 0.9), seeds=1, images=60), seed)
        right, other = ours.predicted == ours.truth, theirs.predicted == ours.truth
        wins, losses = int((right > other).sum()), int((right < other).sum())
        exact = binomtest(wins, wins + losses).pvalue - binom.pmf(wins, wins + losses, 0.5)
        assert mcnemar_p(ours, theirs) == pytest.approx(exact if wins != losses else 1.0)
    assert mcnemar_p(ours, ours) == 1.0


def test_delong_is_the_variance_over_all_pairs() -> None:
    for seed in range(5):
        (ours,), (theirs,) = one_trial(World((1.2, 0.9), seeds=1, images=40), seed)
        tied = replace(theirs, probabilities=np.round(theirs.probabilities, 1))
        truth, wins = ours.truth, []
        for arm in (ours, tied):
            scores = arm.probabilities[:, 1]
            wins.append(
                [[(p > q) + 0.5 * (p == q) for q in scores[truth == 0]] for p in scores[truth == 1]]
            )
        difference_PQ = np.array(wins[0], float) - np.array(wins[1], float)
        variance = sum(difference_PQ.mean(axis=axis).var(ddof=1) / 20 for axis in (0, 1))
        expected = 2 * norm.sf(abs(difference_PQ.mean()) / variance**0.5)
        assert delong_p(ours, tied) == pytest.approx(expected)
    assert delong_p(ours, ours) is None


def test_sign_flips_count_all_reversals() -> None:
    per_seed = [0.03, 0.01, -0.02, 0.05, 0.04, 0.02]
    flips = np.array(np.meshgrid(*[[-1, 1]] * 6)).reshape(6, -1)
    as_far = np.abs(np.array(per_seed) @ flips) >= abs(sum(per_seed)) - 1e-12
    assert sign_flip_p(per_seed) == pytest.approx(as_far.mean())
    assert sign_flip_p([0.01] * 6) == pytest.approx(2 / 2**6)
    assert sign_flip_p(per_seed[:5]) is None


def test_the_classical_tests_stand_beside_the_verdict_where_they_hold() -> None:
    world = World(seeds=6)
    found = judge(*one_trial(world), "accuracy")
    assert len(found["mcnemar_p"]) == len(found["delong_p"]) == 6
    assert 0 < found["sign_flip_p"] <= 1
    assert judge(*one_trial(replace(world, classes=3)), "nll")["delong_p"] is None
    found = judge(*one_trial(replace(world, patients=20)), "auroc")
    assert found["mcnemar_p"] is None and found["delong_p"] is None


# Simulated comparisons. Quick ones are few: their bounds are what right code oversteps once in
# a thousand times by the binomial distribution.

SEEDS_DIFFER = World(seeds=3, between_seeds=1.0)
IMAGES_DIFFER = World(seeds=6, images=150, between_images=2.0)
BOTH_DIFFER = World(seeds=3, classes=3, between_seeds=0.5, between_images=1.0)
PATIENTS_DIFFER = World(seeds=4, images=240, patients=30, between_images=1.5)
NOTHING_DIFFERS = World(seeds=6, images=100)
COVERED = [
    (replace(SEEDS_DIFFER, skill=(1.4, 0.9)), "accuracy"),
    (replace(IMAGES_DIFFER, skill=(1.4, 0.9)), "accuracy"),
    (replace(BOTH_DIFFER, skill=(1.4, 0.9)), "balanced_accuracy"),
    (replace(PATIENTS_DIFFER, skill=(1.4, 0.9)), "accuracy"),
    (replace(BOTH_DIFFER, skill=(1.4, 0.9), classes=2, seeds=6), "auroc"),
]
EQUAL = [SEEDS_DIFFER, IMAGES_DIFFER, BOTH_DIFFER, PATIENTS_DIFFER, NOTHING_DIFFERS]
PLANTED = [
    (replace(SEEDS_DIFFER, seeds=6, between_seeds=0.7), 1.6),
    (IMAGES_DIFFER, 0.8),
]


def false_verdicts(world: World, number: int) -> int:
    return sum(found["verdict"] != "cannot tell" for found in world.trials(number, seed=1))


@pytest.mark.fault("J9")
@pytest.mark.parametrize("world", EQUAL)
def test_equal_arms_are_rarely_told_apart(world: World) -> None:
    assert false_verdicts(world, 150) <= binom.ppf(0.999, 150, 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("world", EQUAL)
def test_equal_arms_are_told_apart_at_most_as_often_as_allowed(world: World) -> None:
    assert false_verdicts(world, 500) <= 37


def covered(world: World, metric: str, number: int) -> int:
    truth = world.expected(metric)
    return sum(f["low"] <= truth <= f["high"] for f in world.trials(number, metric, seed=2))


@pytest.mark.parametrize(("world", "metric"), COVERED)
def test_intervals_hold_the_true_difference(world: World, metric: str) -> None:
    assert covered(world, metric, 100) >= binom.ppf(0.001, 100, 0.95)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "metric"), COVERED)
def test_intervals_hold_the_true_difference_as_often_as_they_say(world: World, metric: str) -> None:
    assert 0.93 <= covered(world, metric, 2000) / 2000 <= 0.97


def power_found_and_due(world: World, number: int) -> tuple[float, float]:
    """Returns the share of verdicts "helped", and Student's power for the true standard error."""
    trials = world.trials(number, seed=3)
    right = (world.margins(2000, seed=4) > 0).mean(axis=(2, 3))
    ratio = world.expected("accuracy") / (right[:, 0] - right[:, 1]).std()
    degrees = float(np.median([found["degrees_of_freedom"] for found in trials]))
    due = nct.sf(student_t.ppf(0.975, degrees), degrees, ratio)
    return sum(found["verdict"] == "helped" for found in trials) / number, float(due)


@pytest.mark.parametrize(("world", "gain"), PLANTED)
def test_planted_differences_are_found(world: World, gain: float) -> None:
    found, due = power_found_and_due(replace(world, skill=(1.0 + gain, 1.0)), 100)
    assert found == pytest.approx(due, abs=0.15)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "gain"), PLANTED)
def test_planted_differences_are_found_as_often_as_theory_says(world: World, gain: float) -> None:
    found, due = power_found_and_due(replace(world, skill=(1.0 + gain, 1.0)), 1000)
    assert found == pytest.approx(due, abs=0.05)
