"""Weights that torch, torchvision and timm saved; and pickles that are made to harm."""

import io
import json
import os
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from regraft import cli
from regraft.errors import ArtefactError, UsageError
from regraft.models.foreign import Import, import_classifier
from regraft.models.quarantine import read_apart
from regraft.models.torch_files import read_torch, refuse_bomb


def regraft(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def taken(path: Path, arch: str | None, **options: Any) -> tuple[Any, list[str]]:
    size = options.pop("image_size", (32, 32))
    return import_classifier(Import(path, "own training", arch, size, **options))


def images(channels: int = 3, side: int = 32) -> Tensor:
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def resnet() -> nn.Module:
    torch.manual_seed(1)
    network: nn.Module = torchvision.models.resnet18(num_classes=3)
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None
            part.running_mean.normal_()
    return network.eval()


def test_torchvisions_resnet_gives_its_own_logits(resnet: nn.Module, tmp_path: Path) -> None:
    wrapped = {f"module.{name}": tensor for name, tensor in resnet.state_dict().items()}
    path = tmp_path / "best.pth"
    torch.save({"epoch": 3, "state_dict": wrapped}, path)
    classifier, notes = taken(path, "resnet18", class_names=("a", "b", "c"))
    with torch.no_grad():
        assert torch.allclose(classifier.eval()(images()), resnet(images()), atol=1e-4)
    assert classifier.class_names == ("a", "b", "c")
    assert classifier.lineage[0]["head"] == "kept"
    assert "torchvision's usual mean and std" in notes[0]
    assert classifier.inputs.mean == pytest.approx((0.485, 0.456, 0.406))


def test_torchvisions_vgg_gives_its_own_features(tmp_path: Path) -> None:
    from torchvision.models.vgg import cfgs, make_layers

    features = make_layers(cfgs["D"], batch_norm=True).eval()
    tensors = {f"features.{name}": tensor for name, tensor in features.state_dict().items()}
    tensors |= {"classifier.6.weight": torch.zeros(3, 4096), "classifier.6.bias": torch.zeros(3)}
    path = tmp_path / "vgg.safetensors"
    save_file(tensors, path)
    classifier, notes = taken(path, "vgg16_bn")
    with torch.no_grad():
        ours, theirs = classifier.eval().backbone(images()), features(images()).mean((2, 3))
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert "it stands on 4,096 values, and regraft's on the means of 512 maps" in " ".join(notes)


def test_a_head_that_is_more_than_one_layer_on_means_is_left_out(tmp_path: Path) -> None:
    import timm

    # Its head stands on the class token, and regraft's on the mean over patches.
    network = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=32).eval()
    save_file(network.state_dict(), tmp_path / "net.safetensors")
    classifier, notes = taken(tmp_path / "net.safetensors", "vit_tiny_patch16_224")
    with torch.no_grad():
        theirs = network.forward_features(images())[:, 1:].mean(1)
        assert torch.allclose(classifier.eval().backbone(images()), theirs, atol=1e-5)
    assert "more than one linear layer on the means of its maps" in " ".join(notes)


def test_a_norm_behind_the_pooling_is_kept_with_the_head(tmp_path: Path) -> None:
    import timm

    network = timm.create_model("convnext_atto", num_classes=3).eval()
    save_file(network.state_dict(), tmp_path / "net.safetensors")
    classifier, _ = taken(tmp_path / "net.safetensors", "convnext_atto")
    assert classifier.lineage[0]["head"] == "kept"
    with torch.no_grad():
        assert torch.allclose(classifier.eval()(images()), network(images()), atol=1e-5)


