import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from regraft.errors import ArtefactError, UsageError
from regraft.inputs import InputSpec
from regraft.models.backbone import Backbone
from regraft.models.classifier import Classifier
from regraft.models.weights import transplant
from signing import sign

RGB = InputSpec((32, 32), 3, 8, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
GREY = InputSpec((32, 32), 1, 8, (0.5,), (0.2,))
SMALL = "resnet10t"


@pytest.fixture(scope="module")
def trained() -> Backbone:
    """A backbone whose every tensor differs from a fresh one."""
    backbone = Backbone.create(SMALL, RGB, seed=7)
    for tensor in backbone.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.125)
    backbone.random = frozenset()
    return backbone


def own_net(folder: Path, text: str = "nn.Conv2d(channels, 8, 3, stride=2)") -> str:
    file = folder / "net.py"
    body = f"nn.Sequential({text}, nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten())"
    file.write_text(f"from torch import nn\n\ndef net(channels):\n    return {body}\n")
    return f"{file}:net"


@pytest.mark.parametrize(
    ("arch", "num_stages", "width"),
    [
        ("vgg11", 5, 512),
        (SMALL, 5, 512),
        ("convnext_atto", 4, 320),
        ("vit_tiny_patch16_224", 12, 192),
    ],
)
def test_stages_hold_every_tensor_once(arch: str, num_stages: int, width: int) -> None:
    backbone = Backbone.create(arch, RGB)
    names = [name for stage in backbone.stages for name in stage]
    assert len(backbone.stages) == num_stages
    assert sorted(names) == sorted(backbone.state_dict())
    assert backbone.width == width


def test_the_neck_of_vgg_is_left_out() -> None:
    backbone = Backbone.create("vgg11", RGB)
    assert backbone.num_parameters == 9_220_480  # its convolutions alone; timm's has 128.8 million
    assert not any("pre_logits" in name for name in backbone.state_dict())


def test_the_seed_alone_decides_the_weights() -> None:
    torch.manual_seed(1)
    first = Backbone.create(SMALL, RGB, seed=3).state_dict()
    torch.manual_seed(2)
    again = Backbone.create(SMALL, RGB, seed=3).state_dict()
    other = Backbone.create(SMALL, RGB, seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["body.conv1.0.weight"], other["body.conv1.0.weight"])


@pytest.mark.parametrize("size", [(32, 32), (64, 48)])
def test_another_input_size_keeps_the_weights(trained: Backbone, size: tuple[int, int]) -> None:
    resized = trained.resized(size).eval()
    assert resized(torch.zeros(1, 3, *size)).shape == (1, 512)
    assert torch.equal(resized.body.conv1[0].weight, trained.body.conv1[0].weight)  # type: ignore[index, union-attr]


def test_a_vit_takes_another_size() -> None:
    backbone = Backbone.create("vit_tiny_patch16_224", RGB).resized((64, 48)).eval()
    assert backbone(torch.zeros(1, 3, 64, 48)).shape == (1, 192)


@pytest.mark.parametrize(
    ("arch", "size", "text"),
    [
        ("vgg999", 32, "timm has no architecture `vgg999`"),
        ("vgg11", 8, "does not work on images of 3 channels and 8x8 px"),
        ("nowhere.py:net", 32, "`nowhere.py:net` cannot be loaded"),
        ("json:loads_", 32, "`json:loads_` cannot be loaded"),
        ("json:loads", 32, "does not work on images of 3 channels and 32x32 px: TypeError"),
    ],
)
def test_an_impossible_architecture_is_refused(arch: str, size: int, text: str) -> None:
    with pytest.raises(UsageError, match="hint: ") as refused:
        Backbone.create(arch, replace(RGB, size=(size, size)))
    assert text in str(refused.value)


def test_an_own_network_has_features_and_stages(tmp_path: Path) -> None:
    backbone = Backbone.create(own_net(tmp_path), RGB)
    assert backbone.arch == "net.py:net"
    assert backbone.width == 8
    assert backbone.stages == (("body.0.weight", "body.0.bias"),)


