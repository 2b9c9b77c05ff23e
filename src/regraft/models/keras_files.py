"""Files that Keras wrote, read by h5py alone: arrays and the list of layers, never code.

The only file that imports h5py. Three layouts:

- `.keras`: a zip of config.json and model.weights.h5;
- `.weights.h5`: `layers/conv2d_1/vars/0`, named by class and counted, whatever the layers are
  called; as text `conv2d_10` comes before `conv2d_2`;
- `.h5` of `model.save`, and of Keras 2's `save_weights` without the list of layers: one group a
  layer, `layer_names` in order; a network inside another is one group, its trainable weights first.

Held to files of Keras 3.15 by tests/test_keras_reference.py.
"""

import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from regraft.errors import ArtefactError, EnvironmentFault
from regraft.models.layers import Array, KerasFile, Layer

HDF5, ZIP = b"\x89HDF\r\n\x1a\n", b"PK\x03\x04"
# Of a group that names its arrays by number: in the order in which Keras makes them.
VARIABLES = {
    "Conv2D": ("kernel", "bias"),
    "DepthwiseConv2D": ("kernel", "bias"),
    "Dense": ("kernel", "bias"),
    "BatchNormalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "Normalization": ("mean", "variance", "count"),
}
NETWORKS = {"Functional", "Sequential", "Model"}
MOST_BYTES_PER_BYTE = 4  # Keras does not compress; as for zip members, assumed
MOST_ARRAYS = 100_000  # assumed; the largest of Keras' collection has about 3,000
MOST_CONFIG_BYTES = 64 * 2**20  # assumed; EfficientNetB7's is 0.4 MB

Node = Any  # h5py has no types


