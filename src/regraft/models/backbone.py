"""Backbone: a network from images to features.

B batch, C channels, H height, W width, D features, N tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from regraft.engine import evaluating
from regraft.errors import RegraftError, UsageError
from regraft.inputs import InputSpec
from regraft.models.architectures import (
    NORMS,
    Undrawn,
    is_normed_pool,
    is_own,
    own_network,
    timm_network,
)
from regraft.models.stages import Cut, dry_run, find_cut, run_above, run_below, stages


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
        self._pool = next((name for name in children if is_normed_pool(children[name])), None)
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
                    return cls(arch, own_network(arch, inputs), inputs)
                with Undrawn() if seed is None else nullcontext():  # type: ignore[no-untyped-call]
                    body = timm_network(arch, inputs)
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
