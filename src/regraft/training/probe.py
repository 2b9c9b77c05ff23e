"""Probes: a head solved on frozen features, and what that says about the features.

N images, D features, K classes.
"""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from regraft.evaluation.metrics import log_losses
from regraft.evaluation.predictions import softmax
from regraft.models.head import Head

Features = NDArray[np.float32]
Labels = NDArray[np.int64]
# Inverse strengths of the L2 penalty on standardised features; a wide grid, assumed.
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
MOST_ITERATIONS = 500


@dataclass(frozen=True)
class Solution:
    """A linear head: logits_NK = features_ND @ weight.T + bias."""

    weight: NDArray[np.float64]
    bias: NDArray[np.float64]
    strength: float

    def logits(self, features_ND: Features) -> NDArray[np.float32]:
        return (features_ND @ self.weight.T + self.bias).astype(np.float32)

    def copy_to(self, head: Head) -> None:
        with torch.no_grad():
            head.weight.copy_(torch.from_numpy(self.weight))
            head.bias.copy_(torch.from_numpy(self.bias))


def solve_head(
    features_ND: Features,
    labels_N: Labels,
    val_features: Features,
    val_labels: Labels,
    *,
    balanced: bool = False,
) -> Solution:
    """Returns the logistic regression with the penalty that is best on validation.

    Features are standardised by the training images, and the scaling is folded into the weights,
    so the solution works on plain features. Solved by L-BFGS to convergence (scikit-learn), from
    the strongest penalty on, each from the one before, until validation gets worse.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    mean, std = features_ND.mean(axis=0), features_ND.std(axis=0)
    std = np.where(std > 1e-6, std, 1.0)  # a dead feature stays out of it
    standardised = ((features_ND - mean) / std).astype(np.float64)
    best: tuple[float, Solution] | None = None
    model = LogisticRegression(
        max_iter=MOST_ITERATIONS,
        class_weight="balanced" if balanced else None,
        warm_start=True,
    )
    for strength in STRENGTHS:
        model.set_params(C=strength)
        with warnings.catch_warnings():
            # Separable classes under a weak penalty converge slowly, and validation rejects them.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(standardised, labels_N)
        weight, bias = model.coef_, model.intercept_
        if len(weight) == 1:  # scikit-learn keeps one row for two classes
            weight, bias = np.vstack([-weight, weight]) / 2, np.hstack([-bias, bias]) / 2
        weight = weight / std
        found = Solution(weight, bias - weight @ mean, strength)
        loss = float(log_losses(softmax(found.logits(val_features)), val_labels).mean())
        if best is not None and loss >= best[0]:
            break
        best = (loss, found)
    assert best is not None
    return best[1]
