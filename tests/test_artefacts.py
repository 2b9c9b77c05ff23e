"""Nothing that a saved folder says is believed: damage is found, malice gets nowhere."""

import json
import os
import pickle
import random
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save, save_file

from regraft import api, cli
from regraft.changing import replace_files
from regraft.documents import MOST_DEPTH, read_json, sha256_of, to_json
from regraft.errors import ArtefactError
from regraft.manifests import verify_manifest
from regraft.models.classifier import Classifier
from regraft.run import Run
from regraft.storage import Store
from regraft.tensors import packed
from regraft.training.recipe import Recipe
from signing import sign

ARCH = "test_resnet"  # of timm: half a million values
MOST_S = 2.0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Run that was evaluated and reported on, of another that it started from."""
    root = tmp_path_factory.mktemp("artefacts")
    patch = pytest.MonkeyPatch()
    patch.setenv("REGRAFT_CACHE", str(root / "cache"))
    generator = np.random.default_rng(0)
    for data, classes in (("one", "abc"), ("two", "xy")):
        for label in classes:
            (root / data / label).mkdir(parents=True)
            for number in range(8):
                pixels = generator.integers(0, 256, (32, 32), dtype=np.uint8)
                Image.fromarray(pixels).save(root / data / label / f"{number}.png")
    recipe = Recipe.scratch().changed({"image_size": 32, "epochs": 1, "channels": 3})
    api.pretrain(root / "one", out=root / "start", arch=ARCH, recipe=recipe)
    head = Recipe.transfer("head").changed({"channels": 3})
    api.finetune(root / "two", out=root / "run", start=root / "start", recipe=head)
    api.evaluate(root / "run", root / "two")
    api.report([root / "run"], out=root / "run" / "report.html")
    patch.undo()
    return root / "run"


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "run")


@pytest.fixture
def folder(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run / "final", tmp_path / "final")


def regraft(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


# Verification


@pytest.mark.fault("I18")
def test_verify_tells_how_the_weights_came_about(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert regraft("verify", run) == 0
    said = capsys.readouterr().out
    start, own = Run.open(run.parent / "start").record, Run.open(run).record
    first, second, last = said.splitlines()[-3:]
    assert first.startswith(f"data {start['data']['fingerprint']} (")
    assert first.endswith(f" -> pretrain -> run {start['id']}")
    assert second.endswith(f" -> finetune -> run {own['id']}")
    assert last == "weights from elsewhere: none"
    document = api.verify(run)
    on_disk = [path for path in run.rglob("*") if path.is_file() and path.name != "lock"]
    assert document["files"] == len(on_disk)
    assert document["not_vouched_for"] == []


@pytest.mark.fault("I1")
def test_any_bit_that_flips_in_any_file_of_a_run_is_found(copied: Path) -> None:
    generator = random.Random(0)
    files = [path for path in copied.rglob("*") if path.is_file() and path.name != "lock"]
    assert len(files) > 12
    found = 0
    for _ in range(1000):
        path = generator.choice(files)
        with path.open("r+b") as stream:
            place = generator.randrange(path.stat().st_size)
            stream.seek(place)
            (byte,) = stream.read(1)
            stream.seek(place)
            stream.write(bytes([byte ^ (1 << generator.randrange(8))]))
            try:
                stream.flush()
                api.verify(copied)
            except ArtefactError:
                found += 1
            stream.seek(place)
            stream.write(bytes([byte]))
    assert found == 1000
    api.verify(copied)


@pytest.mark.fault("I2")
@pytest.mark.parametrize("file", ["final/model.safetensors", "samples.jsonl", "predictions.csv"])
@pytest.mark.parametrize("damage", ["cut", "emptied", "missing"])
def test_a_file_that_lacks_something_is_named(copied: Path, file: str, damage: str) -> None:
    path = copied / file
    if damage == "missing":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size - 1 if damage == "cut" else 0)
    with pytest.raises(ArtefactError) as refused:
        api.verify(copied)
    assert refused.value.exit_code == 4
    assert path.name in " ".join(refused.value.problems)


@pytest.mark.fault("I2")
def test_a_file_that_was_not_saved_with_a_classifier_is_refused_and_beside_a_run_is_told(
    copied: Path,
) -> None:
    (copied / "notes.txt").write_text("mine")
    assert api.verify(copied)["not_vouched_for"] == ["notes.txt"]
    (copied / "final" / "more.bin").write_bytes(b"x")
    with pytest.raises(ArtefactError, match=r"`more\.bin` was not saved with the others"):
        api.verify(copied)
    with pytest.raises(ArtefactError, match=r"`more\.bin` was not saved with the others"):
        Classifier.load(copied)


@pytest.mark.fault("I1", "I2", "I19")
@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "manifest"])
def test_a_damaged_step_is_passed_over_for_the_one_before(tmp_path: Path, damage: str) -> None:
    store = Store(tmp_path)
    for number in (1, 2):
        store.commit(number, {"weights.safetensors": b"%d" % number * 9, "state.json": b"{}"})
    path = store.path(2) / ("manifest.json" if damage == "manifest" else "weights.safetensors")
    path.chmod(0o444)  # trust never depends on it
    if damage == "flip":
        path.write_bytes(b"3" + path.read_bytes()[1:])
    elif damage == "missing":
        path.unlink()
    else:
        os.truncate(path, 3)
    step, skipped = store.recover()
    assert step is not None
    assert step.number == 1
    assert step.read("weights.safetensors") == b"1" * 9
    (told,) = skipped
    assert f"`{store.path(2)}` is passed over" in told
    assert path.name in told or "is not valid JSON" in told
    assert store.numbers() == [1], "what is damaged goes: its number is needed again"


@pytest.mark.fault("I3")
def test_a_manifest_of_a_newer_version_says_who_wrote_it(folder: Path) -> None:
    document = read_json(folder / "manifest.json")
    document |= {"schema": 2, "written_by": "7.1"}
    (folder / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(ArtefactError, match=r"was written by regraft '7\.1' in schema 2"):
        Classifier.load(folder)


@pytest.mark.fault("I18")
@pytest.mark.parametrize("key", ["arch", "verb", "id"])
def test_a_record_that_was_edited_and_signed_again_does_not_fit_its_id(
    copied: Path, key: str
) -> None:
    document = {**read_json(copied / "run.json"), key: "other"}
    replace_files(copied, {"run.json": to_json(document).encode()})
    with pytest.raises(ArtefactError, match=r"id was made of|lineage ends elsewhere"):
        api.verify(copied)


@pytest.mark.fault("I20")
def test_a_classifier_holds_no_place_and_no_user(run: Path) -> None:
    kept = b"".join(path.read_bytes() for path in (run / "final").iterdir())
    for private in (str(run.parent), os.path.expanduser("~"), "regraft-cache"):
        assert private.encode() not in kept or private in ("/root", "/")


def test_packed_tensors_are_those_that_the_library_writes(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 4), "ä": torch.arange(5), "c": torch.randn(2, 3).to(torch.bfloat16),
        "a": torch.tensor(1.5, dtype=torch.float64), "d": torch.tensor([True]),
        "e": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), "f": torch.zeros(0),
    }  # fmt: skip
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    assert b"".join(bytes(part) for part in packed(tensors)) == save(contiguous)
    (tmp_path / "t").write_bytes(b"".join(bytes(part) for part in packed(tensors)))
    for name, tensor in load_file(tmp_path / "t").items():
        assert torch.equal(tensor, tensors[name])


# Malice: each function changes a classifier folder, whose manifest is then signed again

Attack = Callable[[Path], object]


def weights(content: bytes) -> Attack:
    return lambda folder: (folder / "model.safetensors").write_bytes(content)


def header(document: object, data: bytes = b"\0" * 16) -> Attack:
    text = document if isinstance(document, str) else json.dumps(document)
    return weights(len(text.encode()).to_bytes(8, "little") + text.encode() + data)


def entry(shape: list[Any], offsets: list[Any], dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def state(change: Callable[[dict[str, torch.Tensor]], object]) -> Attack:
    def attack(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return attack


def model(**changes: object) -> Attack:
    def attack(folder: Path) -> None:
        document = json.loads((folder / "model.json").read_text())
        (folder / "model.json").write_text(json.dumps({**document, **changes}))

    return attack


def inputs(**changes: object) -> Attack:
    def attack(folder: Path) -> None:
        own = json.loads((folder / "model.json").read_text())["inputs"]
        model(inputs={**own, **changes})(folder)

    return attack


def text(content: bytes | str) -> Attack:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / "model.json").write_bytes(data)


def link(name: str, target: str) -> Attack:
    def attack(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(folder.parent / "outside" / target)

    return attack


def instead(name: str, make: Callable[[Path], object]) -> Attack:
    def attack(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return attack


def archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", canary_pickle())


class Canary:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch canary",))


def canary_pickle() -> bytes:
    return pickle.dumps(Canary())


def deep(depth: int) -> str:
    return "[" * depth + "]" * depth


def twice(folder: Path) -> None:
    own = (folder / "model.json").read_text().rstrip()
    (folder / "model.json").write_text(own[:-1] + ', "arch": "resnet18"}')


def first(change: Callable[[torch.Tensor], object]) -> Attack:
    return state(lambda tensors: change(next(t for t in tensors.values() if t.ndim > 1)))


OVERLAP = {"a": entry([4], [0, 16]), "b": entry([2], [8, 16])}
DUPLICATE = '{"a":%s,"a":%s}' % ((json.dumps(entry([4], [0, 16])),) * 2)
MANY = {f"t{number}": entry([0], [0, 0]) for number in range(150_000)}
SIGNED: dict[str, Attack] = {
    "weights: nothing": weights(b""),
    "weights: half a size": weights(b"\1\2\3"),
    "weights: a header of 2^40 bytes": weights((2**40).to_bytes(8, "little") + b"{}"),
    "weights: a header of 2^64 - 1 bytes": weights(b"\xff" * 8 + b"{}"),
    "weights: a header longer than the file": weights((100).to_bytes(8, "little") + b"{}"),
    "weights: no header": weights((0).to_bytes(8, "little")),
    "weights: header is a list": header([]),
    "weights: header is no JSON": header("{'a': 1}"),
    "weights: header is deep": header('{"a":' + deep(100_000) + "}"),
    "weights: header of spaces": header(" " * 20_000_000),
    "weights: a key twice": header(DUPLICATE),
    "weights: overlap": header(OVERLAP),
    "weights: a hole": header({"a": entry([2], [8, 16])}),
    "weights: offsets backwards": header({"a": entry([4], [16, 0])}),
    "weights: offsets beyond": header({"a": entry([4], [0, 2**50])}),
    "weights: offsets below": header({"a": entry([4], [-16, 0])}),
    "weights: offsets are text": header({"a": entry([4], ["0", "16"])}),
    "weights: a shape that overflows": header({"a": entry([2**33, 2**33], [0, 16])}),
    "weights: a shape below 0": header({"a": entry([-4], [0, 16])}),
    "weights: a shape of 10,000 sides": header({"a": entry([1] * 10_000, [0, 16])}),
    "weights: a shape of fractions": header({"a": entry([1.5], [0, 16])}),
    "weights: unknown numbers": header({"a": entry([4], [0, 16], "object")}),
    "weights: numbers as a list": header({"a": entry([4], [0, 16], ["F32"])}),
    "weights: more at the end": header({"a": entry([4], [0, 16])}, b"\0" * 99),
    "weights: less at the end": header({"a": entry([4], [0, 16])}, b"\0" * 9),
    "weights: 150,000 tensors": header(MANY),
    "weights: a name of 1 MB": header({"a" * 2**20: entry([4], [0, 16])}),
    "weights: a name that climbs": header({"../../outside/x": entry([4], [0, 16])}),
    "weights: a name with NUL": header({"a\0b": entry([4], [0, 16])}),
    "weights: notes that are numbers": header({"__metadata__": {"a": 1}}),
    "weights: an entry that is a number": header({"a": 3}),
    "weights: NaN": first(lambda tensor: tensor.view(-1)[0].fill_(float("nan"))),
    "weights: infinite": first(lambda tensor: tensor.view(-1)[0].fill_(float("inf"))),
    "weights: one tensor more": state(lambda t: t.update(more=torch.zeros(3))),
    "weights: one tensor less": state(lambda t: t.pop("head.bias")),
    "weights: another shape": state(lambda t: t.update({"head.bias": torch.zeros(3)})),
    "weights: other classes": state(lambda t: t.update({"head.weight": torch.zeros(3, 7)})),
    "weights: a pickle": weights(canary_pickle()),
    "weights: an old pickle": weights(pickle.dumps(Canary(), protocol=0)),
    "weights: an archive of a pickle": lambda f: archive(f / "model.safetensors"),
    "weights: text": weights(b"import os; os.system('touch canary')"),
    "model: nothing": text(""),
    "model: no JSON": text("{'arch': 1}"),
    "model: deep": text('{"a":' + deep(100_000) + "}"),
    "model: too deep for us": text('{"a":' + deep(MOST_DEPTH + 1) + "}"),
    "model: a list": text("[]"),
    "model: UTF-16": text("{}".encode("utf-16")),
    "model: 40 MB": text(b" " * 40_000_000),
    "model: a number of 100,000 digits": text('{"schema_version": ' + "9" * 100_000 + "}"),
    "model: a pickle": text(canary_pickle()),
    "model: a key twice": twice,
    "model: NaN": model(schema_version=float("nan")),
    "model: a key more": model(code="import os"),
    "model: a newer version": model(schema_version=2),
    "model: a version that is text": model(schema_version="1"),
    "model: arch is a call": model(arch="os.system"),
    "model: arch is a function": model(arch="os:system"),
    "model: arch is a module here": model(arch="canary_module:net"),
    "model: arch is a file": model(arch="../outside/canary_module.py:net"),
    "model: arch is a download": model(arch="hf-hub:someone/something"),
    "model: arch is an address": model(arch="https://example.org/model"),
    "model: arch is code": model(arch="__import__('os').system('touch canary')"),
    "model: arch is a number": model(arch=5),
    "model: arch is long": model(arch="r" * 1000),
    "model: arch of gigabytes": model(arch="vit_giant_patch14_224"),
    "model: arch of another kind": model(arch="vgg11"),
    "model: 1,000,000 classes": model(class_names=[str(i) for i in range(1_000_000)]),
    "model: a class of 1 MB": model(class_names=["a" * 2**20, "b"]),
    "model: a class without a name": model(class_names=["", "b"]),
    "model: two classes of one name": model(class_names=["a", "a"]),
    "model: classes are numbers": model(class_names=[1, 2]),
    "model: three classes": model(class_names=["a", "b", "c"]),
    "model: lineage of 100,000": model(lineage=[{}] * 100_000),
    "model: lineage is text": model(lineage=["a"]),
    "model: images of 10^9 px": inputs(size=[10**9, 10**9]),
    "model: images of -1 px": inputs(size=[-1, 32]),
    "model: 10^6 channels": inputs(channels=10**6),
    "model: other channels": inputs(channels=1),
    "model: mean is infinite": inputs(mean=[1e999, 0, 0]),
    "model: std is text": inputs(std=["a", "b", "c"]),
    "model: another decoder": inputs(decoder="os.system"),
    "weights: a link": link("model.safetensors", "secret"),
    "weights: a link to endless zeros": instead(
        "model.safetensors", lambda path: path.symlink_to("/dev/zero")
    ),
    "weights: a folder": instead("model.safetensors", Path.mkdir),
    "weights: a pipe": instead("model.safetensors", os.mkfifo),
    "model: a link": link("model.json", "secret"),
    "model: a pipe": instead("model.json", os.mkfifo),
    "a file more": lambda f: (f / "sitecustomize.py").write_text("open('canary', 'w')"),
}


def manifest(change: Callable[[dict[str, Any]], object], *, sign: bool = True) -> Attack:
    def attack(folder: Path) -> None:
        document = json.loads((folder / "manifest.json").read_text())
        document.pop("sha256")
        change(document)
        if sign:
            document["sha256"] = sha256_of(document)
        (folder / "manifest.json").write_text(json.dumps(document, indent=2) + "\n")

    return attack


def listed(name: str) -> Attack:
    return manifest(lambda d: d["files"].update({name: {"size": 6, "sha256": "0" * 64}}))


def sparse(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 2**40)
    manifest(lambda d: d["files"]["model.safetensors"].update(size=2**40))(folder)


UNSIGNED: dict[str, Attack] = {
    "manifest: none": lambda f: (f / "manifest.json").unlink(),
    "manifest: nothing": lambda f: (f / "manifest.json").write_bytes(b""),
    "manifest: a pickle": lambda f: (f / "manifest.json").write_bytes(canary_pickle()),
    "manifest: a list": lambda f: (f / "manifest.json").write_text("[]"),
    "manifest: deep": lambda f: (f / "manifest.json").write_text(deep(100_000)),
    "manifest: a link": link("manifest.json", "secret"),
    "manifest: a pipe": instead("manifest.json", os.mkfifo),
    "manifest: names that climb": listed("../outside/secret"),
    "manifest: a name from the root": listed("/etc/passwd"),
    "manifest: a folder for a name": listed(".."),
    "manifest: a hidden name": listed(".secret"),
    "manifest: a long name": listed("a" * 1000),
    "manifest: 20,000 names": manifest(
        lambda d: d["files"].update({f"f{i}": d["files"]["model.json"] for i in range(20_000)})
    ),
    "manifest: a file less": manifest(lambda d: d["files"].pop("model.json")),
    "manifest: a size below 0": manifest(lambda d: d["files"]["model.json"].update(size=-5)),
    "manifest: a size that is true": manifest(lambda d: d["files"]["model.json"].update(size=True)),
    "manifest: another hash": manifest(lambda d: d["files"]["model.json"].update(sha256="0" * 64)),
    "manifest: not its own hash": manifest(lambda d: d.update(sha256="0" * 64), sign=False),
    "manifest: another form": lambda f: (f / "manifest.json").write_text(
        json.dumps(json.loads((f / "manifest.json").read_text()))
    ),
    "weights: a sparse terabyte": sparse,
}
ATTACKS = {**SIGNED, **UNSIGNED}
watched: list[str] = []
outside: list[Path] = []


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Notes what runs a command, and what is opened or imported outside."""
    if not outside:
        return
    if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect"):
        watched.append(event)
    name = str(arguments[0]) if event in ("open", "import") and arguments else ""
    if name.startswith(str(outside[0])) or "canary" in name or name in ("/etc/passwd", "/dev/zero"):
        watched.append(f"{event} {name}")