def test_tensors_of_another_network_are_refused_by_name(resnet: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_file(resnet.state_dict(), path)
    with pytest.raises(ArtefactError, match=r"\+ `layer1.0.bn3.bias`"):
        taken(path, "resnet50")
    with pytest.raises(ArtefactError, match=r"\+ `conv1.0.weight`"):
        taken(path, "resnet10t")
    with pytest.raises(UsageError, match="does not say which network"):
        taken(path, None)


def test_an_own_network_takes_its_own_tensors(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef make(channels):\n"
        "    return nn.Sequential(nn.Conv2d(channels, 8, 3), nn.BatchNorm2d(8), nn.ReLU())\n"
    )
    body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    whole = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)).eval()
    save_file(whole.state_dict(), tmp_path / "net.safetensors")
    path, arch = tmp_path / "net.safetensors", f"{tmp_path / 'net.py'}:make"
    classifier, _ = taken(path, arch, preprocessing="keras-rescale")
    with torch.no_grad():
        ours, theirs = classifier.eval()(images(1)), whole(images(1))
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_timm_folder_says_all_but_where_it_is_from(tmp_path: Path) -> None:
    import timm

    network = timm.create_model("resnet10t", num_classes=2, in_chans=1).eval()
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(network.state_dict(), folder / "model.safetensors")
    told = {"mean": [0.4], "std": [0.2], "input_size": [1, 40, 40], "tag": "tv_in1k"}
    config = {"architecture": "resnet10t", "label_names": ["no", "yes"], "pretrained_cfg": told}
    (folder / "config.json").write_text(json.dumps(config))
    classifier, notes = taken(folder, None, image_size=None)
    with torch.no_grad():
        ours, theirs = classifier.eval()(images(1, 40)), network(images(1, 40))
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert classifier.inputs.size == (40, 40)
    assert classifier.inputs.mean == pytest.approx((0.4,))
    assert classifier.inputs.std == pytest.approx((0.2,))
    assert classifier.class_names == ("no", "yes")
    assert "what counts is your `--source`" in " ".join(notes)


def test_other_folders_are_told_what_to_do(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ArtefactError, match=r"regraft import .*pytorch_model.bin"):
        taken(folder, "resnet18")
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"architectures": ["ResNetForImageClassification"]}')
    with pytest.raises(ArtefactError, match="names no `architecture`"):
        taken(folder, None)
    (folder / "model.json").write_text("{}")
    with pytest.raises(ArtefactError, match="is a model of regraft already"):
        taken(folder, None)


# Pickles.


class Harm:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


@pytest.mark.fault("I8")
def test_a_pickle_that_runs_code_runs_none_and_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, canary, out = tmp_path / "net.pt", tmp_path / "canary", tmp_path / "out"
    torch.save({"a": torch.zeros(3), "b": Harm(canary)}, path)
    given = ["--arch", "resnet18", "--source", "own", "--out", out]
    assert regraft("import", path, *given) == 4
    told = capsys.readouterr().err
    assert "holds more than tensors, and code in a file is never run" in told
    assert "it would call `posix.system`" in told
    assert not canary.exists()
    assert not out.exists()
    torch.load(path, weights_only=False)  # and this is what it was spared
    assert canary.exists()


@pytest.mark.fault("I8")
def test_a_whole_network_in_a_pickle_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3)), tmp_path / "net.pt")
    with pytest.raises(ArtefactError, match=r"would call `torch.nn.modules.\w+.\w+`"):
        read_torch(tmp_path / "net.pt")
    torch.save({"epoch": 3, "acc": 0.5}, tmp_path / "none.pt")
    with pytest.raises(ArtefactError, match="holds no state dict: dict"):
        read_torch(tmp_path / "none.pt")


