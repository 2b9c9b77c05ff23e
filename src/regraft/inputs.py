"""InputSpec: what a network expects of an image. Plain data, no torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from regraft.errors import ArtefactError

DECODER = "pillow-jpeg-draft-2x-stretch-bilinear-2"
"""Name and version of the one decode-and-resize rule (`data/decode.py`).

Stretching to (height, width) keeps every pixel of the border, where a crop loses it: in medical
images the finding may lie there. Bilinear with antialiasing, and JPEGs decoded at a half, quarter
or eighth where that leaves twice the size asked for: docs/decisions/0003.
"""


@dataclass(frozen=True)
class InputSpec:
    """What a network expects of an image.

    Attributes:
        size: (height, width) in pixels.
        channels: 1 for grey, 3 for RGB, n for others.
        bit_depth: 8 or 16 in the first training; values are scaled to [0, 1] by 255 or 65535.
        mean: Of each channel on the [0, 1] scale, over the training split of the dataset that
            the weights were first trained on; empty until measured.
        std: Likewise.
        decoder: The decode-and-resize rule that made the training images.
    """

    size: tuple[int, int]
    channels: int
    bit_depth: int = 8
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    decoder: str = DECODER

    def with_channels(self, channels: int) -> "InputSpec":
        """Returns the specification for another number of channels: their mean and std averaged."""
        if channels == self.channels:
            return self
        assert self.mean, "measured by the first training"
        mean, std = sum(self.mean) / len(self.mean), sum(self.std) / len(self.std)
        return replace(self, channels=channels, mean=(mean,) * channels, std=(std,) * channels)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "InputSpec":
        """Reads what `to_dict` made.

        Raises:
            ArtefactError: A field is missing, or the decode rule is not this version's.
        """
        try:
            height, width = document["size"]
            spec = cls(
                size=(int(height), int(width)),
                channels=int(document["channels"]),
                bit_depth=int(document["bit_depth"]),
                mean=tuple(float(value) for value in document["mean"]),
                std=tuple(float(value) for value in document["std"]),
                decoder=str(document["decoder"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ArtefactError(
                f"the input specification is not valid: {error!r}",
                hint="restore the folder from a copy",
            ) from error
        if spec.decoder != DECODER:
            raise ArtefactError(
                f"the images were read by rule `{spec.decoder}`, this version has `{DECODER}`",
                hint="use the regraft version that trained the model",
            )
        return spec
