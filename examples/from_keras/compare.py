"""How far an imported model is from Keras' own outputs on the same images.

    python examples/from_keras/compare.py OUTPUTS.npz MODEL...

OUTPUTS.npz (by train.py): images_BHWC from 0 to 255, and the logits that Keras gave.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from regraft import Classifier


def largest_difference(outputs: Path, model: Path) -> float:
    """Returns the largest absolute difference of a logit."""
    kept, classifier = np.load(outputs), Classifier.load(model).eval()
    inputs = classifier.inputs
    mean, std = (torch.tensor(each).view(1, -1, 1, 1) for each in (inputs.mean, inputs.std))
    images_BCHW = torch.from_numpy(kept["images"]).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        logits_BK = classifier((images_BCHW - mean) / std)
    return float((logits_BK - torch.from_numpy(kept["logits"])).abs().max())


if __name__ == "__main__":
    for folder in sys.argv[2:]:
        difference = largest_difference(Path(sys.argv[1]), Path(folder))
        print(f"{folder}: largest difference of a logit from Keras {difference:.1e}")
        if difference > 1e-4:
            sys.exit(1)
