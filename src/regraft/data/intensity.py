"""Which values of the images become 0 and 1: of 8 bits all, of others the real or given range."""

from dataclasses import replace

import numpy as np

from regraft.data.cache import Cache
from regraft.data.dataset import Dataset, unusable
from regraft.errors import count, shorten
from regraft.inputs import InputSpec

BITS = (8, 10, 12, 14, 16)  # that detectors have; 12 of them are often stored as 16
HINT = (
    "`--intensity-range LOW,HIGH` says which values are black and white, for example "
    "`--intensity-range 0,1`"
)


def refuse_unclear(dataset: Dataset, inputs: InputSpec) -> None:
    """Refuses images whose range nobody can know, before they are decoded.

    Args:
        dataset: To be trained on.
        inputs: Of the start, whose range may hold here too, or without mean and std.

    Raises:
        DataError: Images differ in their bits, or are floats, and no range was given.
    """
    is_known = bool(inputs.mean) and inputs.clips and dataset.bit_depth == inputs.bit_depth
    if dataset.options.intensity_range is not None or is_known:
        return
    if len(dataset.pixel_types) > 1:
        told = ", ".join(
            f"{name} ({count(number, 'image')})" for name, number in dataset.pixel_types
        )
        raise unusable(dataset.root, [f"images differ in bits per channel: {told}"], hint=HINT)
    if dataset.pixel_type == "float32":
        told = "images hold floats or 32-bit integers, which have no largest value"
        raise unusable(dataset.root, [told], hint=HINT)


def with_range(inputs: InputSpec, dataset: Dataset, cache: Cache) -> InputSpec:
    """Returns the specification with the range of values for a training on these images.

    A range that was given holds; then that of a start with as many bits, if the values fit; else
    the real range of the training images: 12 bits in files of 16 are 0 to 4095.
    """
    settled = replace(inputs, bit_depth=dataset.bit_depth)
    if dataset.options.intensity_range is not None:
        return settled.with_given_range(dataset.options.intensity_range)
    low, high = cache.extremes(dataset.rows("train"))
    black, white = inputs.intensity_range
    fits = inputs.clips or (black <= low and high <= white)
    if inputs.mean and inputs.bit_depth == dataset.bit_depth and fits:
        return settled
    if dataset.pixel_type == "uint8":
        return replace(settled, intensity_range=(0.0, 255.0), clips=False)
    if dataset.pixel_type == "uint16":
        bits = next(bits for bits in BITS if high < 2**bits)
        return replace(settled, intensity_range=(0.0, 2.0**bits - 1), clips=False)
    return replace(settled, intensity_range=(low, max(high, low + 1)), clips=False)


def refuse_other_scales(inputs: InputSpec, dataset: Dataset, cache: Cache) -> None:
    """Refuses to judge a network on images whose values are on another scale than its own.

    Raises:
        DataError: Some are.
    """
    if inputs.clips:
        return
    problems = []
    depths = {np.dtype(name).itemsize * 8 for name, _ in dataset.pixel_types}
    if depths != {inputs.bit_depth}:
        problems.append(
            f"images have {' and '.join(map(str, sorted(depths)))} bits per channel where the "
            f"network was trained on {inputs.bit_depth}"
        )
    elif inputs.bit_depth > 8:
        low, high = inputs.intensity_range
        far = [
            sample.path
            for sample, ends in zip(dataset.samples, cache.ends, strict=True)
            if not inputs.reaches(*ends)
        ]
        if far:
            problems.append(
                f"{count(len(far), 'image has', 'images have')} values far from {low:g} to "
                f"{high:g}, on which the network was trained: {shorten(far)}"
            )
    if problems:
        raise unusable(dataset.root, problems, hint=HINT)
