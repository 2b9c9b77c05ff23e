"""Weights that other tools wrote, to a Classifier that `--start` takes, with where they are from.

B batch, C channels, H height, W width, K classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from regraft.documents import sha256_of_file
from regraft.engine import evaluating
from regraft.errors import ArtefactError, UsageError, count
from regraft.inputs import InputSpec
from regraft.models.backbone import Backbone
from regraft.models.classifier import WEIGHTS, Classifier
from regraft.models.keras_files import HDF5
from regraft.models.keras_layers import EXACT, HeadWeights, fill, is_untrained, refuse_different
from regraft.models.keras_reference import NotAChain, run_chain
from regraft.models.layers import KerasFile
from regraft.models.quarantine import read_apart
from regraft.models.scaling import Scaling, scaling_of, with_inner
from regraft.models.state_dicts import fill_named, read_folder, read_safetensors

SCALES = ("Rescaling", "Normalization")
UNMAPPED = ("Flatten", "GlobalAveragePooling2D", "GlobalMaxPooling2D", "Dropout")
SIZE = (224, 224)  # as regraft's own default; Krizhevsky et al. 2012 and most networks since
TOLERANCE = 1e-4  # of the largest output; single precision leaves about 1e-6 a layer


@dataclass(frozen=True)
class Import:
    """What is asked for.

    Attributes:
        arch: None: as a folder's config.json says.
        source: Where the weights are from, in the user's words; kept for ever.
        image_size: (height, width); None: as the file says, or 224.
        class_names: In the order of the outputs; empty: as the file says, or numbered.
        preprocessing: A key of `scaling.PREPROCESSING`; None: as the file says, or values / 255.
        numbers: `mean`, `std` and `scale`, where they differ from the preprocessing's.
    """

    file: Path
    source: str
    arch: str | None = None
    image_size: tuple[int, int] | None = None
    class_names: tuple[str, ...] = ()
    preprocessing: str | None = None
    numbers: Mapping[str, Any] | None = None


def import_classifier(asked: Import) -> tuple[Classifier, list[str]]:
    """Returns a Classifier, and what a person should know about it.

    Raises:
        ArtefactError: The file is refused, or does not hold this network.
        UsageError: Something that only the user knows is missing.
    """
    if not asked.source.strip():
        raise UsageError(
            "`--source` is empty: a model keeps for ever where its weights are from",
            hint="say it in words: `--source 'own training on the X-rays of 2024'`",
        )
    if asked.file.is_dir():
        return _from_folder(asked)
    kind = _kind(asked.file)
    if kind == "keras":
        document, arrays = read_apart("keras", asked.file)
        return _from_keras(asked, KerasFile.from_flat(document, arrays))
    if kind == "torch":
        document, tensors = read_apart("torch", asked.file)
        named = {name: torch.from_numpy(array) for name, array in tensors.items()}
        return _from_named(asked, document["format"], named)
    return _from_named(asked, "safetensors", read_safetensors(asked.file))


def _kind(file: Path) -> str:
    """Returns who wrote a file, by its content; a name only tells two kinds of zip apart."""
    if not file.is_file():
        raise ArtefactError(f"file not found: `{file}`", hint="check the path")
    with file.open("rb") as stream:
        magic = stream.read(16)
    if magic.startswith(HDF5) or file.suffix == ".keras":
        return "keras"
    if file.suffix == ".safetensors" or magic[8:10] == b'{"':
        return "safetensors"
    return "torch"  # whose reader refuses what is none


def _from_keras(asked: Import, read: KerasFile) -> tuple[Classifier, list[str]]:
    arch = _named_arch(asked.arch)
    refuse_different(arch)
    try:
        scaling, notes, inputs = _keras_inputs(asked, read, arch)
        backbone = Backbone.create(arch, inputs, seed=0)
        backbone.random = frozenset()
        head = fill(backbone, read)
        notes += [_compared(backbone, head, read, scaling)]
    except (KeyError, TypeError, ValueError, IndexError) as error:  # what a file says, it may lie
        raise ArtefactError(
            f"`{asked.file.name}` is damaged, or says what Keras never writes: {error!r}",
            hint="save it again with Keras: `model.save('model.keras')`",
        ) from error
    if scaling.is_bgr:
        _swap_channels(backbone)
    num_dense = sum(isinstance(part, nn.Linear) for part in backbone.modules())
    untrained = is_untrained(read, num_dense)
    return _assembled(asked, backbone, head, read.format, notes, untrained=untrained)


def _keras_inputs(
    asked: Import, read: KerasFile, arch: str
) -> tuple[Scaling, list[str], InputSpec]:
    convolutions = read.of_kind("Conv2D")
    if not convolutions:
        raise ArtefactError(
            f"`{asked.file.name}` holds no Conv2D layer", hint="only networks of images are taken"
        )
    channels = convolutions[0].arrays["kernel"].shape[2]
    scales_itself = arch.startswith("tf_efficientnet") or bool(read.of_kind("Rescaling"))
    preprocessing = asked.preprocessing or ("none" if scales_itself else "keras-rescale")
    outer = scaling_of(preprocessing, channels, **(asked.numbers or {}))
    scaling, notes = with_inner(outer, read, arch)
    if asked.preprocessing is None and not asked.numbers:
        notes.append(
            "images are scaled by the network's own first layers"
            if scales_itself
            else "images are scaled to [0, 1], as by `rescale=1/255`; if yours were scaled "
            "otherwise, say so with `--preprocessing`"
        )
    listed = read.input_shape[:2] if read.input_shape else (None, None)
    size = (listed[0], listed[1]) if listed[0] and listed[1] else SIZE
    inputs = InputSpec(asked.image_size or size, channels, mean=scaling.mean, std=scaling.std)
    return scaling, notes, inputs


def _compared(backbone: Backbone, head: HeadWeights, read: KerasFile, scaling: Scaling) -> str:
    """Computes random images as Keras would, layer by layer, and holds the network to that.

    Raises:
        ArtefactError: The outputs differ.
    """
    if any(layer.config is None for layer in read.layers):
        return _unproven(backbone, "the file holds weights only, no list of layers")
    scales = [i for i, layer in enumerate(read.layers) if layer.kind in SCALES]
    begin = max(scales, default=-1) + 1
    dense = [i for i, layer in enumerate(read.layers) if layer.kind == "Dense"]
    end = dense[-1] if dense else len(read.layers)
    while head.weight is None and end and read.layers[end - 1].kind in UNMAPPED:
        end -= 1  # up to the maps
    generator = torch.Generator().manual_seed(0)
    shape = (2, backbone.inputs.channels, *backbone.inputs.size)
    images_BCHW = torch.randint(0, 256, shape, generator=generator)
    gain, offset = (torch.tensor(each).view(1, -1, 1, 1) for each in (scaling.gain, scaling.offset))
    scaled_BCHW = images_BCHW * gain + offset
    try:
        theirs = run_chain(read.layers[begin:end], scaled_BCHW)
    except NotAChain as reason:
        return _unproven(backbone, str(reason))
    with evaluating(backbone), torch.no_grad():
        ours = backbone(scaled_BCHW).double()
    if head.weight is not None:
        last = {name: torch.from_numpy(a).double() for name, a in read.layers[end].arrays.items()}
        theirs = theirs @ last["kernel"] + last.get("bias", torch.zeros(()))
        ours = ours @ torch.from_numpy(head.weight).double().T + torch.from_numpy(head.bias)
        if theirs.shape[1] == 1:  # two logits for one
            ours = ours[:, 1:] - ours[:, :1]
    elif theirs.ndim == 4:
        theirs = theirs.mean(dim=(2, 3))
    return _held_to(theirs, ours, "outputs" if head.weight is not None else "features")


def _unproven(backbone: Backbone, reason: str) -> str:
    told = f"layers are matched by shape and order: {reason}"
    if backbone.arch in EXACT:
        return f"{told}; `{backbone.arch}` was held to Keras' outputs when this version was made"
    return f"{told}, so nothing tells whether strides, padding and activations are the same"


def _held_to(theirs: Tensor, ours: Tensor, what: str) -> str:
    if theirs.shape == ours.shape:
        difference = float((theirs - ours).abs().max())
        if difference <= TOLERANCE * max(1.0, float(theirs.abs().max())):
            return f"{what} on random images as Keras computes them, to {difference:.1g}"
        told = f"the {what} differ by {difference:.2g} on random images"
    else:
        told = f"it gives {tuple(ours.shape[1:])} values, Keras' {tuple(theirs.shape[1:])}"
    raise ArtefactError(
        f"the network is not the function that Keras computes: {told}",
        hint="compare the layers one by one: strides, `padding` (Keras pads below and right), "
        "activations, pooling, the order of layers",
    )


def _swap_channels(backbone: Backbone) -> None:
    """Makes a network that was trained on blue, green, red take red, green, blue."""
    first = next(part for part in backbone.modules() if isinstance(part, nn.Conv2d))
    with torch.no_grad():
        first.weight.copy_(first.weight.flip(1))


def _from_folder(asked: Import) -> tuple[Classifier, list[str]]:
    config, tensors = read_folder(asked.file)
    told = config.get("pretrained_cfg") or {}
    size, names = told.get("input_size"), config.get("label_names") or told.get("label_names")
    filled = replace(
        asked,
        file=asked.file / WEIGHTS,
        arch=asked.arch or config.get("architecture"),
        image_size=asked.image_size or (tuple(size[1:]) if size else None),
        class_names=asked.class_names or tuple(names or ()),
    )
    if asked.preprocessing is None and not asked.numbers and told.get("mean"):
        numbers = {"mean": tuple(told["mean"]), "std": tuple(told["std"]), "scale": 1 / 255}
        filled = replace(filled, preprocessing="none", numbers=numbers)
    classifier, notes = _from_named(filled, "timm folder", tensors)
    if tag := told.get("tag"):
        notes.append(
            f"its config.json says `{tag}`, as timm writes of every network of this name, also one "
            "trained from scratch; what counts is your `--source`"
        )
    return classifier, notes


def _from_named(
    asked: Import, form: str, tensors: Mapping[str, Tensor]
) -> tuple[Classifier, list[str]]:
    arch = _named_arch(asked.arch)
    size = asked.image_size or SIZE
    channels = _channels(arch, size, tensors)
    scaling = scaling_of(asked.preprocessing or "torch", channels, **(asked.numbers or {}))
    notes = []
    if asked.preprocessing is None and not asked.numbers:
        notes.append(
            "images are scaled by torchvision's usual mean and std; if yours were scaled "
            "otherwise, say so with `--preprocessing`, or `--mean` and `--std`"
        )
    inputs = InputSpec(size, channels, mean=scaling.mean, std=scaling.std)
    backbone = Backbone.create(arch, inputs, seed=0)
    backbone.random = frozenset()
    head = fill_named(backbone, tensors)
    if scaling.is_bgr:
        _swap_channels(backbone)
    return _assembled(asked, backbone, head, form, notes)


def _channels(arch: str, size: tuple[int, int], tensors: Mapping[str, Tensor]) -> int:
    """Returns how many channels the first convolution of the network takes in the file."""
    usual = Backbone.create(arch, InputSpec(size, 3), seed=None)
    parts = usual.body.named_modules()
    first = next((name for name, part in parts if isinstance(part, nn.Conv2d)), "")
    weight = tensors.get(f"{first}.weight")
    return weight.shape[1] if weight is not None and weight.ndim == 4 else 3


def _named_arch(arch: str | None) -> str:
    if arch is None:
        raise UsageError(
            "the file does not say which network it holds",
            hint="name it: `--arch resnet18`, or your own `--arch file.py:factory`",
        )
    return arch


def _assembled(
    asked: Import,
    backbone: Backbone,
    head: HeadWeights,
    form: str,
    notes: Sequence[str],
    *,
    untrained: bool = False,
) -> tuple[Classifier, list[str]]:
    names = asked.class_names or tuple(f"class_{i}" for i in range(head.num_classes))
    if (len(names) != head.num_classes and head.weight is not None) or len(set(names)) < 2:
        raise UsageError(
            f"the file's head has {count(head.num_classes, 'class', 'classes')}, and "
            f"{len(names)} are named",
            hint="name them in the order of the outputs: `--classes NORMAL,PNEUMONIA` (Keras sorts "
            "folder names as plain text)",
        )
    classifier = Classifier(backbone, names)
    with torch.no_grad():
        if head.weight is not None:
            classifier.head.weight.copy_(torch.from_numpy(head.weight))
            classifier.head.bias.copy_(torch.from_numpy(np.asarray(head.bias)))
        else:
            classifier.head.weight.zero_()
    if not all(bool(tensor.isfinite().all()) for tensor in classifier.state_dict().values()):
        raise ArtefactError(
            f"`{asked.file.name}` holds values that are not finite", hint="train it again"
        )
    record = {
        "verb": "import",
        "source": asked.source.strip(),
        "file": asked.file.name,
        "sha256": sha256_of_file(asked.file),
        "format": form,
        "arch": backbone.arch,
        "head": f"left out: {head.reason}" if head.reason else "kept",
        "untrained": untrained,
    }
    classifier.lineage = (record,)
    told = list(notes)
    if head.reason:
        told.append(f"its head is left out: {head.reason}; `finetune` makes a new one")
    elif not asked.class_names:
        told.append("the classes have numbers only: name them with `--classes`")
    if untrained:
        told.append(
            "warning: every bias is 0, as at birth: nothing has ever trained these layers. Frozen "
            "they stay noise; let all of them learn"
        )
    return classifier, told
