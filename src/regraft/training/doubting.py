"""What is learned of a Classifier when its training ends: its temperature, and its Doubt."""

from collections.abc import Generator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from regraft.engine import Engine
from regraft.evaluation.calibration import (
    LEAST_IMAGES,
    MOST_REMEMBERED,
    doubt_of,
    fit_temperature,
)
from regraft.evaluation.judging import WithFeatures, divided
from regraft.evaluation.predictions import infer, softmax
from regraft.models.classifier import Classifier
from regraft.models.doubt import DEFAULT_RATE, Doubt
from regraft.progress import Note
from regraft.training.activations import choose_feed
from regraft.training.feeds import Features, Feed, Live, Material
from regraft.training.recipe import Recipe


def with_doubt(
    training: Generator[Any, None, None],
    classifier: Classifier,
    material: Material,
    recipe: Recipe,
    engine: Engine,
) -> Generator[Any, None, None]:
    """Yields what the training tells; where it ends by itself, the classifier gets its Doubt.

    Probabilities are calibrated, too, where no search has done so.
    """
    yield from training
    if not len(material.val_rows):
        yield Note("unsure images cannot be told: no validation images were held out")
        return
    feed, batch_size = yield from _feed(classifier, material, recipe, engine)
    network = WithFeatures(classifier, Features(classifier.backbone, feed))

    def outputs(rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return infer(network, feed.plain_batches(rows), engine, batch_size)

    outputs_NX = outputs(material.val_rows)
    logits_NK, features_ND = divided(outputs_NX, classifier)
    labels_N = material.labels[material.val_rows]
    if recipe.search == "none" and len(labels_N) >= LEAST_IMAGES:
        temperature = fit_temperature(logits_NK, labels_N)
        logits_NK = logits_NK / np.float32(temperature)
        with torch.no_grad():
            for parameter in classifier.head.parameters():
                parameter.div_(temperature)
        yield Note(f"probabilities calibrated: temperature {temperature:.2f}, validation images")
    order = np.random.default_rng(0).permutation(material.train_rows)
    known = outputs(np.sort(order[:MOST_REMEMBERED]))
    alone = _one_of_each_group(material)
    remembered_MD = divided(known, classifier)[1]
    probabilities_NK = softmax(logits_NK[alone])
    classifier.doubt = doubt_of(
        remembered_MD, features_ND[alone], probabilities_NK, labels_N[alone]
    )
    yield Note(told(classifier.doubt))


def told(doubt: Doubt) -> str:
    """Returns what a person should know of it."""
    band = doubt.band(DEFAULT_RATE)
    if band is None:
        return (
            f"unsure images cannot be told: {doubt.num_images} independent validation images are "
            f"too few for an error rate of {DEFAULT_RATE:.0%}"
        )
    if band.threshold is None:
        return f"unsure: all images; even the surest are wrong in more than {DEFAULT_RATE:.0%}"
    return (
        f"unsure: probabilities up to {band.threshold:.3f}; of {doubt.num_images} validation "
        f"images {band.answered:.0%} are above, of which at most {DEFAULT_RATE:.0%} are wrong "
        f"({doubt.confidence:.0%} confidence)"
    )


def _feed(
    classifier: Classifier, material: Material, recipe: Recipe, engine: Engine
) -> Generator[Any, None, tuple[Feed, int]]:
    """Returns what the last phase was fed, and how many images a batch is filled up to.

    A frozen part has run over all images already. A search has trained in more ways than one.
    """
    last = recipe.phases[-1]
    live = Live(material, classifier.inputs, recipe, engine, recipe.views_of(last))
    if recipe.search == "none":
        feed, _ = yield from choose_feed(live, classifier.backbone, last)
        if feed is not live:
            return feed, 0
    return live, live.batch_size


def _one_of_each_group(material: Material) -> NDArray[np.int64]:
    """Returns places of validation images that are independent: one of each patient."""
    if material.groups is None:
        return np.arange(len(material.val_rows))
    return np.sort(np.unique(material.groups[material.val_rows], return_index=True)[1])
