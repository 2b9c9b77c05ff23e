"""The same picture again: which pictures are altered copies of each other.

Neighbours are looked up in trees over a few principal components of what pictures look like; a
projection only shortens distances, so none is pushed out of reach. What a tree offers is then
compared value by value, once smooth and once with slow changes taken away: pictures that merely
resemble each other (digits, radiographs) agree in the first, copies in both.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regraft.data.looks import (
    ANGLES,
    RINGS,
    SIDE,
    Floats,
    Looks,
    Rows,
    cosines,
    orientations,
    resampling,
)

LOW = 8  # lowest frequencies of each axis of a thumb, by which neighbours are looked up
COMPONENTS = 8  # of a tree; measured on 20,000 digits: 15 us a look-up, 3 times that with 12
LEAF = 32  # points of a leaf of a tree: measured, a seventh faster than 16
NEAREST, NEAREST_CROPS = 6, 2  # neighbours compared of each picture, of each crop; assumed
# Farthest distance of a copy, of unit vectors: measured, 99 % of clothing, X-rays and CIFAR-10
# re-encoded, cropped by up to 5 % at each side or turned (docs/log.md 2026-11-25).
REACH_THUMB, REACH_DISC = 0.36, 0.25
REACH_HASH = 0.2  # correlation 0.98: 95 % of the copies are above, 99 % of Fashion-MNIST below
EDGES = (
    0.0125,
    0.0375,
)  # cut from a side when crops are looked up: none is off by more than 1.25 %
STEPS = (0.0, 0.0125, 0.025, 0.0375, 0.05)  # cut from a side when two pictures are compared
# Least correlation of a copy (smooth, with slow changes taken away), measured likewise: 19 of 20
# copies are above, all pairs of different pictures of clothing and CIFAR-10 below.
LEAST = {"plain": (0.96, 0.965), "cropped": (0.95, 0.98), "turned": (0.92, 0.97)}
CHUNK = 1024  # pairs compared at once: bounds memory
FINER = 4  # angles between those of a disc, when two discs are turned over each other


@dataclass(frozen=True)
class Pairs:
    """Pictures that are copies of each other: positions, the smaller one first, and how."""

    first: Rows
    second: Rows
    how: NDArray[np.str_]

    def __iter__(self) -> Iterator[tuple[int, int, str]]:
        return zip(self.first.tolist(), self.second.tolist(), self.how.tolist(), strict=True)


def near_pairs(
    looks: Looks, chosen: Rows, on_progress: Callable[[int, int], None] | None = None
) -> Pairs:
    """Returns near duplicates: re-encoded, resized, cropped by up to 5 %, turned or mirrored.

    Of many copies of one picture each is paired with some of the others, not with all: groups
    come from joining pairs.

    Args:
        looks: What all pictures look like.
        chosen: The rows to compare.
        on_progress: Told how many of the look-ups are done.
    """
    rows = chosen[~looks.flat[chosen]]
    steps = len(EDGES) ** 4 + 2
    told = on_progress or (lambda _done, _total: None)
    found: list[tuple[Rows, Rows, str]] = []
    if len(rows) < 2:
        return _joined(found)
    thumbs, discs = _Views(looks.thumbs, rows), _Views(looks.discs, rows)
    tree = _Tree(_low_frequencies(thumbs), REACH_THUMB)
    found.append((*_verified(_once(tree.pairs(tree.vectors)), thumbs, _plain), "plain"))
    told(1, steps)
    cuts = [resampling(SIDE, SIDE, low, 1 - high) for low, high in product(EDGES, EDGES)]
    cropped = np.zeros(0, np.int64)  # pairs as one number each: many crops find the same
    for number, (down, across) in enumerate(product(cuts, cuts), start=2):
        one, other = tree.pairs(_low_frequencies(thumbs, down, across), NEAREST_CROPS).T
        cropped = np.union1d(cropped, (one * len(rows) + other)[one != other])
        told(number, steps)
    asked = np.stack(np.divmod(cropped, len(rows)), axis=1)
    found.append((*_verified(asked, thumbs, _cropped), "cropped"))
    found.append((*_turned_pairs(discs), "turned"))
    found.append((*_bridges(discs, found), "turned"))
    told(steps, steps)
    return _joined([(rows[one], rows[other], how) for one, other, how in found])


class _Views:
    """Thumbs or discs of some rows, as floats, a part at a time: all at once would be gigabytes."""

    def __init__(self, array: NDArray[np.uint8], rows: Rows) -> None:
        self.array, self.rows = array, rows

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, places: Rows) -> Floats:
        return self.array[self.rows[places]].astype(np.float32)

    def blocks(self) -> Iterator[Floats]:
        places = np.arange(len(self.rows))
        for start in range(0, len(places), 4 * CHUNK):
            yield self.take(places[start : start + 4 * CHUNK])


def _turned_pairs(discs: _Views) -> tuple[Rows, Rows]:
    tree = _Tree(_ring_strengths(discs), REACH_DISC)
    return _verified(_once(tree.pairs(tree.vectors)), discs, _turned)


def _bridges(discs: _Views, found: list[tuple[Rows, Rows, str]]) -> tuple[Rows, Rows]:
    """Returns pairs between groups so large that all neighbours of a picture may lie in its own."""
    first, second = (np.concatenate([pairs[side] for pairs in found]) for side in (0, 1))
    groups = joined_groups(len(discs), first, second)
    members = np.flatnonzero(np.bincount(groups)[groups] > NEAREST)
    chosen = members[np.unique(groups[members], return_index=True)[1]]
    if len(chosen) < 2:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    one, other = _turned_pairs(_Views(discs.array, discs.rows[chosen]))
    return chosen[one], chosen[other]


def joined_groups(number: int, first: Rows, second: Rows) -> NDArray[np.int64]:
    """Returns the group of each of `number` pictures, where pairs belong together."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ones = np.ones(len(first), np.int8)
    graph = coo_array((ones, (first, second)), shape=(number, number))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)


