"""The verbs on small data: what crosses, what is compared, what is refused, what is left behind."""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import regraft
from regraft import api
from regraft.changing import replace_files
from regraft.data.dataset import DataOptions, Dataset
from regraft.errors import ArtefactError, DataError, RegraftError, UsageError
from regraft.models.classifier import Classifier
from regraft.progress import Note
from regraft.run import Run
from regraft.training.keeping import Stopped
from regraft.training.recipe import Recipe
from regraft.training.records import Epoch, Step

MakeShapes = Callable[..., Path]
ARCH = "resnet10t"


def scratch(**changes: Any) -> Recipe:
    return Recipe.scratch().changed({"image_size": 32, "epochs": 2, "channels": 3, **changes})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("source")


@pytest.fixture
def start(source: Path, make_shapes: MakeShapes) -> Path:
    """One pretraining for the whole module."""
    if not (source / "run").exists():
        data = make_shapes(("a", "b", "c"), 20, seed=1, name="dataset1")
        shutil.copytree(data, source / "data")
        api.pretrain(source / "data", out=source / "run", arch=ARCH, recipe=scratch(epochs=4))
    return source / "run"


@pytest.mark.fault("D9")
def test_only_the_backbone_crosses_datasets(
    start: Path, make_shapes: MakeShapes, tmp_path: Path
) -> None:
    # Two of the source's class names come again: their head rows must not.
    data = make_shapes(("a", "b"), 12, seed=2)
    recipe = Recipe.transfer("head")
    run = api.finetune(data, out=tmp_path / "run", start=start, recipe=recipe)
    before, after = Classifier.load(start), Classifier.load(run.folder)
    old, new = before.backbone.state_dict(), after.backbone.state_dict()
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert after.class_names == ("a", "b")
    assert not torch.equal(before.head.weight[:2], after.head.weight)
    assert after.inputs.mean == before.inputs.mean
    assert [record["verb"] for record in after.lineage] == ["pretrain", "finetune"]


@pytest.mark.fault("D6", "D8")
def test_another_size_and_another_number_of_classes_just_work(
    start: Path, make_shapes: MakeShapes, tmp_path: Path
) -> None:
    data = make_shapes(tuple("vwxyz"), 8, side=40)
    recipe = Recipe.transfer("lp-ft").changed({"image_size": [48, 40], "epochs": 1})
    run = api.finetune(data, out=tmp_path / "run", start=start, recipe=recipe)
    classifier = Classifier.load(run.folder)
    assert classifier.inputs.size == (48, 40)
    assert len(classifier.class_names) == 5
    assert run.record["recipe"]["phases"][1]["batch_norm"] == "frozen"


def test_compare_answers_and_keeps_everything(
    start: Path, make_shapes: MakeShapes, tmp_path: Path
) -> None:
    data = make_shapes(("x", "y"), 24, seed=3)
    found = api.compare(
        data,
        out=tmp_path / "c",
        start=start,
        seeds=2,
        recipe=Recipe.transfer("lp-ft").changed({"epochs": 2}),
    )
    assert found["verdict"] in ("helped", "hurt", "cannot tell")
    assert {"metric", "difference", "low", "high", "least_detectable"} <= set(found)
    assert json.loads((tmp_path / "c" / "comparison.json").read_text()) == found
    assert (tmp_path / "c" / "report.html").is_file()
    images = set()
    for arm in ("transfer", "scratch"):
        assert len(found["arms"][arm]["accuracy"]["values"]) == 2
        for seed in (0, 1):
            run = Run.open(tmp_path / "c" / f"{arm}-{seed}")
            assert run.record["recipe"]["seed"] == seed
            evaluation = json.loads((run.folder / "evaluation.json").read_text())
            images.add(evaluation["images"])
            accuracy = evaluation["accuracy"]["value"]
            assert accuracy == pytest.approx(found["arms"][arm]["accuracy"]["values"][seed])
    assert len(images) == 1, "both arms are judged on the same test images"
    control = Run.open(tmp_path / "c" / "scratch-0").record
    assert control["start"] is None
    assert [phase["learns"] for phase in control["recipe"]["phases"]] == ["all"]


def test_a_comparison_says_once_what_speaks_against_its_recipe(
    start: Path, make_shapes: MakeShapes, tmp_path: Path
) -> None:
    told: list[str] = []
    api.compare(
        make_shapes(("x", "y"), 12),
        out=tmp_path / "c",
        start=start,
        seeds=2,
        recipe=Recipe.transfer("head").changed({"augment": "natural"}),
        on_progress=lambda one: told.append(one.text) if isinstance(one, Note) else None,
    )
    assert sum("mirrors images" in text for text in told) == 1