@pytest.mark.fault("I9")
def test_a_file_that_unpacks_to_far_more_is_refused_unread(tmp_path: Path) -> None:
    inside = io.BytesIO()
    torch.save({"w": torch.zeros(10**6)}, inside)
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(inside) as stored, zipfile.ZipFile(path, "w") as packed:
        for member in stored.infolist():
            packed.writestr(member.filename, stored.read(member), zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10_000
    with pytest.raises(ArtefactError, match="its members are compressed, which torch never does"):
        refuse_bomb(path)

    content = bytearray(inside.getvalue())
    with zipfile.ZipFile(inside) as stored:
        offset = stored.start_dir
    place = content.find(b"PK\x01\x02", offset)
    content[place + 24 : place + 28] = (2**31).to_bytes(4, "little")  # a size that is a lie
    path.write_bytes(bytes(content))
    with pytest.raises(ArtefactError, match=r"members unpack to 2,\d+,\d+,\d+ bytes|no file of"):
        refuse_bomb(path)


@pytest.mark.parametrize("content", [b"", b"\x80\x02}q\x00.", b"PK\x03\x04 nothing"])
def test_files_from_before_torch_1_6_and_others_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match=r"is no file of torch 1\.6 or newer"):
        refuse_bomb(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ArtefactError, match="it is a zip, but torch did not write it"):
        refuse_bomb(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/code/forward.py", "import os")
    with pytest.raises(ArtefactError, match="it is TorchScript, which holds code"):
        refuse_bomb(path)


@pytest.mark.fault("I7")
@pytest.mark.parametrize("name", ["net.pt", "net.pth", "net.ckpt", "net.bin", "net.pkl"])
def test_a_pickle_given_for_a_model_is_refused(
    name: str,
    tmp_path: Path,
    make_folder: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, data = tmp_path / name, make_folder({"a": 6, "b": 6})
    torch.save({"w": Harm(tmp_path / "canary")}, path)
    for command in (
        ["predict", path, data],
        ["finetune", data, "--start", path, "--out", tmp_path / "run"],
        ["compare", data, "--start", path, "--out", tmp_path / "run"],
    ):
        assert regraft(*command) == 4
        told = capsys.readouterr().err
        assert "is a pickle file, which may run code when it is read" in told
        assert "regraft import" in told
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "canary").exists()


@pytest.mark.fault("I11")
@pytest.mark.parametrize("where", ["/etc/passwd", "../secret.bin", "link.bin", "hard.bin"])
def test_onnx_is_no_model_here_whatever_it_points_to(
    where: str,
    tmp_path: Path,
    make_folder: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    onnx = pytest.importorskip("onnx")
    data = make_folder({"a": 6, "b": 6})
    place = tmp_path / "onnx"
    place.mkdir()
    (tmp_path / "secret.bin").write_bytes(b"secret" * 100)
    (place / "link.bin").symlink_to(tmp_path / "secret.bin")
    os.link(tmp_path / "secret.bin", place / "hard.bin")
    weight = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [4], [0.0] * 4)
    weight.ClearField("float_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=where)
    graph = onnx.helper.make_graph([], "g", [], [], initializer=[weight])
    (place / "net.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    given = ["--arch", "resnet18", "--source", "own", "--out", tmp_path / "out"]
    for command in (
        ["predict", place / "net.onnx", data],
        ["finetune", data, "--start", place / "net.onnx", "--out", tmp_path / "out"],
        ["import", place / "net.onnx", *given],
    ):
        assert regraft(*command) == 4
        told = capsys.readouterr()
        assert "secret" not in told.out + told.err.replace("secret.bin", "")
    assert not (tmp_path / "out").exists()


def test_a_reader_that_dies_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.pt"
    torch.save({"w": torch.zeros(3)}, path)
    with pytest.raises(ArtefactError, match="in a process of its own, ended: KeyError: 'pickle'"):
        read_apart("pickle", path)
    monkeypatch.setenv("PYTHONSTARTUP", "")
    dying = tmp_path / "python"
    dying.write_text("#!/bin/sh\nkill -SEGV $$\n")
    dying.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(dying))
    with pytest.raises(ArtefactError, match="ended: SIGSEGV"):
        read_apart("torch", path)


def test_a_reader_has_bounds_and_no_network(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    path.write_bytes(b"x" * 1000)
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = (
            "import resource, socket, sys\nfrom pathlib import Path\n"
            "from regraft.models.quarantine import _limit, _leave_network\n"
            f"_leave_network()\n_limit(Path({str(path)!r}))\n"
            "try:\n    bytearray(2**31)\n    print('memory')\nexcept MemoryError:\n    pass\n"
            "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
            f"try:\n    socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 5)\n"
            "    print('network')\nexcept OSError:\n    print('none')\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
    files, network = done.stdout.split()
    assert files == "64"
    if network == "network":
        pytest.skip("this system does not let a process leave its network")