def near_hashes(hashes: NDArray[np.int8], asked: Rows) -> Pairs:
    """Returns the pairs of near duplicates of the asked rows among all, turned and mirrored too.

    Crops and turns by other angles are for `near_pairs`, which has the pictures.
    """
    shown: NDArray[np.bool_] = np.asarray(hashes.any(axis=1))
    known, asked = np.flatnonzero(shown), asked[shown[asked]]
    if len(known) < 2 or not len(asked):
        return _joined([])
    tree = _Tree(_unit(hashes[known].astype(np.float32)), REACH_HASH)
    found: list[tuple[Rows, Rows, str]] = []
    for number, vectors in enumerate(orientations(hashes[asked].astype(np.float32))):
        rows, others = tree.pairs(_unit(vectors)).T
        first, second = asked[rows], known[others]
        pairs = _once(np.stack([first, second], axis=1))
        found.append((pairs[:, 0], pairs[:, 1], "turned" if number else "plain"))
    return _joined(found)


class _Tree:
    """Unit vectors, found by their principal components."""

    def __init__(self, vectors: Floats, reach: float) -> None:
        from scipy.spatial import cKDTree

        self.vectors, self.reach = vectors, reach
        self.mean = vectors.mean(axis=0)
        centred = vectors - self.mean
        self.axes = np.linalg.eigh(centred.T @ centred)[1][:, -COMPONENTS:].astype(np.float32)
        self.tree = cKDTree(centred @ self.axes, leafsize=LEAF)

    def pairs(self, queries: Floats, most: int = NEAREST) -> Rows:
        """Returns (query, neighbour) of the nearest within reach, itself among them."""
        nearest = min(most + 1, len(self.vectors))
        points = (queries - self.mean) @ self.axes
        found = self.tree.query(points, k=nearest, distance_upper_bound=self.reach, workers=-1)[1]
        asked = np.repeat(np.arange(len(queries)), nearest)
        pairs = np.stack([asked, found.ravel()], axis=1)
        pairs = pairs[pairs[:, 1] < len(self.vectors)]
        near = [np.zeros(0, np.bool_)]
        for start in range(0, len(pairs), 8 * CHUNK):
            one, other = pairs[start : start + 8 * CHUNK].T
            apart = np.linalg.norm(queries[one] - self.vectors[other], axis=1)
            near.append(apart <= self.reach)
        chosen: Rows = pairs[np.concatenate(near)]
        return chosen


