"""A Classifier as a folder in the form of timm and Hugging Face, which everyone else can load."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regraft.delivery.card import model_card
from regraft.delivery.deployed import (
    TOLERANCE,
    Agreement,
    Deployed,
    Outputs,
    compared,
    quiet_exporters,
)
from regraft.delivery.real_images import RealImages
from regraft.documents import json_content
from regraft.engine import evaluating
from regraft.errors import UsageError
from regraft.models.architectures import VARIANTS, is_own, load_timm_folder, whole_network
from regraft.models.classifier import WEIGHTS, Classifier
from regraft.run import Run
from regraft.storage import committed_folder, write_file
from regraft.tensors import packed

# Where timm's network of the name takes a class token, or has a norm behind its means: options that
# give the mean over patches, and none.
ARGUMENTS: tuple[dict[str, Any], ...] = (
    {},
    {"global_pool": "avg"},
    {"global_pool": "avg", "fc_norm": False},
)


def write_timm_folder(
    classifier: Classifier, out: Path, real: RealImages, run: Run | None, license_: str
) -> Agreement:
    """Writes the folder in the form of timm and Hugging Face: no pickle, no tag of others."""
    network, arguments = _whole_form(classifier)
    config = _timm_config(classifier, network, arguments, license_)
    deployed = Deployed(classifier)

    def outputs(folder: Path) -> Outputs:
        loaded = load_timm_folder(folder)

        def ask(images_BCHW: NDArray[np.float32]) -> NDArray[Any]:
            values = torch.from_numpy(images_BCHW) * deployed.scale + deployed.offset
            return loaded(values).softmax(dim=1).numpy()  # type: ignore[no-any-return]

        return ask

    with committed_folder(out) as folder:
        write_file(folder / WEIGHTS, packed(network.state_dict()))
        write_file(folder / "config.json", json_content(config))
        with quiet_exporters():
            agreement = compared(classifier, real, outputs(folder), "timm")
        card = model_card(classifier, run, "timm", agreement.told(), license_, out.name)
        write_file(folder / "README.md", card.encode("utf-8"))
    return agreement


def _whole_form(classifier: Classifier) -> tuple[nn.Module, dict[str, Any]]:
    """Returns timm's own network with the weights of the classifier, and what made it so.

    Raises:
        UsageError: timm's network has layers that the classifier lacks, or it is no network of
            timm, or its images are cut to a window first.
    """
    arch, inputs = classifier.backbone.arch, classifier.inputs
    for arguments in ARGUMENTS:
        network = None if inputs.clips else _made(classifier, arguments)
        if network is None:
            continue
        state = _timm_state(classifier, network)
        shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
        if shapes == {name: tensor.shape for name, tensor in state.items()}:
            network.load_state_dict(state)
            if _equal_outputs(classifier, network):
                return network, arguments
    reason = "its images are cut to a window of values first, which timm does not do"
    if not inputs.clips:
        reason = "timm's network of that name carries layers of its own before the classifier"
    if is_own(arch):
        reason = "it is your own network, and not in timm's registry"
    raise UsageError(
        f"`{arch}` has no form in timm that is the same function: {reason}",
        hint="use `--to onnx` or `--to torch`, which hold the network itself",
    )


def _made(classifier: Classifier, arguments: Mapping[str, Any]) -> nn.Module | None:
    try:
        arch, number = classifier.backbone.arch, len(classifier.class_names)
        return whole_network(arch, classifier.inputs, number, arguments)
    except TypeError:  # the architecture has no such argument
        return None


def _timm_state(classifier: Classifier, network: nn.Module) -> dict[str, Tensor]:
    """Returns the tensors of the classifier by the names that timm's network has for them."""
    last = network.get_classifier()  # type: ignore[operator]
    name = next((name for name, module in network.named_modules() if module is last), "")
    own = classifier.backbone.state_dict()
    state = {name.removeprefix("body."): tensor for name, tensor in own.items()}
    state |= {f"{name}.weight": classifier.head.weight, f"{name}.bias": classifier.head.bias}
    return {name: tensor.detach().cpu() for name, tensor in state.items()}


def _equal_outputs(classifier: Classifier, network: nn.Module) -> bool:
    inputs = classifier.inputs
    generator = torch.Generator().manual_seed(0)
    images_BCHW = torch.randn(2, inputs.channels, *inputs.size, generator=generator)
    with evaluating(classifier), torch.inference_mode():
        ours, theirs = classifier(images_BCHW), network(images_BCHW)
    return bool((ours.softmax(1) - theirs.softmax(1)).abs().max() <= TOLERANCE)


def _timm_config(
    classifier: Classifier, network: nn.Module, arguments: Mapping[str, Any], license_: str
) -> dict[str, Any]:
    inputs = classifier.inputs
    low, high = inputs.intensity_range
    arch, options = VARIANTS.get(classifier.backbone.arch, (classifier.backbone.arch, {}))
    made_with = {**options, **arguments}
    if inputs.channels != 3:
        made_with["in_chans"] = inputs.channels
    is_fixed = hasattr(network, "set_input_size")
    if is_fixed:
        made_with["img_size"] = list(inputs.size)
    # timm divides by 255; what we subtract and divide by is told on that scale.
    mean = [(low + value * (high - low)) / 255 for value in inputs.mean]
    std = [value * (high - low) / 255 for value in inputs.std]
    traits: Any = network.pretrained_cfg
    return {
        "architecture": arch,
        "num_classes": len(classifier.class_names),
        "num_features": classifier.head.in_features,
        "label_names": list(classifier.class_names),
        "model_args": made_with,
        "pretrained_cfg": {
            "input_size": [inputs.channels, *inputs.size],
            "fixed_input_size": is_fixed,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "squash",  # the whole image, stretched: as regraft reads it
            "mean": mean,
            "std": std,
            "num_classes": len(classifier.class_names),
            "first_conv": traits["first_conv"],
            "classifier": traits["classifier"],
            "license": license_,
        },
        "regraft": {"inputs": asdict(inputs), "lineage": [dict(r) for r in classifier.lineage]},
    }
