"""Stages of a network, and the cuts between them: running only what lies below or above one.

B batch, C channels, H height, W width.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Cut:
    """A place between two stages.

    Attributes:
        below: Name of the last module below it; empty where nothing lies above.
        above: Names of the modules above it: one after the other they give the last maps.
    """

    below: str
    above: tuple[str, ...]


def stages(body: nn.Module) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """Groups the tensors of a network, from the stem to the top.

    timm names the module that ends each stage (`feature_info`); a user's network is cut at its
    top-level children. Tensors after the last boundary belong to the last stage.

    Returns:
        The names of each stage's tensors, and of the module that ends it.
    """
    info = getattr(body, "feature_info", None)
    if info is None:
        ends = [name for name, _ in body.named_children()]
    else:
        ends = [entry["module"] for entry in getattr(info, "info", info)]
    order = {name: position for position, (name, _) in enumerate(body.named_modules())}
    last_of = {
        end: max(place for name, place in order.items() if f"{name}.".startswith(f"{end}."))
        for end in ends
    }
    groups: list[list[str]] = [[] for _ in ends] or [[]]
    for tensor in body.state_dict():
        place = order[tensor.rpartition(".")[0]]
        # A tensor of the network itself (a position embedding) has place 0: the stem.
        stage = next((i for i, end in enumerate(ends) if place <= last_of[end]), len(groups) - 1)
        groups[stage].append(tensor)
    kept = [(tuple(group), end) for group, end in zip(groups, ends or [""], strict=True) if group]
    return tuple(group for group, _ in kept), tuple(end for _, end in kept)


def find_cut(body: nn.Module, forward: Forward, end: str, images_BCHW: Tensor) -> Cut | None:
    """Returns the cut above the module `end`, or None where the network is no chain there.

    Modules without tensors that follow (a max-pooling) are counted below it: less to store. That
    the parts give the whole again, bit for bit, is tried on `images_BCHW`.
    """
    links = _chain(body, forward, end, images_BCHW)
    if end not in links:
        return None
    place = links.index(end) + 1
    while place < len(links) and not body.get_submodule(links[place]).state_dict():
        place += 1
    cut = Cut(links[place - 1], tuple(links[place:]))
    with torch.no_grad():
        again = run_above(body, cut, run_below(body, forward, cut, images_BCHW))
        return cut if torch.equal(again, forward(images_BCHW)) else None


def run_below(body: nn.Module, forward: Forward, cut: Cut, images_BCHW: Tensor) -> Tensor:
    """Returns the activations at the cut; what lies above is never computed."""

    def stop(_module: nn.Module, _given: object, output: Tensor) -> None:
        raise _Reached(output)

    handle = body.get_submodule(cut.below).register_forward_hook(stop)
    try:
        forward(images_BCHW)
    except _Reached as reached:
        return reached.activations
    finally:
        handle.remove()
    raise AssertionError(f"{cut.below} was not called")


def run_above(body: nn.Module, cut: Cut, activations: Tensor) -> Tensor:
    """Returns the network's last maps from the activations at the cut."""
    for name in cut.above:
        activations = body.get_submodule(name)(activations)
    return activations


class _Reached(Exception):
    def __init__(self, activations: Tensor) -> None:
        super().__init__()
        self.activations = activations


def dry_run(module: nn.Module, forward: Forward, shape: tuple[int, ...]) -> Tensor:
    """Returns what a method of a module gives for images of this shape.

    Nothing is computed: the tensors are on the `meta` device and have shapes only. Where a network
    cannot do that (it looks at values), it sees zeros.
    """
    tensors = chain(module.named_parameters(), module.named_buffers())
    shapes = {f"module.{name}": tensor.to("meta") for name, tensor in tensors}
    with torch.no_grad():
        try:
            images_BCHW = torch.empty(shape, device="meta")
            return torch.func.functional_call(_Calling(module, forward), shapes, images_BCHW)  # type: ignore[no-any-return]
        except RuntimeError:  # NotImplementedError is one
            return forward(torch.zeros(shape))  # and raises what is wrong with the network itself


class _Calling(nn.Module):
    """A module whose `forward` is a method of another."""

    def __init__(self, module: nn.Module, method: Forward) -> None:
        super().__init__()
        self.module = module
        self.method = method

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.method(images_BCHW)


def called(
    modules: Iterable[tuple[str, nn.Module]], forward: Forward, images_BCHW: Tensor
) -> list[str]:
    """Returns the names of these modules that a forward pass calls, in the order of the calls."""
    names: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: names.append(name)

    hooks = [module.register_forward_hook(note(name)) for name, module in modules]
    with torch.no_grad():
        forward(images_BCHW)
    for hook in hooks:
        hook.remove()
    return names


def _chain(body: nn.Module, forward: Forward, end: str, images_BCHW: Tensor) -> list[str]:
    """Returns the modules that are called, in their order, opened up where `end` lies inside."""

    def links(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if end.startswith(f"{name}.") or not name:
            for child, inner in module.named_children():
                yield from links(f"{name}.{child}" if name else child, inner)
        else:
            yield name, module

    return called(links("", body), forward, images_BCHW)
