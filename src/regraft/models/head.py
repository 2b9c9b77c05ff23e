"""Head: the classifier on a backbone. Nothing of it is reusable: transfer throws it away."""

import torch
from torch import Tensor, nn


class Head(nn.Linear):
    """One linear layer from features_BD to logits_BK, computed in float32."""

    def __init__(self, width: int, num_classes: int, *, seed: int = 0) -> None:
        super().__init__(width, num_classes)
        generator = torch.Generator().manual_seed(seed)
        # Small weights: training starts at the loss ln K of an unsure classifier. 0.01: as in
        # VGG's own classifier, Simonyan and Zisserman 2014, arXiv:1409.1556.
        nn.init.normal_(self.weight, 0.0, 0.01, generator=generator)
        nn.init.zeros_(self.bias)

    def forward(self, features_BD: Tensor) -> Tensor:
        with torch.autocast(features_BD.device.type, enabled=False):
            return super().forward(features_BD.float())
