"""Architectures: from a name to a network with random weights; the only file that imports timm."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from regraft.engine import evaluating
from regraft.errors import ArtefactError, UsageError, shorten
from regraft.inputs import InputSpec
from regraft.models.stages import called, dry_run

# Networks of timm with options of it: as Keras computes them, with zeros below and right of a map
# whose side is even, and its epsilon. Held to Keras' outputs by tests/test_keras_reference.py.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "keras_mobilenetv2_100": ("mobilenetv2_100", {"pad_type": "same", "bn_eps": 1e-3}),
}
NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
SPARE_VALUES = 10_000_000  # of children that are dropped, and never saved; assumed


class Undrawn(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Leaves tensors as they are where random numbers would be drawn into them."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        drawn = func in (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default)
        return args[0] if drawn else func(*args, **(kwargs or {}))


def timm_network(arch: str, inputs: InputSpec) -> nn.Module:
    import timm

    arch, options = VARIANTS.get(arch, (arch, {}))
    if not timm.is_model(arch):
        close = get_close_matches(arch, timm.list_models(), n=3)
        raise UsageError(
            f"timm has no architecture `{arch}`",
            hint=f"perhaps {shorten(close)}" if close else "for your own write `file.py:factory`",
        )
    if "." in arch:  # `resnet18.a1_in1k`: a network and the name of weights for it
        name, _, weights = arch.partition(".")
        raise UsageError(
            f"`{arch}` asks for the weights `{weights}` of somebody else, which are never used",
            hint=f"write `{name}`: the same network, from random weights",
        )
    # timm would draw 120 million values for VGG's neck, to be dropped below: make it narrow.
    if arch.startswith("vgg"):
        options = {"mlp_ratio": 1 / 512}
    body: nn.Module = timm.create_model(
        arch, pretrained=False, num_classes=0, in_chans=inputs.channels, **options
    )
    if hasattr(body, "set_input_size"):
        body.set_input_size(img_size=inputs.size)  # type: ignore[operator]
    _drop_unused(body, inputs)
    return body


def whole_network(
    arch: str, inputs: InputSpec, num_classes: int, arguments: Mapping[str, Any] | None = None
) -> nn.Module | None:
    """Returns a network of timm with its own classifier, as others train it; None for own ones."""
    import timm

    name, options = VARIANTS.get(arch, (arch, {}))
    if is_own(arch) or not timm.is_model(name):
        return None
    options = {**options, **(arguments or {})}
    network: nn.Module = timm.create_model(
        name, pretrained=False, num_classes=num_classes, in_chans=inputs.channels, **options
    )
    if hasattr(network, "set_input_size"):
        network.set_input_size(img_size=inputs.size)  # type: ignore[operator]
    return network.eval()


def refuse_larger(arch: str, inputs: InputSpec, num_values: int) -> None:
    """Refuses to build a network that is far larger than the weights that are to fill it.

    It is built without memory first: a small file may name a network of gigabytes.

    Raises:
        UsageError: It is, or there is no such network.
    """
    import timm

    if is_own(arch) or not timm.is_model(arch):
        return  # of the user's own code, or told by `Backbone.create`
    with torch.device("meta"):
        narrow = {"mlp_ratio": 1 / 512} if arch.startswith("vgg") else {}
        body = timm.create_model(arch, num_classes=0, in_chans=inputs.channels, **narrow)
    needed = sum(tensor.numel() for tensor in body.state_dict().values())
    if needed > 2 * num_values + SPARE_VALUES:
        raise UsageError(
            f"`{arch}` has {needed:,} values, the file has {num_values:,}",
            hint="check where the file comes from",
        )


def load_timm_folder(folder: Path) -> nn.Module:
    """Returns the network of a folder in timm's form, as everyone else would load it."""
    import timm

    network: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return network.eval()


def _drop_unused(body: nn.Module, inputs: InputSpec) -> None:
    """Replaces the children that `forward_features` never calls: they belong to the classifier."""
    parts = [(name, inner) for name, module in body.named_children() for inner in module.modules()]
    forward: Callable[[Tensor], Tensor] = body.forward_features  # type: ignore[assignment]

    def dry(_images: Tensor) -> Tensor:
        return dry_run(body, forward, (1, inputs.channels, *inputs.size))

    with evaluating(body):
        used = called(parts, dry, torch.empty(0))
    for name, module in list(body.named_children()):
        has_tensors = any(True for _ in module.parameters())
        if name not in used and has_tensors and not is_normed_pool(module):
            setattr(body, name, nn.Identity())


def is_normed_pool(module: nn.Module) -> bool:
    """Whether it is timm's pooling with a norm behind it, and nothing else that has tensors."""
    owners = [inner for inner in module.modules() if any(True for _ in inner.parameters(False))]
    is_normed = bool(owners) and all(isinstance(inner, NORMS) for inner in owners)
    return is_normed and hasattr(module, "global_pool")


def own_network(arch: str, inputs: InputSpec) -> nn.Module:
    factory = _factory(arch)
    body = factory(inputs.channels)
    if not isinstance(body, nn.Module):
        raise UsageError(
            f"`{arch}` returned {type(body).__name__}; expected a torch.nn.Module",
            hint="write `def factory(channels): return nn.Sequential(...)`, images to features",
        )
    return body


def _factory(arch: str) -> Callable[[int], Any]:
    place, _, name = arch.rpartition(":")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # as an import does: dataclasses look it up
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        return getattr(module, name)  # type: ignore[no-any-return]
    except Exception as error:  # code of the user's may raise anything
        raise UsageError(
            f"`{arch}` cannot be loaded: {type(error).__name__}: {error}",
            hint="write `path/to/file.py:factory` or `package.module:factory`",
        ) from error


def is_own(arch: str) -> bool:
    """Whether the architecture is code of the user's rather than a name that timm knows."""
    return ":" in arch


def refuse_unnamed_code(saved: str, named: str | None) -> str:
    """Returns the architecture to build for a saved one; own code must be named again.

    Raises:
        ArtefactError: The artefact would import code that the user has not named now.
    """
    if not is_own(saved):
        return saved
    if named is not None and is_own(named):
        return named
    raise ArtefactError(
        f"the model was built by `{saved}`, and code named in a file is never run unasked",
        hint=f"name it again: `--arch {saved}`",
    )