def test_an_own_network_must_give_features(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text("def text(channels):\n    return 'no network'\n")
    with pytest.raises(UsageError, match=r"returned str; expected a torch\.nn\.Module"):
        Backbone.create(f"{file}:text", RGB)


def test_a_mistake_in_own_code_is_told_as_such(tmp_path: Path) -> None:
    file = tmp_path / "wrong.py"
    for text, told in (("def net(:", "SyntaxError"), ("1 / 0", "ZeroDivisionError: division by")):
        file.write_text(text)
        with pytest.raises(UsageError, match=f"cannot be loaded: {told}"):
            Backbone.create(f"{file}:net", RGB)


def test_own_code_may_define_dataclasses(tmp_path: Path) -> None:
    file = tmp_path / "modern.py"
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "from torch import nn\n\n@dataclass\nclass Width:\n    value: int = 4\n\n"
        "def net(channels):\n    return nn.Sequential(nn.Conv2d(channels, Width().value, 3))\n"
    )
    assert Backbone.create(f"{file}:net", RGB).width == 4


def test_a_transplant_takes_every_tensor(trained: Backbone) -> None:
    target = Backbone.create(SMALL, RGB, seed=1)
    moves = transplant(trained, target)
    arrived = target.state_dict()
    assert all(torch.equal(arrived[name], tensor) for name, tensor in trained.state_dict().items())
    assert {move.what for move in moves} == {"taken"}
    assert sum(move.num_tensors for move in moves) == len(arrived)
    assert sum(move.num_values for move in moves) == sum(t.numel() for t in arrived.values())
    assert not target.is_random


def test_another_architecture_is_refused_with_the_first_differences(trained: Backbone) -> None:
    target = Backbone.create("vgg11", RGB)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(ArtefactError) as refused:
        transplant(trained, target)
    assert "- `body.conv1.0.weight` 24x3x3x3" in str(refused.value)
    assert "more" in str(refused.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())


def test_other_channels_need_to_be_named(trained: Backbone) -> None:
    target = Backbone.create(SMALL, GREY)
    with pytest.raises(ArtefactError, match="--adapt channels"):
        transplant(trained, target)
    moves = transplant(trained, target, ["channels"])
    assert [move.num_tensors for move in moves if move.what == "adapted"] == [1]


def test_adapted_channels_answer_alike_to_grey_images(trained: Backbone) -> None:
    target = Backbone.create(SMALL, GREY)
    transplant(trained, target, ["channels"])
    grey = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        first = trained.body.conv1[0](grey.repeat(1, 3, 1, 1))  # type: ignore[index, operator]
        assert torch.allclose(target.body.conv1[0](grey), first, atol=1e-5)  # type: ignore[index, operator]


def test_named_tensors_may_start_fresh(trained: Backbone) -> None:
    target = Backbone.create(SMALL, RGB, seed=1)
    fresh = target.state_dict()["body.conv1.0.weight"].clone()
    moves = transplant(trained, target, ["new:body.conv1.*"])
    assert torch.equal(target.state_dict()["body.conv1.0.weight"], fresh)
    assert sum(move.num_tensors for move in moves if move.what == "new") > 0
    assert target.random == {name for name in target.state_dict() if ".conv1." in name[:12]}


@pytest.mark.parametrize("entry", ["everything", "new:nothing.*"])
def test_an_exception_that_fits_nothing_is_refused(trained: Backbone, entry: str) -> None:
    with pytest.raises(UsageError, match="`--adapt` cannot be used"):
        transplant(trained, Backbone.create(SMALL, RGB), [entry])


def test_a_saved_classifier_comes_back_equal(trained: Backbone, tmp_path: Path) -> None:
    classifier = Classifier(trained, ("cat", "dög"), seed=5).eval()
    classifier.lineage = ({"verb": "pretrain", "data": "abc"},)
    classifier.save(tmp_path / "final")
    loaded = Classifier.load(tmp_path).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), classifier(images))
    assert loaded.class_names == ("cat", "dög")
    assert loaded.inputs == RGB
    assert loaded.lineage == classifier.lineage
    assert not loaded.backbone.is_random


