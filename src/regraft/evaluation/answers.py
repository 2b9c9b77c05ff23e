"""Answers: what a Classifier says of decoded images, a few at a time, as `predict` would say it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regraft.data.batches import normalised
from regraft.data.decode import Pixels, encode_png
from regraft.engine import Engine, evaluating
from regraft.evaluation.explain import evidence, overlay
from regraft.evaluation.judging import WithFeatures, divided, judged
from regraft.evaluation.predictions import Predictions, eval_batch, outputs_of, softmax
from regraft.evaluation.rows import to_records
from regraft.models.classifier import Classifier


class Answers:
    """A Classifier that is asked again and again, from one thread.

    `predict` and `evaluate` fill every batch up to one size, since an image's last bits depend on
    the size of its batch. A server has often fewer images, and the time of blank ones is lost: so
    smaller sizes are tried once on this network and machine, and used where they give the same
    bits.

    Attributes:
        sizes: Of batches, ascending; the last is the size that `predict` fills up to.
    """

    def __init__(self, classifier: Classifier, engine: Engine) -> None:
        # Copies: tensors may be views of the file, which somebody may write over while we serve.
        state = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
        classifier.load_state_dict(state, assign=True)
        engine.place(classifier)
        self.classifier, self.engine = classifier, engine
        self.network = WithFeatures(classifier)
        self.sizes: tuple[int, ...] = self._equal_sizes()

    def __call__(self, images: Sequence[Pixels]) -> list[dict[str, Any]]:
        """Returns a record for each of at most `sizes[-1]` images; see `to_records`."""
        batch_BCHW = torch.cat([self._normalised(image) for image in images])
        size = next(size for size in self.sizes if size >= len(images))
        logits_NK, features_ND = divided(self._outputs(batch_BCHW, size), self.classifier)
        names = tuple(map(str, range(len(images))))
        table = Predictions(names, self.classifier.class_names, softmax(logits_NK))
        return to_records(judged(table, self.classifier, features_ND), ())

    def explained(self, image: Pixels) -> bytes:
        """Returns a PNG that shows where the evidence for the answer was seen."""
        images_BCHW = self._normalised(image)
        logits_NK, _ = divided(self._outputs(images_BCHW, self.sizes[0]), self.classifier)
        best = int(logits_NK[0].argmax())
        heat_BHW, _, _ = evidence(self.classifier, images_BCHW, best)
        return encode_png(overlay(image, heat_BHW[0], self.classifier.inputs.intensity_range))

    def _normalised(self, image: Pixels) -> Tensor:
        return normalised(image[None], self.classifier.inputs, self.engine.device)

    def _outputs(self, images_BCHW: Tensor, size: int) -> Any:
        with evaluating(self.network), torch.inference_mode(), self.engine.autocast():
            images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
            return outputs_of(self.network, images_BCHW, size)

    def _equal_sizes(self) -> tuple[int, ...]:
        inputs = self.classifier.inputs
        whole = eval_batch(inputs.size, self.engine.device)
        generator = torch.Generator().manual_seed(0)
        images_BCHW = torch.randn(whole, inputs.channels, *inputs.size, generator=generator)
        images_BCHW = images_BCHW.to(self.engine.device)
        expected = self._outputs(images_BCHW, whole)
        found = [whole]
        size = whole // 2
        while size > 1:  # one image alone takes other kernels
            if np.array_equal(self._outputs(images_BCHW[:size], size), expected[:size]):
                found.insert(0, size)
            size //= 2
        return tuple(found)
