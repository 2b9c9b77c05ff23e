"""Heads that are solved on features: against brute force."""

import numpy as np
import pytest
from numpy.typing import NDArray

from regraft.evaluation.calibration import calibrated_loss, fit_temperature
from regraft.training.probe import RIDGE_PENALTIES, effective_rank, probe, solve_ridge


def clouds(number: int, width: int, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    generator = np.random.default_rng(seed)
    labels = np.arange(number) % 3
    centres = generator.normal(0, 1, (3, width))
    return (centres[labels] + generator.normal(0, 1.5, (number, width))).astype(np.float32), labels


def brute_force(
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    groups: NDArray[np.int64],
    penalty: float,
) -> NDArray[np.float64]:
    """Predictions for each group by ridge regression that has not seen it."""
    mean, std = features.mean(axis=0), features.std(axis=0)
    x = ((features - mean) / std).astype(np.float64)
    y = np.eye(3)[labels] * 2 - 1
    found = np.zeros_like(y)
    for group in np.unique(groups):
        out = groups == group
        inner, targets = x[~out], y[~out]
        centre, offset = inner.mean(axis=0), targets.mean(axis=0)
        gram = (inner - centre).T @ (inner - centre) + penalty * np.eye(x.shape[1])
        weight = np.linalg.solve(gram, (inner - centre).T @ (targets - offset))
        found[out] = (x[out] - centre) @ weight + offset
    return found


@pytest.mark.parametrize("width", [5, 60])
@pytest.mark.parametrize("grouped", [False, True])
def test_left_out_logits_are_those_of_a_fit_without_the_image_or_its_group(
    width: int, grouped: bool
) -> None:
    features, labels = clouds(40, width)
    groups = np.repeat(np.arange(10), 4) if grouped else np.arange(40)
    solution, logits = solve_ridge(features, labels, groups)
    expected = {p: brute_force(features, labels, groups, p * 40) for p in RIDGE_PENALTIES}
    errors = {
        p: ((found - (np.eye(3)[labels] * 2 - 1)) ** 2).mean() for p, found in expected.items()
    }
    best = min(errors, key=errors.__getitem__)
    assert solution.penalty == pytest.approx(best * 40)
    scale = logits / expected[best]
    assert np.allclose(scale, scale.flat[0], rtol=1e-3), "one temperature for all"


def test_a_ridge_head_says_of_new_images_what_it_learned() -> None:
    features, labels = clouds(300, 20)
    solution, logits = solve_ridge(features, labels, np.arange(300))
    left_out = (logits.argmax(axis=1) == labels).mean()
    seen = (solution.logits(features).argmax(axis=1) == labels).mean()
    assert 0.6 < left_out < seen
    assert fit_temperature(logits, labels) == pytest.approx(1.0, abs=0.05)


def test_a_patient_on_both_sides_would_flatter_a_probe() -> None:
    generator = np.random.default_rng(0)
    patients = np.repeat(np.arange(30), 5)
    labels = generator.integers(0, 2, 30)[patients]
    own = generator.normal(0, 1, (30, 40))[patients]
    features = (own + generator.normal(0, 0.1, own.shape)).astype(np.float32)
    apart, together = probe(features, labels, patients), probe(features, labels)
    assert together.balanced_accuracy > 0.95 and together.knn > 0.95
    assert apart.balanced_accuracy < 0.7 and apart.knn < 0.7


def test_effective_rank_counts_directions() -> None:
    generator = np.random.default_rng(0)
    full = generator.normal(0, 1, (500, 8)).astype(np.float32)
    assert effective_rank(full) == pytest.approx(8, abs=0.2)
    two = (generator.normal(0, 1, (500, 2)) @ generator.normal(0, 1, (2, 8))).astype(np.float32)
    assert 1 < effective_rank(two) <= 2.01
    assert effective_rank(np.ones((10, 4), np.float32)) == pytest.approx(1)


def test_a_temperature_mends_certainty_and_never_claims_all_of_it() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 2000)
    true = generator.normal(0, 1, (2000, 3))
    true[np.arange(2000), labels] += 1.0
    overconfident = (8 * true).astype(np.float32)
    temperature = fit_temperature(overconfident, labels)
    assert temperature == pytest.approx(8, rel=0.15)
    better = calibrated_loss(overconfident, labels, temperature)
    assert better < calibrated_loss(overconfident, labels, 1.0)
    all_right = np.eye(2, dtype=np.float32)[[0, 1, 0, 1]]
    assert calibrated_loss(all_right, np.array([0, 1, 0, 1]), 0.05) > 0.1  # of 4 images
