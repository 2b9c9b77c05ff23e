"""The contract of a resume: under what the same bits follow, and whether all of it is as it was."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from regraft.data.dataset import DataOptions, Dataset
from regraft.data.decode import UnreadableImage
from regraft.engine import Engine
from regraft.errors import ArtefactError, DataError, count, shorten
from regraft.evaluation.testing import labelled
from regraft.run import Run, versions


def contract(engine: Engine) -> dict[str, Any]:
    """Returns what the bits of a training depend on, besides its recipe, data and start."""
    packages = {name: number for name, number in versions().items() if name != "python"}
    packages["regraft"] = ".".join(version("regraft").split(".")[:2])
    on_cpu = engine.device.type == "cpu"
    return {
        **{key: value for key, value in engine.describe().items() if key != "cpu"},
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_bf16": [torch.cpu._is_avx512_bf16_supported(), torch.cpu._is_amx_tile_supported()],
        "ONEDNN_MAX_CPU_ISA": os.environ.get("ONEDNN_MAX_CPU_ISA", "not set"),
        "onednn": bool(torch.backends.mkldnn.enabled) if on_cpu else None,
        "memory_format": "channels_last",  # of all networks, see Engine.place
        "versions": packages,
    }


def engine_like(kept: Mapping[str, Any]) -> Engine:
    """Returns an engine like the one that described itself so."""
    return Engine(kept["device"], kept["precision"], compiles=kept["compiled"])


def refuse_other_conditions(
    before: Mapping[str, Any], engine: Engine, *, allow: bool, what: str
) -> list[str]:
    """Returns what differs from an earlier contract, where that is allowed.

    Raises:
        ArtefactError: Something does, and is not.
    """
    then, here = _flat(before), _flat(contract(engine))
    different = [
        f"{key}: {_shown(then.get(key))} then, {_shown(here.get(key))} now"
        for key in sorted(then.keys() | here.keys())
        if then.get(key) != here.get(key)
    ]
    if different and not allow:
        raise ArtefactError(
            f"{what} would not give the same bits here: {count(len(different), 'condition')} "
            f"{'differs' if len(different) == 1 else 'differ'}",
            problems=different,
            hint=f"make it as it was ({_remedies(different)}), or go on all the same with "
            "`--allow-inexact`: the report will say so",
        )
    return different


def _remedies(different: Sequence[str]) -> str:
    known = {
        "threads": "threads: OMP_NUM_THREADS",
        "ONEDNN_MAX_CPU_ISA": "the variable ONEDNN_MAX_CPU_ISA",
        "versions": "the same packages",
        "device": "`--device`",
    }
    ways = [way for key, way in known.items() if any(line.startswith(key) for line in different)]
    return ", ".join(ways) or "on the same kind of machine"


def _flat(document: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": each for inner, each in value.items()}
        else:
            flat[key] = value
    return flat


def _shown(value: Any) -> str:
    return "nothing" if value is None else str(value)


def place(dataset: Dataset) -> dict[str, Any]:
    """Returns where the data lies and how it is read, to find it again on this machine."""
    options = asdict(dataset.options)
    if dataset.options.csv is not None:
        options["csv"] = str(dataset.options.csv.resolve())
    return {"data": str(dataset.root.resolve()), "options": options}


def same_data(
    kept: Mapping[str, Any], before: Sequence[Mapping[str, Any]], data: Path | None, what: str
) -> Dataset:
    """Returns the dataset of an earlier command, without the images that were left out then.

    Args:
        kept: What `place` gave.
        before: Lines of its samples.jsonl.
        data: Where it lies now; None: where it lay.
        what: `RUN`, for the hint.

    Raises:
        DataError: It is not there, or has changed.
    """
    dataset = _found_again(kept, data, what)
    _refuse_changed_data(before, dataset)
    return _without_excluded(dataset, before)


def _found_again(kept: Mapping[str, Any], data: Path | None, what: str) -> Dataset:
    folder = data or (Path(kept["data"]) if "data" in kept else None)
    if folder is None or not folder.exists():
        told = f"is not in `{folder}` any more" if folder else "is not known to lie anywhere"
        raise DataError(
            f"the data of `{what}` {told}",
            hint=f"say where it lies: `regraft resume {what} DATA`",
        )
    options = dict(kept.get("options", {}))
    if options.get("csv") is not None:
        options["csv"] = Path(options["csv"])
    tuples = {key: tuple(value) for key, value in options.items() if isinstance(value, list)}
    return Dataset.open(folder, DataOptions(**options | tuples))


def _refuse_changed_data(before: Sequence[Mapping[str, Any]], dataset: Dataset) -> None:
    """Refuses images that are gone, new, or of another content, class or group."""
    then = {line["path"]: line for line in before if "sha256" in line}
    out = {line["path"] for line in before if "sha256" not in line}
    now = {sample.path: labelled(sample) for sample in dataset.samples}
    both = sorted(then.keys() & now.keys())
    changes = {
        "gone": sorted(then.keys() - now.keys()),
        "new": sorted(now.keys() - then.keys() - out),
        "of another content": [p for p in both if then[p]["sha256"] != now[p]["sha256"]],
        "of another class": [p for p in both if then[p]["class"] != now[p]["class"]],
        "of another group": [p for p in both if then[p]["group"] != now[p]["group"]],
    }
    problems = [
        f"{count(len(paths), 'image')} {what}: {shorten(paths)}"
        for what, paths in changes.items()
        if paths
    ]
    if problems:
        raise DataError(
            f"`{dataset.root}` has changed since the start",
            problems=problems,
            hint="restore the data as it was, or begin a new training",
        )


def _without_excluded(dataset: Dataset, before: Sequence[Mapping[str, Any]]) -> Dataset:
    reasons = {line["path"]: str(line["excluded"]) for line in before if "excluded" in line}
    out = [
        (sample, UnreadableImage("excluded", reasons[sample.path]))
        for sample in dataset.samples
        if sample.path in reasons
    ]
    return dataset.without(out) if out else dataset


def refuse_other_splits(run: Run, dataset: Dataset) -> None:
    """Refuses a dataset whose images, after all preparation, are not those of the Run in order.

    Raises:
        DataError: They are not.
    """
    now = [labelled(sample) for sample in dataset.samples]
    fields = now[0].keys()
    then = [{key: line[key] for key in fields} for line in run.samples() if "sha256" in line]
    if then != now:
        paths = [b["path"] for a, b in zip(then, now, strict=False) if a != b]
        raise DataError(
            f"`{dataset.root}` is split otherwise than at the start, e.g. {shorten(paths)}",
            hint="use the regraft version that began the training",
        )
