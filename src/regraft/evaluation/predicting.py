"""Image files to predictions: in batches, on all cores; what is broken is told, and does not stop.

N images, K classes, D features.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regraft.data.batches import normalised
from regraft.data.decode import (
    Pixels,
    UnreadableImage,
    has_frames,
    map_in_threads,
    read_content,
    read_input,
)
from regraft.engine import Engine, evaluating
from regraft.errors import count, shorten
from regraft.evaluation.judging import WithFeatures, divided, judged
from regraft.evaluation.predictions import Predictions, eval_batch, outputs_of, softmax
from regraft.inputs import InputSpec
from regraft.models.classifier import Classifier
from regraft.models.doubt import DEFAULT_RATE
from regraft.progress import Note, OnProgress, counting


def predict_files(
    classifier: Classifier,
    files: Sequence[tuple[Path, str]],
    engine: Engine,
    on_progress: OnProgress,
    error_rate: float = DEFAULT_RATE,
) -> tuple[Predictions | None, list[tuple[str, str]]]:
    """Predicts (root, path) images; returns the table and the broken files with their reasons."""
    inputs = classifier.inputs
    told, batch_size = counting(on_progress, "predicting"), eval_batch(inputs.size, engine.device)
    broken: list[tuple[str, str]] = []
    names: list[str] = []
    several: list[str] = []

    def read(file: tuple[Path, str]) -> Pixels | UnreadableImage:
        root, path = file
        try:
            content = read_content(root, path)
            if has_frames(content):
                several.append(str(root / path))
            return read_input(content, inputs)
        except UnreadableImage as error:
            return error

    def batches() -> Iterator[Tensor]:
        waiting: list[Pixels] = []
        for number, ((root, path), pixels) in enumerate(
            zip(files, map_in_threads(read, files), strict=True), start=1
        ):
            told(number, len(files))
            if isinstance(pixels, UnreadableImage):
                broken.append((str(root / path), str(pixels)))
                continue
            names.append(str(root / path))
            if waiting and waiting[0].dtype != pixels.dtype:
                yield _stacked(waiting, inputs, engine)
                waiting.clear()
            waiting.append(pixels)
            if len(waiting) == batch_size:
                yield _stacked(waiting, inputs, engine)
                waiting.clear()
        if waiting:
            yield _stacked(waiting, inputs, engine)

    outputs = list(_infer_all(classifier, batches(), engine, batch_size))
    if several:
        noun = count(len(several), "file has", "files have")
        shown = shorten(sorted(several))
        on_progress(Note(f"{noun} more than one frame or page, the first was read: {shown}"))
    if not outputs:
        return None, broken
    logits_NK, features_ND = divided(np.concatenate(outputs), classifier)
    table = Predictions(
        tuple(names), classifier.class_names, softmax(logits_NK), features=features_ND
    )
    return judged(table, classifier, features_ND, error_rate), broken


def _infer_all(
    classifier: Classifier, batches: Iterator[Tensor], engine: Engine, batch_size: int
) -> Iterator[NDArray[np.float32]]:
    network = WithFeatures(classifier)
    with evaluating(network), torch.inference_mode(), engine.autocast():
        for images_BCHW in batches:
            yield outputs_of(network, images_BCHW, batch_size)


def _stacked(waiting: Sequence[Pixels], inputs: InputSpec, engine: Engine) -> Tensor:
    return normalised(np.stack(waiting), inputs, engine.device)
