"""How good predictions are, with bootstrap intervals. Pure numpy; the tests hold scikit-learn up.

Every metric is a function of weights_RN (R resamples of N images): the value itself has one row of
ones, the interval has a row of counts for each bootstrap resample. N images, K classes.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regraft.evaluation.predictions import Predictions

Array = NDArray[np.float64]
RESAMPLES = 2000  # assumed enough: the 2.5 % tail then holds 50 resamples
ECE_BINS = 15  # Guo et al. 2017, arXiv:1706.04599
CHUNK = 100  # resamples at a time: bounds memory
SEED = 20261123  # of the bootstrap: the same predictions always give the same interval


def evaluate_predictions(predictions: Predictions) -> dict[str, Any]:
    """Returns every metric as {value, low, high}, the confusion matrix and a table per class.

    What is not defined is None: the AUROC where only one class is shown.
    """
    truth = known_truth(predictions)
    document: dict[str, Any] = {"n": len(predictions.paths)}
    metrics = {name: metric(predictions) for name, metric in METRICS.items()}
    confusion = _confusion(predictions)
    scores = _score_intervals(confusion) if predictions.groups is None else {}
    draws: dict[str, list[Array]] = {name: [] for name in metrics if name not in scores}
    of_classes: list[Array] = []
    tallies = _tallies(predictions)
    for weights_RN in bootstrap_weights(truth, predictions.groups, RESAMPLES):
        for name, drawn in draws.items():
            drawn.append(metrics[name](weights_RN))
        of_classes.append(_class_scores(*tallies(weights_RN)))
    ones = np.ones((1, len(predictions.paths)))
    for name, metric in metrics.items():
        interval = scores.get(name) or _percentiles(np.concatenate(draws[name]))
        numbers = (metric(ones)[0], *interval)
        told = [float(number) if np.isfinite(number) else None for number in numbers]
        document[name] = dict(zip(("value", "low", "high"), told, strict=True))
    document["class_names"] = list(predictions.class_names)
    document["confusion"] = confusion.tolist()
    document["per_class"] = _per_class(
        predictions.class_names, confusion, np.concatenate(of_classes, axis=1)
    )
    return document


def known_truth(predictions: Predictions) -> NDArray[np.int64]:
    assert predictions.truth is not None
    return predictions.truth


def point(predictions: Predictions, name: str) -> float:
    """Returns the value of one metric."""
    return float(METRICS[name](predictions)(np.ones((1, len(predictions.paths))))[0])


def _percentiles(draws: Array) -> tuple[float, float]:
    known = draws[~np.isnan(draws)]
    return tuple(np.percentile(known, [2.5, 97.5])) if len(known) else (np.nan, np.nan)


def _score_intervals(confusion: NDArray[np.int64]) -> dict[str, tuple[float, float]]:
    """Returns 95 % intervals of accuracy and balanced accuracy for independent images.

    A bootstrap of images that are all right has no spread, and would claim to be certain.

    Source: Wilson 1927; sums of proportions as in Zou and Donner 2008, doi:10.1002/sim.3095.
    """
    shown_K = confusion.sum(axis=1)
    hits_K, shown_K = np.diag(confusion)[shown_K > 0], shown_K[shown_K > 0]
    low_K, high_K = _wilson(hits_K, shown_K)
    recall_K, mean = hits_K / shown_K, float((hits_K / shown_K).mean())
    below = float(np.sqrt(((recall_K - low_K) ** 2).sum())) / len(shown_K)
    above = float(np.sqrt(((high_K - recall_K) ** 2).sum())) / len(shown_K)
    low, high = _wilson(hits_K.sum(), shown_K.sum())
    return {
        "accuracy": (float(low), float(high)),
        "balanced_accuracy": (mean - below, mean + above),
    }


def _wilson(hits: Any, number: Any) -> tuple[Any, Any]:
    share, z2 = hits / number, 1.96**2
    centre = (share + z2 / (2 * number)) / (1 + z2 / number)
    half = np.sqrt(z2 * share * (1 - share) / number + z2**2 / (4 * number**2)) / (1 + z2 / number)
    return np.clip(centre - half, 0.0, share), np.clip(centre + half, share, 1.0)


def log_losses(probabilities_NK: Array, truth: NDArray[np.int64]) -> Array:
    """Returns the negative log-likelihood of each image."""
    chosen = probabilities_NK[np.arange(len(truth)), truth]
    losses: Array = -np.log(np.maximum(chosen, np.finfo(np.float64).tiny))
    return losses


def mean_log_loss(
    probabilities_NK: Array,
    truth: NDArray[np.int64],
    *,
    is_balanced: bool = False,
    smoothing: float = 0.0,
) -> float:
    """Returns the mean negative log-likelihood; balanced: the mean of the classes' own means.

    With smoothing, that share of each label belongs to all classes alike, as in a training.
    """
    losses = log_losses(probabilities_NK, truth)
    if smoothing:
        classes = range(probabilities_NK.shape[1])
        of_all = [log_losses(probabilities_NK, np.full_like(truth, label)) for label in classes]
        losses = (1 - smoothing) * losses + smoothing * np.mean(of_all, axis=0)
    if not is_balanced:
        return float(losses.mean())
    return float(np.mean([losses[truth == label].mean() for label in np.unique(truth)]))


def bootstrap_weights(
    truth: NDArray[np.int64], groups: tuple[str, ...] | None, resamples: int
) -> Iterator[Array]:
    """Yields chunks of weights_RN: how often each image is drawn in each resample.

    Without groups the draw is stratified by class; with groups whole groups are drawn, since the
    images of one patient are not independent.
    """
    generator = np.random.default_rng(SEED)
    for start in range(0, resamples, CHUNK):
        rows = min(CHUNK, resamples - start)
        weights_RN = np.zeros((rows, len(truth)))
        if groups is not None:
            names, member = np.unique(np.array(groups), return_inverse=True)
            share = np.full(len(names), 1 / len(names))
            weights_RN = generator.multinomial(len(names), share, rows)[:, member].astype(float)
        else:
            for label in np.unique(truth):
                own = np.flatnonzero(truth == label)
                share = np.full(len(own), 1 / len(own))
                weights_RN[:, own] = generator.multinomial(len(own), share, rows)
        yield weights_RN


def _accuracy(predictions: Predictions) -> Callable[[Array], Array]:
    correct = (predictions.predicted == known_truth(predictions)).astype(float)
    return lambda weights_RN: _mean(weights_RN, correct)


def _balanced_accuracy(predictions: Predictions) -> Callable[[Array], Array]:
    tallies = _tallies(predictions)

    def metric(weights_RN: Array) -> Array:
        hits, shown, _ = tallies(weights_RN)
        with np.errstate(invalid="ignore"):
            return _nanmean(hits / shown)

    return metric


def _macro_f1(predictions: Predictions) -> Callable[[Array], Array]:
    tallies = _tallies(predictions)

    def metric(weights_RN: Array) -> Array:
        hits, shown, said = tallies(weights_RN)
        with np.errstate(invalid="ignore"):
            return _nanmean(2 * hits / (shown + said))

    return metric


def _auroc(predictions: Predictions) -> Callable[[Array], Array]:
    """One class against the rest, averaged over the classes; ties count half."""
    truth, scores_NK = known_truth(predictions), predictions.probabilities

    def of_class(label: int, weights_RN: Array) -> Array:
        values, place = np.unique(scores_NK[:, label], return_inverse=True)
        order = np.argsort(place, kind="stable")
        # Sums over ties, then over all that score lower.
        starts = np.searchsorted(place[order], np.arange(len(values)))
        is_class = (truth == label).astype(float)
        positive = np.add.reduceat((weights_RN * is_class)[:, order], starts, axis=1)
        negative = np.add.reduceat((weights_RN * (1 - is_class))[:, order], starts, axis=1)
        below = np.cumsum(negative, axis=1) - negative / 2
        pairs = positive.sum(axis=1) * negative.sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(pairs > 0, (positive * below).sum(axis=1) / pairs, np.nan)

    present = [label for label in range(scores_NK.shape[1]) if (truth == label).any()]
    # With two classes both give the same area.
    labels = [1] if scores_NK.shape[1] == 2 and len(present) == 2 else present
    return lambda weights_RN: _nanmean(
        np.stack([of_class(label, weights_RN) for label in labels], axis=1)
    )


def _nll(predictions: Predictions) -> Callable[[Array], Array]:
    losses = log_losses(predictions.probabilities, known_truth(predictions))
    return lambda weights_RN: _mean(weights_RN, losses)


def _ece(predictions: Predictions) -> Callable[[Array], Array]:
    confidence = predictions.probabilities.max(axis=1)
    correct = (predictions.predicted == known_truth(predictions)).astype(float)
    bins = np.clip(np.ceil(confidence * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)
    gap_NB = np.zeros((len(bins), ECE_BINS))
    gap_NB[np.arange(len(bins)), bins] = confidence - correct
    return lambda weights_RN: np.abs(weights_RN @ gap_NB).sum(axis=1) / weights_RN.sum(axis=1)


METRICS: dict[str, Callable[[Predictions], Callable[[Array], Array]]] = {
    "accuracy": _accuracy,
    "balanced_accuracy": _balanced_accuracy,
    "macro_f1": _macro_f1,
    "auroc": _auroc,
    "nll": _nll,
    "ece": _ece,
}


def _tallies(
    predictions: Predictions,
) -> Callable[[Array], tuple[Array, Array, Array]]:
    """Returns a function to RxK counts of each class: hit, shown (the truth), said (predicted)."""
    truth, predicted = known_truth(predictions), predictions.predicted
    classes = np.eye(len(predictions.class_names))
    shown_NK, said_NK = classes[truth], classes[predicted]
    hit_NK = shown_NK * said_NK
    return lambda weights_RN: (weights_RN @ hit_NK, weights_RN @ shown_NK, weights_RN @ said_NK)


def _confusion(predictions: Predictions) -> NDArray[np.int64]:
    """Returns KxK counts: rows are the truth, columns what was predicted."""
    number = len(predictions.class_names)
    cells = known_truth(predictions) * number + predictions.predicted
    return np.bincount(cells, minlength=number * number).reshape(number, number)


CLASS_SCORES = ("precision", "recall", "f1")


def _class_scores(hits: Array, shown: Array, said: Array) -> Array:
    """Returns 3xRxK values, in the order of `CLASS_SCORES`; nan where one is not defined."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.stack([hits / said, hits / shown, 2 * hits / (shown + said)])


