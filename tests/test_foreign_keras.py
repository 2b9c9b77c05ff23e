"""Weights that Keras saved: the same function, or a refusal that says why."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from keras_layouts import LAYOUTS, Net, write_keras, write_named, write_nested, write_whole
from regraft import cli
from regraft.errors import ArtefactError, UsageError
from regraft.inputs import InputSpec
from regraft.models import foreign
from regraft.models.backbone import Backbone
from regraft.models.classifier import Classifier
from regraft.models.foreign import Import, import_classifier
from regraft.models.keras_files import read_keras
from regraft.models.keras_reference import run_chain
from regraft.models.scaling import PREPROCESSING, scaling_of

NETWORK = """
from torch import nn

def make(channels):
    layers = []
    for number in range(11):
        layers += [nn.Conv2d(6 if number else channels, 6, 3, padding=1), nn.ReLU()]
    layers += [nn.BatchNorm2d(6), nn.MaxPool2d(2), nn.Conv2d(6, 5, 3, stride=STRIDE), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(100, 15), nn.ReLU())
"""


def network() -> Net:
    net = Net((24, 20, 3))
    for _ in range(11):
        net.conv(6)
    net.norm().pool().conv(5, strides=[2, 2], padding="valid").add("Flatten")
    return net.dense(100, 15, "relu").add("Dropout", rate=0.5).dense(15, 3)


@pytest.fixture(autouse=True)
def _read_here(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Reads files in this process, which is faster; tests of the whole way ask for `apart`."""
    if "apart" not in request.fixturenames:
        monkeypatch.setattr(foreign, "read_apart", lambda _, path: read_keras(path).to_flat())


@pytest.fixture
def apart() -> None:
    """Reads files in a process of their own, as users do."""


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(NETWORK.replace("STRIDE", "2"))
    return f"{tmp_path / 'net.py'}:make"


def asked(path: Path, arch: str, **options: Any) -> Import:
    return Import(path, "own training on bars", arch, **options)


