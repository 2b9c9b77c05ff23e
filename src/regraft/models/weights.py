"""Transplanting: exact merge of a trained backbone into a new one, with the table of what moved.

Either every tensor is taken, or the exception is named, or nothing happens.
"""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regraft.errors import ArtefactError, UsageError, count
from regraft.models.backbone import Backbone

ADAPTATIONS = "`channels`, or `new:<pattern>` of tensors that start fresh (`new:body.features.0.*`)"


@dataclass(frozen=True)
class Move:
    """What became of the tensors of one stage in one way.

    Attributes:
        what: `taken`, `adapted` or `new`.
        num_values: Number of values in these tensors.
    """

    stage: str
    what: str
    num_tensors: int
    num_values: int


def transplant(source: Backbone, target: Backbone, adapt: Sequence[str] = ()) -> list[Move]:
    """Copies the weights of `source` into `target`, and checks that they arrived.

    Args:
        source: A trained backbone at the target's input size (see `Backbone.resized`).
        target: A new backbone; changed in place, and only if everything fits.
        adapt: Exceptions by name: `channels` averages the first convolution over its input
            channels; `new:<pattern>` leaves matching tensors as they are.

    Raises:
        ArtefactError: A tensor is missing, superfluous or of another shape.
        UsageError: An exception is not known or fits nothing.
    """
    patterns = _patterns(adapt, target)
    saved, fresh = source.state_dict(), target.state_dict()
    merged: dict[str, Tensor] = {}
    how: dict[str, str] = {}
    problems = [f"- `{name}` {_shape(saved[name])}" for name in saved if name not in fresh]
    for name, tensor in fresh.items():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            how[name] = "new"
        elif name not in saved:
            problems.append(f"+ `{name}` {_shape(tensor)}")
        elif saved[name].shape == tensor.shape:
            merged[name], how[name] = saved[name], "taken"
        elif "channels" in adapt and _differs_in_channels(saved[name], tensor):
            merged[name], how[name] = adapt_channels(saved[name], tensor.shape[1]), "adapted"
        else:
            problems.append(f"~ `{name}` {_shape(saved[name])} -> {_shape(tensor)}")
    if problems:
        raise _refusal(source, target, problems)
    target.load_state_dict(fresh | merged)
    # What nothing has trained stays so, wherever it is carried.
    target.random = frozenset(
        name for name, what in how.items() if what == "new" or name in source.random
    )
    arrived = target.state_dict()
    assert all(torch.equal(arrived[name], merged[name]) for name in merged)
    return _table(target, how)


def adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """Returns a first convolution for another number of input channels.

    Every new channel gets the mean over the old ones, scaled so that an image whose channels are
    equal gives the same output as before.
    """
    mean = weight.mean(dim=1, keepdim=True)
    return mean.repeat(1, channels, 1, 1) * (weight.shape[1] / channels)


def _patterns(adapt: Sequence[str], target: Backbone) -> list[str]:
    patterns = [entry.removeprefix("new:") for entry in adapt if entry.startswith("new:")]
    unknown = [entry for entry in adapt if entry != "channels" and not entry.startswith("new:")]
    names = list(target.state_dict())
    unused = [entry for entry in patterns if not fnmatch.filter(names, entry)]
    if unknown or unused:
        problems = [f"`{entry}` is not known" for entry in unknown]
        problems += [f"`new:{entry}` fits none of {len(names)} tensors" for entry in unused]
        raise UsageError("`--adapt` cannot be used", problems=problems, hint=f"use {ADAPTATIONS}")
    return patterns


def _differs_in_channels(saved: Tensor, fresh: Tensor) -> bool:
    same_but_inputs = saved.shape[:1] + saved.shape[2:] == fresh.shape[:1] + fresh.shape[2:]
    return saved.ndim == 4 and fresh.ndim == 4 and same_but_inputs


def _refusal(source: Backbone, target: Backbone, problems: list[str]) -> ArtefactError:
    if source.inputs.channels != target.inputs.channels:
        hint = "change the channels with `--adapt channels`, or use images of the same kind"
    else:
        hint = (
            f"leave `--arch` out, start from a Run of `{target.arch}`, or name the exceptions: "
            f"`--adapt` {ADAPTATIONS}"
        )
    shown = problems[:3] + ([f"... and {len(problems) - 3} more"] if len(problems) > 3 else [])
    return ArtefactError(
        f"the weights of `{source.arch}` ({source.inputs.channels} channels) do not fit "
        f"`{target.arch}` ({target.inputs.channels} channels): {count(len(problems), 'tensor')} "
        "differ (- only in the start, + only in the new network, ~ another shape)",
        problems=shown,
        hint=hint,
    )


def _table(target: Backbone, how: dict[str, str]) -> list[Move]:
    state = target.state_dict()
    moves = []
    for number, names in enumerate(target.stages, start=1):
        for what in ("taken", "adapted", "new"):
            chosen = [name for name in names if how[name] == what]
            if chosen:
                values = sum(state[name].numel() for name in chosen)
                moves.append(Move(f"stage {number}", what, len(chosen), values))
    return moves


def _shape(tensor: Tensor) -> str:
    return "x".join(str(side) for side in tensor.shape) or "scalar"
