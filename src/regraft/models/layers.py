"""Layer: what a file of Keras says of one layer. Plain data and numpy."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer of a Keras network, in the order in which the network runs them.

    Attributes:
        kind: Keras' class name, as `Conv2D`.
        arrays: By Keras' names: `kernel`, `bias`, `gamma`, `beta`, `moving_mean`, ...
        config: What the file says of it; None where it holds weights only.
    """

    name: str
    kind: str
    arrays: Mapping[str, Array] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class KerasFile:
    """What was read.

    Attributes:
        layers: Of nested networks too, where they stand.
        input_shape: (height, width, channels) where the file says so; None for any.
    """

    format: str
    layers: tuple[Layer, ...]
    input_shape: tuple[int | None, ...] | None

    def of_kind(self, kind: str) -> list[Layer]:
        return [layer for layer in self.layers if layer.kind == kind]

    def to_flat(self) -> tuple[dict[str, Any], dict[str, Array]]:
        """Returns a JSON document and named arrays, which together say all."""
        arrays = {
            f"{number}.{name}": array
            for number, layer in enumerate(self.layers)
            for name, array in layer.arrays.items()
        }
        rows = [
            {
                "name": layer.name,
                "kind": layer.kind,
                "config": layer.config,
                "arrays": list(layer.arrays),
            }
            for layer in self.layers
        ]
        return {"format": self.format, "layers": rows, "input_shape": self.input_shape}, arrays

    @classmethod
    def from_flat(cls, document: Mapping[str, Any], arrays: Mapping[str, Array]) -> "KerasFile":
        def layers() -> Iterator[Layer]:
            for number, row in enumerate(document["layers"]):
                own = {name: arrays[f"{number}.{name}"] for name in row["arrays"]}
                yield Layer(row["name"], row["kind"], own, row["config"])

        shape = document["input_shape"]
        return cls(document["format"], tuple(layers()), None if shape is None else tuple(shape))
