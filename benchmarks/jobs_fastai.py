"""fastai, in an environment of its own: a frozen timm VGG16 under a new head.

    python jobs_fastai.py FOLDER EPOCHS

Prints one line of JSON.
"""

import json
import sys
import time
from pathlib import Path

from fastai.vision.all import (
    CategoryBlock,
    DataBlock,
    GrandparentSplitter,
    ImageBlock,
    Learner,
    Normalize,
    Resize,
    ResizeMethod,
    accuracy,
    get_image_files,
    parent_label,
)
from jobs_torch import Vgg

folder, epochs = Path(sys.argv[1]), int(sys.argv[2])
inputs = json.loads((folder / "start" / "final" / "model.json").read_text())["inputs"]
block = DataBlock(
    (ImageBlock, CategoryBlock),
    get_items=get_image_files,
    get_y=parent_label,
    splitter=GrandparentSplitter("train", "test"),
    item_tfms=Resize(128, ResizeMethod.Squish),
    batch_tfms=Normalize.from_stats(inputs["mean"], inputs["std"], cuda=False),
)
network = Vgg(folder / "start" / "final" / "model.safetensors", 2)
network.features.requires_grad_(False)
learner = Learner(
    block.dataloaders(folder / "frozen", bs=32, num_workers=2), network, metrics=accuracy
)
with learner.no_bar(), learner.no_logging():
    began = time.perf_counter()
    learner.fit(epochs, 1e-3)  # every epoch is judged on the test images
    seconds = time.perf_counter() - began
    found = float(learner.validate()[1])
print(json.dumps({"seconds": seconds, "accuracy": found}))
