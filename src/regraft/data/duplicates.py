"""The same picture again: which pictures are altered copies of each other.

Neighbours are looked up in trees over a few principal components of what pictures look like; a
projection only shortens distances, so none is pushed out of reach. What a tree offers is then
compared value by value, once smooth and once with slow changes taken away: pictures that merely
resemble each other (digits, radiographs) agree in the first, copies in both.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
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
from regraft.parallel import map_in_processes, parts

LOW = 8  # lowest frequencies of each axis of a thumb, by which neighbours are looked up
COMPONENTS = 8  # of a tree; measured on 20,000 digits: 15 us a look-up, 3 times that with 12
# A tree may give neighbours that are so much farther than the nearest: four times as fast, and no
# copy of 8,000 altered ones was missed by it (docs/log.md 2026-11-25).
SLACK = 1.0
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
CHUNK = 1024  # pairs compared, or pictures looked up, at once: bounds memory
NOTHING: Rows = np.zeros((0, 2), np.int64)  # no pairs
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
    if len(rows) < 2:
        return _joined([])
    told = on_progress or (lambda _done, _total: None)
    thumbs, discs = _Views(looks.thumbs, rows), _Views(looks.discs, rows)
    tree = _Tree(len(thumbs), _low_frequencies(thumbs), REACH_THUMB)
    cuts = [resampling(SIDE, SIDE, low, 1 - high) for low, high in product(EDGES, EDGES)]

    def crops(down: Floats, across: Floats) -> Rows:
        return _apart(tree.pairs(_low_frequencies(thumbs, down, across), NEAREST_CROPS))

    def whole() -> Rows:
        return _verified(_once(tree.pairs(_blocks(tree.vectors))), thumbs, _plain)

    def fitted(part: range) -> Rows:
        return _verified(asked[part.start : part.stop], thumbs, _cropped)

    look_ups: list[Callable[[], Rows]] = [partial(crops, *cut) for cut in product(cuts, cuts)]
    look_ups += [whole, partial(_turned_pairs, discs)]
    looked: list[Rows] = []
    steps = len(look_ups) + 1
    for pairs in map_in_processes(_called, look_ups, _called):
        looked.append(pairs)
        told(len(looked), steps)
    *cropped, plain, turned = looked
    asked = np.unique(np.concatenate(cropped), axis=0)  # many crops find the same
    crops_found = map_in_processes(fitted, parts(len(asked), CHUNK), fitted)
    found = [(plain, "plain"), (np.concatenate([NOTHING, *crops_found]), "cropped")]
    found += [(turned, "turned"), (_bridges(discs, found), "turned")]
    told(steps, steps)
    return _joined([(rows[pairs], how) for pairs, how in found])


def _called(look_up: Callable[[], Rows]) -> Rows:
    return look_up()


class _Views:
    """Thumbs or discs of some rows, as floats, a part at a time: all at once would be gigabytes."""

    def __init__(self, array: NDArray[np.uint8], rows: Rows) -> None:
        self.array, self.rows = array, rows

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, places: Rows) -> Floats:
        return self.array[self.rows[places]].astype(np.float32)

    def blocks(self) -> Iterator[Floats]:
        for places in _blocks(np.arange(len(self.rows))):
            yield self.take(places)


def _blocks(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    for start in range(0, len(array), CHUNK):
        yield array[start : start + CHUNK]


def _turned_pairs(discs: _Views) -> Rows:
    tree = _Tree(len(discs), _ring_strengths(discs), REACH_DISC)
    return _verified(_once(tree.pairs(_blocks(tree.vectors))), discs, _turned)


def _bridges(discs: _Views, found: list[tuple[Rows, str]]) -> Rows:
    """Returns pairs between groups so large that all neighbours of a picture may lie in its own."""
    first, second = np.concatenate([pairs for pairs, _ in found]).T
    groups = joined_groups(len(discs), first, second)
    members = np.flatnonzero(np.bincount(groups)[groups] > NEAREST)
    chosen = members[np.unique(groups[members], return_index=True)[1]]
    if len(chosen) < 2:
        return NOTHING
    return np.asarray(chosen[_turned_pairs(_Views(discs.array, discs.rows[chosen]))])


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
    vectors = (_unit(hashes[rows].astype(np.float32)) for rows in _blocks(known))
    tree = _Tree(len(known), vectors, REACH_HASH)
    found: list[tuple[Rows, str]] = []
    for rows in _blocks(asked):
        for number, turned in enumerate(orientations(hashes[rows].astype(np.float32))):
            own, others = tree.pairs([_unit(turned)]).T
            pairs = _once(np.stack([rows[own], known[others]], axis=1))
            found.append((pairs, "turned" if number else "plain"))
    return _joined(found)


class _Tree:
    """Unit vectors, given in blocks, found by their principal components."""

    def __init__(self, number: int, blocks: Iterable[Floats], reach: float) -> None:
        from scipy.spatial import cKDTree

        done, self.reach = 0, reach
        for block in blocks:  # into their place at once: joined blocks would be there twice
            if not done:
                self.vectors = np.empty((number, block.shape[1]), np.float32)
            self.vectors[done : done + len(block)] = block
            done += len(block)
        self.mean = self.vectors.mean(axis=0)
        spread = self.vectors.T @ self.vectors - len(self.vectors) * np.outer(self.mean, self.mean)
        self.axes = np.linalg.eigh(spread)[1][:, -COMPONENTS:].astype(np.float32)
        self.tree = cKDTree(self._points(self.vectors), leafsize=LEAF)

    def pairs(self, blocks: Iterable[Floats], most: int = NEAREST) -> Rows:
        """Returns (query, neighbour) of the nearest within reach, itself among them."""
        nearest = min(most + 1, len(self.vectors))
        near, start = [NOTHING], 0
        for queries in blocks:
            points = self._points(queries)
            found = self.tree.query(points, nearest, SLACK, distance_upper_bound=self.reach)[1]
            asked, place = np.nonzero(found < len(self.vectors))
            others = found[asked, place]
            apart = np.linalg.norm(queries[asked] - self.vectors[others], axis=1)
            pairs = np.stack([start + asked, others], axis=1)
            near.append(pairs[apart <= self.reach])
            start += len(queries)
        return np.concatenate(near)

    def _points(self, vectors: Floats) -> Floats:
        return np.asarray(vectors @ self.axes - self.mean @ self.axes)


def _apart(pairs: Rows) -> Rows:
    """Returns the pairs of different rows."""
    return np.asarray(pairs[pairs[:, 0] != pairs[:, 1]])


def _once(pairs: Rows) -> Rows:
    """Returns each pair of different rows once, the smaller position first."""
    return np.unique(np.sort(_apart(pairs), axis=1), axis=0)


def _low_frequencies(
    thumbs: _Views, down: Floats | None = None, across: Floats | None = None
) -> Iterator[Floats]:
    """Yields unit vectors of the lowest frequencies (DCT), of crops where these are given."""
    waves = cosines(LOW)
    rows = waves if down is None else waves @ down
    columns = waves if across is None else waves @ across
    for block in thumbs.blocks():
        frequencies = (rows @ block @ columns.T).reshape(-1, LOW**2)
        yield _unit(frequencies[:, 1:])  # without the mean: brightness is no content


def _ring_strengths(discs: _Views) -> Iterator[Floats]:
    """Yields how strong each frequency is along each ring, which no turn and no mirror changes."""
    turns = np.outer(np.arange(ANGLES), np.arange(LOW)) * (2 * np.pi / ANGLES)
    real, imaginary = np.cos(turns).astype(np.float32), np.sin(turns).astype(np.float32)
    for block in discs.blocks():
        weighted = _weighted(block)  # of few frequencies a product is faster than the FFT of all
        strengths = np.hypot(weighted @ real, weighted @ imaginary)
        yield _unit(strengths.reshape(len(strengths), -1))


def _spectra(discs: Floats) -> NDArray[Any]:
    """Returns the frequencies along each ring."""
    spectra: NDArray[Any] = np.fft.rfft(_weighted(discs), axis=2)
    return spectra.astype(np.complex64)


def _weighted(discs: Floats) -> Floats:
    """Returns discs of mean 0 and size 1; outer rings weigh more, as they are longer."""
    weight = np.sqrt((np.arange(RINGS) + 0.5) / (RINGS**2 / 2) / ANGLES)[:, None].astype(np.float32)
    mean = (discs * weight**2).sum(axis=(1, 2), keepdims=True)
    weighted = (discs - mean) * weight
    size = np.sqrt((weighted**2).sum(axis=(1, 2), keepdims=True))
    return np.asarray(weighted / np.maximum(size, 1e-6))


def _verified(
    pairs: Rows,
    views: _Views,
    compare: Callable[[Floats, Floats], NDArray[np.bool_]],
) -> Rows:
    kept = [NOTHING]
    for start in range(0, len(pairs), CHUNK):
        chunk = pairs[start : start + CHUNK]
        first, second = (views.take(chunk[:, side]) for side in (0, 1))
        kept.append(chunk[compare(first, second)])
    return np.sort(np.concatenate(kept), axis=1)


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


def _joined(found: list[tuple[Rows, str]]) -> Pairs:
    """Returns every pair once, under the first name it was found by."""
    names: dict[tuple[int, int], str] = {}
    for pairs, how in found:
        for first, second in pairs.tolist():
            names.setdefault((first, second), how)
    places = np.array(sorted(names), np.int64).reshape(-1, 2)
    how_found = np.array([names[first, second] for first, second in places.tolist()], np.str_)
    return Pairs(places[:, 0], places[:, 1], how_found)