def images(shape: tuple[int, int, int] = (24, 20, 3)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    height, width, channels = shape
    return torch.randint(0, 256, (3, channels, height, width), generator=generator).float()


def outputs(classifier: Classifier, images_BCHW: torch.Tensor) -> torch.Tensor:
    """Of images from 0 to 255, scaled as the classifier's InputSpec says."""
    mean, std = (torch.tensor(each).view(1, -1, 1, 1) for each in
                 (classifier.inputs.mean, classifier.inputs.std))  # fmt: skip
    with torch.no_grad():
        logits: torch.Tensor = classifier.eval()((images_BCHW / 255 - mean) / std)
    return logits


def theirs(net: Net, path: Path, images_BCHW: torch.Tensor) -> torch.Tensor:
    """What Keras computes from images scaled by 1/255: its layers, one by one."""
    layers = list(read_keras(write_keras(net, path.with_suffix(".reference.keras"))).layers)
    head = layers.pop().arrays
    features = run_chain(layers, images_BCHW / 255)
    return features @ torch.from_numpy(head["kernel"]).double() + torch.from_numpy(head["bias"])


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_outputs_of_keras(name: str, own: str, tmp_path: Path) -> None:
    net = network()
    path = LAYOUTS[name](net, tmp_path / name)
    classifier, _ = import_classifier(asked(path, own, image_size=(24, 20)))
    assert torch.allclose(
        outputs(classifier, images()).double(), theirs(net, path, images()), atol=1e-5
    )
    assert classifier.lineage[0]["head"] == "kept"


def test_the_twelfth_convolution_comes_after_the_second(tmp_path: Path) -> None:
    net = network()
    path = LAYOUTS["net.weights.h5"](net, tmp_path / "net.weights.h5")
    kernels = [layer.arrays["kernel"] for layer in read_keras(path).of_kind("Conv2D")]
    assert [array.shape[2] for array in kernels] == [3] + [6] * 11
    assert np.array_equal(kernels[10], net.arrays["conv2d_10"]["kernel"])


def test_another_stride_in_the_own_network_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text(NETWORK.replace("STRIDE", "(2, 2), padding=0, dilation=1"))
    (tmp_path / "wrong.py").write_text(NETWORK.replace("ReLU", "ELU").replace("STRIDE", "2"))
    path = write_keras(network(), tmp_path / "net.keras")
    import_classifier(asked(path, f"{tmp_path / 'other.py'}:make"))
    with pytest.raises(ArtefactError, match="not the function that Keras computes: the outputs"):
        import_classifier(asked(path, f"{tmp_path / 'wrong.py'}:make"))


def test_layers_that_do_not_fit_are_named_with_their_shapes(tmp_path: Path, own: str) -> None:
    net = Net((24, 20, 3))
    for _ in range(11):
        net.conv(7)
    net.norm().pool().conv(5).add("Flatten").dense(600, 15, "relu").dense(15, 3)
    with pytest.raises(ArtefactError, match=r"`conv2d`: weight 7x3x3x3, not 6x3x3x3"):
        import_classifier(asked(write_keras(net, tmp_path / "net.keras"), own))
    few = Net((24, 20, 3)).conv(6).add("GlobalAveragePooling2D").dense(6, 3)
    with pytest.raises(ArtefactError, match="1 Conv2D layer in the file, 12 in the network"):
        import_classifier(asked(write_keras(few, tmp_path / "few.keras"), own))


def test_what_kerass_epsilon_adds_is_carried_by_the_variance(tmp_path: Path, own: str) -> None:
    net = network()
    path = write_keras(net, tmp_path / "net.keras")
    classifier, _ = import_classifier(asked(path, own))
    norm = next(part for part in classifier.modules() if isinstance(part, torch.nn.BatchNorm2d))
    saved = torch.from_numpy(net.arrays["batch_normalization"]["moving_variance"])
    assert norm.running_var is not None
    assert torch.allclose(norm.running_var + norm.eps, saved + 1e-3, atol=1e-7)


def test_one_sigmoid_becomes_two_logits_of_the_same_probability(tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text(
        "from torch import nn\ndef make(channels):\n"
        "    return nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU())\n"
    )
    net = Net((8, 8, 3)).conv(8).add("GlobalAveragePooling2D").dense(8, 1, "sigmoid")
    path = write_keras(net, tmp_path / "net.keras")
    classifier, _ = import_classifier(asked(path, f"{tmp_path / 'small.py'}:make"))
    small = images((8, 8, 3))
    ours = outputs(classifier, small).softmax(1)[:, 1]
    assert torch.allclose(ours.double(), theirs(net, path, small).sigmoid()[:, 0], atol=1e-6)


def test_a_softmax_over_one_unit_is_no_head(tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text(
        "from torch import nn\ndef make(channels):\n    return nn.Conv2d(channels, 8, 3)\n"
    )
    net = Net((8, 8, 3)).conv(8, padding="valid", activation="linear")
    net.add("GlobalAveragePooling2D").dense(8, 1, "softmax")
    path = write_keras(net, tmp_path / "net.keras")
    classifier, notes = import_classifier(asked(path, f"{tmp_path / 'small.py'}:make"))
    assert "a softmax over one unit always says 1" in " ".join(notes)
    assert not classifier.head.weight.any()


@pytest.mark.parametrize(
    ("arch", "reason"),
    [
        ("resnet50", "strides in the first 1x1 convolution of a block, timm's in the 3x3"),
        ("mobilenetv2_100", "use `--arch keras_mobilenetv2_100`"),
        ("efficientnet_b0", "use `--arch tf_efficientnet_b0`"),
        ("vit_tiny_patch16_224", "as far as is known"),
    ],
)
def test_a_network_that_is_another_function_is_refused(
    arch: str, reason: str, tmp_path: Path
) -> None:
    path = write_keras(network(), tmp_path / "net.keras")
    with pytest.raises(ArtefactError, match=re.escape(reason)):
        import_classifier(asked(path, arch))


def test_code_in_a_file_is_left_out_and_said(tmp_path: Path, own: str) -> None:
    net = network()
    lambda_layer = {"class_name": "Lambda", "config": {"name": "twice", "function": "os.system"}}
    net.entries.insert(1, lambda_layer)
    _, notes = import_classifier(asked(write_keras(net, tmp_path / "net.keras"), own))
    assert "`twice` (Lambda) is left out: code in a file is never run" in " ".join(notes)
    assert "nothing tells whether strides" in " ".join(notes)


@pytest.mark.parametrize("preprocessing", PREPROCESSING)
def test_each_preprocessing_is_what_keras_does(preprocessing: str) -> None:
    values = np.arange(12, dtype=np.float64).reshape(4, 3) * 20
    imagenet = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = {
        "none": values,
        "keras-rescale": values / 255,
        "tf": values / 127.5 - 1,
        "torch": (values / 255 - imagenet[0]) / imagenet[1],
        "caffe": values - np.array([123.68, 116.779, 103.939]),  # in RGB; channels swap in weights
    }[preprocessing]
    scaling = scaling_of(preprocessing, 3)
    inputs = InputSpec((1, 1), 3, mean=scaling.mean, std=scaling.std)
    ours = (values / 255 - np.array(inputs.mean)) / np.array(inputs.std)
    assert np.allclose(ours, expected)
    assert scaling.is_bgr == (preprocessing == "caffe")


def test_caffes_blue_comes_first_in_keras_and_last_here(tmp_path: Path, own: str) -> None:
    net = network()
    path = write_keras(net, tmp_path / "net.keras")
    classifier, _ = import_classifier(asked(path, own, preprocessing="caffe"))
    bgr = images().flip(1) - torch.tensor([103.939, 116.779, 123.68]).view(1, 3, 1, 1)
    expected = theirs(net, path, bgr * 255)
    difference = (outputs(classifier, images()).double() - expected).abs().max()
    assert difference < 1e-4 * expected.abs().max()


def test_a_rescaling_inside_the_network_becomes_mean_and_std(tmp_path: Path, own: str) -> None:
    net = network()
    rescaling = {"name": "scale", "scale": 1 / 127.5, "offset": -1.0}
    net.entries.insert(1, {"class_name": "Rescaling", "config": rescaling})
    classifier, notes = import_classifier(asked(write_keras(net, tmp_path / "net.keras"), own))
    assert np.allclose(classifier.inputs.mean, 0.5)
    assert np.allclose(classifier.inputs.std, 0.5)
    assert "by the network's own first layers" in notes[0]


def test_numbers_for_scaling_must_fit_the_channels(tmp_path: Path, own: str) -> None:
    path = write_keras(network(), tmp_path / "net.keras")
    with pytest.raises(UsageError, match="takes 3 channels, and there are 2 means"):
        import_classifier(asked(path, own, numbers={"mean": (0.5, 0.5)}))
    classifier, _ = import_classifier(asked(path, own, numbers={"mean": (0.5,), "std": (0.25,)}))
    assert np.allclose(classifier.inputs.std, 0.25)


def test_class_names_are_as_many_as_the_head_has(tmp_path: Path, own: str) -> None:
    path = write_keras(network(), tmp_path / "net.keras")
    with pytest.raises(UsageError, match="head has 3 classes, and 2 are named"):
        import_classifier(asked(path, own, class_names=("a", "b")))


def test_a_model_says_where_its_weights_are_from(tmp_path: Path, own: str) -> None:
    path = write_keras(network(), tmp_path / "net.keras")
    with pytest.raises(UsageError, match="`--source` is empty"):
        import_classifier(Import(path, " ", own))


# Order of layers in a network inside another, of which only weights were saved.


def small_names(net: Net, *, frozen: int) -> list[str]:
    """The order in which Keras lists the weights if the first `frozen` layers do not learn."""
    is_norm = ("moving_mean", "moving_variance")
    owned = [(name, variable) for name, own in net.arrays.items() for variable in own]
    still = [*list(net.arrays)[:frozen]]
    learn = [(n, v) for n, v in owned if n not in still and v not in is_norm]
    rest = [pair for pair in owned if pair not in learn]
    return [f"{name}/{variable}" for name, variable in (*learn, *rest)]


def blocks() -> Net:
    return Net((8, 8, 3)).conv(4).norm().conv(4).norm().conv(4).norm()


@pytest.mark.parametrize("frozen", [0, 6])
def test_a_wholly_frozen_or_learning_inner_network_keeps_its_order(
    frozen: int, tmp_path: Path
) -> None:
    net = blocks()
    names = small_names(net, frozen=frozen)
    layers = read_keras(write_nested(net, list(net.arrays), names, tmp_path / "w.h5")).layers
    kernels = [layer.name for layer in layers if layer.kind == "Conv2D"]
    assert kernels == ["conv2d", "conv2d_1", "conv2d_2"]


@pytest.mark.parametrize("frozen", [2, 4])
def test_a_partly_frozen_inner_network_has_lost_its_order(frozen: int, tmp_path: Path) -> None:
    net = blocks()
    names = small_names(net, frozen=frozen)
    path = write_nested(net, list(net.arrays), names, tmp_path / "w.h5")
    with pytest.raises(ArtefactError, match="`base` was partly frozen when it was saved"):
        read_keras(path)


def test_a_partly_frozen_vgg_is_put_in_order_by_its_names(tmp_path: Path) -> None:
    net = Net((8, 8, 3))
    for block in (1, 2):
        for number in (1, 2):
            net.conv(4, name=f"block{block}_conv{number}")
    names = small_names(net, frozen=2)
    assert names[0].startswith("block2")
    layers = read_keras(write_nested(net, list(net.arrays), names, tmp_path / "w.h5")).layers
    assert [layer.name for layer in layers] == sorted(net.arrays)


# Files that are made to harm.


def _soft_link(file: Any) -> None:
    file["layers/conv2d/vars/9"] = h5py.SoftLink("/layers")


def _external_link(file: Any) -> None:
    file["layers/conv2d/vars/9"] = h5py.ExternalLink("/etc/passwd", "/")


def _external_storage(file: Any) -> None:
    file.create_dataset("layers/x", (10,), "f4", external=[("/etc/passwd", 0, 40)])


def _virtual(file: Any) -> None:
    layout = h5py.VirtualLayout((10,), "f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", (10,))
    file.create_virtual_dataset("layers/x", layout)


def _bomb(file: Any) -> None:
    file.create_dataset("layers/x", data=np.zeros(10**7, "f4"), compression="gzip")


def _circle(file: Any) -> None:
    file["layers/again"] = file["layers"]


def _objects(file: Any) -> None:
    file.create_dataset("layers/x", data=["import os"], dtype=h5py.string_dtype())


@pytest.mark.fault("I10")
@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (_soft_link, "is a link to another place"),
        (_external_link, "is a link to another place"),
        (_external_storage, "lies outside the file"),
        (_virtual, "lies outside the file"),
        (_bomb, "unpacks to far more than the file holds"),
        (_circle, "do not end|far more than the file holds"),
        (_objects, "holds object, not numbers"),
    ],
)
def test_a_file_that_points_outside_itself_or_swells_is_refused(
    harm: Callable[[Any], None], reason: str, tmp_path: Path
) -> None:
    path = LAYOUTS["net.weights.h5"](blocks(), tmp_path / "w.weights.h5")
    with h5py.File(path, "a") as file:
        harm(file)
    with pytest.raises(ArtefactError, match=reason):
        read_keras(path)


@pytest.mark.fault("I10")
@pytest.mark.parametrize("name", ["first_try.h5", "net.keras"])
@pytest.mark.usefixtures("apart")
def test_a_damaged_file_is_refused_and_nothing_is_left(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = LAYOUTS[name](blocks(), tmp_path / name)
    content = bytearray(path.read_bytes())
    path.write_bytes(bytes(content[: len(content) // 2]))
    command = ["import", str(path), "--arch", "vgg16", "--source", "own", "--out"]
    assert _exit_code([*command, str(tmp_path / "out")]) == 4
    assert f"`{name}` cannot be imported" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.fault("I10")
@pytest.mark.parametrize("name", ["first_try.h5", "net.keras"])
def test_a_keras_file_given_for_a_model_gets_a_pointer(
    name: str,
    tmp_path: Path,
    make_folder: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, data = LAYOUTS[name](blocks(), tmp_path / name), make_folder({"a": 6, "b": 6})
    finetune = ["finetune", str(data), "--start", str(path), "--out", str(tmp_path / "out")]
    for command in (["predict", str(path), str(data)], finetune):
        assert _exit_code(command) == 4
        told = capsys.readouterr().err
        assert "a model of regraft is a folder" in told
        assert f"regraft import {path} --arch ..." in told


def _exit_code(command: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(command)
    return int(str(ended.value.code))


# The original question's file, all the way.


@pytest.fixture
def first_try(tmp_path: Path) -> Path:
    """VGG16(weights=None) without its top, frozen, then Flatten and Dense(2), 64 px; random."""
    sizes = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    blocks_of = [1, 1, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5]
    net = Net((64, 64, 3))
    for place, (filters, block) in enumerate(zip(sizes, blocks_of, strict=True)):
        number = place - blocks_of.index(block) + 1
        net.conv(filters, name=f"block{block}_conv{number}")
        name = f"block{block}_conv{number}"
        net.arrays[name]["bias"] = np.zeros(filters, np.float32)
    net.add("Flatten").dense(2048, 2)
    return write_named(net, tmp_path / "first_try.h5")


@pytest.mark.usefixtures("apart")
def test_the_question_s_file_is_imported_and_finetuned(
    first_try: Path,
    make_shapes: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    start, run = tmp_path / "start", tmp_path / "run"
    command = ["import", str(first_try), "--arch", "vgg16", "--image-size", "64"]
    source = ["--source", "own training on bars"]
    assert _exit_code([*command, *source, "--out", str(start)]) == 0
    told = capsys.readouterr()
    assert "weights from elsewhere: own training on bars" in told.out
    assert "it stands on 2,048 values (flattened maps)" in told.err
    assert "nothing has ever trained these layers" in told.err

    data = str(make_shapes(("down", "up"), 8))
    given = [data, "--start", str(start), "--image-size", "32", "--out", str(run)]
    assert _exit_code(["finetune", *given, "--strategy", "head"]) == 2
    assert "the backbone is random" in capsys.readouterr().err
    assert _exit_code(["predict", str(start), data]) == 4
    assert "was imported without its head" in capsys.readouterr().err

    assert _exit_code(["finetune", *given, "--strategy", "full", "--epochs", "1"]) == 0
    assert "weights from elsewhere: own training on bars (first_try.h5)" in capsys.readouterr().err
    page = tmp_path / "page.html"
    assert _exit_code(["report", str(run), "--out", str(page)]) == 0
    assert "Weights from elsewhere" in page.read_text()
    assert "own training on bars (first_try.h5)" in (run / "run.json").read_text()
    last = Classifier.load(run)
    assert [record["verb"] for record in last.lineage] == ["import", "finetune"]
    assert not last.backbone.random


def test_trained_weights_are_not_taken_for_random_ones(tmp_path: Path, own: str) -> None:
    classifier, notes = import_classifier(asked(write_whole(network(), tmp_path / "w.h5"), own))
    assert not classifier.lineage[0]["untrained"]
    assert "nothing has ever trained" not in " ".join(notes)


def test_the_mobilenet_of_keras_is_timms_with_other_padding() -> None:
    inputs = InputSpec((32, 32), 3, mean=(0.0,) * 3, std=(1.0,) * 3)
    ours = Backbone.create("keras_mobilenetv2_100", inputs)
    timms = Backbone.create("mobilenetv2_100", inputs)
    assert ours.state_dict().keys() == timms.state_dict().keys()
    assert ours.width == timms.width
    with torch.no_grad():
        seen = torch.randn(1, 3, 32, 32)
        assert not torch.allclose(ours.eval()(seen), timms.eval()(seen), atol=1e-3)
