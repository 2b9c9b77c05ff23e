"""The usual torch loop: torchvision's ImageFolder, a DataLoader with two workers, a timm network.

    python jobs_torch.py JOB FOLDER PRECISION

Prints one line of JSON. The peers' best documented settings: the same images, size, batches,
epochs and start weights as ours.
"""

import json
import sys
import time
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder


def loader(
    folder: Path, size: int, batch: int, *, shuffle: bool, norm: tuple[float, float] = (0.5, 0.25)
) -> DataLoader[object]:
    steps = transforms.Compose(
        [
            transforms.Resize((size, size)),
            transforms.ToTensor(),
            transforms.Normalize([norm[0]] * 3, [norm[1]] * 3),
        ]
    )
    return DataLoader(
        ImageFolder(str(folder), steps),
        batch,
        shuffle=shuffle,
        num_workers=2,
        persistent_workers=True,
    )


class Vgg(nn.Module):
    """timm's VGG16 without its neck, as ours: features, average pooling, one linear layer."""

    def __init__(self, weights: Path | None, num_classes: int) -> None:
        super().__init__()
        self.features = timm.create_model("vgg16", num_classes=0, mlp_ratio=1 / 512).features
        if weights is not None:
            state = load_file(weights)
            prefix = "backbone.body.features."
            own = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
            self.features.load_state_dict(own)
        self.head = nn.Linear(512, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images).mean(dim=(2, 3)))
        return logits


def frozen(folder: Path, precision: str, epochs: int) -> dict[str, object]:
    """Every epoch decodes every image and runs the frozen network, as most scripts do; and every
    epoch is judged on the test images, as the original script does.
    """
    network = Vgg(folder / "start" / "final" / "model.safetensors", 2)
    network.features.requires_grad_(False)
    inputs = json.loads((folder / "start" / "final" / "model.json").read_text())["inputs"]
    norm = inputs["mean"][0], inputs["std"][0]
    train = loader(folder / "frozen" / "train", 128, 32, shuffle=True, norm=norm)
    test = loader(folder / "frozen" / "test", 128, 32, shuffle=False, norm=norm)
    optimizer = torch.optim.Adam(network.head.parameters(), 1e-3)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    began = time.perf_counter()
    for _ in range(epochs):
        for images, labels in train:
            with autocast:
                loss = nn.functional.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        right = 0
        with torch.no_grad(), autocast:
            for images, labels in test:
                right += int((network(images).argmax(1) == labels).sum())
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "accuracy": right / len(test.dataset)}  # type: ignore[arg-type]


def scratch(folder: Path, arch: str) -> dict[str, object]:
    """One epoch of a whole network, contiguous float32."""
    network = Vgg(None, 3) if arch == "vgg16" else timm.create_model(arch, num_classes=3)
    images = loader(folder / "scratch" / "train", 224, 16, shuffle=True)
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9)
    next(iter(images))  # the workers have started
    began = time.perf_counter()
    for batch, labels in images:
        loss = nn.functional.cross_entropy(network(batch), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return {"seconds": time.perf_counter() - began}


def decode(folder: Path) -> dict[str, object]:
    """One pass over large JPEGs."""
    images = loader(folder / "jpeg", 224, 32, shuffle=False)
    began = time.perf_counter()
    number = sum(len(batch) for batch, _ in images)
    return {"seconds": time.perf_counter() - began, "images": number}


def predict(folder: Path) -> dict[str, object]:
    """VGG16 at 224 px over files."""
    network = Vgg(None, 3).eval()
    images = loader(folder / "predict", 224, 32, shuffle=False)
    began = time.perf_counter()
    with torch.inference_mode():
        number = sum(len(network(batch)) for batch, _ in images)
    return {"seconds": time.perf_counter() - began, "images": number}


if __name__ == "__main__":
    job, place = sys.argv[1], Path(sys.argv[2])
    jobs = {
        "frozen-fp32": lambda: frozen(place, "fp32", int(sys.argv[3])),
        "frozen-bf16": lambda: frozen(place, "bf16", int(sys.argv[3])),
        "scratch-vgg16": lambda: scratch(place, "vgg16"),
        "scratch-resnet50": lambda: scratch(place, "resnet50"),
        "decode": lambda: decode(place),
        "predict": lambda: predict(place),
    }
    print(json.dumps(jobs[job]()))
