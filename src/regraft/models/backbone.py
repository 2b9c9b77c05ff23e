"""Backbone: a network from images to features; the only file that imports timm.

B batch, C channels, H height, W width, D features, N tokens.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from regraft.engine import evaluating
from regraft.errors import ArtefactError, RegraftError, UsageError, shorten
from regraft.inputs import InputSpec
from regraft.models.stages import Cut, called, dry_run, find_cut, run_above, run_below, stages

# Networks of timm with options of it: as Keras computes them, with zeros below and right of a map
# whose side is even, and its epsilon. Held to Keras' outputs by tests/test_keras_reference.py.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "keras_mobilenetv2_100": ("mobilenetv2_100", {"pad_type": "same", "bn_eps": 1e-3}),
}
NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


SPARE_VALUES = 10_000_000  # of children that are dropped, and never saved; assumed


class Backbone(nn.Module):
    """Images to features: a network without its classifier, ending in global average pooling.

    For a timm architecture that is `forward_features` and a mean over positions, with the norm that
    some have behind it (ConvNeXt). A neck that belongs to the classifier (VGG's fc6 and fc7, 119.5
    of its 134.3 million parameters) is left out, so any input size from the network's smallest
    works.

    Attributes:
        arch: A timm name, or `file.py:factory` / `package.module:factory` of the user's.
        inputs: What it expects of an image.
        width: Number of features, measured by one forward pass.
        stages: Names of the tensors of each stage, from the stem to the top; together all.
        random: Names of the tensors that nothing has trained or transplanted yet.
    """

    def __init__(self, arch: str, body: nn.Module, inputs: InputSpec) -> None:
        super().__init__()
        # The file's place is nobody's business: artefacts hold no paths.
        self.arch = Path(arch).name if is_own(arch) else arch
        self.body = body
        self.inputs = inputs
        self.random = frozenset(self.state_dict())
        children = dict(body.named_children())
        self._pool = next((name for name in children if _is_normed_pool(children[name])), None)
        self.width = self._measured_width()
        groups, self._ends = stages(body)
        self.stages = tuple(tuple(f"body.{name}" for name in group) for group in groups)

    @classmethod
    def create(cls, arch: str, inputs: InputSpec, *, seed: int | None = 0) -> "Backbone":
        """Returns the architecture with weights drawn from `seed`; nothing is ever downloaded.

        Args:
            arch: See the class.
            inputs: What it is to expect.
            seed: None: all weights will be loaded, and are not drawn (half of the time it takes).

        Raises:
            UsageError: The architecture is unknown, or does not work at this input size.
        """
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed or 0)
                if is_own(arch):  # it may draw what its state does not hold
                    return cls(arch, _own_network(arch, inputs), inputs)
                with _Undrawn() if seed is None else nullcontext():  # type: ignore[no-untyped-call]
                    body = _timm_network(arch, inputs)
                return cls(arch, body, inputs)
        except RegraftError:
            raise
        except Exception as error:  # networks, those of users above all, may raise anything
            height, width = inputs.size
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UsageError(
                f"`{arch}` does not work on images of {inputs.channels} channels and "
                f"{height}x{width} px: {reason}",
                hint="check what the network expects: `--image-size`, and the images' channels",
            ) from error

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Returns features_BD."""
        return self._features(self._maps(images_BCHW))

    def stage_features(self, images_BCHW: Tensor) -> list[Tensor]:
        """Returns the pooled outputs of each stage, from the stem to the top; the last ones are
        what `forward` returns. A stage of a user's network that gives no maps is left out.
        """
        found: list[Tensor] = []

        def keep(_module: nn.Module, _given: object, output: object) -> None:
            if isinstance(output, Tensor) and output.ndim in (2, 3, 4):
                found.append(self._pooled(output))

        hooks = [
            self.body.get_submodule(end).register_forward_hook(keep) for end in self._ends[:-1]
        ]
        try:
            top = self(images_BCHW)
        finally:
            for hook in hooks:
                hook.remove()
        return [*found, top]

    def stage_maps(self, images_BCHW: Tensor) -> tuple[list[Tensor], Tensor]:
        """Returns the maps of each stage that gives some, BCHW, and features_BD made of them."""
        found: list[Tensor] = []

        def keep(_module: nn.Module, _given: object, output: object) -> object:
            if not isinstance(output, Tensor) or output.ndim not in (3, 4):
                return output
            found.append(output)
            return output.clone()  # what follows may write into it

        hooks = [self.body.get_submodule(end).register_forward_hook(keep) for end in self._ends]
        try:
            features_BD = self(images_BCHW)
        finally:
            for hook in hooks:
                hook.remove()
        return found, features_BD

    def as_maps(self, output: Tensor) -> Tensor:
        """Returns the output of a stage as BCHW: tokens go where their patches lie."""
        if output.ndim == 4:
            is_last = getattr(self.body, "output_fmt", None) == "NHWC"
            return output.permute(0, 3, 1, 2) if is_last else output
        patches_BND = output[:, getattr(self.body, "num_prefix_tokens", 0) :]
        height, width = self.inputs.size
        rows = max(1, round((patches_BND.shape[1] * height / width) ** 0.5))
        columns = patches_BND.shape[1] // rows
        number, width = len(patches_BND), patches_BND.shape[2]
        grid = patches_BND[:, : rows * columns].reshape(number, rows, columns, width)
        return grid.permute(0, 3, 1, 2)

    def cut(self, num_frozen: int) -> Cut | None:
        """Returns the place above the lowest stages; None where the network cannot be cut there."""
        if num_frozen == len(self.stages):
            return Cut("", ())
        height, width = self.inputs.size
        example = next(self.parameters())
        generator = torch.Generator().manual_seed(0)
        shape = (2, self.inputs.channels, height, width)
        images_BCHW = torch.randn(shape, generator=generator).to(example)
        with evaluating(self):
            return find_cut(self.body, self._maps, self._ends[num_frozen - 1], images_BCHW)

    def below(self, cut: Cut, images_BCHW: Tensor) -> Tensor:
        """Returns the activations at the cut; features_BD where nothing lies above it."""
        if not cut.below:
            return self(images_BCHW)  # type: ignore[no-any-return]
        return run_below(self.body, self._maps, cut, images_BCHW)

    def above(self, cut: Cut, activations: Tensor) -> Tensor:
        """Returns features_BD from the activations at the cut."""
        if not cut.below:
            return activations
        return self._features(run_above(self.body, cut, activations))

    def _maps(self, images_BCHW: Tensor) -> Tensor:
        forward: Callable[[Tensor], Tensor] = getattr(self.body, "forward_features", self.body)
        return forward(images_BCHW)

    def _features(self, maps: Tensor) -> Tensor:
        """Returns features_BD from the last maps."""
        if self._pool is None:
            return self._pooled(maps)
        features: Tensor = self.body.get_submodule(self._pool)(maps)
        return features

    def _pooled(self, maps: Tensor) -> Tensor:
        if maps.ndim == 4:
            channels_last = getattr(self.body, "output_fmt", None) == "NHWC"
            return maps.mean(dim=(1, 2) if channels_last else (2, 3))
        if maps.ndim == 3:
            patches_BND = maps[:, getattr(self.body, "num_prefix_tokens", 0) :]
            return patches_BND.mean(dim=1)
        return maps

    def resized(self, size: tuple[int, int]) -> "Backbone":
        """Returns the backbone for another input size.

        Position embeddings are interpolated by timm, in a copy; other networks keep their weights,
        and share them with the original.
        """
        body = self.body
        if size != self.inputs.size and hasattr(body, "set_input_size"):
            body = deepcopy(body)
            body.set_input_size(img_size=size)  # type: ignore[operator]
        resized = Backbone(self.arch, body, replace(self.inputs, size=size))
        resized.random = self.random
        return resized

    def stage_modules(self, stage: int) -> Iterator[nn.Module]:
        """Yields the modules of one stage; what has no tensors (dropout) goes with those before."""
        stage_of = {tensor: number for number, names in enumerate(self.stages) for tensor in names}
        current = 0
        for name, module in self.named_modules():
            own = next(iter(module.state_dict(prefix=f"{name}." if name else "")), None)
            current = current if own is None else stage_of[own]
            if current == stage:
                yield module

    @property
    def is_random(self) -> bool:
        """Whether nothing has trained or transplanted any of its weights yet."""
        return len(self.random) == len(self.state_dict())

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def normalisation(self) -> str:
        """`batch`, `other` (layer or group) or `none`: what sets sensible learning rates."""
        found = [module for module in self.modules() if isinstance(module, NORMS)]
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in found):
            return "batch"
        return "other" if found else "none"

    def _measured_width(self) -> int:
        with evaluating(self):
            features = dry_run(self, self.forward, (2, self.inputs.channels, *self.inputs.size))
        if not isinstance(features, Tensor) or features.ndim != 2 or 0 in features.shape:
            raise ValueError(f"gives {getattr(features, 'shape', type(features))}, not features")
        return int(features.shape[1])


class _Undrawn(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Leaves tensors as they are where random numbers would be drawn into them."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        drawn = func in (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default)
        return args[0] if drawn else func(*args, **(kwargs or {}))


def _timm_network(arch: str, inputs: InputSpec) -> nn.Module:
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
        if name not in used and has_tensors and not _is_normed_pool(module):
            setattr(body, name, nn.Identity())


def _is_normed_pool(module: nn.Module) -> bool:
    """Whether it is timm's pooling with a norm behind it, and nothing else that has tensors."""
    owners = [inner for inner in module.modules() if any(True for _ in inner.parameters(False))]
    is_normed = bool(owners) and all(isinstance(inner, NORMS) for inner in owners)
    return is_normed and hasattr(module, "global_pool")


def _own_network(arch: str, inputs: InputSpec) -> nn.Module:
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
