"""Findings about classes, and about single images: how many, how large, how bright, how stored.

A shortcut is a trait of the files (format, mode, size, brightness of the border) that tells the
class without looking at the picture: a network learns it first, and fails elsewhere.
"""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regraft.data.finding import ERROR, NOTE, WARNING, FileRef, Finding
from regraft.data.survey import Picture
from regraft.errors import count

LEAST_IMAGES = 5  # of a class, as `opening.MIN_IMAGES`: fewer cannot be split
FEW_IMAGES = 20  # of a class: a test share of 20 % leaves 4; assumed
IMBALANCE = 10.0  # largest class over smallest from which it is told; assumed
# A trait tells classes where it comes this much of the way from chance to certainty; assumed.
SHORTCUT = 0.5
MOST_JUDGED = 5000  # images that shortcuts are judged on, drawn by a fixed seed; assumed ample
FOLDS = 5
SMALL_PX = 32  # a side under that holds few details for any network that is common; assumed
ODD_RATIO = 4.0  # of area or of the sides' ratio, over or under the median; assumed
OUTLIER = 8.0  # robust standard deviations of brightness; assumed, 0 of the shared sets' digits


def trait_findings(
    pictures: Sequence[Picture], flat: Sequence[bool], *, is_split: bool, is_scaled: bool
) -> list[Finding]:
    """Returns the findings about one dataset's classes and images.

    Args:
        pictures: Of one dataset.
        flat: Which of them show nothing.
        is_split: Whether folder or CSV gives the splits.
        is_scaled: Whether the user says which values are black and white.
    """
    return [
        *class_findings(pictures, is_split=is_split),
        *_form_findings(pictures, is_scaled=is_scaled),
        *_size_findings(pictures),
        *_intensity_findings(pictures, flat),
        *_shortcuts(pictures),
    ]


def class_findings(pictures: Sequence[Picture], *, is_split: bool) -> Iterator[Finding]:
    """Yields findings about the names and sizes of the classes."""
    sizes = Counter(one.label for one in pictures)
    if len(sizes) < 2:
        yield Finding(
            "one-class",
            ERROR,
            len(sizes),
            f"there is {f'only the class `{min(sizes)}`' if sizes else 'no class at all'}",
            "a classifier needs at least 2 classes",
        )
        return
    spelling = defaultdict(list)
    for name in sorted(sizes):
        spelling[unicodedata.normalize("NFC", name).casefold()].append(name)
    if same := [names for names in spelling.values() if len(names) > 1]:
        yield Finding(
            "spelling",
            ERROR,
            len(same),
            f"{count(len(same), 'class')} are written in more than one way",
            "give each class one spelling: upper or lower case, and one Unicode form",
            tuple(", ".join(f"{name!a}" for name in names) for names in same),
        )
    few = {name: number for name, number in sizes.items() if number < FEW_IMAGES}
    if few:
        is_error = not is_split and min(few.values()) < LEAST_IMAGES
        yield Finding(
            "tiny-class",
            ERROR if is_error else WARNING,
            len(few),
            f"{count(len(few), 'class has', 'classes have')} fewer than {FEW_IMAGES} images",
            f"collect more; below {LEAST_IMAGES} a class cannot be split, and its figures will "
            "vary widely",
            tuple(f"{name}: {number}" for name, number in sorted(few.items(), key=lambda x: x[1])),
        )
    (largest, most), (smallest, least) = sizes.most_common()[0], sizes.most_common()[-1]
    if most >= IMBALANCE * least:
        yield Finding(
            "imbalance",
            WARNING,
            len(sizes),
            f"`{largest}` has {most / least:.0f} times as many images as `{smallest}`",
            "read balanced accuracy and the table per class, not accuracy; weigh the classes alike "
            "in the loss with `--set class_weights=balanced`",
            tuple(f"{name}: {number}" for name, number in sizes.most_common()),
            numbers={"ratio": most / least},
        )


def _form_findings(pictures: Sequence[Picture], *, is_scaled: bool) -> Iterator[Finding]:
    depths = Counter(one.pixel_type for one in pictures)
    channels = Counter(one.channels for one in pictures)
    if len(depths) > 1 and not is_scaled:
        rare = min(depths, key=depths.__getitem__)
        yield _of(
            [one for one in pictures if one.pixel_type == rare],
            "mixed-depth",
            ERROR,
            f"types of pixels differ: {_tally(depths)}",
            "say which values are black and white: `--intensity-range LOW,HIGH`",
        )
    if len(channels) > 1:
        fewest = min(channels, key=channels.__getitem__)
        is_grey = set(channels) == {1, 3}
        yield _of(
            [one for one in pictures if one.channels == fewest],
            "mixed-channels",
            NOTE if is_grey else ERROR,
            f"channels differ: {_tally(channels)}",
            "nothing: grey images are replicated to RGB" if is_grey else "give all the same bands",
        )


