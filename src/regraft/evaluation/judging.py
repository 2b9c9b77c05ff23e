"""What a Classifier says of images, with its doubts: one code for evaluate, predict and serve.

B batch, N images, K classes, D features.
"""

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regraft.evaluation.predictions import Predictions
from regraft.models.classifier import Classifier
from regraft.models.doubt import DEFAULT_RATE
from regraft.progress import Note, OnProgress


class WithFeatures(nn.Module):
    """A Classifier that gives its logits, and behind them the features they were made of.

    Attributes:
        backbone: That of the Classifier, or what runs the rest of it where a part has run.
    """

    def __init__(self, classifier: Classifier, backbone: nn.Module | None = None) -> None:
        super().__init__()
        self.head = classifier.head
        self.backbone = backbone or classifier.backbone

    def forward(self, batch: Tensor) -> Tensor:
        features_BD = self.backbone(batch).float()
        return torch.cat([self.head(features_BD), features_BD], dim=1)


def judged(
    table: Predictions,
    classifier: Classifier,
    features_ND: NDArray[np.float32],
    error_rate: float = DEFAULT_RATE,
) -> Predictions:
    """Returns the predictions with what the Classifier doubts of them."""
    if classifier.doubt is None:
        return table
    return replace(
        table,
        unsure=classifier.doubt.unsure(table.probabilities, error_rate),
        unfamiliar=classifier.doubt.unfamiliar(features_ND),
    )


def divided(
    outputs_NX: NDArray[np.float32], classifier: Classifier
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Returns logits_NK and features_ND from the outputs of `WithFeatures`."""
    number = len(classifier.class_names)
    return outputs_NX[:, :number], outputs_NX[:, number:]


def kept_rate(predictions: Predictions) -> dict[str, float | int | None] | None:
    """Returns how the images did that were not unsure, to hold against what was promised.

    None where nobody knows which are unsure, or what they show.
    """
    if predictions.unsure is None or predictions.truth is None:
        return None
    answered = ~predictions.unsure
    wrong = predictions.predicted != predictions.truth
    number = int(answered.sum())
    return {
        "promised_error_rate": DEFAULT_RATE,
        "n": number,
        "share": number / len(answered),
        "errors": int((answered & wrong).sum()),
        "error_rate": float(wrong[answered].mean()) if number else None,
    }


def refuse_unmeasured(classifier: Classifier, error_rate: float, on_progress: OnProgress) -> None:
    """Refuses an error rate of which nobody knows; says so where none is known at all.

    Raises:
        UsageError: Others were measured.
    """
    band = None if classifier.doubt is None else classifier.doubt.band(error_rate)
    if band is None:
        why = (
            "nobody has measured it" if classifier.doubt is None else "too few images were held out"
        )
        on_progress(Note(f"note: of this model it is not known when it is unsure: {why}"))
    elif band.threshold is None:
        on_progress(
            Note(f"note: all are unsure: no threshold keeps errors below {error_rate:g} here")
        )
