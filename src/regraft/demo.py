"""The embedded story: ten handwritten digits, then even or odd from a few of them.

The images are the 1,797 8x8 digits that come with scikit-learn (UCI, Alpaydin and Kaynak 1998).
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from regraft import api
from regraft.data.decode import encode_png
from regraft.progress import Note, OnProgress
from regraft.run import refuse_existing
from regraft.storage import make_folder, write_bytes
from regraft.training.recipe import Recipe

ARCH, SIZE = "resnet10t", 32  # measured: the source learns in under 30 s on 2 cores
SOURCE_IMAGES = 1000
FEW = 10  # training images a class for the target, and as many to validate


def tell_story(out: Path, seeds: int, on_progress: OnProgress) -> dict[str, Any]:
    """Pretrains on ten digits, fine-tunes on even/odd, and compares with training from scratch.

    Returns:
        The comparison (see `api.compare`); `out` holds images, Runs and report.html.
    """
    refuse_existing(out)
    source, target = out / "data" / "ten-digits", out / "data" / "even-odd"
    write_digits(source, target)
    on_progress(Note("1. pretrain on Dataset1: ten digits, from random weights"))
    first = api.pretrain(
        source,
        out=out / "source",
        arch=ARCH,
        recipe=Recipe.scratch().changed({"image_size": SIZE, "epochs": 10, "channels": 3}),
        on_progress=on_progress,
    )
    found = api.evaluate(first.folder, source, on_progress=on_progress)["accuracy"]["value"]
    on_progress(Note(f"   test accuracy on ten digits: {found:.3f}"))
    on_progress(Note(f"2. transfer to Dataset2: even or odd, {FEW} images a class; and a control"))
    return api.compare(
        target,
        out=out / "comparison",
        start=first.folder,
        seeds=seeds,
        recipe=Recipe.transfer().changed({"epochs": 40}),
        on_progress=on_progress,
    )


def write_digits(source: Path, target: Path) -> None:
    """Writes both datasets as PNG class folders; no image is in both."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * 255 / 16).astype(np.uint8)[..., None]
    seen: Counter[str] = Counter()
    for number, (image, label) in enumerate(zip(pixels, digits.target, strict=True)):
        if number < SOURCE_IMAGES:
            path = source / str(label)
        else:
            name = "even" if label % 2 == 0 else "odd"
            split = ("train", "val")[seen[name] // FEW] if seen[name] < 2 * FEW else "test"
            seen[name] += 1
            path = target / split / name
        make_folder(path)
        write_bytes(path / f"{number:04d}.png", encode_png(image))