def _size_findings(pictures: Sequence[Picture]) -> Iterator[Finding]:
    sides = np.array([one.size for one in pictures], np.float64).reshape(-1, 2)
    if not len(sides):
        return
    area, ratio = np.log(sides.prod(axis=1)), np.log(sides[:, 0] / sides[:, 1])
    far = np.log(ODD_RATIO)
    is_odd = (abs(area - np.median(area)) > far) | (abs(ratio - np.median(ratio)) > far)
    is_odd |= (sides.min(axis=1) < SMALL_PX) & (np.median(sides.min(axis=1)) >= SMALL_PX)
    if odd := [one for one, odd in zip(pictures, is_odd, strict=True) if odd]:
        height, width = np.median(sides, axis=0)
        yield _of(
            odd,
            "odd-size",
            NOTE,
            f"{count(len(odd), 'image')} are much larger, smaller or longer than most "
            f"({height:.0f} x {width:.0f} px)",
            "look at them: thumbnails and strips become smears when stretched to one size",
            lambda one: f"{one.path}: {one.size[0]} x {one.size[1]} px",
        )


def _intensity_findings(pictures: Sequence[Picture], flat: Sequence[bool]) -> Iterator[Finding]:
    if empty := [one for one, is_flat in zip(pictures, flat, strict=True) if is_flat]:
        yield _of(
            empty,
            "constant",
            WARNING,
            f"{count(len(empty), 'image')} show nothing: (almost) all pixels are equal",
            "leave them out: `--exclude-from check.json` does",
        )
    shown = [one for one, is_flat in zip(pictures, flat, strict=True) if not is_flat]
    bright = np.array([one.brightness for one in shown])
    if len(bright) < FEW_IMAGES:
        return
    middle = np.median(bright)
    # 1.4826: from the median distance of a normal distribution to its standard deviation.
    spread = max(1.4826 * float(np.median(abs(bright - middle))), 1 / 255)
    far = [one for one in shown if abs(one.brightness - middle) > OUTLIER * spread]
    if far:
        yield _of(
            far,
            "intensity",
            WARNING,
            f"{count(len(far), 'image')} are far brighter or darker than the others (mean "
            f"{middle:.2f} of 1)",
            "look whether they are negatives, failed exposures, or of another range",
            lambda one: f"{one.path}: mean {one.brightness:.2f}",
        )


def _shortcuts(pictures: Sequence[Picture]) -> Iterator[Finding]:
    """Yields traits of files that alone predict the class of images held out."""
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.tree import DecisionTreeClassifier

    sizes = Counter(one.label for one in pictures)
    judged = [one for one in pictures if sizes[one.label] >= FOLDS]
    names = sorted({one.label for one in judged})
    if len(names) < 2:
        return
    if len(judged) > MOST_JUDGED:
        drawn = np.random.default_rng(0).choice(len(judged), MOST_JUDGED, replace=False)
        judged = [judged[row] for row in np.sort(drawn)]
    labels = np.array([names.index(one.label) for one in judged])
    if min(Counter(labels.tolist()).values()) < FOLDS:
        return
    chance = 1 / len(names)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    for trait, values in _traits(judged).items():
        if (values == values[0]).all():
            continue
        tree = DecisionTreeClassifier(max_depth=4, class_weight="balanced", random_state=0)
        told = cross_val_predict(tree, values, labels, cv=folds)
        hits = [float((told[labels == one] == one).mean()) for one in range(len(names))]
        score = float(np.mean(hits))
        if score >= chance + SHORTCUT * (1 - chance):
            yield Finding(
                "shortcut",
                WARNING,
                len(judged),
                f"{trait} alone tells the class: balanced accuracy {score:.2f} on images held out, "
                f"chance is {chance:.2f}",
                "make it the same for all classes, or a network learns it instead of the picture",
                tuple(_shares(judged, trait)),
                numbers={"score": score, "chance": chance},
            )


def _traits(pictures: Sequence[Picture]) -> dict[str, NDArray[np.float64]]:
    formats = sorted({one.format for one in pictures})
    kinds = sorted({one.pixel_type for one in pictures})
    columns = {
        "the file format": [[formats.index(one.format)] for one in pictures],
        "the pixel mode": [[one.channels, kinds.index(one.pixel_type)] for one in pictures],
        "the image size": [[*one.size, one.size[0] / one.size[1]] for one in pictures],
        "the brightness of the border": [[one.border] for one in pictures],
    }
    return {trait: np.array(values, np.float64) for trait, values in columns.items()}


def _shares(pictures: Sequence[Picture], trait: str) -> Iterator[str]:
    """Yields what is usual in each class."""
    for name in sorted({one.label for one in pictures}):
        own = [one for one in pictures if one.label == name]
        if trait == "the brightness of the border":
            yield f"{name}: {np.median([one.border for one in own]):.2f} of 1"
            continue
        kinds = {
            "the file format": [one.format for one in own],
            "the pixel mode": [f"{one.channels} x {one.pixel_type}" for one in own],
            "the image size": [f"{one.size[0]} x {one.size[1]} px" for one in own],
        }[trait]
        kind, number = Counter(kinds).most_common(1)[0]
        yield f"{name}: {number} of {len(own)} {kind}"


def _of(
    pictures: Sequence[Picture],
    code: str,
    severity: str,
    told: str,
    advice: str,
    shown: Callable[[Picture], str] = lambda one: one.path,
) -> Finding:
    files = tuple(map(FileRef.to, pictures))
    lines = tuple(shown(one) for one in pictures)
    return Finding(code, severity, len(pictures), told, advice, lines, files)


def _tally(counts: Counter[Any]) -> str:
    return ", ".join(f"{value} ({count(number, 'image')})" for value, number in counts.items())