sys.addaudithook(watch)


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A secret, and code that leaves a canary when it runs."""
    place = tmp_path / "outside"
    place.mkdir()
    (place / "secret").write_text("secret")
    (place / "canary_module.py").write_text(
        "import pathlib\npathlib.Path('canary').write_text('')\n"
    )
    monkeypatch.syspath_prepend(place)
    monkeypatch.chdir(tmp_path)
    watched.clear()
    outside.append(place)
    yield place
    outside.clear()


@pytest.mark.fault("I5", "I6", "I12", "I13", "I14", "I15")
@pytest.mark.parametrize("name", ATTACKS)
def test_a_malicious_classifier_is_refused_and_nothing_else_happens(
    folder: Path, trap: Path, name: str
) -> None:
    outside.clear()  # while the attack is made
    ATTACKS[name](folder)
    if name in SIGNED and (folder / "model.safetensors").is_file():
        names = ["model.safetensors", "model.json"]
        sign(folder, [n for n in names if (folder / n).is_file() and "zero" not in name])
    outside.append(trap)
    for use in (Classifier.load, api.verify):
        if use is api.verify and name.startswith("model: arch"):
            continue  # what a name builds is for those who build it
        began = time.process_time()
        with pytest.raises(ArtefactError) as refused:
            use(folder)
        assert time.process_time() - began < MOST_S
        assert len(str(refused.value)) < 2000
    assert watched == []
    assert not (folder.parent / "canary").exists()


def test_there_are_enough_malicious_artefacts() -> None:
    assert len(ATTACKS) >= 100


def test_the_trap_catches(trap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The canary sings where something is opened, run or imported."""
    pickle.loads(canary_pickle())  # noqa: S301
    (trap / "secret").read_text()
    __import__("canary_module")
    monkeypatch.delitem(sys.modules, "canary_module")
    assert {event.split()[0] for event in watched} == {"os.system", "open", "import"}
    assert Path("canary").exists()


