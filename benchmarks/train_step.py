"""Images a second of one training step: this package's engine beside the usual torch loop.

    make bench

Both train the same plain VGG16 (timm, no classifier neck) on the same random images, one after the
other in one process. Prints one JSON document; the ratio is what travels between machines.
"""

import json
import platform
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from regraft.engine import Engine
from regraft.inputs import InputSpec
from regraft.models.backbone import Backbone
from regraft.models.classifier import Classifier

STEPS, BATCH = 6, 16


def images_per_s(step: Callable[[], None]) -> float:
    step()  # warm-up
    start = time.monotonic()
    for _ in range(STEPS):
        step()
    return STEPS * BATCH / (time.monotonic() - start)


def usual_step(network: nn.Module, images_BCHW: Tensor, labels_B: Tensor) -> Callable[[], None]:
    """What most scripts do: float32, contiguous, SGD as it comes."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images_BCHW), labels_B).backward()
        optimizer.step()

    return step


def our_step(
    network: nn.Module, images_BCHW: Tensor, labels_B: Tensor, engine: Engine
) -> Callable[[], None]:
    engine.place(network)
    images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        with engine.autocast():
            logits_BK = network(images_BCHW)
        engine.backward(nn.functional.cross_entropy(logits_BK, labels_B))
        optimizer.step()

    return step


def main() -> None:
    engine = Engine("cpu")
    rows = []
    for size in (64, 128):
        inputs = InputSpec((size, size), 3)
        images_BCHW, labels_B = torch.randn(BATCH, 3, size, size), torch.arange(BATCH) % 3
        speeds = {}
        for name in ("usual", "regraft"):
            network = Classifier(Backbone.create("vgg16", inputs), ("a", "b", "c"))
            if name == "usual":
                step = usual_step(network, images_BCHW, labels_B)
            else:
                step = our_step(network, images_BCHW, labels_B, engine)
            speeds[name] = images_per_s(step)
        rows.append({"arch": "vgg16", "size": size, **speeds})
        rows[-1]["ratio"] = speeds["regraft"] / speeds["usual"]
    machine = {"processor": platform.processor() or platform.machine(), **engine.describe()}
    print(json.dumps({"batch": BATCH, "machine": machine, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