def _per_class(
    names: tuple[str, ...], confusion: NDArray[np.int64], draws_3RK: Array
) -> list[dict[str, Any]]:
    """Returns a row for each class: the scores, and 95 % `intervals` of those that are defined.

    Resamples of a class that is all right or all wrong have no spread, and would claim to be
    certain: Wilson's interval of precision and recall is the least.
    """
    hits_K = np.diag(confusion).astype(float)
    shown_K, said_K = confusion.sum(axis=1), confusion.sum(axis=0)
    values_3K = _class_scores(hits_K[None], shown_K[None], said_K[None])[:, 0]
    table = []
    for label, name in enumerate(names):
        row: dict[str, Any] = {"class": name, "n": int(shown_K[label])}
        intervals: dict[str, list[float]] = {}
        for score, number in enumerate(CLASS_SCORES):
            value = values_3K[score, label]
            row[number] = float(value) if np.isfinite(value) else None
            if row[number] is None:
                continue
            low, high = _percentiles(draws_3RK[score, :, label])
            ends = [value if np.isnan(end) else end for end in (low, high)]
            if number != "f1":
                of = (said_K if number == "precision" else shown_K)[label]
                least, most = _wilson(hits_K[label], of)
                ends = [min(ends[0], least), max(ends[1], most)]
            intervals[number] = [float(min(ends[0], value)), float(max(ends[1], value))]
        table.append(row | {"intervals": intervals})
    return table


def _mean(weights_RN: Array, values: Array) -> Array:
    mean: Array = weights_RN @ values / weights_RN.sum(axis=1)
    return mean


def _nanmean(values_RK: Array) -> Array:
    known = ~np.isnan(values_RK)
    with np.errstate(invalid="ignore"):
        mean: Array = np.where(known, values_RK, 0.0).sum(axis=1) / known.sum(axis=1)
    return mean
