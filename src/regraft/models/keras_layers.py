"""Layers of Keras into a Backbone and its Head: exactly, or not at all.

Layers of one kind meet in their order: Keras' as listed, torch's as called. That holds for a chain,
and for networks whose branches hold one layer of a kind (DenseNet, MobileNet, EfficientNet).

B batch, C channels, H height, W width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from regraft.engine import evaluating
from regraft.errors import ArtefactError, count
from regraft.models.architectures import is_own
from regraft.models.backbone import Backbone
from regraft.models.layers import Array, KerasFile, Layer
from regraft.models.stages import called, dry_run

KINDS = ("Conv2D", "DepthwiseConv2D", "BatchNormalization", "Dense")
EPSILON = 1e-3  # Keras' default; a file of weights alone does not hold it
EPSILONS = {"densenet": 1.001e-5}  # keras.applications.densenet
# Held to Keras' own outputs by tests/test_keras_reference.py; the larger ones differ in counts.
EXACT = (
    "vgg16", "vgg19", "densenet121", "densenet169", "densenet201",
    "keras_mobilenetv2_100", "tf_efficientnet_b0",
)  # fmt: skip
DIFFERENT = {
    "resnet": "Keras' ResNet strides in the first 1x1 convolution of a block, timm's in the 3x3",
    "mobilenetv2": "Keras pads with zeros below and right, timm's `mobilenetv2_100` on all sides: "
    "use `--arch keras_mobilenetv2_100`",
    "efficientnet": "Keras pads with zeros below and right, as timm's `tf_efficientnet_b0` does, "
    "and its epsilon is 0.001: use `--arch tf_efficientnet_b0`",
}
BETWEEN = ("Dropout", "SpatialDropout2D", "GaussianDropout", "GaussianNoise")


@dataclass(frozen=True)
class HeadWeights:
    """Of a linear layer on pooled features; or why there is none.

    Attributes:
        num_classes: Of the file, also where its head is not kept.
        reason: Why the head is left out; empty where it is kept.
    """

    num_classes: int
    weight: Array | None = None
    bias: Array = field(default_factory=lambda: np.zeros(0, np.float32))
    reason: str = ""


def refuse_different(arch: str) -> None:
    """Refuses networks of timm that are not the function that Keras computes.

    Raises:
        ArtefactError: It is not known to be the same one.
    """
    if is_own(arch) or arch in EXACT:
        return
    known = next((DIFFERENT[part] for part in DIFFERENT if part in arch), "")
    raise ArtefactError(
        f"`{arch}` is not the function that Keras computes"
        + (f": {known}" if known else ", as far as is known"),
        hint=f"import {', '.join(EXACT)}; or write the same network for torch and name it: "
        "`--arch file.py:factory`",
    )


def fill(backbone: Backbone, read: KerasFile) -> HeadWeights:
    """Puts the layers of a file into a backbone, every tensor of it, and returns the head.

    Raises:
        ArtefactError: The layers are not those of the network.
    """
    strange = [layer for layer in read.layers if layer.arrays and layer.kind not in KINDS]
    strange = [layer for layer in strange if layer.kind != "Normalization"]
    modules = _modules(backbone)
    own = {kind: read.of_kind(kind) for kind in KINDS}
    dense = own["Dense"][len(modules["Dense"]) :]
    own["Dense"] = own["Dense"][: len(modules["Dense"])]
    problems = [f"`{layer.name}` is a {layer.kind}, which is not known" for layer in strange]
    problems += [
        f"{count(len(own[kind]), f'{kind} layer')} in the file, {len(modules[kind])} in the network"
        for kind in KINDS
        if len(own[kind]) != len(modules[kind])
    ]
    state: dict[str, Tensor] = {}
    if not problems:
        for kind in KINDS:
            for layer, (name, module) in zip(own[kind], modules[kind], strict=True):
                tensors, wrong = _tensors(layer, module, backbone.arch, read)
                state |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
                problems += [f"`{layer.name}`: {text}" for text in wrong]
        problems += [f"nothing for `{name}`" for name in _unset(backbone, state)]
    if problems:
        raise ArtefactError(
            f"the file does not hold the layers of `{backbone.arch}`",
            problems=problems[:3] + ([f"... and {len(problems) - 3} more"] if problems[3:] else []),
            hint="name the network that was trained: `--arch vgg16`, ..., or your own "
            "`file.py:factory`",
        )
    backbone.load_state_dict(backbone.state_dict() | state)
    return _head(read, dense, backbone)


def is_untrained(read: KerasFile, kept_dense: int) -> bool:
    """Whether all biases, scales and shifts are those of birth: nothing has trained these layers.

    Keras begins with bias 0, scale 1 and shift 0, and one step of training moves them all.
    """
    dense = read.of_kind("Dense")[:kept_dense]
    learned = [read.of_kind(kind) for kind in KINDS[:3]]
    born = {"bias": 0.0, "beta": 0.0, "gamma": 1.0}
    arrays = [
        (born[name], array)
        for layer in [*dense, *(layer for of_kind in learned for layer in of_kind)]
        for name, array in layer.arrays.items()
        if name in born
    ]
    return bool(arrays) and all(bool(np.all(array == value)) for value, array in arrays)


def _modules(backbone: Backbone) -> dict[str, list[tuple[str, nn.Module]]]:
    """Returns the modules of each kind, in the order in which the network calls them."""
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)
    found = {name: part for name, part in backbone.named_modules() if isinstance(part, kinds)}
    inputs = backbone.inputs

    def dry(_images: Tensor) -> Tensor:
        return dry_run(backbone, backbone.forward, (1, inputs.channels, *inputs.size))

    with evaluating(backbone):
        order = list(dict.fromkeys(called(found.items(), dry, torch.empty(0))))
    modules: dict[str, list[tuple[str, nn.Module]]] = {kind: [] for kind in KINDS}
    for name in order:
        modules[_kind(found[name])].append((name, found[name]))
    return modules


def _kind(module: nn.Module) -> str:
    if isinstance(module, nn.BatchNorm2d):
        return "BatchNormalization"
    if isinstance(module, nn.Linear):
        return "Dense"
    assert isinstance(module, nn.Conv2d)
    is_depthwise = module.groups == module.in_channels > 1
    return "DepthwiseConv2D" if is_depthwise else "Conv2D"


def _tensors(
    layer: Layer, module: nn.Module, arch: str, read: KerasFile
) -> tuple[dict[str, Tensor], list[str]]:
    """Returns the tensors for a module, and what does not fit."""
    if layer.kind == "BatchNormalization":
        arrays, wrong = _norm(layer, module, arch)
    else:
        arrays, wrong = _linear(layer, module, read)
    own = dict(module.state_dict())
    for name, array in arrays.items():
        if name in own and tuple(own[name].shape) != array.shape:
            wrong.append(f"{name} {_shape(array.shape)}, not {_shape(own[name].shape)}")
    return {name: torch.from_numpy(array) for name, array in arrays.items() if name in own}, wrong


def _linear(layer: Layer, module: nn.Module, read: KerasFile) -> tuple[dict[str, Array], list[str]]:
    kernel, bias = layer.arrays["kernel"], layer.arrays.get("bias")
    if layer.kind == "Conv2D":
        weight = kernel.transpose(3, 2, 0, 1)  # HWIO to OIHW
    elif layer.kind == "DepthwiseConv2D":
        weight = kernel.transpose(2, 3, 0, 1).reshape(-1, 1, *kernel.shape[:2])
    else:
        weight = _flattened(layer, read).T
    found = {"weight": np.ascontiguousarray(weight)}
    wrong = []
    if getattr(module, "bias", None) is not None:
        found["bias"] = np.zeros(len(weight), np.float32) if bias is None else bias
    elif bias is not None:
        wrong.append("has a bias, which the network has not")
    return found, wrong


def _flattened(layer: Layer, read: KerasFile) -> Array:
    """Returns a Dense kernel of one's own network for torch's order of flattened maps.

    That is CHW instead of HWC. Only the first Dense can stand on maps; on their means there is one
    value a channel.
    """
    kernel, convolutions = layer.arrays["kernel"], read.of_kind("Conv2D")
    inputs, outputs = kernel.shape
    channels = convolutions[-1].arrays["kernel"].shape[3] if convolutions else 0
    if layer is not read.of_kind("Dense")[0] or not channels or inputs % channels:
        return kernel
    return kernel.reshape(-1, channels, outputs).transpose(1, 0, 2).reshape(inputs, outputs)


def _norm(layer: Layer, module: nn.Module, arch: str) -> tuple[dict[str, Array], list[str]]:
    arrays = layer.arrays
    mean, variance = arrays["moving_mean"], arrays["moving_variance"]
    epsilon = EPSILON if layer.config is None else float(layer.config.get("epsilon", EPSILON))
    if layer.config is None:
        epsilon = next((e for name, e in EPSILONS.items() if arch.startswith(name)), epsilon)
    # Both divide by sqrt(variance + epsilon): what one has more of, the other carries as variance.
    shifted = (variance.astype(np.float64) + (epsilon - module.eps)).astype(np.float32)  # type: ignore[operator]
    wrong = [] if np.all(shifted >= 0) else [f"epsilon {epsilon:g} cannot become {module.eps:g}"]
    found = {
        "weight": arrays.get("gamma", np.ones_like(mean)),
        "bias": arrays.get("beta", np.zeros_like(mean)),
        "running_mean": mean,
        "running_var": shifted,
    }
    return found, wrong


def _unset(backbone: Backbone, state: Mapping[str, Tensor]) -> list[str]:
    counters = {name for name in backbone.state_dict() if name.endswith("num_batches_tracked")}
    return [name for name in backbone.state_dict() if name not in state.keys() | counters]


def _head(read: KerasFile, dense: Sequence[Layer], backbone: Backbone) -> HeadWeights:
    if not dense:
        return HeadWeights(2, reason="the file has none")
    last = dense[-1]
    kernel = _flattened(last, read) if is_own(backbone.arch) else last.arrays["kernel"]
    units = kernel.shape[1]
    classes = max(units, 2)
    if len(dense) > 1:
        return HeadWeights(classes, reason=f"it has {len(dense)} layers, and one is kept")
    if kernel.shape[0] != backbone.width:
        return HeadWeights(
            classes,
            reason=f"it stands on {kernel.shape[0]:,} values (flattened maps), and regraft's on "
            f"{backbone.width:,} (their means)",
        )
    config = last.config or {}
    if not is_own(backbone.arch) and (strange := _between(read, last)):
        return HeadWeights(classes, reason=f"it stands on a {strange}, not on a mean of the maps")
    if units == 1 and config.get("activation") == "softmax":
        return HeadWeights(
            2, reason="a softmax over one unit always says 1: it has learned nothing"
        )
    bias = last.arrays.get("bias", np.zeros(units, np.float32))
    if units == 1:  # softmax([0, z]) is sigmoid(z)
        kernel = np.concatenate([np.zeros_like(kernel), kernel], axis=1)
        bias = np.concatenate([np.zeros_like(bias), bias])
    return HeadWeights(classes, np.ascontiguousarray(kernel.T), bias)


def _between(read: KerasFile, head: Layer) -> str:
    """Returns the kind of what the head stands on, where that is listed and gives other features.

    Flattened maps of one pixel are their own mean: their width tells.
    """
    if head.config is None:
        return ""
    before = [
        layer for layer in read.layers[: read.layers.index(head)] if layer.kind not in BETWEEN
    ]
    last = before[-1] if before else None
    fits = last is None or last.kind in ("GlobalAveragePooling2D", "Flatten", "Dense", "Activation")
    return "" if fits or last is None else last.kind


def _shape(shape: Sequence[int]) -> str:
    return "x".join(str(side) for side in shape)
