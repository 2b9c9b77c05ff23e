from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from regraft.evaluation.metrics import (
    METRICS,
    _score_intervals,
    evaluate_predictions,
    mean_log_loss,
    point,
)
from regraft.evaluation.predictions import Predictions, softmax
from regraft.evaluation.rows import to_csv, to_records


def random_predictions(
    number: int = 60, classes: int = 3, *, skill: float = 1.0, seed: int = 0, groups: int = 0
) -> Predictions:
    generator = np.random.default_rng(seed)
    truth = np.arange(number) % classes
    logits = generator.normal(0, 1, (number, classes))
    logits[np.arange(number), truth] += skill
    probabilities = np.round(softmax(logits.astype(np.float32)), 1)  # rounding makes ties
    probabilities = (probabilities + 0.01) / (probabilities + 0.01).sum(axis=1, keepdims=True)
    names = tuple(f"class {i}" for i in range(classes))
    member = tuple(f"patient {i % groups}" for i in range(number)) if groups else None
    return Predictions(
        tuple(f"{i}.png" for i in range(number)), names, probabilities, truth, member
    )


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_metrics_agree_with_scikit_learn(classes: int, seed: int) -> None:
    found = random_predictions(classes=classes, seed=seed)
    truth, scores = found.truth, found.probabilities
    expected = {
        "accuracy": sk.accuracy_score(truth, found.predicted),
        "balanced_accuracy": sk.balanced_accuracy_score(truth, found.predicted),
        "macro_f1": sk.f1_score(truth, found.predicted, average="macro"),
        "nll": sk.log_loss(truth, scores),
        "auroc": sk.roc_auc_score(
            truth, scores[:, 1] if classes == 2 else scores, multi_class="ovr"
        ),
    }
    for name, value in expected.items():
        assert point(found, name) == pytest.approx(value, abs=1e-9), name
    confusion = evaluate_predictions(found)["confusion"]
    assert confusion == sk.confusion_matrix(truth, found.predicted).tolist()


def test_weighted_metrics_equal_metrics_of_repeated_images() -> None:
    found = random_predictions(30)
    counts = np.random.default_rng(1).integers(0, 3, 30)
    rows = np.repeat(np.arange(30), counts)
    assert found.truth is not None
    repeated = Predictions(
        tuple(found.paths[row] for row in rows),
        found.class_names,
        found.probabilities[rows],
        found.truth[rows],
    )
    for name, metric in METRICS.items():
        weighted = float(metric(found)(counts[None, :].astype(float))[0])
        assert weighted == pytest.approx(point(repeated, name), abs=1e-9), name


def test_a_calibrated_classifier_has_no_calibration_error() -> None:
    probabilities = np.tile([0.75, 0.25], (400, 1))
    truth = np.array([0, 0, 0, 1] * 100)
    paths = tuple(str(i) for i in range(400))
    assert point(Predictions(paths, ("a", "b"), probabilities, truth), "ece") == pytest.approx(0)
    wrong = Predictions(paths, ("a", "b"), probabilities, np.ones(400, np.int64))
    assert point(wrong, "ece") == pytest.approx(0.75)


def test_intervals_hold_the_value_and_shrink_with_more_images() -> None:
    few = evaluate_predictions(random_predictions(60))
    many = evaluate_predictions(random_predictions(960))
    for name in METRICS:
        assert few[name]["low"] <= few[name]["value"] <= few[name]["high"], name
    width = [d["accuracy"]["high"] - d["accuracy"]["low"] for d in (few, many)]
    assert width[1] < 0.4 * width[0]


def test_a_perfect_score_is_not_certain() -> None:
    truth = np.array([0, 1] * 10)
    perfect = Predictions(
        tuple(str(i) for i in range(20)), ("a", "b"), np.eye(2)[truth] * 0.98 + 0.01, truth
    )
    found = evaluate_predictions(perfect)
    # Wilson 1927 for 20 of 20: 1 / (1 + 1.96^2 / 20)
    assert found["accuracy"]["low"] == pytest.approx(0.8389, abs=1e-4)
    assert found["accuracy"]["high"] == 1.0
    assert found["balanced_accuracy"]["low"] < 0.9


