"""A network and batches to a table: one code for validation, test and prediction.

N images, K classes.
"""

from collections.abc import Generator, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regraft.engine import Engine, evaluating, spells
from regraft.progress import Counting

MOST_IN_BATCH = 64
# Pixels in a batch on a processor: small batches stay in its caches. Measured at 224 px by 8 and by
# 64 images: ResNet-50 73 and 43 images/s, VGG16 41 and 34 (docs/log.md 2026-11-25).
BATCH_PX = 8 * 224 * 224


@dataclass(frozen=True)
class Predictions:
    """What a Classifier says of images.

    Attributes:
        paths: Relative to the dataset's root, or as named by the user.
        class_names: Of the columns of `probabilities`.
        probabilities: NxK, float64, rows sum to 1.
        truth: N class indices, or None where nobody knows.
        groups: N names of what belongs together (a patient; else the image itself), or None.
        unsure: Which are not sure enough for the error rate asked for; None where nobody knows.
        unfamiliar: Which are far from all images learned from; likewise.
        features: NxD, what the probabilities were made of; None where nobody asked.
    """

    paths: tuple[str, ...]
    class_names: tuple[str, ...]
    probabilities: NDArray[np.float64]
    truth: NDArray[np.int64] | None = None
    groups: tuple[str, ...] | None = None
    unsure: NDArray[np.bool_] | None = None
    unfamiliar: NDArray[np.bool_] | None = None
    features: NDArray[np.float32] | None = None

    @property
    def predicted(self) -> NDArray[np.int64]:
        predicted: NDArray[np.int64] = self.probabilities.argmax(axis=1)
        return predicted

    def worst(self, most: int) -> NDArray[np.int64]:
        """Positions of the most confident mistakes, the worst first."""
        assert self.truth is not None
        wrong = np.flatnonzero(self.predicted != self.truth)
        confidence = self.probabilities[wrong].max(axis=1)
        return wrong[np.argsort(-confidence, kind="stable")][:most]


def eval_batch(size: tuple[int, int], device: torch.device) -> int:
    """Returns how many images of (height, width) a network sees at once where nothing learns.

    It depends on nothing else, so that the same images give the same bits whatever the recipe.
    """
    if device.type != "cpu":
        return MOST_IN_BATCH
    return max(1, min(MOST_IN_BATCH, BATCH_PX // (size[0] * size[1])))


def infer(
    network: nn.Module,
    batches: Iterable[Tensor],
    engine: Engine,
    batch_size: int = 0,
) -> NDArray[np.float32]:
    """Returns the network's outputs for all images in order; it is put back as it was.

    Args:
        network: Put into evaluation mode.
        batches: Of this process's shard, see `eval_batches`; the outputs are those of all.
        engine: Where and how to compute.
        batch_size: To which smaller batches are filled up, see `outputs_of`.
    """
    running = inferring(network, batches, engine, batch_size=batch_size)
    while True:
        try:
            next(running)
        except StopIteration as ended:
            return ended.value  # type: ignore[no-any-return]


def inferring(
    network: nn.Module,
    batches: Iterable[Tensor],
    engine: Engine,
    what: str = "",
    total: int = 0,
    batch_size: int = 0,
) -> Generator[Counting, None, NDArray[np.float32]]:
    """Does the same, and yields about every second how far it is.

    Args:
        network: See `infer`.
        batches: See `infer`.
        engine: See `infer`.
        what: For the Counting.
        total: Images of all processes.
        batch_size: See `infer`.
    """
    outputs, done = [], 0
    with evaluating(network):
        for spell in spells(batches):
            if done:
                yield Counting(what, done, total)
            with torch.inference_mode(), engine.autocast():  # not while others act
                for batch in spell:
                    outputs.append(outputs_of(network, batch, batch_size))
                    done = min(done + len(batch) * engine.shard[1], total)
    return np.concatenate(engine.gathered(outputs))


def outputs_of(network: nn.Module, images_BCHW: Tensor, batch_size: int = 0) -> NDArray[np.float32]:
    """Returns the network's outputs for one batch, which blank images fill up to `batch_size`.

    Kernels are chosen by the number of images, and round differently: one image alone, or the last
    few of a folder, would get other bits than the same images among others (docs/log.md
    2026-11-25). In batches of one size an image's outputs depend on nothing but the image.
    """
    number = len(images_BCHW)
    if missing := max(0, batch_size - number):
        blank = images_BCHW.new_zeros(missing, *images_BCHW.shape[1:])
        images_BCHW = torch.cat([images_BCHW, blank])
        images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
    outputs: NDArray[np.float32] = network(images_BCHW)[:number].float().cpu().numpy()
    return outputs


def softmax(logits_NK: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits_NK.astype(np.float64) - logits_NK.max(axis=1, keepdims=True)
    exponential = np.exp(shifted)
    normalised: NDArray[np.float64] = exponential / exponential.sum(axis=1, keepdims=True)
    return normalised
