"""Is `finetune` as good as the rules that others use? Pairs of real datasets, one step budget.

    make quality                                      every cell, then the table; continues
    .venv/bin/python benchmarks/quality.py --pairs omniglot --rules auto,head --seeds 2
    .venv/bin/python benchmarks/quality.py --table    what is there so far

Each rule starts from the same weights and sees the same labelled images; four fifths teach and one
fifth judges (`auto` and `scratch` may divide them otherwise), and each takes STEPS optimiser steps,
those of its choosing included. `auto` was made on the tuning pairs; how often the report pairs were
looked at on the way, docs/quality.md tells. A seed draws the target images, the split and
everything random. Results go to `benchmarks/results/quality`, one file a cell.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("KMP_BLOCKTIME", "0")  # as the command line does: read by torch

import numpy as np
import torch
from bench import HERE, HOME, XRAYS
from sklearn.model_selection import StratifiedGroupKFold

from regraft import api
from regraft.data.cache import Cache
from regraft.data.dataset import DataOptions, Dataset
from regraft.engine import Engine
from regraft.evaluation.compare import judge
from regraft.evaluation.predictions import Predictions
from regraft.evaluation.testing import predict_dataset
from regraft.models.backbone import Backbone
from regraft.models.classifier import Classifier
from regraft.training.auto import tune
from regraft.training.feeds import Material
from regraft.training.loop import fit
from regraft.training.recipe import Phase, Recipe
from regraft.training.session import POOLED_BELOW
from regraft.training.start import Start

ARCH = f"{HERE / 'small_vgg.py'}:net"
RESULTS = HERE / "results" / "quality"
SOURCES = HOME / "quality-sources"
STEPS, BATCH, MOST_TEST = 800, 32, 2000
NOTHING: Mapping[str, Any] = {}
SEEDS = 6


@dataclass(frozen=True)
class Pair:
    """A source and a target.

    Attributes:
        sizes: Labelled images of a class; 0: all there are.
        tuning: Whether `auto` was made on it.
    """

    name: str
    source: tuple[str, DataOptions]
    target: tuple[str, DataOptions]
    side: int
    sizes: tuple[int, ...]
    tuning: bool


PARITY = DataOptions(relabel=("even=0,2,4,6,8", "odd=1,3,5,7,9"))
SIX = ("dress", "hat", "longsleeve", "outwear", "pants", "shirt")
FOUR = ("shoes", "shorts", "skirt", "t-shirt")
OWN = DataOptions()
PAIRS = (
    Pair("cifar-parity", ("cifar10_6k", OWN), ("mnist", PARITY), 32, (10, 50, 100), True),
    Pair("omniglot", ("omniglot-A", OWN), ("omniglot-B", OWN), 32, (5, 10), True),
    Pair("xray-cells", ("cxr_kermany_1k", OWN), ("bccd_cells", OWN), 48, (20,), True),
    Pair("fashion-mnist", ("fashion_mnist_10k", OWN), ("mnist", OWN), 32, (10, 50), False),
    Pair(
        "clothing",
        ("clothing_128", DataOptions(relabel=tuple(f"{name}={name}" for name in SIX))),
        ("clothing_128", DataOptions(relabel=tuple(f"{name}={name}" for name in FOUR))),
        48, (20, 50), False,
    ),
    Pair(
        "xray-view",
        ("cxr_kermany_1k", OWN),
        ("cxr_hannover_224", DataOptions(group_regex=r"^([^_]+)_")),
        48, (0,), False,
    ),
)  # fmt: skip


class StepClock(Engine):
    """An engine whose clock counts optimiser steps: a time budget is a number of steps."""

    def seconds_per_image(self, *_: Any) -> float:
        return 1 / BATCH


@dataclass(frozen=True)
class Cell:
    """One target, so many images of a class, one seed."""

    dataset: Dataset
    cached: Cache
    start: Start
    engine: Engine
    labelled: np.ndarray[Any, np.dtype[np.int64]]
    test: np.ndarray[Any, np.dtype[np.int64]]
    groups: np.ndarray[Any, np.dtype[np.int64]]
    seed: int

    def material(self, *, pooled: bool) -> Material:
        labels, groups = self.dataset.labels[self.labelled], self.groups[self.labelled]
        folds = StratifiedGroupKFold(5, shuffle=True, random_state=self.seed)
        learn, held_out = next(iter(folds.split(labels, labels, groups)))
        rows = (self.labelled[learn], self.labelled[held_out])
        if pooled:
            rows = (self.labelled, self.labelled[:0])
        grouped = any(sample.group for sample in self.dataset.samples)
        groups_N = self.groups if grouped else None
        images, labels_N = self.cached.images, self.dataset.labels
        return Material(images, labels_N, *rows, groups=groups_N, key=self.cached.key)

    def recipe(self, recipe: Recipe, material: Material, **changes: Any) -> Recipe:
        steps = -(-len(material.train_rows) // BATCH)
        settled = recipe.changed({"batch_size": BATCH, "seed": self.seed, **changes})
        if any(phase.learns != "head" for phase in settled.phases):
            settled = settled.changed({"epochs": max(1, STEPS // steps)})
        return settled.resolved(
            normalisation="batch",
            num_images=len(material.train_rows),
            is_grey=self.cached.is_grey,
        )

    def inputs(self) -> Any:
        return replace(self.start.classifier.inputs, size=self.cached.images.shape[1:3])

    def classifier(self, *, random: bool = False) -> Classifier:
        transplanted = self.start.backbone(self.inputs(), self.seed)[0]
        backbone = self.random() if random else transplanted
        classifier = Classifier(backbone, self.dataset.class_names, seed=self.seed)
        self.engine.place(classifier)
        return classifier

    def random(self) -> Backbone:
        own = self.cached.with_statistics(self.inputs(), self.labelled)
        return self.start.random_backbone(own, self.seed)


def fixed(cell: Cell, recipe: Recipe, **changes: Any) -> Classifier:
    """Trains by one recipe, and keeps the best epoch on the held-out fifth."""
    material, classifier = cell.material(pooled=False), cell.classifier()
    settled = cell.recipe(recipe, material, **changes)
    for _ in fit(classifier, material, settled, cell.engine):
        pass
    return classifier


def searched(cell: Cell, goal: str) -> Classifier:
    """Trains by `auto`, from the start or from random weights."""
    material = cell.material(pooled=len(cell.labelled) < POOLED_BELOW)
    classifier = cell.classifier(random=goal == "scratch")
    recipe = Recipe.transfer("auto")
    if goal == "scratch":
        recipe = recipe.as_scratch(STEPS)
    recipe = recipe.changed({"batch_size": BATCH, "seed": cell.seed, "time_budget": float(STEPS)})
    recipe = recipe.resolved(
        normalisation="batch", num_images=len(material.train_rows), is_grey=cell.cached.is_grey
    )
    random = cell.random if goal == "transfer" else None
    for _ in tune(classifier, material, recipe, cell.engine, random=random):
        pass
    return classifier


def phases(*, head: bool, **settings: Any) -> tuple[Phase, ...]:
    whole = Phase(learns="all", **settings)
    return (Phase(learns="head", epochs=1), whole) if head else (whole,)


TRANSFER = Recipe.transfer("lp-ft")
RULES: dict[str, Callable[[Cell], Classifier]] = {
    "auto": lambda cell: searched(cell, "transfer"),
    "scratch, tuned": lambda cell: searched(cell, "scratch"),
    # The original question: everything frozen, a new head.
    "head": lambda cell: fixed(cell, Recipe.transfer("head")),
    "lp-ft": lambda cell: fixed(cell, TRANSFER),
    # fastai: fine_tune, docs.fast.ai/callback.schedule: slice(lr / 100, lr), BatchNorm trains
    "fastai": lambda cell: fixed(
        cell,
        TRANSFER,
        optimizer="adamw",
        weight_decay=0.01,
        phases=phases(head=True, lr=1e-3, layer_decay=0.01**0.25, batch_norm="train", warmup=0.25),
    ),
    # AutoGluon multimodal defaults: AdamW 1e-4, layer-wise decay 0.9, warm-up 0.1
    "autogluon": lambda cell: fixed(
        cell,
        TRANSFER,
        optimizer="adamw",
        weight_decay=1e-3,
        phases=phases(head=False, lr=1e-4, layer_decay=0.9, batch_norm="train", warmup=0.1),
    ),
    # thuml's ERM: SGD 0.01, the backbone at a tenth of it
    "thuml erm": lambda cell: fixed(
        cell,
        TRANSFER,
        optimizer="sgd",
        weight_decay=5e-4,
        phases=phases(head=False, lr=1e-3, head_factor=10.0, batch_norm="train", warmup=0.0),
    ),
    # BiT-HyperRule: SGD 0.003, no weight decay, a fifth of the steps to warm up
    "bit": lambda cell: fixed(
        cell,
        TRANSFER,
        optimizer="sgd",
        weight_decay=0.0,
        phases=phases(head=False, lr=3e-3, batch_norm="train", warmup=0.2),
    ),
}


@cache
def opened(pair: Pair, source: Path | None = None) -> tuple[Dataset, Cache, Start]:
    start = Start.load(source or trained_source(pair, SOURCES / pair.name), ARCH, ())
    dataset = Dataset.open(_folder(pair.target[0]), pair.target[1])
    channels = start.classifier.inputs.channels
    cached, dataset = Cache.build(dataset, (pair.side, pair.side), channels)
    return dataset, cached, start


def cell_of(pair: Pair, size: int, seed: int, source: Path | None = None) -> Cell:
    dataset, cached, start = opened(pair, source)
    generator = np.random.default_rng(seed)
    pool = np.concatenate([dataset.rows("train"), dataset.rows("val")])
    if size:
        of_class = [
            pool[dataset.labels[pool] == label] for label in range(len(dataset.class_names))
        ]
        pool = np.concatenate([generator.permutation(rows)[:size] for rows in of_class])
    test = np.random.default_rng(0).permutation(dataset.rows("test"))[:MOST_TEST]
    names = [sample.group or sample.sha256 for sample in dataset.samples]
    groups = np.unique(names, return_inverse=True)[1]
    return Cell(
        dataset, cached, start, StepClock("cpu"), np.sort(pool), np.sort(test), groups, seed
    )


def work(name: str, size: int, seed: int, rule: str) -> str:
    """Fills one cell."""
    pair = next(pair for pair in PAIRS if pair.name == name)
    file = _file(name, size, seed, rule)
    if file.exists():
        return ""
    cell = cell_of(pair, size, seed)
    began = time.perf_counter()
    classifier = RULES[rule](cell)
    seconds = time.perf_counter() - began
    found = tested(cell, classifier)
    assert found.truth is not None
    document = {
        "balanced_accuracy": balanced_accuracy(found),
        "seconds": seconds,
        "predicted": found.predicted.tolist(),
        "truth": found.truth.tolist(),
        "groups": None if found.groups is None else list(found.groups),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document))
    return (
        f"{name} {size} seed {seed} {rule}: {document['balanced_accuracy']:.3f} ({seconds:.0f} s)"
    )


def tested(cell: Cell, classifier: Classifier) -> Predictions:
    return predict_dataset(classifier, cell.dataset, cell.cached, cell.test, cell.engine)


def balanced_accuracy(found: Predictions) -> float:
    assert found.truth is not None
    right = found.predicted == found.truth
    recalls = [right[found.truth == label].mean() for label in np.unique(found.truth)]
    return float(np.mean(recalls))


def _file(pair: str, size: int, seed: int, rule: str) -> Path:
    return RESULTS / f"{pair}-{size}-{seed}-{rule.replace(' ', '_').replace(',', '')}.json"


def _folder(name: str) -> Path:
    if not name.startswith("omniglot-"):
        return XRAYS / name
    place = HOME / name
    if not place.exists():
        number, alphabets = {"omniglot-A": (1, None), "omniglot-B": (2, ("Sanskrit", "Tagalog"))}[
            name
        ]
        archive = zipfile.ZipFile(XRAYS / "omniglot_small" / f"images_background_small{number}.zip")
        for member in archive.namelist():
            parts = Path(member).parts
            if not member.endswith(".png") or (alphabets and parts[1] not in alphabets):
                continue
            drawer = int(Path(member).stem.rpartition("_")[2])  # the last 8 of 20 are for the test
            split = "test" if drawer > 12 else "train"
            file = place / split / f"{parts[1]}-{parts[2]}" / parts[3]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(archive.read(member))
    return place


def trained_source(pair: Pair, out: Path, changes: Mapping[str, Any] = NOTHING) -> Path:
    """Trains the network on the pair's source, if that is not done; returns the Run's folder."""
    name, options = pair.source
    if not (out / "final" / "manifest.json").exists():
        dataset = Dataset.open(_folder(name), options)
        recipe = Recipe.scratch().changed({"image_size": pair.side, "channels": 3, **changes})
        api.pretrain(dataset, out=out, arch=ARCH, recipe=recipe, engine=Engine("cpu"))
    return out


def table(pairs: list[Pair], rules: list[str], seeds: int) -> str:
    """Returns means and spreads, mean ranks, and rows that `auto` wins and loses by its mean."""
    lines = [
        "| pair, images of a class | " + " | ".join(rules) + " |",
        "|---" * (len(rules) + 1) + "|",
    ]
    ranks: dict[str, list[float]] = {rule: [] for rule in rules}
    rows: list[dict[str, float]] = []
    for pair in pairs:
        for size in pair.sizes:
            scores = {rule: _scores(pair.name, size, seeds, rule) for rule in rules}
            if not all(scores.values()):
                continue
            means = {rule: float(np.mean(found)) for rule, found in scores.items()}
            rows.append(means)
            for rule, found in means.items():
                higher = sum(other > found for other in means.values())
                ranks[rule].append(1 + higher)
            cells = [f"{means[rule]:.3f} +- {np.std(scores[rule], ddof=1):.3f}" for rule in rules]
            lines.append(f"| {pair.name}, {size or 'all'} | " + " | ".join(cells) + " |")
    if ranks[rules[0]]:
        mean = [f"{np.mean(ranks[rule]):.2f}" for rule in rules]
        lines.append("| mean rank | " + " | ".join(mean) + " |")
        if "auto" in rules:
            wins = [sum(row["auto"] > row[rule] for row in rows) for rule in rules]
            losses = [sum(row["auto"] < row[rule] for row in rows) for rule in rules]
            counts = [f"{won}, {lost}" for won, lost in zip(wins, losses, strict=True)]
            lines.append("| `auto` wins, loses | " + " | ".join(counts) + " |")
    return "\n".join(lines)


def margins(pairs: list[Pair], rules: list[str], seeds: int) -> str:
    """Returns `auto` against the best other rule of each cell, with the paired interval."""
    lines = []
    for pair in pairs:
        for size in pair.sizes:
            others = {
                rule: _scores(pair.name, size, seeds, rule) for rule in rules if rule != "auto"
            }
            if not _scores(pair.name, size, seeds, "auto") or not all(others.values()):
                continue
            best = max(others, key=lambda rule: float(np.mean(others[rule])))
            arms = [
                [_loaded(pair, size, seed, rule) for seed in range(seeds)]
                for rule in ("auto", best)
            ]
            found = judge(arms[0], arms[1], "balanced_accuracy")
            lines.append(
                f"{pair.name}, {size or 'all'}: auto {found['difference']:+.3f} over the best "
                f"other ({best}), 95 % interval {found['low']:+.3f} to {found['high']:+.3f}"
            )
    return "\n".join(lines)


def _scores(pair: str, size: int, seeds: int, rule: str) -> list[float]:
    files = [_file(pair, size, seed, rule) for seed in range(seeds)]
    if not all(file.exists() for file in files):
        return []
    return [json.loads(file.read_text())["balanced_accuracy"] for file in files]


def _loaded(pair: Pair, size: int, seed: int, rule: str) -> Predictions:
    document = json.loads(_file(pair.name, size, seed, rule).read_text())
    names = opened(pair)[0].class_names
    paths = tuple(str(number) for number in range(len(document["truth"])))
    groups = document["groups"] and tuple(document["groups"])
    certain = np.eye(len(names))[document["predicted"]]
    return Predictions(paths, names, certain, np.array(document["truth"]), groups)


def _alone() -> None:
    torch.set_num_threads(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", default="")
    parser.add_argument("--rules", default=",".join(name.replace(",", ";") for name in RULES))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--table", action="store_true")
    chosen = parser.parse_args()
    rules = [name.replace(";", ",") for name in chosen.rules.split(",")]
    pairs = [pair for pair in PAIRS if not chosen.pairs or pair.name in chosen.pairs.split(",")]
    if not chosen.table:
        for pair in pairs:  # sources and caches first, once
            cell_of(pair, pair.sizes[0], 0)
        jobs = [
            (pair.name, size, seed, rule)
            for seed in range(chosen.seeds)
            for pair in pairs
            for size in pair.sizes
            for rule in rules
        ]
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(chosen.jobs, context, _alone) as pool:
            for told in pool.map(work, *zip(*jobs, strict=True)):
                if told:
                    print(told, file=sys.stderr, flush=True)
    for title, kept in (("report pairs", False), ("tuning pairs", True)):
        some = [pair for pair in pairs if pair.tuning == kept]
        print(
            f"\n{title}\n{table(some, rules, chosen.seeds)}\n{margins(some, rules, chosen.seeds)}"
        )


if __name__ == "__main__":
    main()