def test_channels_last_weights_can_be_saved(tmp_path: Path) -> None:
    classifier = Classifier(Backbone.create(SMALL, RGB), ("a", "b"))
    classifier.to(memory_format=torch.channels_last)
    classifier.save(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["backbone.body.conv1.0.weight"].is_contiguous()


def changed_model(folder: Path, key: str, value: object) -> None:
    file = folder / "model.json"
    document = json.loads(file.read_text())
    file.write_text(json.dumps({**document, key: value}))


Damage = Callable[[Path], object]


@pytest.mark.parametrize(
    ("damage", "resign", "text"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b"x"), False, "has 1 bytes, not"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 100), True, "no tensors"),
        (lambda f: (f / "model.json").write_text("{"), True, "not valid JSON"),
        (lambda f: changed_model(f, "arch", "vgg11"), False, "model.json"),
        (lambda f: changed_model(f, "arch", "vgg11"), True, "are not those of `vgg11`"),
        (lambda f: changed_model(f, "code", "import os"), True, "no classifier of this version"),
        (lambda f: changed_model(f, "class_names", ["a"]), True, "no classifier of this version"),
        (lambda f: changed_model(f, "arch", "os:system"), True, "is never run unasked"),
        (lambda f: (f / "manifest.json").unlink(), False, "`manifest.json` is missing"),
        (lambda f: (f / "model.json").unlink(), False, "holds no trained classifier"),
    ],
)
def test_a_damaged_classifier_is_refused(
    tmp_path: Path, damage: Damage, resign: bool, text: str
) -> None:
    Classifier(Backbone.create(SMALL, RGB), ("a", "b")).save(tmp_path)
    damage(tmp_path)
    if resign:  # as an attacker would: the hashes fit again
        sign(tmp_path)
    with pytest.raises(ArtefactError) as refused:
        Classifier.load(tmp_path)
    assert text.replace("`manifest.json` is", "manifest.json` is") in str(refused.value)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    Classifier(Backbone.create(SMALL, RGB), ("a", "b")).save(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["head.bias"][0] = float("nan")
    save_file(state, tmp_path / "model.safetensors")
    sign(tmp_path)
    with pytest.raises(ArtefactError, match="not finite"):
        Classifier.load(tmp_path)


def test_own_code_must_be_named_again(tmp_path: Path) -> None:
    arch = own_net(tmp_path)
    Classifier(Backbone.create(arch, RGB), ("a", "b")).save(tmp_path / "final")
    with pytest.raises(ArtefactError, match=r"name it again: `--arch net\.py:net`"):
        Classifier.load(tmp_path)
    assert Classifier.load(tmp_path, arch=arch).class_names == ("a", "b")
    assert str(tmp_path) not in (tmp_path / "final" / "model.json").read_text()


def test_weights_that_will_be_loaded_are_not_drawn_and_everything_else_is_there() -> None:
    inputs = InputSpec((64, 64), 3)
    for arch in ("resnet10t", "swin_tiny_patch4_window7_224"):
        drawn, undrawn = (Backbone.create(arch, inputs, seed=seed) for seed in (0, None))
        undrawn.load_state_dict(drawn.state_dict())
        images = torch.randn(2, 3, 64, 64)
        with torch.no_grad():  # buffers that no state holds (Swin's positions) are right too
            assert torch.equal(drawn.eval()(images), undrawn.eval()(images))


def test_the_features_of_the_last_stage_are_those_of_the_network() -> None:
    backbone = Backbone.create("vgg11_bn", InputSpec((64, 64), 3)).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        stages = backbone.stage_features(images)
        assert torch.equal(stages[-1], backbone(images))
    assert [stage.shape[1] for stage in stages] == [64, 128, 256, 512, 512]