@pytest.mark.parametrize("strategy", ["lp-ft", "auto"])
@pytest.mark.fault("D9")
def test_test_images_never_reach_the_training(
    start: Path, make_shapes: MakeShapes, tmp_path: Path, strategy: str
) -> None:
    """Turning every test image plain grey changes neither weights nor metrics of the training."""
    data = make_shapes(("x", "y"), 12, splits=("train", "val", "test"))
    states = []
    for name in ("first", "second"):
        run = api.finetune(
            data,
            out=tmp_path / name,
            start=start,
            recipe=Recipe.transfer(strategy).changed({"epochs": 1}),
        )
        told = (run.epochs(), run.trials())
        states.append((told, Classifier.load(run.folder).state_dict()))
        for grey, file in enumerate((data / "test").rglob("*.png")):
            Image.new("L", (32, 32), grey).save(file)
    assert states[0][0] == states[1][0]
    assert all(torch.equal(states[0][1][name], states[1][1][name]) for name in states[0][1])


@pytest.mark.fault("D10")
def test_a_run_finds_its_own_test_images_wherever_they_lie(
    start: Path, source: Path, tmp_path: Path
) -> None:
    first = api.evaluate(start, source / "data")
    moved = tmp_path / "moved"
    shutil.copytree(source / "data", moved)
    for file in moved.rglob("*.png"):
        file.rename(file.with_name(f"renamed_{file.name}"))
    again = api.evaluate(start, moved)
    assert again["images"] == first["images"]
    assert again["accuracy"] == first["accuracy"]
    assert first["n"] == sum(sample.get("split") == "test" for sample in Run.open(start).samples())


def test_part_of_the_own_test_images_is_refused(start: Path, source: Path, tmp_path: Path) -> None:
    partial = tmp_path / "partial"
    shutil.copytree(source / "data", partial)
    own = [s["path"] for s in Run.open(start).samples() if s.get("split") == "test"]
    (partial / own[0]).unlink()
    with pytest.raises(DataError, match=rf"has {len(own) - 1} of the run's {len(own)} test images"):
        api.evaluate(start, partial)


def test_images_seen_in_training_are_refused(start: Path, source: Path, tmp_path: Path) -> None:
    trained = [s for s in Run.open(start).samples() if s.get("split") == "train"]
    for sample in trained[:5]:
        target = tmp_path / "seen" / sample["class"]
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / "data" / sample["path"], target)
    with pytest.raises(DataError, match=r"5 images were seen in training"):
        api.evaluate(start, tmp_path / "seen")


@pytest.mark.fault("D6", "D7")
def test_new_images_of_known_classes_can_be_judged(start: Path, make_shapes: MakeShapes) -> None:
    data = make_shapes(("a", "c"), 3, seed=99)
    assert api.evaluate(start, data)["n"] == 6
    data = make_shapes(("a", "unknown"), 3, seed=98, name="other")
    with pytest.raises(DataError, match="the model does not know `unknown`"):
        api.evaluate(start, data)


@pytest.mark.fault("D5")
def test_a_test_image_that_the_start_has_seen_is_a_leak(
    start: Path, source: Path, make_shapes: MakeShapes, tmp_path: Path
) -> None:
    data = make_shapes(("x", "y"), 12, splits=("train", "val", "test"), seed=5)
    trained = next(s["path"] for s in Run.open(start).samples() if s.get("split") == "train")
    shutil.copy(source / "data" / trained, data / "test" / "x" / "leak.png")
    with pytest.raises(DataError, match="the start was trained on 1 test image"):
        api.finetune(data, out=tmp_path / "run", start=start)
    assert not (tmp_path / "run").exists()


@pytest.mark.fault("D8")
def test_grey_start_takes_colour_only_by_name(make_shapes: MakeShapes, tmp_path: Path) -> None:
    grey = make_shapes(("a", "b"), 12)
    run = api.pretrain(
        grey, out=tmp_path / "grey", arch=ARCH, recipe=scratch(epochs=1, channels="auto")
    )
    assert Classifier.load(run.folder).inputs.channels == 1
    colour = make_shapes(("a", "b"), 12, name="colour")
    for file in colour.rglob("*.png"):
        Image.open(file).convert("RGB").save(file)
    with pytest.raises(RegraftError, match="images of 3 channels, the network takes 1"):
        api.finetune(colour, out=tmp_path / "c", start=run.folder)
    found = api.finetune(
        colour,
        out=tmp_path / "adapted",
        start=run.folder,
        adapt=["channels"],
        recipe=Recipe.transfer("head"),
    )
    assert Classifier.load(found.folder).inputs.channels == 3
    assert [row["what"] for row in found.record["transplant"]].count("adapted") == 1