def test_score_intervals_cover_the_truth() -> None:
    generator = np.random.default_rng(5)
    truth = np.repeat([0, 1], [60, 15])
    skill = np.array([0.9, 0.7])
    hits = {"accuracy": 0, "balanced_accuracy": 0}
    expected = {"accuracy": (60 * 0.9 + 15 * 0.7) / 75, "balanced_accuracy": 0.8}
    for _ in range(400):
        right = generator.random(75) < skill[truth]
        confusion = np.zeros((2, 2), np.int64)
        np.add.at(confusion, (truth, np.where(right, truth, 1 - truth)), 1)
        for name, (low, high) in _score_intervals(confusion).items():
            hits[name] += low <= expected[name] <= high
    assert all(0.92 <= number / 400 <= 0.985 for number in hits.values()), hits


def test_images_of_one_patient_widen_the_interval() -> None:
    alone = random_predictions(200)
    copies = Predictions(  # ten patients with twenty equal images each
        alone.paths,
        alone.class_names,
        np.repeat(alone.probabilities[:10], 20, axis=0),
        np.repeat(np.arange(10) % 3, 20),
        tuple(f"p{i // 20}" for i in range(200)),
    )
    independent = Predictions(
        copies.paths, copies.class_names, copies.probabilities, copies.truth, None
    )

    def width(predictions: Predictions) -> float:
        accuracy = evaluate_predictions(predictions)["accuracy"]
        return float(accuracy["high"] - accuracy["low"])

    assert width(copies) > 2 * width(independent)


def test_the_same_predictions_give_the_same_evaluation() -> None:
    assert evaluate_predictions(random_predictions()) == evaluate_predictions(random_predictions())


def test_a_class_without_test_images_counts_in_no_average() -> None:
    found = random_predictions(40, 2)
    probabilities = np.hstack([found.probabilities, np.full((40, 1), 1e-6)])
    extended = Predictions(found.paths, (*found.class_names, "rare"), probabilities, found.truth)
    assert point(extended, "balanced_accuracy") == pytest.approx(point(found, "balanced_accuracy"))
    assert evaluate_predictions(extended)["per_class"][2] == {
        "class": "rare", "n": 0, "precision": None, "recall": None, "f1": None, "intervals": {},
    }  # fmt: skip


@pytest.mark.parametrize("grouped", [False, True])
def test_the_scores_of_a_class_have_intervals_around_them(grouped: bool) -> None:
    found = random_predictions(120, 3)
    groups = tuple(f"patient {row // 4}" for row in range(120)) if grouped else None
    table = replace(found, groups=groups)
    for row in evaluate_predictions(table)["per_class"]:
        for score in ("precision", "recall", "f1"):
            low, high = row["intervals"][score]
            assert 0 <= low < row[score] < high <= 1
            assert 0.05 < high - low < 0.6
    certain = Predictions(
        tuple("abcdef"), ("x", "y"), np.tile([0.9, 0.1], (6, 1)), np.zeros(6, np.int64)
    )
    row = evaluate_predictions(certain)["per_class"][0]
    low, high = row["intervals"]["recall"]
    assert (row["recall"], high) == (1.0, 1.0)
    assert low == pytest.approx(0.61, abs=0.01)  # Wilson 1927: 6 of 6


def test_the_csv_is_safe_for_spreadsheets_and_tells_broken_files() -> None:
    table = Predictions(("=1+1.png", 'a,"b".png'), ("-x", "y"), np.array([[0.9, 0.1], [0.2, 0.8]]))
    text = to_csv(table, [("c.png", "truncated: no end")])
    assert text.split("\r\n") == [
        "path,predicted,probability,p(-x),p(y),error",
        "'=1+1.png,'-x,0.900000,0.900000,0.100000,",
        '"a,""b"".png",y,0.800000,0.200000,0.800000,',
        "c.png,,,,,truncated: no end",
        "",
    ]
    assert to_records(table, [("c.png", "truncated")])[0]["probabilities"] == {"-x": 0.9, "y": 0.1}


def test_the_worst_mistakes_come_first() -> None:
    table = Predictions(
        ("a", "b", "c"),
        ("x", "y"),
        np.array([[0.6, 0.4], [0.9, 0.1], [0.1, 0.9]]),
        np.array([1, 1, 1]),
    )
    assert table.worst(5).tolist() == [1, 0]


def test_the_smoothed_loss_is_that_of_a_training() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(50, 4)).astype(np.float32)
    truth = generator.integers(0, 4, 50)
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits), torch.from_numpy(truth), label_smoothing=0.1
    )
    found = mean_log_loss(softmax(logits), truth, smoothing=0.1)
    assert found == pytest.approx(float(expected))
