"""regraft's side of each benchmark, and the limits: the same work with nothing around it.

    python jobs_regraft.py JOB FOLDER

Prints one line of JSON. Each job starts with an empty cache.
"""

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401  no tool's imports are timed
import numpy as np
import sklearn.linear_model  # noqa: F401
import timm  # noqa: F401
import torch
from torch import nn

from regraft import api
from regraft.data.augment import AUGMENTATIONS
from regraft.data.batches import normalised, train_batches
from regraft.data.cache import Cache
from regraft.data.dataset import Dataset
from regraft.data.decode import read_content, read_pixels
from regraft.data.listing import list_images
from regraft.engine import Engine
from regraft.evaluation.predicting import predict_files
from regraft.evaluation.predictions import eval_batch, infer
from regraft.inputs import InputSpec
from regraft.models.backbone import Backbone
from regraft.models.classifier import Classifier
from regraft.progress import quiet
from regraft.training.feeds import Material
from regraft.training.loop import fit
from regraft.training.recipe import Recipe
from regraft.training.records import Epoch, Trial

HALF = ((0.5,) * 3, (0.25,) * 3)
Found = dict[str, Any]


def frozen(folder: Path) -> Found:
    """A new head on a frozen VGG16: the whole command, from files to the finished Run."""
    began = time.perf_counter()
    run = api.finetune(
        folder / "frozen",
        out=Path(os.environ["REGRAFT_CACHE"]) / "run",
        start=folder / "start",
        recipe=Recipe.transfer("head").changed({"image_size": 128}),
    )
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "accuracy": api.evaluate(run.folder, folder / "frozen")["accuracy"]["value"],
    }


class _Enough(Exception):
    pass


def first(folder: Path) -> Found:
    """`finetune` without options, until its first usable classifier is saved."""
    began = time.perf_counter()
    out = Path(os.environ["REGRAFT_CACHE"]) / "run"

    def stop(told: object) -> None:
        if isinstance(told, Trial):
            raise _Enough

    try:
        api.finetune(
            folder / "frozen",
            out=out,
            start=folder / "start",
            recipe=Recipe.transfer().changed({"image_size": 128}),
            on_progress=stop,
        )
    except _Enough:
        seconds = time.perf_counter() - began
    accuracy = api.evaluate(out, folder / "frozen")["accuracy"]["value"]
    return {"seconds": seconds, "accuracy": accuracy}


def frozen_limit(folder: Path, passes: int = 1) -> Found:
    """All images decoded once, and those of training and validation run through VGG16."""
    engine = Engine()
    classifier = Classifier.load(folder / "start")
    inputs = replace(classifier.inputs, size=(128, 128))
    engine.place(classifier)
    files = list_images([folder / "frozen" / "train", folder / "frozen" / "test"])[0]
    number = len(list_images([folder / "frozen" / "train"])[0])
    began = time.perf_counter()

    def read(file: tuple[Path, str]) -> Any:
        return read_pixels(read_content(*file), size=(128, 128), channels=3)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        images = np.stack(list(pool.map(read, files)))
    batch = eval_batch(inputs.size, engine.device)
    batches = [
        normalised(images[start : min(start + batch, number)], inputs, engine.device)
        for start in range(0, number, batch)
    ]
    for _ in range(passes):
        infer(classifier.backbone, batches, engine)
    return {"seconds": time.perf_counter() - began, "images": len(images)}


def last_stage(folder: Path, side: int, *, stored: bool) -> Found:
    """The fifth stage of VGG16 for 10 epochs, on decoded images."""
    engine = Engine()
    dataset = Dataset.open(folder / "frozen")
    start = Classifier.load(folder / "start")
    backbone = start.backbone.resized((side, side))
    cache, dataset = Cache.build(dataset, (side, side), 3)
    classifier = Classifier(backbone, dataset.class_names)
    engine.place(classifier)
    rows = dataset.rows("train"), dataset.rows("val")
    key = cache.key if stored else None
    material = Material(cache.images, dataset.labels, *rows, key=key)
    recipe = Recipe.transfer("last:1").changed({"epochs": 10, "augment": "none"})
    recipe = recipe.resolved(normalisation="none", num_images=len(rows[0]), is_grey=True)
    began = time.perf_counter()
    told = [r for r in fit(classifier, material, recipe, engine) if isinstance(r, Epoch)]
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "losses": [record.val_loss for record in told]}


def scratch(folder: Path, arch: str) -> Found:
    """One epoch of a whole network with the default augmentation, after decoding."""
    engine = Engine()
    material, classifier, recipe = _whole(folder, arch, engine)
    began = time.perf_counter()
    for _ in fit(classifier, material, recipe, engine):
        pass
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "images": len(material.train_rows)}