def read_keras(path: Path) -> KerasFile:
    """Returns the layers of a `.keras`, `.weights.h5` or `.h5` file.

    Raises:
        ArtefactError: It is none of them, is damaged, or points outside itself.
        EnvironmentFault: h5py is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        raise EnvironmentFault(
            "files of Keras are read by h5py, which is not installed",
            hint="pip install 'regraft[keras]'",
        ) from error
    try:
        with path.open("rb") as stream:
            magic = stream.read(8)
        if magic.startswith(ZIP):
            return _read_archive(path, h5py)
        with h5py.File(path, "r") as file:
            nodes = _checked(file, path.stat().st_size, h5py)
            if "layers" in file:
                return KerasFile("Keras .weights.h5", tuple(_counted_alone(nodes, "layers")), None)
            return _read_legacy(file, nodes)
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, zipfile.BadZipFile) as error:
        raise refused(path, f"{type(error).__name__}: {error}".splitlines()[0]) from error


def refused(path: Path, reason: str) -> ArtefactError:
    return ArtefactError(
        f"`{path.name}` cannot be imported: {reason}",
        hint="save it again with Keras: `model.save('model.keras')`",
    )


def _read_archive(path: Path, h5py: Any) -> KerasFile:
    with zipfile.ZipFile(path) as archive:
        names = {"config.json", "model.weights.h5"}
        if missing := names - set(archive.namelist()):
            raise ValueError(f"it is a zip without `{min(missing)}`, so not a .keras file")
        sizes = {name: archive.getinfo(name).file_size for name in names}
        whole = path.stat().st_size
        if sizes["config.json"] > MOST_CONFIG_BYTES or sizes["model.weights.h5"] > (
            MOST_BYTES_PER_BYTE * whole
        ):
            raise ValueError("its members unpack to far more than the file holds")
        config = json.loads(archive.read("config.json"))
        content = archive.read("model.weights.h5")
    with h5py.File(io.BytesIO(content), "r") as file:
        nodes = _checked(file, len(content), h5py)
    layers = tuple(_counted_as_listed(nodes, "layers", config["config"]["layers"]))
    return KerasFile("Keras .keras", layers, _input_shape(config))


def _checked(file: Node, size_bytes: int, h5py: Any) -> dict[str, Array]:
    """Returns every array of the file, by its path, or refuses the file.

    Nothing may lie outside it (external and soft links, external storage, virtual datasets), and
    nothing may unpack to far more than it holds.
    """
    found: dict[str, Array] = {}
    pending, total = [("", file)], 0
    while pending:
        prefix, group = pending.pop()
        for name in group:
            path = f"{prefix}/{name}".lstrip("/")
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise ValueError(f"`{path}` is a link to another place")
            node = group[name]
            if isinstance(node, h5py.Group):
                pending.append((path, node))
                continue
            if node.external or node.is_virtual:
                raise ValueError(f"`{path}` lies outside the file")
            total += node.nbytes
            if total > MOST_BYTES_PER_BYTE * size_bytes or len(found) > MOST_ARRAYS:
                raise ValueError("it unpacks to far more than the file holds")
            if node.dtype.kind == "f":
                found[path] = np.asarray(node[()], dtype=np.float32)
            elif node.dtype.kind not in "iu":  # counters and seeds of random layers
                raise ValueError(f"`{path}` holds {node.dtype}, not numbers")
        if len(pending) > MOST_ARRAYS:  # hard links may form a circle
            raise ValueError("its groups do not end")
    return found


def _counted_as_listed(
    arrays: Mapping[str, Array], place: str, listed: Sequence[Mapping[str, Any]]
) -> Iterator[Layer]:
    counts: dict[str, int] = {}
    for entry in listed:
        kind, config = entry["class_name"], entry["config"]
        generic = _snake(kind)
        number = counts[generic] = counts.get(generic, -1) + 1
        group = f"{place}/{generic}_{number}" if number else f"{place}/{generic}"
        if "layers" in config:
            yield from _counted_as_listed(arrays, f"{group}/layers", config["layers"])
        else:
            yield Layer(config.get("name", generic), kind, _numbered(arrays, group, kind, config),
                        config)  # fmt: skip


def _counted_alone(arrays: Mapping[str, Array], place: str) -> Iterator[Layer]:
    """Without a list: by class and number. A network inside comes first, as its top is on it."""
    groups = {path[len(place) + 1 :].split("/")[0] for path in arrays if path.startswith(place)}
    kinds = {_snake(kind): kind for kind in (*VARIABLES, *NETWORKS)}

    def order(group: str) -> tuple[bool, str, int]:
        stem, number = _split_number(group)
        return kinds.get(stem) not in NETWORKS, stem, number

    for group in sorted(groups, key=order):
        stem, _ = _split_number(group)
        kind = kinds.get(stem, stem)
        if kind in NETWORKS or any(path.startswith(f"{place}/{group}/layers/") for path in arrays):
            yield from _counted_alone(arrays, f"{place}/{group}/layers")
        else:
            own = _numbered(arrays, f"{place}/{group}", kind, None)
            yield Layer(group, kind, own)


def _numbered(
    arrays: Mapping[str, Array], group: str, kind: str, config: Mapping[str, Any] | None
) -> dict[str, Array]:
    prefix = f"{group}/vars/"
    found = {
        path[len(prefix) :]: array for path, array in arrays.items() if path.startswith(prefix)
    }
    names = VARIABLES.get(kind)
    if names is None:
        return found
    if kind == "BatchNormalization" and config is not None:
        left_out = {"gamma": config.get("scale", True), "beta": config.get("center", True)}
        names = tuple(name for name in names if left_out.get(name, True))
    if kind == "BatchNormalization" and len(found) != len(names):
        raise ValueError(f"`{group}` has {len(found)} arrays: which are scale and shift?")
    return {names[int(number)]: array for number, array in sorted(found.items())}


def _read_legacy(file: Node, arrays: Mapping[str, Array]) -> KerasFile:
    root = "model_weights/" if "model_weights" in file else ""
    group = file["model_weights"] if root else file
    names = _text_list(group, "layer_names")
    if not names:
        raise ValueError("it holds neither `layers` nor `layer_names`, so Keras did not write it")
    config = json.loads(file.attrs["model_config"]) if "model_config" in file.attrs else None
    inside = {name: _inside(group[name], f"{root}{name}/", arrays) for name in names}
    if config is None:
        for name in names:
            if len(inside[name]) > 1:
                _refuse_lost_order(name, _text_list(group[name], "weight_names"))
        layers = [layer for name in names for layer in _as_named(_in_order(inside[name]))]
        return KerasFile("Keras .h5 of weights", tuple(layers), None)
    listed = config["config"]["layers"]
    layers = list(_listed(listed, {owner: own for each in inside.values() for owner, own in each}))
    return KerasFile("Keras .h5", tuple(layers), _input_shape(config))


def _inside(
    group: Node, place: str, arrays: Mapping[str, Array]
) -> list[tuple[str, dict[str, Array]]]:
    """Returns the arrays of each layer in a group, in the order of its `weight_names`."""
    found: dict[str, dict[str, Array]] = {}
    for path in _text_list(group, "weight_names"):
        owner, _, variable = path.rpartition("/")
        if f"{place}{path}" in arrays:
            own = found.setdefault(owner.rpartition("/")[2] or group.name.rpartition("/")[2], {})
            named = variable.partition(":")[0].replace("depthwise_kernel", "kernel")  # of Keras 2
            own[named] = arrays[f"{place}{path}"]
    return list(found.items())


def _listed(
    listed: Sequence[Mapping[str, Any]], owned: Mapping[str, Mapping[str, Array]]
) -> Iterator[Layer]:
    for entry in listed:
        kind, config = entry["class_name"], entry["config"]
        if "layers" in config:
            yield from _listed(config["layers"], owned)
        else:
            name = config.get("name", "")
            yield Layer(name, kind, owned.get(name, {}), config)


def _in_order(inside: list[tuple[str, dict[str, Array]]]) -> list[tuple[str, dict[str, Array]]]:
    """Sorts a network without norms by the numbers in its names (`block1_conv2`, `conv2d_10`)."""
    if any("moving_mean" in own for _, own in inside):
        return inside
    return sorted(inside, key=lambda item: [int(number) for number in re.findall(r"\d+", item[0])])


def _as_named(inside: list[tuple[str, dict[str, Array]]]) -> Iterator[Layer]:
    """Yields the layers of a group where the file holds no list of layers."""
    for owner, own in inside:
        if own:
            yield Layer(owner, _kind_of(owner, own), own)


def _refuse_lost_order(name: str, listed: Sequence[str]) -> None:
    """Refuses a network inside another that was partly frozen when its weights were saved.

    Its trainable weights come first, so the order of its layers is lost. What keeps it: all learn
    (statistics last), norms alone are frozen (kernels first), or all are frozen (each layer's
    arrays together, and one convolution before the first norm, as in Keras' own networks).
    """
    owners = [path.rpartition("/")[0] for path in listed]
    norms = {owner for owner, path in zip(owners, listed, strict=True) if "moving_mean" in path}
    first = {owner: owners.index(owner) for owner in norms}
    together = sum(
        owners[place : place + owners.count(owner)] == [owner] * owners.count(owner)
        for owner, place in first.items()
    )
    kernels = [place for place, path in enumerate(listed) if "kernel" in path]
    early = sum(place < min(first.values(), default=0) for place in kernels)
    if norms and (together not in (0, len(norms)) or (together and early not in (1, len(kernels)))):
        raise ValueError(
            f"`{name}` was partly frozen when it was saved, and weights alone do not tell the "
            "order of its layers"
        )


def _kind_of(name: str, own: Mapping[str, Array]) -> str:
    """Returns the kind of a layer of which only the arrays and a name are known."""
    for kind in ("BatchNormalization", "Normalization"):
        if set(VARIABLES[kind][-2:]) & set(own):
            return kind
    if "kernel" in own and set(own) <= {"kernel", "bias"}:
        if own["kernel"].ndim == 2:
            return "Dense"
        if own["kernel"].ndim == 4:
            is_depthwise = own["kernel"].shape[3] == 1 and re.search("depthwise|dwconv", name)
            return "DepthwiseConv2D" if is_depthwise else "Conv2D"
    return "layer of " + ", ".join(sorted(own))


def _input_shape(config: Mapping[str, Any]) -> tuple[int | None, ...] | None:
    own = config["config"]
    for place in (own, *(entry["config"] for entry in own.get("layers", ()))):
        for key in ("batch_shape", "batch_input_shape", "build_input_shape"):
            if isinstance(place.get(key), list) and len(place[key]) == 4:
                return tuple(place[key][1:])
    return None


def _text_list(group: Node, name: str) -> list[str]:
    """Returns a list of names; Keras cuts one of more than 64 kB into `name0`, `name1`, ..."""
    if name in group.attrs:
        parts = [group.attrs[name]]
    else:
        numbers = range(len(group.attrs))
        parts = [group.attrs[f"{name}{i}"] for i in numbers if f"{name}{i}" in group.attrs]
    return [
        entry.decode("utf-8") if isinstance(entry, bytes) else str(entry)
        for part in parts
        for entry in part
    ]


def _snake(kind: str) -> str:
    apart = re.sub(r"(?<=.)([A-Z][a-z]+)", r"_\1", re.sub(r"\W", "", kind))
    return re.sub(r"(?<=[a-z])([A-Z])", r"_\1", apart).lower()


def _split_number(group: str) -> tuple[str, int]:
    found = re.fullmatch(r"(.*?)(?:_(\d+))?", group)
    assert found is not None
    return found[1], int(found[2] or 0)