@pytest.mark.fault("I4")
def test_weights_of_another_network_say_what_differs_first(folder: Path) -> None:
    state(lambda t: t.update({"head.weight": torch.zeros(3, t["head.weight"].shape[1])}))(folder)
    sign(folder)
    with pytest.raises(ArtefactError) as refused:
        Classifier.load(folder)
    assert "1 tensor differs" in str(refused.value)
    assert "~ `head.weight` 3x" in refused.value.problems[0]


@pytest.mark.fault("I6")
def test_weights_that_are_not_finite_are_named(folder: Path) -> None:
    state(lambda t: t["head.bias"].fill_(float("nan")))(folder)
    sign(folder)
    with pytest.raises(ArtefactError, match=r"not finite in `head\.bias`"):
        Classifier.load(folder)


@pytest.mark.fault("I16")
def test_weights_in_use_do_not_hang_on_their_file(folder: Path) -> None:
    classifier = Classifier.load(folder)
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    os.truncate(folder / "model.safetensors", 0)
    for name, tensor in classifier.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.fault("M2")
def test_nothing_here_needs_a_network(copied: Path) -> None:
    """Every connection is refused in these tests (conftest)."""
    verify_manifest(copied / "final")
    Classifier.load(copied)


@pytest.mark.fault("I19")
def test_a_comparison_is_verified_with_all_of_its_runs(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path / "cache"))
    out, start = tmp_path / "verdict", run.parent / "start"
    head = Recipe.transfer("head").changed({"channels": 3})
    api.compare(run.parent / "two", out=out, start=start, seeds=1, recipe=head)
    document = api.verify(out)
    on_disk = [path for path in out.rglob("*") if path.is_file() and path.name != "lock"]
    assert document["files"] == len(on_disk)
    assert document["not_vouched_for"] == []
    path = out / "scratch-0" / "final" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ArtefactError, match=r"scratch-0/final: `model\.safetensors` is not"):
        api.verify(out)