def test_an_interrupt_leaves_a_loadable_run(make_shapes: MakeShapes, tmp_path: Path) -> None:
    def interrupt(record: Any) -> None:
        if isinstance(record, Step) and record.epoch == 2:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(
        Stopped, match="stopped by SIGINT; epoch 1, the best so far, is saved"
    ) as stopped:
        api.pretrain(
            make_shapes(("a", "b"), 12),
            out=tmp_path / "run",
            arch=ARCH,
            recipe=scratch(epochs=5),
            on_progress=interrupt,
        )
    assert stopped.value.exit_code == 130
    run = Run.open(tmp_path / "run")
    assert run.status == {"state": "interrupted", "best_epoch": 1}
    assert len(run.epochs()) == 1
    found = api.evaluate(run.folder, tmp_path / "shapes", split="val")
    assert found["nll"]["value"] == pytest.approx(run.epochs()[0]["val_loss"], rel=1e-3)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_failed_training_says_why_in_its_run(make_shapes: MakeShapes, tmp_path: Path) -> None:
    with pytest.raises(RegraftError, match="loss is"):
        api.pretrain(
            make_shapes(("a", "b"), 12),
            out=tmp_path / "run",
            arch="vgg11",
            recipe=scratch(lr=1e18, clip_norm=0.0),
        )
    status = Run.open(tmp_path / "run").status
    assert status["state"] == "failed"
    assert "loss is" in status["reason"]


def test_a_mistake_on_the_way_leaves_no_run_that_seems_to_run(
    make_shapes: MakeShapes, tmp_path: Path
) -> None:
    def fail(record: Any) -> None:
        if isinstance(record, Step):
            raise ZeroDivisionError("planted")

    with pytest.raises(ZeroDivisionError):
        api.pretrain(
            make_shapes(("a", "b"), 12),
            out=tmp_path / "run",
            arch=ARCH,
            recipe=scratch(),
            on_progress=fail,
        )
    assert Run.open(tmp_path / "run").status["state"] == "failed"


def test_batches_of_one_image_are_refused_before_anything_is_created(
    make_shapes: MakeShapes, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="`--batch-size 1` gives batches of one of"):
        api.pretrain(
            make_shapes(("a", "b"), 12),
            out=tmp_path / "run",
            arch=ARCH,
            recipe=scratch(batch_size=1),
        )
    assert not (tmp_path / "run").exists()


def test_more_stages_than_there_are_is_refused(
    start: Path, make_shapes: MakeShapes, tmp_path: Path
) -> None:
    recipe = Recipe.transfer("last:9")
    with pytest.raises(UsageError, match="`last:9`: `resnet10t` has 5 stages"):
        api.finetune(make_shapes(("x", "y"), 12), out=tmp_path / "run", start=start, recipe=recipe)
    assert not (tmp_path / "run").exists()


@pytest.mark.fault("D12")
def test_what_is_left_out_or_unfinished_is_told(
    start: Path, make_shapes: MakeShapes, tmp_path: Path
) -> None:
    told: list[Any] = []
    run = tmp_path / "stopped"
    shutil.copytree(start, run)
    Run.open(run).set_status("interrupted", best_epoch=1)
    data = make_shapes(("a", "c"), 3, seed=99)
    (data / "a" / "scan.jp2").write_bytes(b"DICM")
    api.evaluate(run, data, on_progress=told.append)
    api.predict(run, [data], on_progress=told.append)
    texts = [record.text for record in told if isinstance(record, Note)]
    assert texts == [
        f"note: `{run}` is no finished training: interrupted",
        "1 file left out, no images by name: `a/scan.jp2`",
        "note: of this model it is not known when it is unsure: too few images were held out",
    ]


def test_a_recipe_for_the_other_goal_is_refused(
    start: Path, make_shapes: MakeShapes, tmp_path: Path
) -> None:
    data = make_shapes(("x", "y"), 12)
    with pytest.raises(UsageError, match='goal = "scratch"; this command needs "transfer"'):
        api.finetune(data, out=tmp_path / "run", start=start, recipe=Recipe.scratch())
    with pytest.raises(UsageError, match='goal = "transfer"; this command needs "scratch"'):
        api.pretrain(data, out=tmp_path / "run", arch=ARCH, recipe=Recipe.transfer("lp-ft"))


