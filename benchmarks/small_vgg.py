"""The network of the quality benchmark: five stages like VGG's, small enough for 2 cores."""

from collections import OrderedDict

from torch import nn

WIDTHS = (16, 32, 64, 128, 128)


def net(channels: int) -> nn.Module:
    """Returns features_BD of images from 32 px."""
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    for number, width in enumerate(WIDTHS, start=1):
        convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        # Simonyan and Zisserman 2014, arXiv:1409.1556, drawn as in arXiv:1502.01852
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        norm = nn.BatchNorm2d(width)
        stages[f"stage{number}"] = nn.Sequential(convolution, norm, nn.ReLU(), nn.MaxPool2d(2))
        channels = width
    return nn.Sequential(stages)
