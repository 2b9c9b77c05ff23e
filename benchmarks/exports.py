"""Exports beside regraft on 256 real images: largest difference of a probability, equal classes.

python benchmarks/exports.py [FILE.json]

Each network is trained for one epoch on chest X-rays (REGRAFT_TEST_DATA, or ../shared/data): its
probabilities are then no accident of birth. Every form that it has is written and compared.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from time import monotonic
from typing import Any

from regraft import api
from regraft.engine import Engine
from regraft.errors import UsageError
from regraft.training.recipe import Recipe

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("REGRAFT_TEST_DATA") or ROOT / ".." / "shared" / "data")
SMALL_NET = f"{ROOT / 'examples' / 'cifar10_to_mnist_parity' / 'small_net.py'}:small_net"
NETWORKS = ("resnet18", "convnext_atto", "vgg16_bn", SMALL_NET)
SIZE, IMAGES = 64, 256


def main(out: str | None = None) -> None:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        for arch in NETWORKS:
            name = Path(arch).name
            run = Path(place) / name.replace(":", "_")
            recipe = Recipe.scratch().changed({"image_size": SIZE, "epochs": 1})
            data = DATA / "cxr_kermany_1k"
            api.pretrain(data, out=run, arch=arch, recipe=recipe, engine=Engine("cpu"))
            for form in ("onnx", "torch", "timm"):
                rows.append({"network": name, "form": form} | compared(run, form, arch))
                print(told(rows[-1]), flush=True)
    if out is not None:
        Path(out).write_text(json.dumps(rows, indent=2) + "\n")


def compared(run: Path, form: str, arch: str) -> dict[str, Any]:
    began = monotonic()
    own = arch if ":" in arch else None
    try:
        # A folder for each: the model cards of two forms would have one name.
        out = run.with_name(f"{run.name}-{form}") / "model"
        found = api.export(run, to=form, out=out, images=IMAGES, arch=own)
    except UsageError as error:
        return {"refused": error.message}
    return {**vars(found), "seconds": monotonic() - began}


def told(row: dict[str, Any]) -> str:
    start = f"{row['network']:<24} {row['form']:<6}"
    if "refused" in row:
        return f"{start} refused: {row['refused']}"
    return (
        f"{start} {row['num_images']} images ({row['images']}): largest difference "
        f"{row['max_difference']:.2e}, same class {row['equal_top1']:.2%}, {row['seconds']:.0f} s"
    )


if __name__ == "__main__":
    main(*sys.argv[1:2])
