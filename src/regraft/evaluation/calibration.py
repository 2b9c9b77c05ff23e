"""What held-out images teach of a Classifier: a temperature that makes probabilities mean what they
say, thresholds that keep to an error rate, and the distance at which an image is unfamiliar.

N images, K classes, D features, M remembered images.
"""

from math import ceil, log

import numpy as np
from numpy.typing import NDArray

from regraft.evaluation.metrics import log_losses
from regraft.evaluation.predictions import softmax
from regraft.models.doubt import Band, Doubt, distances, unit

LEAST_IMAGES = 100  # assumed: fewer held-out images fit noise
WIDEST = 20.0  # a temperature lies between its inverse and this; assumed
RATES = (0.01, 0.02, 0.05, 0.1, 0.2)  # errors among answered images that can be asked for
CONFIDENCE = 0.95
SHARES = 10  # thresholds that are tried: those that answer 10 %, 20 %, ... of the images
UNFAMILIAR_RATE = 0.05  # of familiar images; as Sun et al. 2022, arXiv:2204.06507
NEIGHBOURS = 5  # assumed; they use 1 % of the images remembered
MOST_REMEMBERED = 1000  # training images: 2 MB of ResNet-18's features; assumed


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


def least_loss(num_images: int, num_classes: int) -> float:
    """Returns the `calibrated_loss` where all images are right beyond doubt."""
    share = 1 / (num_images + 1)
    return -log(1 - share + share / num_classes)


def doubt_of(
    remembered_MD: NDArray[np.float32],
    features_ND: NDArray[np.float32],
    probabilities_NK: NDArray[np.float64],
    truth_N: NDArray[np.int64],
) -> Doubt:
    """Returns what independent validation images tell.

    Args:
        remembered_MD: Features of training images.
        features_ND: Of the validation images.
        probabilities_NK: Likewise.
        truth_N: Their classes.
    """
    remembered_MD = unit(remembered_MD)
    return Doubt(
        num_images=len(truth_N),
        confidence=CONFIDENCE,
        bands=bands(probabilities_NK, truth_N),
        neighbours=NEIGHBOURS,
        distance=usual_distance(distances(features_ND, remembered_MD, NEIGHBOURS)),
        unfamiliar_rate=UNFAMILIAR_RATE,
        remembered=remembered_MD,
    )


def bands(probabilities_NK: NDArray[np.float64], truth_N: NDArray[np.int64]) -> tuple[Band, ...]:
    """Returns for each error rate the threshold that answers most and still keeps to it.

    A threshold keeps to a rate if so few errors above it would be rarer than 5 % at that rate,
    shared out over all thresholds tried. Rates of which so few images tell nothing are left out.

    Source: Geifman and El-Yaniv 2017, arXiv:1705.08500, with fixed shares in place of a search.
    """
    from scipy.stats import binom

    surest_N = probabilities_NK.max(axis=1)
    right_N = probabilities_NK.argmax(axis=1) == truth_N
    number, chance = len(truth_N), (1 - CONFIDENCE) / SHARES
    descending = np.sort(surest_N)[::-1]
    found = []
    for rate in RATES:
        if (1 - rate) ** number > chance:  # not even without any error
            continue
        band = Band(error_rate=rate, threshold=None, answered=0.0)
        for share in range(1, SHARES + 1):
            place = ceil(number * share / SHARES)
            # That of the next image: those above it are as new images above it would be.
            threshold = float(descending[place]) if place < number else 0.0
            answered = surest_N > threshold
            errors = int((answered & ~right_N).sum())
            if answered.any() and binom.cdf(errors, answered.sum(), rate) <= chance:
                band = Band(
                    error_rate=rate, threshold=min(threshold, 1.0), answered=float(answered.mean())
                )
        found.append(band)
    return tuple(found)


def usual_distance(distances_N: NDArray[np.float64]) -> float | None:
    """Returns the distance that a new image of the same kind exceeds with the stated chance.

    Source: the rank of split conformal prediction, Papadopoulos et al. 2002; exact for images that
    are drawn alike, so it needs 19.
    """
    rank = ceil((len(distances_N) + 1) * (1 - UNFAMILIAR_RATE))
    return float(np.sort(distances_N)[rank - 1]) if rank <= len(distances_N) else None