def scratch_limit(folder: Path, arch: str) -> Found:
    """The same steps on tensors that are ready, with nothing around them."""
    engine = Engine()
    material, classifier, _ = _whole(folder, arch, engine)
    generator = torch.Generator().manual_seed(0)
    ready = [
        torch.randn(16, 3, 224, 224, generator=generator).contiguous(
            memory_format=torch.channels_last
        )
        for _ in range(len(material.train_rows) // 16)
    ]
    labels = torch.arange(16) % 3
    optimizer = torch.optim.SGD(
        classifier.parameters(), 0.01, momentum=0.9, nesterov=True, fused=True
    )
    classifier.train()
    began = time.perf_counter()
    for images_BCHW in ready:
        with engine.autocast():
            logits_BK = classifier(images_BCHW)
        loss = nn.functional.cross_entropy(logits_BK, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    return {"seconds": time.perf_counter() - began, "images": 16 * len(ready)}


def _whole(folder: Path, arch: str, engine: Engine) -> tuple[Material, Classifier, Recipe]:
    inputs = InputSpec((224, 224), 3, 8, *HALF)
    dataset = Dataset.open(folder / "scratch", whole=True)
    cache, dataset = Cache.build(dataset, inputs.size, 3)
    rows = np.arange(len(dataset.samples))
    material = Material(cache.images, dataset.labels, rows, rows[:3])
    backbone = Backbone.create(arch, inputs)
    classifier = Classifier(backbone, dataset.class_names)
    engine.place(classifier)
    recipe = Recipe.scratch().changed({"epochs": 1, "batch_size": 16})
    recipe = recipe.resolved(
        normalisation=backbone.normalisation, num_images=len(rows), is_grey=False
    )
    return material, classifier, recipe


def decode(folder: Path) -> Found:
    """Large JPEGs into an empty cache, and from a full one."""
    dataset = Dataset.open(folder / "jpeg", whole=True)
    began = time.perf_counter()
    Cache.build(dataset, (224, 224), 3)
    cold = time.perf_counter() - began
    Cache.build(dataset, (224, 224), 3)
    warm = time.perf_counter() - began - cold
    return {"seconds": cold, "images": len(dataset.samples), "again_seconds": warm}


def warm() -> Found:
    """Augmented batches at 224 px from decoded images, on one core."""
    torch.set_num_threads(1)
    images = np.random.default_rng(0).integers(0, 256, (512, 224, 224, 3), dtype=np.uint8)
    inputs = InputSpec((224, 224), 3, 8, *HALF)
    speeds = {}
    for name in ("gentle", "natural"):
        for epoch in range(2):  # the first warms up
            began = time.perf_counter()
            for _ in train_batches(
                images,
                np.arange(512),
                inputs,
                AUGMENTATIONS[name],
                batch_size=64,
                seed=0,
                epoch=epoch,
                device=torch.device("cpu"),
            ):
                pass
            speeds[name] = 512 / (time.perf_counter() - began)
    return speeds


def predict(folder: Path) -> Found:
    """VGG16 at 224 px over files."""
    engine = Engine()
    backbone = Backbone.create("vgg16", InputSpec((224, 224), 3, 8, *HALF))
    classifier = Classifier(backbone, ("a", "b", "c"))
    engine.place(classifier)
    files = list_images([folder / "predict"])[0]
    predict_files(classifier, files[:1], engine, quiet)  # as Keras' graph is traced before
    began = time.perf_counter()
    table, _ = predict_files(classifier, files, engine, quiet)
    assert table is not None
    return {"seconds": time.perf_counter() - began, "images": len(table.paths)}


def memory(folder: Path) -> Found:
    """Opening, decoding, one epoch and an evaluation: the peak of anonymous memory."""
    peak = 0.0

    def watch() -> None:
        nonlocal peak
        while True:
            status = Path("/proc/self/status").read_text()
            line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
            peak = max(peak, int(line.split()[1]) / 1024)
            time.sleep(0.05)

    threading.Thread(target=watch, daemon=True).start()
    run = Path(os.environ["REGRAFT_CACHE"]) / "run"
    recipe = Recipe.scratch().changed({"image_size": 32, "epochs": 1, "stall_share": 1.0})
    (folder / "net.py").write_text(
        "from torch import nn\n\ndef net(channels):\n"
        "    return nn.Sequential(nn.Conv2d(channels, 8, 3, 4), nn.ReLU())\n"
    )
    arch = f"{folder / 'net.py'}:net"
    api.pretrain(folder / "images", out=run, arch=arch, recipe=recipe)
    found = api.evaluate(run, folder / "images", arch=arch)
    return {"peak_mib": peak, "test_images": found["n"]}


if __name__ == "__main__":
    job, place = sys.argv[1], Path(sys.argv[2])
    jobs: dict[str, Callable[[], object]] = {
        "frozen": lambda: frozen(place),
        "frozen-limit": lambda: frozen_limit(place),
        "first": lambda: first(place),
        "first-limit": lambda: frozen_limit(place, passes=2),
        "last-stored": lambda: last_stage(place, int(sys.argv[3]), stored=True),
        "last-live": lambda: last_stage(place, int(sys.argv[3]), stored=False),
        "scratch-vgg16": lambda: scratch(place, "vgg16"),
        "scratch-resnet50": lambda: scratch(place, "resnet50"),
        "limit-vgg16": lambda: scratch_limit(place, "vgg16"),
        "limit-resnet50": lambda: scratch_limit(place, "resnet50"),
        "decode": lambda: decode(place),
        "warm": warm,
        "predict": lambda: predict(place),
        "memory": lambda: memory(place),
    }
    with tempfile.TemporaryDirectory() as cache:
        os.environ["REGRAFT_CACHE"] = cache
        print(json.dumps(jobs[job]()))
