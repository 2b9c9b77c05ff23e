"""How a network that was trained elsewhere scales its images, told as mean and std. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from regraft.errors import ArtefactError, UsageError, count
from regraft.models.layers import KerasFile

# (scale, mean, std): the network sees (value * scale - mean) / std, where values go to 255.
# keras.applications.imagenet_utils.preprocess_input, and ImageDataGenerator(rescale=1/255).
PREPROCESSING: dict[str, tuple[float, tuple[float, ...], tuple[float, ...]]] = {
    "none": (1.0, (0.0,), (1.0,)),
    "keras-rescale": (1 / 255, (0.0,), (1.0,)),
    "tf": (1 / 127.5, (1.0,), (1.0,)),
    "torch": (1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "caffe": (1.0, (123.68, 116.779, 103.939), (1.0,)),
}
BEFORE = ("InputLayer", "Rescaling", "Normalization", "ZeroPadding2D")
KNOWN_ASIDE = (
    "Activation", "Add", "AveragePooling2D", "BatchNormalization", "Concatenate", "Conv2D", "Dense",
    "DepthwiseConv2D", "Dropout", "ELU", "Flatten", "GlobalAveragePooling2D", "GlobalMaxPooling2D",
    "LeakyReLU", "MaxPooling2D", "Multiply", "ReLU", "Reshape", "Softmax", "SpatialDropout2D",
)  # fmt: skip


@dataclass(frozen=True)
class Scaling:
    """What a network sees of a value v from 0 to 255: `v * gain + offset`, for each channel.

    Attributes:
        is_bgr: Whether its channels were trained in the order blue, green, red.
    """

    gain: tuple[float, ...]
    offset: tuple[float, ...]
    is_bgr: bool = False

    @property
    def mean(self) -> tuple[float, ...]:
        """On the scale from 0 to 1, as an InputSpec has it."""
        pairs = zip(self.gain, self.offset, strict=True)
        return tuple(0.0 - offset / (255 * gain) for gain, offset in pairs)

    @property
    def std(self) -> tuple[float, ...]:
        return tuple(1 / (255 * gain) for gain in self.gain)

    def then(self, gain: ArrayLike, offset: ArrayLike) -> "Scaling":
        """Returns this scaling with another one behind it."""
        first, second = np.array(self.gain), np.array(self.offset)
        after = np.broadcast_to(gain, first.shape), np.broadcast_to(offset, first.shape)
        return replace(
            self,
            gain=tuple((first * after[0]).tolist()),
            offset=tuple((second * after[0] + after[1]).tolist()),
        )


def scaling_of(
    preprocessing: str, channels: int, mean: Sequence[float] = (), std: Sequence[float] = (),
    scale: float | None = None,
) -> Scaling:  # fmt: skip
    """Returns what these options say.

    Args:
        preprocessing: A key of `PREPROCESSING`.
        channels: Of the network's input.
        mean: Of each channel, or one for all; instead of the preprocessing's.
        std: Likewise.
        scale: What values from 0 to 255 are multiplied by first; instead of the preprocessing's.

    Raises:
        UsageError: Options are not known, or their numbers do not fit.
    """
    if preprocessing not in PREPROCESSING:
        raise UsageError(
            f"there is no preprocessing `{preprocessing}`", hint=f"use {', '.join(PREPROCESSING)}"
        )
    own = PREPROCESSING[preprocessing]
    scale, mean, std = scale or own[0], tuple(mean) or own[1], tuple(std) or own[2]
    is_bgr = preprocessing == "caffe"
    if {len(mean), len(std)} - {1, channels} or (is_bgr and channels != 3):
        raise UsageError(
            f"the network takes {count(channels, 'channel')}, and there are "
            f"{count(len(mean), 'mean')} and {count(len(std), 'deviation')}",
            hint="give one number, or one for each channel: `--mean 0.5,0.5,0.5`",
        )
    if not all(value > 0 for value in (scale, *std)):
        raise UsageError("`--scale` and `--std` must be above 0", hint="leave them out for none")
    means, deviations = np.broadcast_to(mean, channels), np.broadcast_to(std, channels)
    gains = scale / deviations
    return Scaling(tuple(gains.tolist()), tuple((-means / deviations).tolist()), is_bgr)


def with_inner(scaling: Scaling, read: KerasFile, arch: str) -> tuple[Scaling, list[str]]:
    """Returns a scaling with that of the network's own first layers, and notes on others.

    Raises:
        ArtefactError: A network scales its images behind its first convolution.
    """
    notes = []
    if arch.startswith("tf_efficientnet") and all(layer.config is None for layer in read.layers):
        scaling = scaling.then((1 / 255,), (0.0,))  # keras.applications.efficientnet begins so
    is_before = True
    for layer in read.layers:
        config: Any = layer.config or {}
        is_scale = layer.kind in ("Rescaling", "Normalization")
        if is_scale and not is_before and layer.config is not None:
            raise ArtefactError(
                f"`{layer.name}` scales values behind the first convolution",
                hint="only a scaling in front of the network can be imported",
            )
        if layer.kind == "Rescaling":
            scaling = scaling.then(np.atleast_1d(config["scale"]), np.atleast_1d(config["offset"]))
        elif layer.kind == "Normalization":
            # Keras divides by at least 1e-7.
            deviation = np.maximum(np.sqrt(layer.arrays["variance"].astype(np.float64)), 1e-7)
            scaling = scaling.then(1 / deviation, -layer.arrays["mean"] / deviation)
        elif layer.arrays:
            is_before = False
        elif layer.kind not in (*BEFORE, *KNOWN_ASIDE) and not layer.kind.startswith("Random"):
            notes.append(
                f"`{layer.name}` ({layer.kind}) is left out: code in a file is never run. If it "
                "scales images, say so with `--scale`, `--mean` and `--std`"
            )
    return scaling, notes
