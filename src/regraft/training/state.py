"""What a training needs to go on from where it is, by name: plain values, and tensors.

Dropout, order and augmentation follow from the seed, the step and the image, so that no random
state is among it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from regraft.errors import ArtefactError

State = Mapping[str, Tensor]


@dataclass
class Snapshot:
    """Where a training is between two of its records.

    Attributes:
        values: For JSON.
        tensors: Of all parts, as `part/name`; not copied.
    """

    values: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def put(self, part: str, state: State) -> None:
        self.tensors |= {f"{part}/{name}": tensor for name, tensor in state.items()}

    def get(self, part: str) -> dict[str, Tensor]:
        """Returns the tensors of a part by their own names; none: it was not put."""
        start = f"{part}/"
        return {n.removeprefix(start): t for n, t in self.tensors.items() if n.startswith(start)}

    def put_inner(self, part: str, inner: "Snapshot") -> None:
        self.values[part] = inner.values
        self.put(part, inner.tensors)

    def inner(self, part: str) -> "Snapshot | None":
        if part not in self.values:
            return None
        return Snapshot(self.values[part], self.get(part))


@dataclass
class Bookmark:
    """Between a generator that trains and whoever drives it.

    Attributes:
        saved: Where to go on from; None: from the beginning.
        describe: Set by the generator: where it is now. Asked between two records only. None where
            it is at no place to go on from, and before it has begun.
        judged: Set by `fit`: validation logits of the best epoch so far.
    """

    saved: Snapshot | None = None
    describe: Callable[[], Snapshot | None] = lambda: None
    judged: NDArray[np.float32] | None = None


def moments(optimizer: Optimizer, network: nn.Module) -> dict[str, Tensor]:
    """Returns the optimiser's moments as `moment/parameter`."""
    return {
        f"{moment}/{name}": tensor
        for name, parameter in network.named_parameters()
        for moment, tensor in optimizer.state.get(parameter, {}).items()
    }


def restore_moments(optimizer: Optimizer, network: nn.Module, saved: State) -> None:
    """Gives the moments back to the parameters of these names.

    Raises:
        ArtefactError: Another parameter learns now, or one no more.
    """
    names = {parameter: name for name, parameter in network.named_parameters()}
    learning = {names[p] for group in optimizer.param_groups for p in group["params"]}
    owners = {key.partition("/")[2] for key in saved}
    if owners and owners != learning:
        raise _unfitting("the optimiser's moments", sorted(owners ^ learning))
    parameters = {name: parameter for parameter, name in names.items()}
    for key, tensor in saved.items():
        moment, _, name = key.partition("/")
        parameter = parameters[name]
        like = parameter if tensor.shape == parameter.shape else tensor
        own = torch.empty_like(like, dtype=tensor.dtype, device=parameter.device)
        optimizer.state[parameter][moment] = own.copy_(tensor)


def restore(network: nn.Module, saved: State) -> None:
    """Copies tensors into the network, each in its own memory format.

    Raises:
        ArtefactError: They are not those of this network.
    """
    own = network.state_dict()
    wrong = set(own) ^ set(saved) | {
        name for name in own.keys() & saved.keys() if own[name].shape != saved[name].shape
    }
    if wrong:
        raise _unfitting("the saved weights", sorted(wrong))
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


def _unfitting(what: str, names: list[str]) -> ArtefactError:
    return ArtefactError(
        f"{what} are not those of this training",
        problems=[f"`{name}`" for name in names[:3]],
        hint="restore the Run from a copy, or train again",
    )


def differing(snapshot: Snapshot, origin: State) -> dict[str, Tensor]:
    """Returns the tensors that are not as in `origin`: what stays frozen is written once only."""
    return {
        name: tensor
        for name, tensor in snapshot.tensors.items()
        if not _equal(tensor, _of_origin(name, origin))
    }


def completed(values: dict[str, Any], names: list[str], tensors: State, origin: State) -> Snapshot:
    """Returns the whole snapshot again from what differed.

    Args:
        values: Of the snapshot.
        names: Of all its tensors.
        tensors: Those that differed.
        origin: The others.
    """
    whole = dict[str, Tensor]()
    for name in names:
        tensor = tensors[name] if name in tensors else _of_origin(name, origin)
        if tensor is None:
            raise _unfitting("the saved tensors", [name])
        whole[name] = tensor
    return Snapshot(values, whole)


def _of_origin(name: str, origin: State) -> Tensor | None:
    """Returns the tensor of the origin with the same last part of the name."""
    return origin.get(name.rpartition("/")[2])


def _equal(tensor: Tensor, other: Tensor | None) -> bool:
    if other is None or tensor.shape != other.shape or tensor.dtype != other.dtype:
        return False
    return torch.equal(tensor.detach().cpu(), other)
