"""A trained classifier over HTTP: the same answers, and what it withstands."""

import numpy as np
import pytest
import torch

from regraft.engine import Engine, evaluating
from regraft.evaluation.predictions import eval_batch, outputs_of
from regraft.inputs import InputSpec
from regraft.models.backbone import Backbone
from regraft.models.classifier import Classifier

ENGINE = Engine("cpu")


@pytest.mark.parametrize("arch", ["resnet18", "convnext_atto"])
def test_an_image_has_the_same_outputs_alone_and_among_others(arch: str) -> None:
    inputs = InputSpec((64, 64), 3, mean=(0.5,) * 3, std=(0.2,) * 3)
    network = Classifier(Backbone.create(arch, inputs, seed=0), ("a", "b", "c"))
    ENGINE.place(network)
    whole = eval_batch(inputs.size, ENGINE.device)
    generator = torch.Generator().manual_seed(0)
    images_BCHW = torch.randn(whole, 64, 64, 3, generator=generator).permute(0, 3, 1, 2)
    with evaluating(network), torch.inference_mode(), ENGINE.autocast():
        among = outputs_of(network, images_BCHW, whole)
        for number in (1, 2, 3, 15, 33):
            alone = outputs_of(network, images_BCHW[-number:], whole)
            np.testing.assert_array_equal(alone, among[-number:])
