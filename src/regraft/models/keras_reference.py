"""A chain of Keras layers computed as Keras does, to hold an imported network to.

B batch, C channels, H height, W width. Maps are BCHW as torch's; what Keras flattens is flattened
in its order (HWC).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regraft.models.layers import Layer

MERGES = ("Add", "Average", "Concatenate", "Dot", "Maximum", "Minimum", "Multiply", "Subtract")
ASLEEP = (
    "InputLayer", "Dropout", "SpatialDropout2D", "GaussianDropout", "GaussianNoise",
    "ActivityRegularization", "RandomBrightness", "RandomContrast", "RandomCrop", "RandomFlip",
    "RandomRotation", "RandomTranslation", "RandomZoom",
)  # fmt: skip
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "elu": F.elu,
    "selu": F.selu,
    "gelu": F.gelu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),  # Keras 3
}


class NotAChain(Exception):
    """The layers cannot be computed one after the other, or one of them is not known."""


def run_chain(layers: Sequence[Layer], images_BCHW: Tensor) -> Tensor:
    """Returns what Keras computes from images that nothing has scaled yet.

    Raises:
        NotAChain: See there.
    """
    if any(layer.kind in MERGES for layer in layers):
        raise NotAChain("its layers are no chain")
    values = images_BCHW.double()
    for layer in layers:
        if layer.config is None:
            raise NotAChain("the file holds weights only, no list of layers")
        if layer.kind in ASLEEP:
            continue
        if layer.kind not in _STEPS or layer.config.get("data_format") == "channels_first":
            raise NotAChain(f"`{layer.name}` is a {layer.kind}, which is not known")
        arrays = {name: torch.from_numpy(array).double() for name, array in layer.arrays.items()}
        values = _STEPS[layer.kind](values, layer.config, arrays)
        if (name := layer.config.get("activation")) is not None:
            values = _activation(values, name)
    return values


Arrays = Mapping[str, Tensor]
Config = Mapping[str, Any]


def _activation(values: Tensor, name: Any) -> Tensor:
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise NotAChain(f"the activation `{name}` is not known")
    return ACTIVATIONS[name](values)


def _convolution(values: Tensor, config: Config, arrays: Arrays) -> Tensor:
    weight = arrays["kernel"].permute(3, 2, 0, 1)
    return _convolved(values, weight, config, arrays, int(config.get("groups", 1)))


def _depthwise(values: Tensor, config: Config, arrays: Arrays) -> Tensor:
    kernel = arrays["kernel"]
    weight = kernel.permute(2, 3, 0, 1).reshape(-1, 1, *kernel.shape[:2])
    return _convolved(values, weight, config, arrays, kernel.shape[2])


def _convolved(
    values: Tensor, weight: Tensor, config: Config, arrays: Arrays, groups: int
) -> Tensor:
    stride, dilation = _pair(config.get("strides", 1)), _pair(config.get("dilation_rate", 1))
    if config.get("padding") == "same":
        values = _padded(values, weight.shape[2:], stride, dilation, 0.0)
    return F.conv2d(values, weight, arrays.get("bias"), stride, 0, dilation, groups)


def _max_pooling(values: Tensor, config: Config, _arrays: Arrays) -> Tensor:
    size = _pair(config["pool_size"])
    stride = _pair(config.get("strides") or size)
    if config.get("padding") == "same":
        values = _padded(values, size, stride, (1, 1), float("-inf"))
    return F.max_pool2d(values, size, stride)


def _mean_pooling(values: Tensor, config: Config, _arrays: Arrays) -> Tensor:
    if config.get("padding") == "same":
        raise NotAChain("an average pooling pads")
    size = _pair(config["pool_size"])
    return F.avg_pool2d(values, size, _pair(config.get("strides") or size))


def _padded(
    values: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], by: float
) -> Tensor:
    """Pads as TensorFlow does: what is odd goes below and right."""
    pads = []
    for side, k, s, d in zip(values.shape[2:], kernel, stride, dilation, strict=True):
        total = max((-(-side // s) - 1) * s + (k - 1) * d + 1 - side, 0)
        pads.append((total // 2, total - total // 2))
    return F.pad(values, (*pads[1], *pads[0]), value=by)


def _zero_padding(values: Tensor, config: Config, _arrays: Arrays) -> Tensor:
    rows, columns = (_pair(each) for each in config["padding"])
    return F.pad(values, (*columns, *rows))


def _norm(values: Tensor, config: Config, arrays: Arrays) -> Tensor:
    mean, variance = arrays["moving_mean"], arrays["moving_variance"]
    deviation = (variance + float(config["epsilon"])).sqrt()
    scale = arrays.get("gamma", torch.ones_like(mean)) / deviation
    shift = arrays.get("beta", torch.zeros_like(mean)) - mean * scale
    shape = (1, -1, 1, 1) if values.ndim == 4 else (1, -1)
    return values * scale.view(shape) + shift.view(shape)


def _dense(values: Tensor, _config: Config, arrays: Arrays) -> Tensor:
    product: Tensor = values @ arrays["kernel"]
    product += arrays.get("bias", torch.zeros(()))
    return product


def _flatten(values: Tensor, _config: Config, _arrays: Arrays) -> Tensor:
    return (values.permute(0, 2, 3, 1) if values.ndim == 4 else values).flatten(1)


def _rescaling(values: Tensor, config: Config, _arrays: Arrays) -> Tensor:
    scale, offset = (torch.tensor(config[key]).double() for key in ("scale", "offset"))
    return values * scale.view(1, -1, 1, 1) + offset.view(1, -1, 1, 1)


def _relu(values: Tensor, config: Config, _arrays: Arrays) -> Tensor:
    if config.get("negative_slope") or config.get("threshold"):
        raise NotAChain("a ReLU with a slope or threshold")
    return values.clamp(0, config.get("max_value"))


def _pair(value: Any) -> tuple[int, int]:
    first, second = value if isinstance(value, list | tuple) else (value, value)
    return int(first), int(second)


_STEPS: dict[str, Callable[[Tensor, Config, Arrays], Tensor]] = {
    "Activation": lambda values, _config, _arrays: values,
    "AveragePooling2D": _mean_pooling,
    "BatchNormalization": _norm,
    "Conv2D": _convolution,
    "Dense": _dense,
    "DepthwiseConv2D": _depthwise,
    "Flatten": _flatten,
    "GlobalAveragePooling2D": lambda values, _config, _arrays: values.mean(dim=(2, 3)),
    "GlobalMaxPooling2D": lambda values, _config, _arrays: values.amax(dim=(2, 3)),
    "MaxPooling2D": _max_pooling,
    "ReLU": _relu,
    "Rescaling": _rescaling,
    "ZeroPadding2D": _zero_padding,
}