def _once(pairs: Rows) -> Rows:
    """Returns each pair of different rows once, the smaller position first."""
    apart = np.asarray(pairs[:, 0] != pairs[:, 1])
    return np.unique(np.sort(pairs[apart], axis=1), axis=0)


def _low_frequencies(
    thumbs: _Views, down: Floats | None = None, across: Floats | None = None
) -> Floats:
    """Returns unit vectors of the lowest frequencies (DCT), of crops where these are given."""
    waves = cosines(LOW)
    rows = waves if down is None else waves @ down
    columns = waves if across is None else waves @ across
    parts = [(rows @ block @ columns.T).reshape(-1, LOW**2) for block in thumbs.blocks()]
    return _unit(np.concatenate(parts)[:, 1:])  # without the mean: brightness is no content


def _ring_strengths(discs: _Views) -> Floats:
    """Returns how strong each frequency is along each ring, which no turn and no mirror changes."""
    parts = []
    for block in discs.blocks():
        strengths = np.abs(_spectra(block)[..., :LOW])
        parts.append(strengths.reshape(len(strengths), -1).astype(np.float32))
    return _unit(np.concatenate(parts))


def _spectra(discs: Floats) -> NDArray[Any]:
    """Returns the frequencies along each ring; outer rings weigh more, as they are longer."""
    weight = np.sqrt((np.arange(RINGS) + 0.5) / (RINGS**2 / 2) / ANGLES)[:, None].astype(np.float32)
    mean = (discs * weight**2).sum(axis=(1, 2), keepdims=True)
    weighted = (discs - mean) * weight
    size = np.sqrt((weighted**2).sum(axis=(1, 2), keepdims=True))
    spectra: NDArray[Any] = np.fft.rfft(weighted / np.maximum(size, 1e-6), axis=2)
    return spectra.astype(np.complex64)


def _verified(
    pairs: Rows,
    views: _Views,
    compare: Callable[[Floats, Floats], NDArray[np.bool_]],
) -> tuple[Rows, Rows]:
    kept = [np.zeros((0, 2), np.int64)]
    for start in range(0, len(pairs), CHUNK):
        chunk = pairs[start : start + CHUNK]
        first, second = (views.take(chunk[:, side]) for side in (0, 1))
        kept.append(chunk[compare(first, second)])
    found = np.sort(np.concatenate(kept), axis=1)
    return found[:, 0], found[:, 1]


def _plain(first: Floats, second: Floats) -> NDArray[np.bool_]:
    return _enough(_agreement(first, second), _agreement(_sharp(first), _sharp(second)), "plain")


