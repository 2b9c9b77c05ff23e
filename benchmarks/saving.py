"""How long a training of VGG16 at 224 px spends on saving what a resume needs; JSON on stdout.

python benchmarks/saving.py [--minutes 5] [--batch-size 16]
"""

import argparse
import json
import os
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from regraft import api
from regraft.training.keeping import Keeper, Stopped
from regraft.training.recipe import Recipe
from regraft.training.records import Step

SIZE = 224


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--batch-size", type=int, default=16)
    asked = parser.parse_args()
    saves: list[float] = []
    times: dict[str, float] = {}
    save = Keeper.save

    def timed(self: Keeper) -> None:
        began = time.monotonic()
        save(self)
        saves.append(time.monotonic() - began)

    def told(record: object) -> None:
        if not isinstance(record, Step):
            return
        now = time.monotonic()
        times.setdefault("began", now)
        times["steps"] = times.get("steps", 0) + 1
        if now - times["began"] > 60 * asked.minutes and "asked" not in times:
            times["asked"] = now
            os.kill(os.getpid(), signal.SIGTERM)

    Keeper.save = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as place:
        data = write_images(Path(place) / "data")
        recipe = Recipe.scratch().changed({
            "image_size": SIZE, "epochs": 10_000, "channels": 3, "batch_size": asked.batch_size,
        })  # fmt: skip
        try:
            api.pretrain(
                data, out=Path(place) / "run", arch="vgg16", recipe=recipe, on_progress=told
            )
        except Stopped:
            ended = time.monotonic()
    elapsed = times["asked"] - times["began"]
    result = {
        "steps": times["steps"],
        "seconds": round(elapsed, 1),
        "seconds_per_step": round(elapsed / times["steps"], 3),
        "saves": len(saves) - 1,
        "seconds_per_save": round(float(np.mean(saves)), 3),
        "share_saving": round(sum(saves[:-1]) / elapsed, 4),
        "seconds_from_signal_to_end": round(ended - times["asked"], 2),
    }
    print(json.dumps(result))


def write_images(root: Path) -> Path:
    generator = np.random.default_rng(0)
    for label in ("a", "b"):
        (root / label).mkdir(parents=True)
        for number in range(40):
            pixels = generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / label / f"{label}{number:02d}.png")
    return root


if __name__ == "__main__":
    main()
