"""Temperature scaling: one number that makes probabilities mean what they say.

N images, K classes.
"""

import numpy as np
from numpy.typing import NDArray

from regraft.evaluation.metrics import log_losses
from regraft.evaluation.predictions import softmax

LEAST_IMAGES = 100  # assumed: fewer held-out images fit noise
WIDEST = 20.0  # a temperature lies between its inverse and this; assumed


def fit_temperature(logits_NK: NDArray[np.float32], labels_N: NDArray[np.int64]) -> float:
    """Returns the temperature by which held-out logits are to be divided.

    Source: Guo et al. 2017, arXiv:1706.04599.
    """
    from scipy.optimize import minimize_scalar

    best = minimize_scalar(
        lambda log_t: calibrated_loss(logits_NK, labels_N, float(np.exp(log_t))),
        bounds=(-np.log(WIDEST), np.log(WIDEST)),
        method="bounded",
    )
    return float(np.exp(best.x))


def calibrated_loss(
    logits_NK: NDArray[np.float32], labels_N: NDArray[np.int64], temperature: float
) -> float:
    """Returns the mean negative log-likelihood at a temperature.

    Probabilities are mixed with 1/(N+1) of the uniform ones: where all N images are right, no
    certainty is taken from that (Laplace's rule).
    """
    probabilities = softmax(logits_NK / np.float32(temperature))
    share = 1 / (len(labels_N) + 1)
    mixed = (1 - share) * probabilities + share / probabilities.shape[1]
    return float(log_losses(mixed, labels_N).mean())
