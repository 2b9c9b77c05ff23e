"""Deployed: a Classifier as others will run it, and whether it says the same there.

B batch, C channels, H height, W width, K classes.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from regraft.data.batches import normalised
from regraft.delivery.real_images import RealImages
from regraft.engine import evaluating
from regraft.errors import ArtefactError
from regraft.evaluation.predictions import softmax
from regraft.inputs import InputSpec
from regraft.models.classifier import Classifier

TOLERANCE = 1e-4  # of probabilities; single precision leaves about 1e-6
BATCH = 16  # images at once while outputs are compared; another than the exported example's
CPU = torch.device("cpu")

Outputs = Callable[[NDArray[np.float32]], NDArray[Any]]  # of images_BCHW as stored


@dataclass(frozen=True)
class Agreement:
    """How far an export's probabilities are from regraft's in single precision.

    Attributes:
        num_images: How many were compared.
        images: Which.
        max_difference: The largest of all probabilities.
        equal_top1: Share of images with the same best class.
    """

    num_images: int
    images: str
    max_difference: float
    equal_top1: float

    def told(self) -> str:
        return (
            f"largest difference of a probability {self.max_difference:.1e}, same class on "
            f"{self.equal_top1:.2%} of {self.images}"
        )


class Deployed(nn.Module):
    """A Classifier that takes images_BCHW in the values they are stored in, as float32.

    Normalisation and softmax are inside; the temperature is in the head already.
    """

    scale: Tensor
    offset: Tensor

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.inputs: InputSpec = classifier.inputs
        inputs = self.inputs
        low, high = inputs.intensity_range
        copied = deepcopy(classifier).to(CPU, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        self.backbone: nn.Module = copied.backbone
        self.head: nn.Module = copied.head
        self.window = (low, high) if inputs.clips else None
        std, mean = (torch.tensor(each, dtype=torch.float64) for each in (inputs.std, inputs.mean))
        scale = 1 / (std * (high - low))
        self.register_buffer("scale", scale.float().view(1, -1, 1, 1))
        self.register_buffer("offset", (-mean / std - low * scale).float().view(1, -1, 1, 1))
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns probabilities_BK and logits_BK."""
        if self.window is not None:
            images = images.clamp(*self.window)
        features_BD = self.backbone(images * self.scale + self.offset)
        # Not the head's own call: it switches autocast off, which no graph needs to know.
        logits_BK = functional.linear(features_BD, self.head.weight, self.head.bias)  # type: ignore[arg-type]
        return logits_BK.softmax(dim=1), logits_BK


def compared(classifier: Classifier, real: RealImages, outputs: Outputs, to: str) -> Agreement:
    """Returns how the outputs agree with regraft's.

    Raises:
        ArtefactError: They do not.
    """
    ours, theirs = [], []
    with evaluating(classifier), torch.inference_mode():
        for start in range(0, len(real.images), BATCH):
            pixels = real.images[start : start + BATCH]
            ours.append(classifier(normalised(pixels, classifier.inputs, CPU)).numpy())
            images_BCHW = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype=np.float32)
            theirs.append(np.asarray(outputs(images_BCHW), dtype=np.float64))
    expected, found = softmax(np.concatenate(ours)), np.concatenate(theirs)
    difference = float(np.abs(expected - found).max())
    same = float((expected.argmax(axis=1) == found.argmax(axis=1)).mean())
    agreement = Agreement(len(found), real.told, difference, same)
    if not difference <= TOLERANCE or same < 1:  # also where it is no number
        raise ArtefactError(
            f"the {to} export does not say what regraft says: {agreement.told()}",
            hint="nothing was written; please report the architecture and the versions "
            f"(`{classifier.backbone.arch}`, torch {torch.__version__})",
        )
    return agreement


@contextmanager
def quiet_exporters() -> Iterator[None]:
    """Silences what torch and onnxscript say of themselves while they work."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
