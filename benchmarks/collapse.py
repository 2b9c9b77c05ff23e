"""Do features collapse when the source has few classes? Chest X-rays, then another question.

    .venv/bin/python benchmarks/collapse.py

Trains the quality benchmark's network on X-rays of two or of three classes, briefly and long, and
asks ridge heads on each of its stages for another label of other X-rays (the projection; patients
left out as a whole). Prints mean and spread over seeds.
"""

import os
import tempfile
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("KMP_BLOCKTIME", "0")  # as the command line does: read by torch

import numpy as np
import torch
from bench import XRAYS
from quality import ARCH

from regraft import api
from regraft.data.batches import eval_batches
from regraft.data.cache import Cache
from regraft.data.dataset import DataOptions, Dataset
from regraft.models.backbone import Backbone
from regraft.models.classifier import Classifier
from regraft.training.probe import balanced, effective_rank, solve_ridge
from regraft.training.recipe import Recipe

SIDE, SEEDS = 48, 3
TWO = DataOptions(relabel=("normal=normal", "pneumonia=bacteria,virus"))


def told(backbone: Backbone, target: Dataset) -> list[float]:
    """Returns the effective rank, and the balanced accuracy of a ridge head on each stage."""
    cache, target = Cache.build(target, (SIDE, SIDE), backbone.inputs.channels)
    rows = np.arange(len(target.samples))
    batches = eval_batches(
        cache.images, rows, backbone.inputs, batch_size=64, device=torch.device("cpu")
    )
    backbone.eval()
    with torch.no_grad():
        found = [backbone.stage_features(batch) for batch in batches]
    stages = [torch.cat(each).numpy() for each in zip(*found, strict=True)]
    groups = np.unique([str(sample.group) for sample in target.samples], return_inverse=True)[1]
    logits = [solve_ridge(stage, target.labels, groups)[1] for stage in stages]
    scores = [balanced(each.argmax(axis=1), target.labels) for each in logits]
    return [effective_rank(stages[-1]), *scores]


def main() -> None:
    target = Dataset.open(
        XRAYS / "cxr_hannover_224", DataOptions(group_regex=r"^([^_]+)_"), whole=True
    )
    print("classes  epochs  rank        stages 1 to 5, balanced accuracy on the other question")
    for options, classes in ((TWO, 2), (DataOptions(), 3)):
        for epochs in (0, 10, 30, 100):
            rows = []
            for seed in range(SEEDS):
                dataset = Dataset.open(XRAYS / "cxr_kermany_1k", options)
                recipe = Recipe.scratch().changed({"image_size": SIDE, "seed": seed})
                recipe = recipe.changed({"epochs": max(epochs, 1), "channels": 3})
                with tempfile.TemporaryDirectory() as folder:
                    run = api.pretrain(dataset, out=Path(folder) / "run", arch=ARCH, recipe=recipe)
                    backbone = Classifier.load(run.folder, arch=ARCH).backbone
                if not epochs:
                    backbone = Backbone.create(ARCH, replace(backbone.inputs), seed=seed)
                rows.append(told(backbone, target))
            mean, spread = np.mean(rows, axis=0), np.std(rows, axis=0, ddof=1)
            shown = " ".join(f"{m:.3f}+-{s:.3f}" for m, s in zip(mean[1:], spread[1:], strict=True))
            rank = f"{mean[0]:.1f}+-{spread[0]:.1f}"
            print(f"{classes:<8} {epochs:<7} {rank:<11} {shown}", flush=True)


if __name__ == "__main__":
    main()
