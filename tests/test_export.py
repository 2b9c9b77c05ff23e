"""Exports say elsewhere what regraft says here, or they are not written."""

import json
import subprocess
import sys
from collections.abc import Callable
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
from regraft.models.architectures import load_timm_folder
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


@pytest.mark.parametrize("arch", ["resnet10t", "convnext_atto", "vit_tiny_patch16_224"])
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


@pytest.mark.parametrize(
    ("arch", "reason"),
    [
        ("vgg11_bn", "carries layers of its own before the classifier"),
        ("mobilenetv3_small_050", "carries layers of its own before the classifier"),
        (f"{SMALL_NET}:small_net", "it is your own network"),
    ],
)
def test_a_network_that_timm_has_in_another_form_is_refused_by_name(
    arch: str, reason: str, images: Path, tmp_path: Path
) -> None:
    model = saved(tmp_path, classifier(arch))
    own = arch if ":" in arch else None
    with pytest.raises(UsageError, match=reason) as refused:
        api.export(model, to="timm", out=tmp_path / "folder", data=images, arch=own)
    assert f"`{Path(arch).name}` has no form in timm" in str(refused.value)
    assert "--to onnx" in refused.value.hint
    assert not (tmp_path / "folder").exists()


def test_a_network_of_ones_own_goes_by_torch_export(images: Path, tmp_path: Path) -> None:
    arch = f"{SMALL_NET}:small_net"
    made = classifier(arch)
    model = saved(tmp_path, made)
    found = api.export(model, to="torch", out=tmp_path / "m.pt2", data=images, arch=arch)
    assert found.max_difference <= 1e-4
    told = {"regraft.json": ""}
    program = torch.export.load(tmp_path / "m.pt2", extra_files=told).module()
    assert json.loads(json.loads(told["regraft.json"])["class_names"]) == list(NAMES)
    assert program(torch.zeros(5, 3, 32, 32))[0].shape == (5, 3)


@pytest.mark.fault("I17")
@pytest.mark.parametrize(("to", "name"), [("torch", "m.pt2"), ("timm", "folder")])
def test_an_export_that_says_something_else_is_not_written(
    to: str, name: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = exporting._program_outputs, load_timm_folder

    def perturbed(folder: Path) -> torch.nn.Module:
        network = loads[1](folder)
        with torch.no_grad():
            next(network.parameters())[0].add_(0.05)
        return network

    monkeypatch.setattr(
        exporting, "_program_outputs", lambda content: lambda x: loads[0](content)(x) + 2e-4
    )
    monkeypatch.setattr("regraft.delivery.timm_folder.load_timm_folder", perturbed)
    model = saved(tmp_path, classifier("resnet10t"))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ArtefactError, match=f"the {to} export does not say what regraft says"):
        api.export(model, to=to, out=tmp_path / name, data=images)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.fault("M3")
def test_onnx_that_is_not_installed_is_named_with_its_extra(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    model = saved(tmp_path, classifier("resnet10t"))
    with pytest.raises(EnvironmentFault, match="onnxruntime") as refused:
        api.export(model, to="onnx", out=tmp_path / "m.onnx", data=images)
    assert refused.value.hint == "pip install 'regraft[onnx]'"
    assert refused.value.exit_code == 5
    assert not (tmp_path / "m.md").exists()


def test_a_bare_classifier_needs_images_and_nothing_is_overwritten(
    images: Path, tmp_path: Path
) -> None:
    model = saved(tmp_path, classifier("resnet10t"))
    with pytest.raises(UsageError, match="checked on real images"):
        api.export(model, to="torch", out=tmp_path / "m.pt2")
    (tmp_path / "m.md").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        api.export(model, to="torch", out=tmp_path / "m.pt2", data=images)
    with pytest.raises(UsageError, match="`--to keras` is not known"):
        api.export(model, to="keras", out=tmp_path / "k", data=images)
    with pytest.raises(UsageError, match="never written to"):
        api.export(model, to="timm", out=images / "folder", data=images)


@pytest.mark.parametrize(
    ("changes", "low", "high"),
    [
        ({"bit_depth": 16, "intensity_range": (100.0, 4000.0)}, 100, 4000),
        ({"intensity_range": (50.0, 200.0), "clips": True}, 0, 255),
    ],
)
def test_the_range_of_values_is_inside_the_deployed_network(
    changes: dict[str, Any], low: int, high: int
) -> None:
    from regraft.data.batches import normalised

    made = classifier("resnet10t", channels=1, **changes).eval()
    generator = np.random.default_rng(0)
    pixels = generator.integers(low, high, (3, 32, 32, 1)).astype(np.uint16)
    with torch.inference_mode():
        expected = made(normalised(pixels, made.inputs, torch.device("cpu"))).softmax(1)
        stored = torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32))
        found, logits = Deployed(made)(stored)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits.softmax(1), found)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Run, evaluated, with its cache at hand."""
    from regraft.training.recipe import Recipe

    root = tmp_path_factory.mktemp("run")
    generator = np.random.default_rng(0)
    for label in ("cat", "=dog"):
        (root / "secret_place" / label).mkdir(parents=True)
        for i in range(20):
            pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "secret_place" / label / f"{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REGRAFT_CACHE", str(root / "cache"))
        recipe = Recipe.scratch().changed({"image_size": 32, "epochs": 1})
        api.pretrain(root / "secret_place", out=root / "run", arch="resnet10t", recipe=recipe)
        api.evaluate(root / "run", root / "secret_place")
    return root / "run"


@pytest.mark.fault("I20")
def test_a_card_tells_origin_numbers_and_limits_and_no_place(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REGRAFT_CACHE", str(run.parent / "cache"))
    found = api.export(run, to="timm", out=tmp_path / "folder", license="cc-by-4.0")
    assert "validation" in found.images
    assert "from the cache" in found.images
    card = (tmp_path / "folder" / "README.md").read_text()
    front = card.split("---")[1]
    assert 'license: "cc-by-4.0"' in front
    assert "pipeline_tag: image-classification" in front
    evaluation = json.loads((run / "evaluation.json").read_text())
    accuracy = evaluation["accuracy"]
    assert f"| accuracy | {accuracy['value']:.4f} | {accuracy['low']:.4f}" in card
    assert "Weights from elsewhere: none." in card
    fingerprint = json.loads((run / "run.json").read_text())["data"]["fingerprint"]
    assert f"data fingerprint `{fingerprint}`" in card
    assert "## Limits" in card
    for path in (tmp_path / "folder").iterdir():
        assert str(run.parent).encode() not in path.read_bytes()


def test_without_the_cache_the_data_is_asked_for_and_its_validation_images_are_used(
    run: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="are not in the cache") as refused:
        api.export(run, to="timm", out=tmp_path / "folder")
    assert "--data DATA" in refused.value.hint
    data = Dataset.open(run.parent / "secret_place", whole=True)
    found = api.export(run, to="timm", out=tmp_path / "folder", data=data, images=7)
    assert found.images.endswith("images of the run")
    assert found.num_images == 7


def test_a_card_names_weights_from_elsewhere(images: Path, tmp_path: Path) -> None:
    made = classifier("resnet10t")
    made.lineage = (
        {"verb": "import", "source": "a colleague", "file": "x.h5", "head": "kept"},
        {"verb": "finetune", "data": "f" * 64, "train_images": 5, "arch": "resnet10t"},
    )
    model = saved(tmp_path, made)
    api.export(model, to="timm", out=tmp_path / "folder", data=images)
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "Weights from elsewhere: a colleague (x.h5)." in card
    assert "Not measured" in card
    assert "\\<b\\>eel\\</b\\>" in card, "names are no markup"
