"""Fetches CIFAR-10 and MNIST into DATA/cifar10 and DATA/mnist. Runs only when you ask for it.

python download.py DATA
"""

import sys
from pathlib import Path


def main(data: Path) -> None:
    """Downloads both datasets by torchvision, which checks their MD5 sums."""
    from torchvision.datasets import CIFAR10, MNIST

    MNIST(data / "fetched", download=True)
    (data / "fetched" / "MNIST" / "raw").rename(data / "mnist")
    for split in ("train", "test"):
        images = CIFAR10(data / "fetched", train=split == "train", download=True)
        for number, (image, label) in enumerate(images):
            folder = data / "cifar10" / split / images.classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{number:05d}.png")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
