"""InputSpec: what a network expects of an image. Plain data, no torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regraft.errors import ArtefactError

DECODER = "exact-jpeg-draft-2x-stretch-bilinear-3"
"""Name and version of the one decode-and-resize rule (`data/decode.py`).

Stretching to (height, width) keeps every pixel of the border, where a crop loses it: in medical
images the finding may lie there. Bilinear with antialiasing, and JPEGs decoded at a half, quarter
or eighth where that leaves twice the size asked for: docs/decisions/0003.
"""


MOST_PX = 8192  # of a side; assumed
MOST_CHANNELS = 256  # of an image; assumed


@dataclass(frozen=True)
class InputSpec:
    """What a network expects of an image.

    Attributes:
        size: (height, width) in pixels.
        channels: 1 for grey, 3 for RGB, n for others.
        bit_depth: Of the images it was trained on: 8, 16, or 32 (floats).
        mean: Of each channel on the [0, 1] scale, over the training split of the dataset that
            the weights were first trained on; empty until measured.
        std: Likewise.
        decoder: The decode-and-resize rule that made the training images.
        intensity_range: The values that become 0 and 1: 0 and 255 of 8 bits; of others the real
            ones, measured on the training images or given (`--intensity-range`).
        clips: Whether values beyond the range become 0 or 1: a range that was given is a window.
            Of a measured one they keep their distance, and other scales are refused.
    """

    size: tuple[int, int]
    channels: int
    bit_depth: int = 8
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    decoder: str = DECODER
    intensity_range: tuple[float, float] = (0.0, 255.0)
    clips: bool = False

    def with_channels(self, channels: int) -> "InputSpec":
        """Returns the specification for another number of channels: their mean and std averaged."""
        if channels == self.channels:
            return self
        assert self.mean, "measured by the first training"
        mean, std = sum(self.mean) / len(self.mean), sum(self.std) / len(self.std)
        return replace(self, channels=channels, mean=(mean,) * channels, std=(std,) * channels)

    def with_given_range(self, given: tuple[float, float] | None) -> "InputSpec":
        """Returns the specification for images of another scale: what is black and white there."""
        return self if given is None else replace(self, intensity_range=given, clips=True)

    def scaled(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Returns values of images on the [0, 1] scale."""
        low, high = self.intensity_range
        share = (values - low) / (high - low)
        return share.clip(0, 1) if self.clips else share

    def told_range(self) -> str:
        """Returns the range of values, for people."""
        low, high = self.intensity_range
        beyond = "given; values beyond become 0 or 1" if self.clips else "the real range"
        return f"values from {low:g} to {high:g} become 0 to 1 ({beyond})"

    def reaches(self, low: float, high: float) -> bool:
        """Whether values from `low` to `high` can be on this scale: at most its width beyond it."""
        black, white = self.intensity_range
        return low >= 2 * black - white and high <= 2 * white - black

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "InputSpec":
        """Reads what `to_dict` made.

        Raises:
            ArtefactError: A field is missing, or the decode rule is not this version's.
        """
        try:
            decoder = str(document["decoder"])
            if decoder != DECODER:
                raise ArtefactError(
                    f"the images were read by rule `{decoder}`, this version has `{DECODER}`",
                    hint="use the regraft version that trained the model",
                )
            height, width = document["size"]
            low, high = (float(value) for value in document["intensity_range"])
            spec = cls(
                size=(int(height), int(width)),
                channels=int(document["channels"]),
                bit_depth=int(document["bit_depth"]),
                mean=tuple(float(value) for value in document["mean"]),
                std=tuple(float(value) for value in document["std"]),
                decoder=decoder,
                intensity_range=(low, high),
                clips=bool(document["clips"]),
            )
            if not all(0 < side <= MOST_PX for side in (height, width)):
                raise ValueError(f"images of {spec.size} px")
            if not 0 < spec.channels <= MOST_CHANNELS:
                raise ValueError(f"{spec.channels} channels")
            if {len(spec.mean), len(spec.std)} - {0, spec.channels}:
                raise ValueError("mean and std of other channels")
            if not low < high:
                raise ValueError(f"the intensity range is {low} to {high}")
        except (KeyError, TypeError, ValueError) as error:
            raise ArtefactError(
                f"the input specification is not valid: {error!r}",
                hint="restore the folder from a copy",
            ) from error
        return spec
