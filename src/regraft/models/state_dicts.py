"""Named tensors of torch (timm's and torchvision's state dicts, timm folders) into a Backbone.

Names are never guessed: torchvision's ResNets, DenseNets and the convolutions of its VGGs bear
timm's names, and are the same function.

B batch, C channels, H height, W width, D features, K classes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from regraft.errors import ArtefactError
from regraft.models.architectures import is_own, whole_network
from regraft.models.backbone import Backbone
from regraft.models.classifier import MODEL, WEIGHTS
from regraft.models.keras_layers import HeadWeights
from regraft.models.torch_files import without_prefix

TOLERANCE = 1e-4  # of logits; single precision leaves about 1e-6 a layer
MOST_CONFIG_BYTES = 2**20  # assumed; timm's are about 1 kB


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a file, floats in single precision.

    Raises:
        ArtefactError: It is damaged, or none.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ArtefactError(
            f"`{path.name}` is no file of safetensors: {str(error).splitlines()[0]}",
            hint="save it again with `safetensors.torch.save_file`",
        ) from error
    floats = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    return without_prefix(floats)


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns config.json and the tensors of a folder that timm saved.

    Raises:
        ArtefactError: It is another kind of folder.
    """
    if (folder / MODEL).is_file() or (folder / "run.json").is_file():
        raise ArtefactError(
            f"`{folder}` is a model of regraft already", hint=f"use it as it is: `--start {folder}`"
        )
    if not (folder / WEIGHTS).is_file():
        pickled = sorted(path.name for path in folder.glob("*.bin")) or ["FILE"]
        raise ArtefactError(
            f"`{folder}` holds no `{WEIGHTS}`",
            hint=f"name a file itself: `regraft import {folder / pickled[0]}`",
        )
    place, config = folder / "config.json", None
    if place.is_file() and place.stat().st_size <= MOST_CONFIG_BYTES:
        try:
            config = json.loads(place.read_text(encoding="utf-8"))
        except ValueError:
            config = None
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise ArtefactError(
            f"`{place}` names no `architecture`, as timm writes it",
            hint=f"name the weights and the network: `regraft import {folder / WEIGHTS} --arch ...`"
            " (networks of the transformers library have other layers than timm's)",
        )
    return config, read_safetensors(folder / WEIGHTS)


def fill_named(backbone: Backbone, tensors: Mapping[str, Tensor]) -> HeadWeights:
    """Puts tensors into the backbone by name, every one of it, and returns the head.

    Raises:
        ArtefactError: Names or shapes are not those of the network.
    """
    own = {name.removeprefix("body."): tensor for name, tensor in backbone.state_dict().items()}
    rest = {name: tensor for name, tensor in tensors.items() if name not in own}
    optional = {name for name in own if name.endswith("num_batches_tracked")}
    problems = [f"+ `{name}`" for name in own if name not in tensors.keys() | optional]
    problems += [
        f"~ `{name}` {tuple(tensors[name].shape)} -> {tuple(own[name].shape)}"
        for name in own.keys() & tensors.keys()
        if own[name].shape != tensors[name].shape
    ]
    head = _head(backbone, rest)
    problems += [f"- `{name}`" for name in _strange(backbone, rest, head)]
    if problems:
        raise ArtefactError(
            f"the tensors are not those of `{backbone.arch}` (+ only in the network, - only in the "
            "file, ~ another shape)",
            problems=sorted(problems)[:3] + ([f"... and {len(problems) - 3} more"] if problems[3:]
                                             else []),
            hint="name the network that was trained with `--arch`; names are timm's, which "
            "torchvision shares for ResNets, DenseNets and VGGs",
        )  # fmt: skip
    state = {f"body.{name}": tensors[name] for name in own.keys() & tensors.keys()}
    backbone.load_state_dict(backbone.state_dict() | state)
    return _proven(backbone, head, tensors)


def _head(backbone: Backbone, rest: Mapping[str, Tensor]) -> HeadWeights:
    flat = {name: tensor for name, tensor in rest.items() if tensor.ndim == 2}
    if not flat:
        return HeadWeights(2, reason="the file has none")
    name, weight = list(flat.items())[-1]
    bias = rest.get(f"{name.removesuffix('weight')}bias", torch.zeros(len(weight)))
    classes = max(len(weight), 2)
    if weight.shape[1] != backbone.width or len(flat) > 1:
        return HeadWeights(
            classes,
            reason=f"it stands on {weight.shape[1]:,} values, and regraft's on the means of "
            f"{backbone.width:,} maps",
        )
    if len(weight) == 1:  # softmax([0, z]) is sigmoid(z)
        weight = torch.cat([torch.zeros_like(weight), weight])
        bias = torch.cat([torch.zeros_like(bias), bias])
    return HeadWeights(classes, weight.numpy(), bias.numpy())


def _strange(backbone: Backbone, rest: Mapping[str, Tensor], head: HeadWeights) -> list[str]:
    """Returns the names that belong to no classifier of this network."""
    whole = whole_network(backbone.arch, backbone.inputs, head.num_classes)
    if whole is None:  # the user's own: a last linear layer may stand beside it
        flat = [name.removesuffix("weight") for name, tensor in rest.items() if tensor.ndim == 2]
        return [name for name in rest if not name.startswith(tuple(flat[-1:]) or " ")]
    known = whole.state_dict().keys()
    is_neck = backbone.arch.startswith("vgg")  # torchvision calls it `classifier`
    return [
        name for name in rest if name not in known and not (is_neck and name.startswith("classif"))
    ]


def _proven(backbone: Backbone, head: HeadWeights, tensors: Mapping[str, Tensor]) -> HeadWeights:
    """Returns the head if the whole network of timm gives its logits, or why it is left out."""
    if head.weight is None or is_own(backbone.arch):
        return head
    number = sum(tensor.ndim == 2 and len(tensor) == 1 for tensor in tensors.values())
    whole = whole_network(backbone.arch, backbone.inputs, 1 if number else head.num_classes)
    assert whole is not None, "an architecture of timm"
    try:
        whole.load_state_dict(dict(tensors))
    except RuntimeError as error:
        return HeadWeights(head.num_classes, reason=f"timm refuses it: {str(error)[:80]}")
    generator = torch.Generator().manual_seed(0)
    shape = (2, backbone.inputs.channels, *backbone.inputs.size)
    images_BCHW = torch.randn(shape, generator=generator)
    with torch.no_grad():
        theirs = whole(images_BCHW)
        features_BD = backbone.eval()(images_BCHW)
        ours = features_BD @ torch.from_numpy(head.weight).T + torch.from_numpy(head.bias)
    ours = ours[:, 1:] - ours[:, :1] if number else ours
    difference = float((theirs - ours).abs().max())
    if difference <= TOLERANCE * max(1.0, float(theirs.abs().max())):
        return head
    return HeadWeights(
        head.num_classes,
        reason="this network's classifier is more than one linear layer on the means of its maps",
    )
