"""Where the evidence was seen: in the right place, for the class asked for, and never by name."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from regraft import api
from regraft.engine import Engine
from regraft.errors import UsageError
from regraft.evaluation.explain import evidence, overlay
from regraft.inputs import InputSpec
from regraft.models.backbone import Backbone
from regraft.models.classifier import Classifier
from regraft.training.recipe import Recipe

MakeFolder = Callable[..., Path]
INPUTS = InputSpec((32, 32), 1, mean=(0.0,), std=(1.0,))


@pytest.fixture
def seeing(tmp_path: Path) -> Classifier:
    source = "from torch import nn\n\ndef net(_):\n    return nn.Sequential("
    source += "nn.Conv2d(1, 2, 4, stride=4), nn.ReLU(inplace=True))\n"
    (tmp_path / "net.py").write_text(source)
    made = Classifier(Backbone.create(f"{tmp_path / 'net.py'}:net", INPUTS), ("=bright", "dark"))
    convolution = made.backbone.body[0]  # type: ignore[index]
    with torch.no_grad():
        convolution.weight[0], convolution.weight[1] = 1.0, -1.0
        made.head.weight.copy_(torch.eye(2))
    return made


def test_the_evidence_lies_where_it_is_and_follows_the_class(seeing: Classifier) -> None:
    images = torch.zeros(1, 1, 32, 32)
    images[..., 4:12, 20:28] = 1.0
    images[..., 20:28, 4:12] = -1.0
    for label, (row, column) in enumerate([(8, 24), (24, 8)]):
        heat, classes, probabilities = evidence(seeing, images, label)
        assert heat.shape == (1, 32, 32)
        assert (heat.min(), heat.max()) == (0, 1)
        assert heat[0, row, column] > 0.9
        assert heat[0, column, row] < 0.1, "the evidence for the other class"
        assert heat[0, 16, 16] < 0.1
        assert classes[0] == label
        assert 0 < probabilities[0] < 1


@pytest.mark.parametrize(
    "arch",
    [
        "resnet10t",
        "vgg11_bn",
        "convnext_atto",
        "vit_tiny_patch16_224",
        "swin_tiny_patch4_window7_224",
    ],
)
def test_every_kind_of_network_can_be_explained_and_is_left_as_it_was(arch: str) -> None:
    inputs = InputSpec((64, 64), 3, mean=(0.5,) * 3, std=(0.2,) * 3)
    made = Classifier(Backbone.create(arch, inputs), ("a", "b", "c")).train()
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():  # as a server asks
        heat, classes, probabilities = evidence(made, images)
    assert heat.shape == (2, 64, 64)
    assert np.isfinite(heat).all()
    assert made.training
    assert all(torch.equal(before[name], tensor) for name, tensor in made.state_dict().items())
    assert all(parameter.grad is None for parameter in made.parameters())
    assert not any(module._forward_hooks for module in made.modules())
    with torch.inference_mode():
        logits = made.eval()(images)
    assert logits.argmax(dim=1).tolist() == classes.tolist()
    torch.testing.assert_close(torch.from_numpy(probabilities), logits.softmax(1).amax(1))
    with pytest.raises(UsageError, match="the network has stages 0 to"):
        evidence(made, images, stage=99)


def test_coarse_maps_are_passed_over_unless_they_are_asked_for() -> None:
    inputs = InputSpec((64, 64), 3, mean=(0.5,) * 3, std=(0.2,) * 3)
    made = Classifier(Backbone.create("resnet10t", inputs), ("a", "b"))
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    number = len(made.backbone.stage_maps(images)[0])
    default, chosen = evidence(made, images)[0], evidence(made, images, stage=number - 2)[0]
    coarse = evidence(made, images, stage=number - 1)[0]
    assert np.array_equal(default, chosen)
    assert not np.array_equal(default, coarse)


def test_without_evidence_the_image_is_left_grey() -> None:
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    shown = overlay(pixels, np.zeros((8, 8), np.float32), (0.0, 255.0))
    assert np.array_equal(shown, pixels.repeat(3, axis=2))
    hot = overlay(pixels, np.ones((8, 8), np.float32), (0.0, 255.0))
    assert (hot[..., 0] > hot[..., 2] + 50).all()


def test_pictures_are_numbered_and_a_table_says_what_they_show(
    seeing: Classifier, tmp_path: Path
) -> None:
    seeing.save(tmp_path / "model")
    (tmp_path / "images").mkdir()
    Image.fromarray(np.full((32, 32), 200, np.uint8)).save(tmp_path / "images" / "=1.png")
    (tmp_path / "images" / "broken.png").write_bytes(b"no")
    out, arch = tmp_path / "out", f"{tmp_path / 'net.py'}:net"
    number, broken = api.explain(tmp_path / "model", [tmp_path / "images"], out=out, arch=arch)
    assert (number, len(broken)) == (1, 1)
    assert {path.name for path in out.iterdir()} == {"000.png", "explained.csv", "manifest.json"}
    with (out / "explained.csv").open(newline="") as stream:
        rows = list(csv.reader(stream))
    assert rows[1][0] == "000.png"
    assert rows[1][2] == "'=bright"
    assert rows[2][4].startswith("not-an-image")
    with Image.open(out / "000.png") as picture:
        assert picture.size == (224, 224)
    with pytest.raises(UsageError, match="the model does not know `grey`"):
        api.explain(
            tmp_path / "model", [tmp_path / "images"], out=tmp_path / "o", label="grey", arch=arch
        )
    assert not (tmp_path / "o").exists()


def test_the_worst_mistakes_stand_in_the_report_with_what_was_seen(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    data = make_folder({"a": 40, "b": 40}, size=(32, 32))  # noise: nothing can be learned
    recipe = Recipe.scratch().changed({"image_size": 32, "epochs": 1, "channels": 3})
    run = api.pretrain(data, out=tmp_path / "run", arch="resnet10t", recipe=recipe)
    found = api.evaluate(run.folder, data, engine=Engine("cpu"))
    names = {path.name for path in (run.folder / "mistakes").iterdir()} - {"manifest.json"}
    number = found["num_mistakes"]
    assert number, "an untrained network makes mistakes"
    assert names == {f"{i:03d}{end}.png" for i in range(number) for end in ("", "-evidence")}
    page = api.report([run.folder], out=tmp_path / "page.html").read_text()
    assert page.count('in colour"') == number
    assert "where it looked, not why" in page
