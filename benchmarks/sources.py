"""Which training of a source serves a transfer? Variants of the scratch recipe, judged by targets.

    .venv/bin/python benchmarks/sources.py omniglot 5      a tuning pair of quality.py, images of a
                                                           class; minutes on one core

Of each variant one source is trained; a solved head on its frozen features and `auto` then learn
from the same target images, three seeds. Prints a table.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import quality
import torch

from regraft import api
from regraft.data.cache import Cache
from regraft.data.dataset import Dataset
from regraft.engine import Engine
from regraft.evaluation.testing import predict_dataset
from regraft.training.recipe import Recipe
from regraft.training.start import Start

SEEDS = 3
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "no augmentation": {"augment": "none"},
    "natural augmentation": {"augment": "natural"},
    "labels smoothed by 0.1": {"label_smoothing": 0.1},
    "mixup 0.2": {"mixup": 0.2},
    "a tenth of the weight decay": {"weight_decay": 5e-5},
    "a third of the epochs": {"epochs": 10},
}


def main(name: str, size: int) -> None:
    torch.set_num_threads(1)
    pair = next(pair for pair in quality.PAIRS if pair.name == name and pair.tuning)
    print("| training of the source | its validation | effective rank | head | auto |")
    print("|---|---|---|---|---|")
    for variant, changes in VARIANTS.items():
        with tempfile.TemporaryDirectory() as place:
            source = trained(pair, Path(place) / "source", changes)
            best = [epoch for epoch in source.epochs() if epoch["is_best"]][-1]
            by_rule = judged(pair, size, Start.load(source.folder, quality.ARCH, ()))
        scores = [f"{np.mean(own):.3f} +- {np.std(own, ddof=1):.3f}" for own in by_rule]
        own, rank = best["val_balanced_accuracy"], best["effective_rank"]
        print(f"| {variant} | {own:.3f} | {rank:.0f} | {' | '.join(scores)} |", flush=True)


def trained(pair: quality.Pair, out: Path, changes: dict[str, Any]) -> Any:
    name, options = pair.source
    recipe = Recipe.scratch().changed({"image_size": pair.side, "channels": 3, **changes})
    dataset = Dataset.open(quality._folder(name), options)
    return api.pretrain(dataset, out=out, arch=quality.ARCH, recipe=recipe, engine=Engine("cpu"))


def judged(pair: quality.Pair, size: int, start: Start) -> list[list[float]]:
    """Returns balanced accuracies of head and `auto`, by seed."""
    dataset = Dataset.open(quality._folder(pair.target[0]), pair.target[1])
    channels = start.classifier.inputs.channels
    cached, dataset = Cache.build(dataset, (pair.side, pair.side), channels)
    found = []
    for rule in ("head", "auto"):
        scores = []
        for seed in range(SEEDS):
            cell = quality.cell_of(pair, size, seed, (dataset, cached, start))
            classifier = quality.RULES[rule](cell)
            table = predict_dataset(classifier, dataset, cached, cell.test, cell.engine)
            scores.append(quality.balanced_accuracy(table))
        found.append(scores)
    return found


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
