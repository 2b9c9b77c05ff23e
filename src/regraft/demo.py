"""The embedded story: ten handwritten digits, then even or odd from a few of them.

The images are the 1,797 8x8 digits that come with scikit-learn (UCI, Alpaydin and Kaynak 1998).
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from regraft import api
from regraft.data.decode import encode_png
from regraft.documents import read_json
from regraft.manifests import read_document
from regraft.progress import Note, OnProgress
from regraft.run import refuse_existing
from regraft.storage import make_folder, write_file, write_json
from regraft.training.recipe import Recipe

ARCH, SIZE = "resnet10t", 32  # measured: the source learns in under 30 s on 2 cores
SOURCE_IMAGES = 1000
STORY = "story.json"
FEW = 10  # training images a class for the target, and as many to validate


def tell_story(out: Path, seeds: int, on_progress: OnProgress) -> dict[str, Any]:
    """Pretrains on ten digits, fine-tunes on even/odd, and compares with training from scratch.

    Returns:
        The comparison (see `api.compare`); `out` holds images, Runs and report.html.
    """
    refuse_existing(out)
    make_folder(out)
    write_json(out / STORY, {"schema": 1, "verb": "demo", "seeds": seeds})
    return resume_story(out, on_progress)


def is_story(out: Path) -> bool:
    return (out / STORY).is_file()


def resume_story(out: Path, on_progress: OnProgress) -> dict[str, Any]:
    """Does what is not done yet of the story, and returns the comparison."""
    source, target = out / "data" / "ten-digits", out / "data" / "even-odd"
    first, verdict = out / "source", out / "comparison"
    if (first / "run.json").is_file():
        api.resume(first, on_progress=on_progress)
    else:  # nobody has read the images yet
        write_digits(source, target)
        on_progress(Note("1. pretrain on Dataset1: ten digits, from random weights"))
        recipe = Recipe.scratch().changed({"image_size": SIZE, "epochs": 10, "channels": 3})
        api.pretrain(source, out=first, arch=ARCH, recipe=recipe, on_progress=on_progress)
    if (verdict / "asked.json").is_file():
        api.resume(verdict, on_progress=on_progress)
        comparison: dict[str, Any] = read_document(verdict, "comparison.json")
        return comparison
    found = api.evaluate(first, source, on_progress=on_progress)["accuracy"]["value"]
    on_progress(Note(f"   test accuracy on ten digits: {found:.3f}"))
    on_progress(Note(f"2. transfer to Dataset2: even or odd, {FEW} images a class; and a control"))
    return api.compare(
        target,
        out=verdict,
        start=first,
        seeds=int(read_json(out / STORY)["seeds"]),
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
        write_file(path / f"{number:04d}.png", encode_png(image))
