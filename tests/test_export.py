"""Exports say elsewhere what regraft says here, or they are not written."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from regraft import api
from regraft.data.dataset import Dataset
from regraft.delivery import export as exporting
from regraft.delivery.deployed import Deployed
from regraft.engine import Engine
from regraft.errors import ArtefactError, EnvironmentFault, UsageError
from regraft.inputs import InputSpec
from regraft.models.backbone import Backbone
from regraft.models.classifier import Classifier

MakeFolder = Callable[..., Path]
NAMES = ("cat", "-dog", "<b>eel</b>")
SMALL_NET = Path(__file__).parents[1] / "examples" / "cifar10_to_mnist_parity" / "small_net.py"
# Runs where regraft cannot be imported: what others have is the file, and their own tools.
ALONE = """
import sys
class Refuse:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "regraft": raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import json, numpy as np
from PIL import Image
model, paths = sys.argv[1], sys.argv[2:]
"""
ONNX_ALONE = (
    ALONE
    + """
import onnxruntime
images = np.stack([np.asarray(Image.open(p), np.float32).transpose(2, 0, 1) for p in paths])
session = onnxruntime.InferenceSession(model)
names = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])
found = session.run(["probabilities"], {"images": images})[0]
print(json.dumps([names, found.tolist()]))
"""
)
TIMM_ALONE = (
    ALONE
    + """
import timm, torch
model = timm.create_model("local-dir:" + model, pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
images = torch.stack([transform(Image.open(p)) for p in paths])
with torch.no_grad():
    found = model(images).softmax(1)
print(json.dumps([model.pretrained_cfg["label_names"], found.tolist()]))
"""
)


def classifier(
    arch: str, size: tuple[int, int] = (32, 32), channels: int = 3, **changes: Any
) -> Classifier:
    inputs = InputSpec(size, channels, mean=(0.4,) * channels, std=(0.2,) * channels, **changes)
    made = Classifier(Backbone.create(arch, inputs, seed=1), NAMES)
    torch.nn.init.normal_(made.head.weight, 0, 0.5, generator=torch.Generator().manual_seed(0))
    return made


@pytest.fixture
def images(make_folder: MakeFolder) -> Path:
    return make_folder({"cat": 4, "eel": 4}, size=(32, 32), mode="RGB", name="images")


def saved(tmp_path: Path, made: Classifier) -> Path:
    made.save(tmp_path / "model")
    return tmp_path / "model"


def alone(program: str, model: Path, images: Path, told: pytest.TempPathFactory) -> Any:
    paths = sorted(map(str, images.rglob("*.png")))
    done = subprocess.run(
        [sys.executable, "-c", program, str(model), *paths],
        capture_output=True,
        text=True,
        check=True,
        cwd=told.mktemp("elsewhere"),
    )
    return json.loads(done.stdout)


def test_onnx_alone_gives_the_probabilities_of_predict(
    images: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = saved(tmp_path, classifier("resnet10t"))
    found = api.export(model, to="onnx", out=tmp_path / "out" / "m.onnx", data=images)
    assert found.num_images == 8
    assert found.equal_top1 == 1
    assert found.max_difference <= 1e-4
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["m.md", "m.onnx"]
    table, _ = api.predict(model, [images], engine=Engine("cpu", "fp32"))
    assert table is not None
    names, probabilities = alone(ONNX_ALONE, tmp_path / "out" / "m.onnx", images, tmp_path_factory)
    assert tuple(names) == NAMES
    order = np.argsort(table.paths)
    np.testing.assert_allclose(probabilities, table.probabilities[order], atol=1e-4)
    assert np.ptp(table.probabilities[:, 0]) > 1e-3, "images must differ for this to say anything"


@pytest.mark.parametrize(
    "arch", ["resnet10t", "convnext_atto", pytest.param("vit_tiny_patch16_224")]
)
def test_timm_alone_gives_the_probabilities_of_predict(
    arch: str, images: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = saved(tmp_path, classifier(arch))
    folder = tmp_path / "folder"
    api.export(model, to="timm", out=folder, data=images, license="apache-2.0")
    files = {"README.md", "config.json", "manifest.json", "model.safetensors"}
    assert {path.name for path in folder.iterdir()} == files
    config = json.loads((folder / "config.json").read_text())
    assert config["pretrained_cfg"]["mean"] == pytest.approx([0.4] * 3)
    assert config["pretrained_cfg"]["license"] == "apache-2.0"
    assert "in1k" not in (folder / "config.json").read_text()
    table, _ = api.predict(model, [images], engine=Engine("cpu", "fp32"))
    assert table is not None
    names, probabilities = alone(TIMM_ALONE, folder, images, tmp_path_factory)
    assert tuple(names) == NAMES
    order = np.argsort(table.paths)
    np.testing.assert_allclose(probabilities, table.probabilities[order], atol=1e-4)
