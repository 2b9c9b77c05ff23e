"""Files laid out as Keras lays them out, written with h5py: small networks for the tests.

Held to files of Keras 3.15.1 itself by tests/test_keras_reference.py.
"""

import io
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from regraft.models.keras_files import VARIABLES, _snake

Array = np.ndarray[Any, np.dtype[np.float32]]
Entry = dict[str, Any]


class Net:
    """Keras layers of drawn weights, in order: `Net((24, 20, 3)).conv(6).flatten().dense(2)`."""

    def __init__(self, shape: tuple[int, int, int], *, seed: int = 0) -> None:
        self.shape = shape
        self.channels = shape[2]
        self.entries: list[Entry] = [
            {"class_name": "InputLayer", "config": {"name": "in", "batch_shape": [None, *shape]}}
        ]
        self.arrays: dict[str, dict[str, Array]] = {}
        self._random = np.random.default_rng(seed)

    def draw(self, *shape: int) -> Array:
        fan = max(int(np.prod(shape[:-1])), 1)
        return self._random.normal(0, np.sqrt(2 / fan), shape).astype(np.float32)

    def add(self, kind: str, arrays: dict[str, Array] | None = None, **config: Any) -> "Net":
        number = sum(entry["class_name"] == kind for entry in self.entries)
        name = config.pop("name", f"{_snake(kind)}_{number}" if number else _snake(kind))
        self.entries.append({"class_name": kind, "config": {"name": name, **config}})
        if arrays:
            self.arrays[name] = arrays
        return self

    def conv(self, filters: int, *, size: int = 3, bias: bool = True, **config: Any) -> "Net":
        arrays = {"kernel": self.draw(size, size, self.channels, filters)}
        if bias:
            arrays["bias"] = self.draw(1, filters)[0]
        self.channels = filters
        plain = {"strides": [1, 1], "padding": "same", "activation": "relu"}
        return self.add("Conv2D", arrays, **(plain | config))

    def norm(self, epsilon: float = 1e-3) -> "Net":
        low, high = np.float32(0.5), np.float32(1.5)
        arrays = {
            "gamma": self._random.uniform(low, high, self.channels).astype(np.float32),
            "beta": self.draw(1, self.channels)[0],
            "moving_mean": self.draw(1, self.channels)[0],
            "moving_variance": self._random.uniform(low, high, self.channels).astype(np.float32),
        }
        return self.add("BatchNormalization", arrays, epsilon=epsilon, center=True, scale=True)

    def pool(self) -> "Net":
        return self.add("MaxPooling2D", pool_size=[2, 2], strides=[2, 2], padding="valid")

    def dense(self, inputs: int, units: int, activation: str = "softmax") -> "Net":
        arrays = {"kernel": self.draw(inputs, units), "bias": self.draw(1, units)[0]}
        return self.add("Dense", arrays, activation=activation)

    def config(self) -> dict[str, Any]:
        return {"class_name": "Sequential", "config": {"name": "net", "layers": self.entries}}


def write_keras(net: Net, path: Path) -> Path:
    inside = io.BytesIO()
    with h5py.File(inside, "w") as file:
        _count(net, file)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", "{}")
        archive.writestr("config.json", json.dumps(net.config()))
        archive.writestr("model.weights.h5", inside.getvalue())
    return path


def write_weights(net: Net, path: Path) -> Path:
    with h5py.File(path, "w") as file:
        _count(net, file)
    return path


def write_whole(net: Net, path: Path) -> Path:
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = json.dumps(net.config())
        _name(net, file.create_group("model_weights"))
    return path


def write_named(net: Net, path: Path) -> Path:
    """As Keras 2's `save_weights('first_try.h5')`."""
    with h5py.File(path, "w") as file:
        _name(net, file)
    return path


def write_nested(net: Net, inside: Sequence[str], listed: Sequence[str], path: Path) -> Path:
    """As `write_named`, with some layers in a network of their own, in the given order of names."""
    with h5py.File(path, "w") as file:
        outer = [name for name in net.arrays if name not in inside]
        file.attrs["layer_names"] = [b"base", *(name.encode() for name in outer)]
        _datasets(file.create_group("base"), net, listed)
        for name in outer:
            _datasets(file.create_group(name), net, [f"{name}/{v}" for v in net.arrays[name]])
    return path


LAYOUTS: dict[str, Callable[[Net, Path], Path]] = {
    "net.keras": write_keras,
    "net.weights.h5": write_weights,
    "net.h5": write_whole,
    "first_try.h5": write_named,
}


def _count(net: Net, file: Any) -> None:
    counts: dict[str, int] = {}
    layers = file.create_group("layers")
    for entry in net.entries:
        generic = _snake(entry["class_name"])
        number = counts[generic] = counts.get(generic, -1) + 1
        group = layers.create_group(f"{generic}_{number}" if number else generic)
        own = net.arrays.get(entry["config"]["name"], {})
        names = [name for name in VARIABLES.get(entry["class_name"], ()) if name in own]
        for place, name in enumerate(names):
            group.create_dataset(f"vars/{place}", data=own[name])


def _name(net: Net, group: Any) -> None:
    names = [entry["config"]["name"] for entry in net.entries]
    group.attrs["layer_names"] = [name.encode() for name in names]
    for name in sorted(names):
        listed = [f"{name}/{variable}" for variable in net.arrays.get(name, {})]
        _datasets(group.create_group(name), net, listed)


def _datasets(group: Any, net: Net, listed: Sequence[str]) -> None:
    group.attrs["weight_names"] = [f"{path}:0".encode() for path in listed]
    for path in listed:
        name, _, variable = path.partition("/")
        group.create_dataset(f"{path}:0", data=net.arrays[name][variable])
