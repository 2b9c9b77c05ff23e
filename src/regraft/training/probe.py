"""Probes: a head solved on frozen features, and what that says about the features.

N images, D features, K classes.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from regraft.evaluation.calibration import calibrated_loss, fit_temperature
from regraft.evaluation.metrics import log_losses
from regraft.evaluation.predictions import softmax
from regraft.models.head import Head
from regraft.parallel import one_thread

Features = NDArray[np.float32]
Labels = NDArray[np.int64]
Fold = tuple[Labels, Labels]  # places that learn, places that judge
# L2 penalties on standardised features, the strongest first; a wide grid, assumed.
LOGISTIC_PENALTIES = (1e4, 1e3, 1e2, 10.0, 1.0, 0.1)
MOST_ITERATIONS = 500
# Likewise, as shares of the number of images.
RIDGE_PENALTIES = np.logspace(-4, 2, 13)
NEIGHBOURS = (1, 5, 20)
MOST_NEIGHBOURED = 4000  # images whose distances fit into memory; assumed


@dataclass(frozen=True)
class Solution:
    """A linear head: logits_NK = features_ND @ weight.T + bias.

    Attributes:
        penalty: What the squared weights on standardised features cost beside the sum of the
            images' losses.
    """

    weight: NDArray[np.float64]
    bias: NDArray[np.float64]
    penalty: float

    def logits(self, features_ND: Features) -> NDArray[np.float32]:
        return (features_ND @ self.weight.T + self.bias).astype(np.float32)

    def copy_to(self, head: Head) -> None:
        with torch.no_grad():
            head.weight.copy_(torch.from_numpy(self.weight))
            head.bias.copy_(torch.from_numpy(self.bias))


@one_thread
def solve_head(
    features_ND: Features, labels_N: Labels, folds: Sequence[Fold], *, balanced: bool = False
) -> Solution:
    """Returns the logistic regression with the penalty that held-out images like best.

    Solved by L-BFGS to convergence (scikit-learn), from the strongest penalty on, each from the one
    before, until held-out images like it less.

    Args:
        features_ND: Of all images.
        labels_N: Class indices.
        folds: Places that learn, and places that judge. Of one fold, the solution is that of the
            places that learn; of several, that of all.
        balanced: Whether each class weighs the same.
    """
    fits = [_Logistic(features_ND[learn], labels_N[learn], balanced) for learn, _ in folds]
    best: tuple[float, Solution] | None = None
    for penalty in LOGISTIC_PENALTIES:
        found = [fit.solved(penalty) for fit in fits]
        losses = [
            log_losses(softmax(solution.logits(features_ND[judge])), labels_N[judge])
            for solution, (_, judge) in zip(found, folds, strict=True)
        ]
        loss = float(np.concatenate(losses).mean())
        if best is not None and loss >= best[0]:
            break
        best = (loss, found[0])
    assert best is not None
    if len(folds) == 1:
        return best[1]
    return _Logistic(features_ND, labels_N, balanced).solved(best[1].penalty)


class _Logistic:
    """Logistic regression on standardised features; the scaling is folded into the solution."""

    def __init__(self, features_ND: Features, labels_N: Labels, balanced: bool) -> None:
        from sklearn.linear_model import LogisticRegression

        self.mean, std = features_ND.mean(axis=0), features_ND.std(axis=0)
        self.std = np.where(std > 1e-6, std, 1.0)  # a dead feature stays out of it
        self.standardised = ((features_ND - self.mean) / self.std).astype(np.float64)
        self.labels = labels_N
        weight = "balanced" if balanced else None
        self.model = LogisticRegression(
            max_iter=MOST_ITERATIONS, class_weight=weight, warm_start=True
        )

    def solved(self, penalty: float) -> Solution:
        from sklearn.exceptions import ConvergenceWarning

        self.model.set_params(C=1 / penalty)
        with warnings.catch_warnings():
            # Separable classes under a weak penalty converge slowly, and validation rejects them.
            warnings.simplefilter("ignore", ConvergenceWarning)
            self.model.fit(self.standardised, self.labels)
        weight, bias = self.model.coef_, self.model.intercept_
        if len(weight) == 1:  # scikit-learn keeps one row for two classes
            weight, bias = np.vstack([-weight, weight]) / 2, np.hstack([-bias, bias]) / 2
        weight = weight / self.std
        return Solution(weight, bias - weight @ self.mean, penalty)


@dataclass(frozen=True)
class Probe:
    """What frozen features say of a dataset when nothing is trained but a ridge head on them.

    Attributes:
        solution: The head, on all images.
        logits_NK: Of each image, by a head that has not seen it or its group.
        loss: Their negative log-likelihood at the best temperature.
        balanced_accuracy: Theirs.
        std_error: Of that, over independent images.
        knn: Balanced accuracy of the nearest neighbours, likewise.
        effective_rank: How many directions the features use.
    """

    solution: Solution
    logits_NK: NDArray[np.float32]
    loss: float
    balanced_accuracy: float
    std_error: float
    knn: float
    effective_rank: float

    def told(self) -> str:
        """Returns the probe for people."""
        return (
            f"images left out in turn: loss {self.loss:.3f}, balanced accuracy "
            f"{self.balanced_accuracy:.3f} +- {self.std_error:.3f}, nearest neighbours "
            f"{self.knn:.3f}; effective rank {self.effective_rank:.1f}"
        )


@one_thread
def probe(features_ND: Features, labels_N: Labels, groups_N: Labels | None = None) -> Probe:
    """Returns the probe of these features; groups are left out as a whole.

    Args:
        features_ND: Of one stage.
        labels_N: Class indices.
        groups_N: Group index of each image; None: each image is its own.
    """
    groups_N = np.arange(len(labels_N)) if groups_N is None else groups_N
    solution, logits_NK = solve_ridge(features_ND, labels_N, groups_N)
    loss = calibrated_loss(logits_NK, labels_N, fit_temperature(logits_NK, labels_N))
    accuracy = balanced(logits_NK.argmax(axis=1), labels_N)
    return Probe(
        solution,
        logits_NK,
        loss,
        accuracy,
        (accuracy * (1 - accuracy) / len(labels_N)) ** 0.5,
        _neighbours(features_ND, labels_N, groups_N),
        effective_rank(features_ND),
    )


@one_thread
def solve_ridge(
    features_ND: Features, labels_N: Labels, groups_N: Labels
) -> tuple[Solution, NDArray[np.float32]]:
    """Returns ridge regression on one-hot targets, and the logits of each left-out group.

    One eigendecomposition serves every penalty, in the smaller of both dimensions; the penalty is
    the one with the least leave-one-group-out error. Both are scaled by the temperature of the
    left-out logits, so that their softmax are probabilities.

    Source: Hastie, Tibshirani and Friedman 2009, 3.4.1 and 7.10 (leave-one-out in closed form).
    """
    wide_ND = features_ND.astype(np.float64)
    mean, std = wide_ND.mean(axis=0), wide_ND.std(axis=0)
    std = np.where(std > 1e-6, std, 1.0)  # a dead feature stays out of it
    x_ND = (wide_ND - mean) / std
    targets_NK = np.eye(int(labels_N.max()) + 1)[labels_N] * 2 - 1
    offset_K = targets_NK.mean(axis=0)
    number, width = x_ND.shape
    if width <= number:
        values, directions = np.linalg.eigh(x_ND.T @ x_ND)
        values = np.maximum(values, 1e-9)
        left = x_ND @ (directions / np.sqrt(values))
    else:
        values, left = np.linalg.eigh(x_ND @ x_ND.T)
        values = np.maximum(values, 1e-9)
    centred = left.T @ (targets_NK - offset_K)
    members = _members(groups_N)
    best: tuple[float, float, NDArray[np.float64]] | None = None
    for penalty in RIDGE_PENALTIES * number:
        shrunk = values / (values + penalty)
        residuals = targets_NK - offset_K - left @ (shrunk[:, None] * centred)
        left_out = targets_NK - _left_out(residuals, left * np.sqrt(shrunk), members)
        error = float(((left_out - targets_NK) ** 2).mean())
        if best is None or error < best[0]:
            best = (error, penalty, left_out)
    assert best is not None
    _, penalty, left_out = best
    weight_DK = x_ND.T @ (left @ (centred / (values + penalty)[:, None]))
    logits_NK = left_out.astype(np.float32)
    scale = 1 / fit_temperature(logits_NK, labels_N)
    weight_KD = scale * (weight_DK / std[:, None]).T
    solution = Solution(weight_KD, scale * offset_K - weight_KD @ mean, penalty)
    return solution, (scale * logits_NK).astype(np.float32)


def _left_out(
    residuals_NK: NDArray[np.float64], half_NR: NDArray[np.float64], members: Sequence[Labels]
) -> NDArray[np.float64]:
    """Returns the residuals of each group under the fit without it: (1 - H_gg)^-1 r_g."""
    number = len(residuals_NK)
    leverages = (half_NR**2).sum(axis=1) + 1 / number
    found: NDArray[np.float64] = residuals_NK / np.maximum(1 - leverages, 1e-9)[:, None]
    for rows in members:
        hat = half_NR[rows] @ half_NR[rows].T + 1 / number
        found[rows] = np.linalg.solve(np.eye(len(rows)) * (1 + 1e-9) - hat, residuals_NK[rows])
    return found


def _members(groups_N: Labels) -> list[Labels]:
    """Returns the rows of each group of several images."""
    order = np.argsort(groups_N, kind="stable")
    starts = np.flatnonzero(np.diff(groups_N[order])) + 1
    return [rows for rows in np.split(order, starts) if len(rows) > 1]


def _neighbours(features_ND: Features, labels_N: Labels, groups_N: Labels) -> float:
    """Returns the balanced accuracy of the best number of nearest neighbours, groups left out.

    Cosine similarity. Source: the most dependable cheap score in arXiv:2503.18528.
    """
    chosen = np.random.default_rng(0).permutation(len(labels_N))[:MOST_NEIGHBOURED]
    unit_ND = features_ND[chosen] / np.maximum(
        np.linalg.norm(features_ND[chosen], axis=1, keepdims=True), 1e-12
    )
    similar_NN = unit_ND @ unit_ND.T
    similar_NN[groups_N[chosen][:, None] == groups_N[chosen][None, :]] = -np.inf
    nearest_NN = np.argsort(-similar_NN, axis=1)[:, : max(NEIGHBOURS)]
    votes = np.eye(int(labels_N.max()) + 1)[labels_N[chosen][nearest_NN]]
    found = [votes[:, :k].sum(axis=1).argmax(axis=1) for k in NEIGHBOURS if k < len(chosen)]
    return max(balanced(each, labels_N[chosen]) for each in found)


def balanced(predicted_N: Labels, labels_N: Labels) -> float:
    """Returns the mean share of hits over the classes shown."""
    right = predicted_N == labels_N
    return float(np.mean([right[labels_N == label].mean() for label in np.unique(labels_N)]))


@one_thread
def effective_rank(features_ND: Features) -> float:
    """Returns the exponential of the entropy of the normalised singular values.

    Source: Roy and Vetterli 2007, "The effective rank", EUSIPCO.
    """
    wide_ND = features_ND.astype(np.float64)
    centred = wide_ND - wide_ND.mean(axis=0)
    tall = centred if len(centred) >= centred.shape[1] else centred.T
    singular = np.sqrt(np.maximum(np.linalg.eigvalsh(tall.T @ tall), 0))
    share = singular[singular > 0] / singular.sum() if singular.sum() > 0 else np.ones(1)
    return float(np.exp(-(share * np.log(share)).sum()))
