"""Imports held to Keras itself; slow, and only where an environment with Keras exists.

`make bench` makes one in the user's cache folder; or name its python in REGRAFT_KERAS_PYTHON.
"""

import importlib.util
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from regraft import api
from regraft.errors import ArtefactError
from regraft.models.classifier import Classifier
from regraft.models.foreign import Import, import_classifier
from regraft.training.recipe import Recipe

EXAMPLE = Path(__file__).parents[1] / "examples" / "from_keras"
USUAL = Path.home() / ".cache" / "regraft-bench" / "environment-keras" / "bin" / "python"
PYTHON = Path(os.environ.get("REGRAFT_KERAS_PYTHON") or USUAL)
FORMATS = ("keras", "h5", "weights.h5", "legacy.h5")
ARCHS = {
    "vgg16": "vgg16",
    "vgg16_nested": "vgg16",
    "vgg16_flatten": "vgg16",
    "vgg19": "vgg19",
    "densenet121": "densenet121",
    "densenet169": "densenet169",
    "densenet201": "densenet201",
    "densenet121_nested": "densenet121",
    "mobilenetv2": "keras_mobilenetv2_100",
    "mobilenetv2_odd": "keras_mobilenetv2_100",
    "efficientnetb0": "tf_efficientnet_b0",
    "plain": "plain.py:make",
    "resnet50": "resnet50",
}
PLAIN = """
from torch import nn

def make(channels):
    layers = []
    for number in range(11):
        layers += [nn.Conv2d(6 if number else channels, 6, 3, padding=1), nn.ReLU()]
    layers += [nn.BatchNorm2d(6), nn.MaxPool2d(2), nn.Conv2d(6, 5, 3, stride=2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(100, 8), nn.ReLU())
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="no environment with Keras: `make bench`"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("reference")
    _keras("reference.py", place)
    (place / "plain.py").write_text(PLAIN)
    return place


def _keras(script: str, *arguments: object) -> str:
    command = [str(PYTHON), str(EXAMPLE / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", [name for name in ARCHS if name != "resnet50"])
def test_features_and_logits_are_those_of_keras(name: str, form: str, files: Path) -> None:
    kept = np.load(files / f"{name}.npz")
    arch = f"{files}/{ARCHS[name]}" if ":" in ARCHS[name] else ARCHS[name]
    # `plain` scales inside, as -1 to 1: of weights alone that must be said.
    said = "tf" if name == "plain" and form in ("weights.h5", "legacy.h5") else None
    size = (int(kept["images"].shape[1]), int(kept["images"].shape[2]))
    asked = Import(files / f"{name}.{form}", "test", arch, size, preprocessing=said)
    classifier, _ = import_classifier(asked)
    inputs = classifier.inputs
    mean, std = (torch.tensor(each).view(1, -1, 1, 1) for each in (inputs.mean, inputs.std))
    images_BCHW = torch.from_numpy(kept["images"]).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        features_BD = classifier.eval().backbone((images_BCHW - mean) / std)
        logits_BK = classifier.head(features_BD)
    theirs = torch.from_numpy(kept["features"])
    if name == "vgg16_flatten":  # the head is left out; the maps' means are what is kept
        assert classifier.lineage[0]["head"].startswith("left out: it stands on 2,048 values")
        theirs = theirs.view(len(theirs), -1, features_BD.shape[1]).mean(dim=1)
    elif name == "plain":  # one sigmoid became two logits
        logits_BK = logits_BK[:, 1:] - logits_BK[:, :1]
    assert (features_BD - theirs).abs().max() < 1e-4
    if name != "vgg16_flatten":
        assert (logits_BK - torch.from_numpy(kept["logits"])).abs().max() < 1e-4


@pytest.mark.parametrize("form", FORMATS)
def test_a_resnet_of_keras_is_refused(form: str, files: Path) -> None:
    with pytest.raises(ArtefactError, match="strides in the first 1x1 convolution"):
        import_classifier(Import(files / f"resnet50.{form}", "test", "resnet50", (64, 64)))


def test_a_vgg_that_keras_trained_is_imported_and_finetuned(
    shared_data: Path, tmp_path: Path
) -> None:
    xrays = shared_data / "cxr_kermany_1k"
    told = _keras("train.py", xrays, tmp_path / "keras", "--epochs", "2")
    assert "classes: bacteria,normal,virus" in told
    spec = importlib.util.spec_from_file_location("compare", EXAMPLE / "compare.py")
    assert spec is not None and spec.loader is not None
    compare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compare)
    for name in ("model.keras", "model.weights.h5", "model.h5", "first_try.h5"):
        api.import_weights(
            tmp_path / "keras" / name, out=tmp_path / name, arch="vgg16", source="train.py",
            image_size=64, class_names=("bacteria", "normal", "virus"),
        )  # fmt: skip
        difference = compare.largest_difference(tmp_path / "keras" / "outputs.npz", tmp_path / name)
        assert difference < 1e-4
    run = api.finetune(
        shared_data / "cxr_hannover_224",
        out=tmp_path / "target",
        start=tmp_path / "model.keras",
        recipe=Recipe.transfer("head"),
    )
    assert run.record["start"]["elsewhere"] == ["train.py (model.keras)"]
    assert Classifier.load(run.folder).class_names == ("ap", "pa")
