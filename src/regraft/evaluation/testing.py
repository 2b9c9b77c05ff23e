"""The test images of a Run: found again by content, predicted plainly, and written down."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regraft.data.batches import eval_batches
from regraft.data.cache import Cache
from regraft.data.dataset import Dataset, Sample, unusable
from regraft.data.decode import (
    encode_png,
)
from regraft.documents import json_content, sha256_of
from regraft.engine import Engine
from regraft.errors import DataError, UsageError, count, shorten
from regraft.evaluation.explain import heat_of, overlay
from regraft.evaluation.judging import WithFeatures, divided, judged, kept_rate
from regraft.evaluation.metrics import evaluate_predictions
from regraft.evaluation.predictions import Predictions, eval_batch, infer, softmax
from regraft.evaluation.rows import to_csv
from regraft.models.classifier import Classifier
from regraft.run import Run
from regraft.storage import committed_folder, remove_leftovers, write_file

NUM_MISTAKES = 24  # thumbnails kept for the report
THUMBNAIL_PX = 128


def fitting_channels(dataset: Dataset, channels: int) -> int:
    """Returns the channels to decode to.

    Raises:
        UsageError: The images have others than the network takes, and are not grey.
    """
    if dataset.channels == channels or (dataset.channels, channels) == (1, 3):
        return channels
    raise UsageError(
        f"`{dataset.root}` has images of {count(dataset.channels, 'channel')}, the network takes "
        f"{channels}",
        hint=f"let the network take {dataset.channels}: `--adapt channels` when fine-tuning, "
        f"`--set channels={dataset.channels}` when pretraining",
    )


def test_images(run: Run, dataset: Dataset, split: str) -> Dataset:
    """Returns the images of `dataset` on which the Run may be judged.

    If it holds images of the Run's own split, these are found by content, wherever the folder
    lies. Otherwise its own split of that name, if the Run has never seen these images.

    Raises:
        DataError: Some of the Run's own images are missing, or images were trained on.
        UsageError: There is no such split.
    """
    if split not in ("val", "test"):
        raise UsageError(
            f"`--split {split}` cannot be judged: use images that were not trained on",
            hint="use `--split test` or `--split val`",
        )
    own = {s["sha256"]: s for s in run.samples() if s.get("split") == split}
    found = [sample for sample in dataset.samples if sample.sha256 in own]
    if found:
        if missing := len(own) - len({sample.sha256 for sample in found}):
            raise DataError(
                f"`{dataset.root}` has {len(own) - missing} of the run's {len(own)} {split} images",
                hint="give the whole dataset of the run, or a dataset that it has never seen",
            )
        again = [
            replace(s, split=split, label=own[s.sha256]["class"], group=own[s.sha256]["group"])
            for s in found
        ]
        return replace(dataset, samples=tuple(again), class_names=run.class_names)
    return _foreign_images(run, dataset, split)


def _foreign_images(run: Run, dataset: Dataset, split: str) -> Dataset:
    chosen = [sample for sample in dataset.samples if sample.split == split]
    if not chosen:
        raise UsageError(
            f"`{dataset.root}` has no {split} images",
            hint=f"it has {shorten(sorted({s.split for s in dataset.samples}))}: use `--split`",
        )
    problems = []
    if unknown := sorted({sample.label for sample in chosen} - set(run.class_names)):
        problems.append(
            f"the model does not know {shorten(unknown)}; it knows {shorten(run.class_names, 10)}"
        )
    seen = run.seen()
    trained = [s for s in chosen if seen.get(s.sha256) in ("train", "val")]
    if trained and "leak" not in dataset.options.allow:
        problems.append(
            f"{count(len(trained), 'image was', 'images were')} seen in training, "
            f"e.g. {shorten(sample.path for sample in trained)}"
        )
    if problems:
        raise unusable(
            dataset.root,
            problems,
            hint="give images of the classes it knows (`regraft finetune` teaches it others), and "
            "leave those it has seen out with `--allow leak`",
        )
    kept = tuple(sample for sample in chosen if sample not in set(trained))
    return replace(dataset, samples=kept, class_names=run.class_names)


def predict_dataset(
    classifier: Classifier, dataset: Dataset, cache: Cache, rows: NDArray[np.int64], engine: Engine
) -> Predictions:
    """Returns predictions for these rows: in order, not augmented, with truth and groups."""
    batch_size = eval_batch(classifier.inputs.size, engine.device)
    batches = eval_batches(
        cache.images,
        rows,
        classifier.inputs,
        batch_size=batch_size,
        device=engine.device,
        shard=engine.shard,
    )
    outputs_NX = infer(WithFeatures(classifier), batches, engine, batch_size)
    logits_NK, features_ND = divided(outputs_NX, classifier)
    return judged(tabulate(logits_NK, dataset, rows), classifier, features_ND)


def tabulate(
    logits_NK: NDArray[np.float32], dataset: Dataset, rows: NDArray[np.int64]
) -> Predictions:
    """Returns logits of these rows as Predictions."""
    samples = [dataset.samples[row] for row in rows]
    grouped = all(sample.group is not None for sample in samples)
    return Predictions(
        paths=tuple(sample.path for sample in samples),
        class_names=dataset.class_names,
        probabilities=softmax(logits_NK),
        truth=dataset.labels[rows],
        groups=tuple(str(sample.group) for sample in samples) if grouped else None,
    )


def record_evaluation(
    run: Run,
    predictions: Predictions,
    dataset: Dataset,
    cache: Cache,
    split: str,
    *,
    classifier: Classifier,
    write: bool,
) -> dict[str, Any]:
    """Returns the evaluation; writes it, predictions.csv and the worst mistakes into the Run.

    Beside each mistake lies where the evidence for what was predicted was seen.
    """
    row_of = {sample.path: row for row, sample in enumerate(dataset.samples)}
    worst = predictions.worst(NUM_MISTAKES)
    document = {
        "schema": 1,
        "run": run.record["id"],
        "split": split,
        "images": _fingerprint(dataset, predictions.paths),
        **evaluate_predictions(predictions),
        "answered": kept_rate(predictions),
        "excluded": [{"path": path, "reason": why} for path, why in dataset.excluded],
        "num_mistakes": int((predictions.predicted != predictions.truth).sum()),
        "mistakes": [_mistake(predictions, int(position)) for position in worst],
    }
    if not write:
        return document
    remove_leftovers(run.folder)  # of an evaluation that was killed
    rows = np.array([row_of[predictions.paths[position]] for position in worst], dtype=np.int64)
    with committed_folder(run.folder / "mistakes", "mistakes", replaces=True) as folder:
        _write_mistakes(folder, classifier, cache.images[rows], predictions.predicted[worst])
    run.write_files({
        "predictions.csv": to_csv(predictions).encode("utf-8", "surrogateescape"),
        "evaluation.json": json_content(document),
    })  # fmt: skip
    return document


def _write_mistakes(
    folder: Path, classifier: Classifier, images: NDArray[Any], predicted: NDArray[np.int64]
) -> None:
    """Writes a small picture of each image, and one with the evidence over it."""
    scale = classifier.inputs.intensity_range
    step = max(1, max(images.shape[1:3]) // THUMBNAIL_PX)
    for number, heat in enumerate(heat_of(classifier, images, predicted)):
        small, evidence = images[number][::step, ::step], heat[::step, ::step]
        write_file(folder / f"{number:03d}.png", encode_png(small, scale))
        shown = encode_png(overlay(small, evidence, scale))
        write_file(folder / f"{number:03d}-evidence.png", shown)


def _mistake(predictions: Predictions, position: int) -> dict[str, Any]:
    assert predictions.truth is not None
    best = int(predictions.predicted[position])
    return {
        "path": predictions.paths[position],
        "truth": predictions.class_names[predictions.truth[position]],
        "predicted": predictions.class_names[best],
        "probability": float(predictions.probabilities[position, best]),
    }


def _fingerprint(dataset: Dataset, paths: Sequence[str]) -> str:
    chosen = set(paths)
    hashes: Counter[str] = Counter(s.sha256 for s in dataset.samples if s.path in chosen)
    return sha256_of(sorted(hashes.elements()))


def own_rows(dataset: Dataset) -> NDArray[np.int64]:
    """Returns the rows of all samples."""
    return np.arange(len(dataset.samples), dtype=np.int64)


def labelled(sample: Sample) -> dict[str, Any]:
    """Returns a sample as a line of samples.jsonl."""
    return {
        "path": sample.path,
        "sha256": sample.sha256,
        "class": sample.label,
        "group": sample.group,
        "split": sample.split,
    }
