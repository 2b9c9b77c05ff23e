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

from regraft.run import Run

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
            source = quality.trained_source(pair, Path(place) / "source", changes)
            best = [epoch for epoch in Run.open(source).epochs() if epoch["is_best"]][-1]
            scores = [judged(pair, size, source, rule) for rule in ("head", "auto")]
        own, rank = best["val_balanced_accuracy"], best["effective_rank"]
        print(f"| {variant} | {own:.3f} | {rank:.0f} | {' | '.join(scores)} |", flush=True)


def judged(pair: quality.Pair, size: int, source: Path, rule: str) -> str:
    """Returns mean and spread of the balanced accuracy that a rule reaches from this source."""
    cells = [quality.cell_of(pair, size, seed, source) for seed in range(SEEDS)]
    tables = [quality.tested(cell, quality.RULES[rule](cell)) for cell in cells]
    found = [quality.balanced_accuracy(table) for table in tables]
    return f"{np.mean(found):.3f} +- {np.std(found, ddof=1):.3f}"


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