def _cropped(first: Floats, second: Floats) -> NDArray[np.bool_]:
    """Whether a crop of the first is the second: both axes are fitted in turn, from the middle."""
    cuts = np.stack([resampling(SIDE, SIDE, low, 1 - high) for low, high in product(STEPS, STEPS)])
    first = first - first.mean(axis=(1, 2), keepdims=True)
    target = _unit(second.reshape(len(second), -1), centre=True).reshape(second.shape)
    down = cuts[np.full(len(first), len(cuts) // 2)]
    for _ in range(2):
        across = _best_cut(cuts, down @ first, target)
        turned = (first @ across.transpose(0, 2, 1)).transpose(0, 2, 1)
        down = _best_cut(cuts, turned, target.transpose(0, 2, 1))
    fitted = down @ first @ across.transpose(0, 2, 1)
    smooth, sharp = _agreement(fitted, second), _agreement(_sharp(fitted), _sharp(second))
    return _enough(smooth, sharp, "cropped")


def _best_cut(cuts: Floats, views: Floats, targets: Floats) -> Floats:
    """Returns the cut of the last axis after which each view agrees best with its unit target.

    Scalar products and norms of all cuts come from small products of the view with the target and
    with itself: 25 cuts cost little more than one.
    """
    number = len(views)
    crossed = (targets.transpose(0, 2, 1) @ views).reshape(number, -1)
    squared = (views.transpose(0, 2, 1) @ views).reshape(number, -1)
    products = crossed @ cuts.reshape(len(cuts), -1).T
    norms = squared @ (cuts.transpose(0, 2, 1) @ cuts).reshape(len(cuts), -1).T
    sums = views.sum(axis=1) @ cuts.sum(axis=1).T
    spread = np.sqrt(np.maximum(norms - sums**2 / SIDE**2, 1e-6))
    best: Floats = cuts[(products / spread).argmax(axis=1)]
    return best


def _turned(first: Floats, second: Floats) -> NDArray[np.bool_]:
    smooth = _best_turn(_spectra(first), _spectra(second))
    sharp = _best_turn(_spectra(_sharp_rings(first)), _spectra(_sharp_rings(second)))
    return _enough(smooth, sharp, "turned")


def _best_turn(first: NDArray[Any], second: NDArray[Any]) -> Floats:
    """Returns the correlation at the best angle, mirrored or not."""
    best = [
        FINER * np.fft.irfft((first * other).sum(axis=1), FINER * ANGLES, axis=1).max(axis=1)
        for other in (second.conj(), second)
    ]
    return np.asarray(np.maximum(*best))


def _enough(smooth: Floats, sharp: Floats, how: str) -> NDArray[np.bool_]:
    return (smooth >= LEAST[how][0]) & (sharp >= LEAST[how][1])


def _agreement(first: Floats, second: Floats) -> Floats:
    """Returns the correlation over the last two axes."""
    one, other = (
        _unit(view.reshape(*view.shape[:-2], -1), centre=True) for view in (first, second)
    )
    correlation: Floats = (one * other).sum(axis=-1)
    return correlation


def _unit(vectors: Floats, *, centre: bool = False) -> Floats:
    if centre:
        vectors = vectors - vectors.mean(axis=-1, keepdims=True)
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    unit: Floats = vectors / np.maximum(norms, 1e-6)
    return unit


def _sharp(thumbs: Floats) -> Floats:
    fine, coarse = _blurs()
    sharp: Floats = fine @ thumbs @ fine.T - coarse @ thumbs @ coarse.T
    return sharp


@lru_cache(maxsize=1)
def _blurs() -> tuple[Floats, Floats]:
    from scipy.ndimage import gaussian_filter1d

    eye = np.eye(SIDE)  # 0.7 px: JPEG blocks and noise; 3 px: what resembling pictures share
    fine, coarse = (gaussian_filter1d(eye, sigma, axis=0).astype(np.float32) for sigma in (0.7, 3))
    return fine, coarse


def _sharp_rings(discs: Floats) -> Floats:
    from scipy.ndimage import gaussian_filter1d

    def blurred(rings: float, angles: float) -> Floats:
        along: Floats = gaussian_filter1d(discs, angles, axis=2, mode="wrap")
        across: Floats = gaussian_filter1d(along, rings, axis=1)
        return across

    return blurred(0.6, 1) - blurred(2, 5)  # the first hides how a turned copy was interpolated


def _joined(found: list[tuple[Rows, Rows, str]]) -> Pairs:
    """Returns every pair once, under the first name it was found by."""
    names: dict[tuple[int, int], str] = {}
    for first, second, how in found:
        for pair in zip(first.tolist(), second.tolist(), strict=True):
            names.setdefault(pair, how)
    places = np.array(sorted(names), np.int64).reshape(-1, 2)
    how_found = np.array([names[first, second] for first, second in places.tolist()], np.str_)
    return Pairs(places[:, 0], places[:, 1], how_found)