@pytest.mark.fault("D9")
def test_the_control_does_not_know_the_mean_of_dataset1(
    start: Path, make_shapes: MakeShapes, tmp_path: Path
) -> None:
    recipe = Recipe.transfer("lp-ft").changed({"epochs": 1})
    data = make_shapes(("x", "y"), 12, seed=4)
    api.compare(data, out=tmp_path / "c", start=start, seeds=1, recipe=recipe)
    inherited = Classifier.load(start).inputs.mean
    transfer, scratch = (
        Classifier.load(tmp_path / "c" / f"{a}-0") for a in ("transfer", "scratch")
    )
    assert transfer.inputs.mean == inherited
    assert scratch.inputs.mean != inherited


@pytest.mark.parametrize(
    ("name", "content", "wording"),
    [
        ("run.json", "[]", "has schema None"),
        ("run.json", '{"schema": 1}', "does not fit"),
        ("samples.jsonl", "{\n", "samples.jsonl` line 1 is not valid JSON"),
        ("samples.jsonl", "[1]\n", "samples.jsonl` line 1 is no record of an image"),
        ("samples.jsonl", '{"sha256": "ab"}\n', "samples.jsonl` line 1 is no record of an image"),
    ],
)
def test_a_run_that_was_edited_is_refused(
    start: Path, source: Path, tmp_path: Path, name: str, content: str, wording: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(start, run)
    whole = (run / name).read_bytes()
    (run / name).write_text(content)
    with pytest.raises(
        ArtefactError, match=rf"`{name}` has {len(content)} bytes, not {len(whole)}"
    ):
        api.evaluate(run, source / "data")
    (run / name).write_bytes(whole)
    replace_files(run, {name: content.encode()})  # as one who knows the manifest would
    with pytest.raises(ArtefactError, match=r"hint: (restore|use)") as refused:
        api.evaluate(run, source / "data")
    assert wording in str(refused.value)


def test_training_images_are_not_for_judging(start: Path, source: Path) -> None:
    with pytest.raises(UsageError, match="`--split train` cannot be judged"):
        api.evaluate(start, source / "data", split="train")


def test_the_run_folder_holds_what_the_design_says(start: Path) -> None:
    run = Run.open(start)
    assert run.status["state"] == "finished"
    record = run.record
    assert record["recipe"]["image_size"] == [32, 32]
    assert "auto" not in json.dumps(record["recipe"])
    packages = {"regraft", "torch", "timm", "numpy", "scipy", "scikit-learn", "pillow"}
    assert set(record["versions"]) == {"python"} | packages
    assert [epoch["epoch"] for epoch in run.epochs()] == [1, 2, 3, 4]
    assert "elapsed_s" not in run.epochs()[0]
    samples = list(run.samples())
    assert len(samples) == 60
    assert {sample["split"] for sample in samples} == {"train", "val", "test"}
    assert not list(start.rglob("*.tmp"))


def test_patients_stay_together_from_split_to_interval(
    start: Path, make_shapes: MakeShapes, tmp_path: Path
) -> None:
    data = make_shapes(("x", "y"), 24)
    for file in sorted(data.rglob("*.png")):
        patient = int(re.sub(r"\D", "", file.stem)) // 3
        file.rename(file.with_name(f"p{patient}_{file.name}"))
    dataset = Dataset.open(data, DataOptions(group_regex="^([^_]+)_"))
    run = api.finetune(dataset, out=tmp_path / "run", start=start, recipe=Recipe.transfer("head"))
    splits: dict[str, set[str]] = {}
    for sample in run.samples():
        splits.setdefault(sample["group"], set()).add(sample["split"])
    assert len(splits) == 8
    assert all(len(found) == 1 for found in splits.values())
    alone = api.evaluate(run.folder, data)
    grouped = api.evaluate(run.folder, replace(dataset))
    assert alone["accuracy"] == grouped["accuracy"], "the run remembers its groups"


def test_progress_is_told_in_records(make_shapes: MakeShapes, tmp_path: Path) -> None:
    told: list[Any] = []
    api.pretrain(
        make_shapes(("a", "b"), 12), out=tmp_path / "run", arch=ARCH, recipe=scratch(),
        on_progress=told.append,
    )  # fmt: skip
    epochs = [record for record in told if isinstance(record, Epoch)]
    texts = [record.text for record in told if hasattr(record, "text")]
    assert len(epochs) == 2
    assert any(
        re.match(r"time: about [\d.]+ s for 2 epochs at 32x32 px on", text) for text in texts
    )
    first_step = next(i for i, record in enumerate(told) if isinstance(record, Step))
    assert any(hasattr(r, "text") and r.text.startswith("time:") for r in told[:first_step])


def test_the_public_names_exist() -> None:
    for name in regraft.__all__:
        assert getattr(regraft, name) is not None
    with pytest.raises(AttributeError, match="has no attribute `nothing`"):
        _ = regraft.nothing
