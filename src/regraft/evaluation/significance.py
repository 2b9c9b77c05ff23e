"""How sure a difference is: its variance over seeds and images, and the classical tests.

S seeds, N test images, B blocks of images, C clusters, R rows of weights; P positive and Q negative
images.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from regraft.evaluation.metrics import CHUNK, SEED, Array, known_truth
from regraft.evaluation.predictions import Predictions

MOST_BLOCKS = 300  # a t of 299 degrees is 0.4 % wider than the normal; bounds time and memory
LEAST_SIGN_FLIPS = 6  # of fewer seeds no p-value falls below 0.05: 2 / 2^5 = 0.06
ROUNDING = 1e-9  # a spread below it is what float64 leaves of none; assumed


@dataclass(frozen=True)
class Spread:
    """How far a mean difference would vary.

    Attributes:
        std_error: Over another training and another test set alike.
        degrees_of_freedom: Of `std_error`.
        error_of_images: Over another test set alone.
    """

    std_error: float
    degrees_of_freedom: float
    error_of_images: float

    @property
    def half_width(self) -> float:
        """Half of the 95 % interval."""
        from scipy.special import stdtrit

        return float(stdtrit(self.degrees_of_freedom, 0.975)) * self.std_error


def blocks_of(predictions: Predictions) -> NDArray[np.int64]:
    """Returns N indices of blocks: what the jackknife leaves out together.

    A block is a whole group; without groups, an image. More than MOST_BLOCKS are dealt out at
    random into so many; images without groups class by class, so that each block has its share.
    """
    truth = known_truth(predictions)
    if predictions.groups is None:
        cluster_N, stratum_C = np.arange(len(truth)), truth
    else:
        names, cluster_N = np.unique(np.array(predictions.groups), return_inverse=True)
        stratum_C = np.zeros(len(names), np.int64)
    clusters = len(stratum_C)
    if clusters <= MOST_BLOCKS:
        return cluster_N
    order = np.lexsort((np.random.default_rng(SEED).random(clusters), stratum_C))
    block_C = np.empty(clusters, np.int64)
    block_C[order] = np.arange(clusters) % MOST_BLOCKS
    return block_C[cluster_N]


def jackknife(
    differences: Callable[[Array], Array], block_N: NDArray[np.int64]
) -> tuple[Array, Array]:
    """Returns the S differences on all images, and their SxB pseudo-values.

    A pseudo-value tells what its block adds to the difference, so any metric can be treated like a
    mean over images. A block counts by what it moves: blocks of unequal size need no weights. The
    rows are centred on the plain differences, since the jackknife's correction of their bias would
    add noise. NaN where the metric is not defined without the block.

    Args:
        differences: From weights_RN to the SxR differences.
        block_N: See `blocks_of`.

    Source: Dorfman, Berbaum and Metz 1992, Invest. Radiol. 27:723 (readers in place of seeds).
    """
    plain_S = differences(np.ones((1, len(block_N))))[:, 0]
    blocks = int(block_N.max()) + 1
    if blocks == 1:  # nothing is left without it
        return plain_S, np.full((len(plain_S), 1), np.nan)
    chunks = np.split(np.arange(blocks), range(CHUNK, blocks, CHUNK))
    without_SB = np.concatenate(
        [differences((chunk[:, None] != block_N).astype(np.float64)) for chunk in chunks], axis=1
    )
    moved_SB = without_SB.mean(axis=1, keepdims=True) - without_SB
    return plain_S, plain_S[:, None] + (blocks - 1) * moved_SB


def effective_number(block_N: NDArray[np.int64]) -> float:
    """Returns how many blocks of equal size know as much as these: at most B.

    Source: Kish 1965, Survey Sampling (the loss by unequal weights).
    """
    sizes = np.bincount(block_N)
    return float(sizes.sum() ** 2 / (sizes**2).sum())


def spread_of(table_SB: Array, blocks: float) -> Spread:
    """Returns the spread of the table's mean where seeds and blocks are both drawn at random.

    A value is the mean + its seed's effect + its block's effect + the rest, each with a variance
    of its own. One seed says nothing of the next: its spread is that of images alone. NaN where
    a pseudo-value is: the block holds all of a class, and how such blocks vary cannot be known.

    Args:
        table_SB: Pseudo-values.
        blocks: Their effective number, for the degrees of freedom.

    Source: Satterthwaite 1946, doi:10.2307/3002019; as in Hillis 2007, doi:10.1002/sim.2532.
    """
    if np.isnan(table_SB).any():
        return Spread(np.nan, np.nan, np.nan)
    (seeds, columns), mean = table_SB.shape, table_SB.mean()
    mean_S, mean_B = table_SB.mean(axis=1), table_SB.mean(axis=0)
    # Mean squares of a two-way table without replication.
    of_images = float(seeds * mean_B.var(ddof=1))
    error_of_images = (of_images / table_SB.size) ** 0.5
    if seeds == 1:
        return Spread(error_of_images, blocks - 1, error_of_images)
    of_seeds = float(columns * mean_S.var(ddof=1))
    rest_SB = table_SB - mean_S[:, None] - mean_B + mean
    of_rest = float((rest_SB**2).sum()) / ((seeds - 1) * (columns - 1))
    squares = of_seeds, of_images, of_rest
    freedom = seeds - 1, blocks - 1, (seeds - 1) * (blocks - 1)
    # The sum is the unbiased estimate, but falls to nothing and below by chance: three seeds may
    # agree. No mean square is expected above the truth, so the largest is the least to believe.
    total = max(of_seeds + of_images - of_rest, *squares)
    # Satterthwaite's degrees come out too many just when few seeds agree by chance. The factor
    # (n + 2) / n is measured: 95 % intervals cover in 94.5 % at least, without it in 92.4 %
    # (docs/decisions/0007). A sum has no fewer degrees than its scarcest part.
    doubt = sum(m**2 * (n + 2) / n**2 for m, n in zip(squares, freedom, strict=True))
    degrees = max(min(freedom), total**2 / doubt if doubt > 0 else 0.0)
    return Spread((total / table_SB.size) ** 0.5, degrees, error_of_images)


def mcnemar_p(ours: Predictions, theirs: Predictions) -> float:
    """Returns the two-sided mid-p-value that both are right equally often.

    Source: Fagerland, Lydersen and Laake 2013, doi:10.1186/1471-2288-13-91.
    """
    from scipy.stats import binom

    right, other = (arm.predicted == known_truth(arm) for arm in (ours, theirs))
    wins, losses = int((right & ~other).sum()), int((other & ~right).sum())
    tail = binom.cdf(min(wins, losses), wins + losses, 0.5)
    return min(1.0, float(2 * tail - binom.pmf(wins, wins + losses, 0.5)))


def delong_p(ours: Predictions, theirs: Predictions) -> float | None:
    """Returns the two-sided p-value that both of two classes' AUROC are equal.

    None where it cannot be known: a class has one image, or the difference no spread.

    Source: DeLong et al. 1988, doi:10.2307/2531595, by ranks as in Sun and Xu 2014,
        doi:10.1109/LSP.2014.2337313.
    """
    from scipy.stats import norm

    is_positive = known_truth(ours) == 1
    if min(is_positive.sum(), (~is_positive).sum()) < 2:
        return None
    (ours_P, ours_Q), (theirs_P, theirs_Q) = (
        _placements(arm.probabilities[:, 1], is_positive) for arm in (ours, theirs)
    )
    difference_P, difference_Q = ours_P - theirs_P, ours_Q - theirs_Q
    variance = sum(values.var(ddof=1) / len(values) for values in (difference_P, difference_Q))
    error = float(variance) ** 0.5
    return float(2 * norm.sf(abs(difference_P.mean()) / error)) if error > ROUNDING else None


def _placements(scores_N: Array, is_positive: NDArray[np.bool_]) -> tuple[Array, Array]:
    """Returns P shares of negatives below each positive, Q of positives above each negative."""
    from scipy.stats import rankdata

    ranks_N = rankdata(scores_N)  # ties share their mean rank
    ranks_P, ranks_Q = (rankdata(scores_N[own]) for own in (is_positive, ~is_positive))
    below_P = (ranks_N[is_positive] - ranks_P) / len(ranks_Q)
    above_Q = 1 - (ranks_N[~is_positive] - ranks_Q) / len(ranks_P)
    return below_P, above_Q


def sign_flip_p(per_seed: Sequence[float]) -> float | None:
    """Returns the exact two-sided p-value that each seed's difference might as well be reversed.

    None with fewer than LEAST_SIGN_FLIPS seeds, or where a difference is NaN. Above 16 seeds a
    sample of the 2^S reversals.
    """
    from scipy.stats import permutation_test

    if len(per_seed) < LEAST_SIGN_FLIPS or np.isnan(per_seed).any():
        return None
    found = permutation_test(
        (np.array(per_seed),),
        np.mean,
        permutation_type="samples",
        n_resamples=2**16,
        vectorized=True,
        rng=SEED,
    )
    return float(found.pvalue)
