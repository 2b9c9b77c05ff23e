"""The small network of the original question, as a factory for `--arch small_net.py:small_net`."""

from torch import nn


def small_net(channels: int) -> nn.Module:
    """Returns images to features: Conv 32 stride 2, max pool 3, global max pool.

    regraft adds the classifier (`Dense`) itself.
    """
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(3),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
    )
