"""Predictions of new images: the numbers of evaluate, and doubts that keep what they promise."""

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from regraft import api, cli
from regraft.data.cache import Cache
from regraft.data.dataset import Dataset
from regraft.engine import Engine
from regraft.errors import ArtefactError, DataError, EnvironmentFault, UsageError
from regraft.evaluation.calibration import (
    CONFIDENCE,
    UNFAMILIAR_RATE,
    bands,
    doubt_of,
    usual_distance,
)
from regraft.evaluation.embeddings import refuse_unknown_form
from regraft.evaluation.predictions import Predictions
from regraft.evaluation.rows import to_csv, to_records
from regraft.evaluation.testing import own_rows, predict_dataset
from regraft.evaluation.testing import test_images as images_of_test
from regraft.models.classifier import Classifier
from regraft.models.doubt import Doubt, distances, unit
from regraft.run import Run
from regraft.training.recipe import Recipe
from signing import sign

MakeShapes = Callable[..., Path]


def regraft(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("predict")


@pytest.fixture
def run(place: Path, make_shapes: MakeShapes) -> Path:
    """One training for the whole module, with enough validation images to have doubts."""
    if not (place / "run").exists():
        data = make_shapes(("a", "b"), 150, splits=("train", "val", "test"), seed=1, name="data")
        shutil.move(data, place / "data")
        recipe = Recipe.scratch().changed({"image_size": 32, "epochs": 2, "channels": 3})
        told: list[Any] = []
        api.pretrain(
            place / "data",
            out=place / "run",
            arch="resnet10t",
            recipe=recipe,
            on_progress=told.append,
        )
        texts = " ".join(getattr(record, "text", "") for record in told)
        assert "probabilities calibrated: temperature" in texts
        assert "unsure: probabilities up to" in texts
    return place / "run"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_predict_equals_evaluate_bit_for_bit(run: Path, place: Path, precision: str) -> None:
    """Whatever stands beside an image, and however many do."""
    engine, data = Engine("cpu", precision), place / "data"
    classifier = Classifier.load(run)
    engine.place(classifier)
    dataset = images_of_test(Run.open(run), Dataset.open(data, whole=True), "test")
    cache, dataset = Cache.build(dataset, classifier.inputs.size, 3)
    judged = predict_dataset(classifier, dataset, cache, own_rows(dataset), engine)
    expected = dict(zip(judged.paths, judged.probabilities, strict=True))
    assert len(expected) == 300
    paths = sorted(expected)
    for chosen in (paths, paths[:1], paths[7:10], paths[100:165]):
        table, _ = api.predict(run, [data / path for path in chosen], engine=engine)
        assert table is not None
        for path, probabilities in zip(chosen, table.probabilities, strict=True):
            assert np.array_equal(probabilities, expected[path])


def test_a_model_knows_when_it_is_unsure_and_keeps_it_in_its_folder(
    run: Path, place: Path, tmp_path: Path
) -> None:
    names = {path.name for path in (run / "final").iterdir()}
    assert {"doubt.json", "doubt.safetensors"} <= names
    manifest = json.loads((run / "final" / "manifest.json").read_text())
    assert {"doubt.json", "doubt.safetensors"} <= set(manifest["files"])
    doubt = Classifier.load(run).doubt
    assert doubt is not None
    assert doubt.num_images == 300
    assert [band.error_rate for band in doubt.bands] == [0.02, 0.05, 0.1, 0.2]
    answered = api.evaluate(run, place / "data")["answered"]
    assert answered["errors"] <= 0.05 * answered["n"]
    with pytest.raises(UsageError, match="300 independent validation images tell nothing of it"):
        api.predict(run, [place / "data"], error_rate=0.01)
    copy = tmp_path / "copy"
    shutil.copytree(run / "final", copy)
    document = json.loads((copy / "doubt.json").read_text())
    (copy / "doubt.json").write_text(json.dumps({**document, "neighbours": "many"}))
    sign(copy)
    with pytest.raises(ArtefactError, match=r"doubt.json` does not fit its classifier"):
        Classifier.load(copy)


def test_pictures_of_another_kind_are_unfamiliar(run: Path, place: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    (tmp_path / "noise").mkdir()
    for i in range(20):
        pixels = generator.integers(0, 256, (32, 32), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "noise" / f"{i}.png")
    strange, _ = api.predict(run, [tmp_path / "noise"])
    usual, _ = api.predict(run, [place / "data" / "test"])
    assert strange is not None and strange.unfamiliar is not None
    assert usual is not None and usual.unfamiliar is not None
    assert strange.unfamiliar.mean() > 0.9
    assert usual.unfamiliar.mean() < 0.15


def made_up(number: int, seed: int) -> tuple[Any, Any]:
    """Draws images of two classes whose probabilities are as overconfident as networks are."""
    generator = np.random.default_rng(seed)
    truth = generator.integers(0, 2, number)
    seen = (2 * truth - 1) * 1.2 + generator.normal(0, 1, number)
    share = 1 / (1 + np.exp(-8 * seen))  # calibrated it would be 2.4
    return np.stack([1 - share, share], axis=1), truth


def test_the_error_rate_of_what_is_not_unsure_is_kept_as_often_as_promised() -> None:
    """The promise: with 95 % confidence, over draws of validation images."""
    future, truth = made_up(200_000, seed=12345)
    surest, wrong = future.max(axis=1), future.argmax(axis=1) != truth
    assert 0.1 < wrong.mean() < 0.13, "without doubt the rate would be broken"
    draws, broken, answered = 400, {0.05: 0, 0.1: 0}, {0.05: 0.0, 0.1: 0.0}
    for seed in range(draws):
        found = {band.error_rate: band for band in bands(*made_up(400, seed))}
        for rate in broken:
            threshold = found[rate].threshold
            if threshold is not None:
                sure = surest > threshold
                broken[rate] += wrong[sure].mean() > rate
                answered[rate] += sure.mean() / draws
    # Four standard errors of a share of 5 % over 400 draws.
    most = draws * (1 - CONFIDENCE) + 4 * (draws * 0.05 * 0.95) ** 0.5
    assert all(number <= most for number in broken.values())
    assert answered[0.05] > 0.3, "a band that answers nothing keeps any promise"
    assert answered[0.1] > answered[0.05]


def test_familiar_images_are_flagged_as_often_as_stated() -> None:
    generator = np.random.default_rng(0)
    flagged, far = [], []
    for _ in range(60):
        known, held, new = (
            generator.normal(1, 1, (n, 16)).astype(np.float32) for n in (200, 99, 100)
        )
        other = generator.normal(-1, 1, (50, 16)).astype(np.float32)
        threshold = usual_distance(distances(held, unit(known), 5))
        assert threshold is not None
        flagged.append((distances(new, unit(known), 5) > threshold).mean())
        far.append((distances(other, unit(known), 5) > threshold).mean())
    assert np.mean(flagged) == pytest.approx(UNFAMILIAR_RATE, abs=0.02)
    assert np.mean(far) > 0.9
    assert usual_distance(np.ones(18)) is None, "18 images cannot tell of one in twenty"


def test_few_validation_images_tell_of_no_rate_and_bad_ones_leave_nothing_sure() -> None:
    few, truth = made_up(20, 0)
    assert bands(few, truth) == ()
    generator = np.random.default_rng(0)
    features = generator.normal(size=(300, 4)).astype(np.float32)
    guesses = np.tile([0.4, 0.6], (300, 1))
    doubt = doubt_of(features, features, guesses, generator.integers(0, 2, 300))
    band = doubt.band(0.05)
    assert band is not None and band.threshold is None
    unsure = doubt.unsure(np.array([[1.0, 0.0]]), 0.05)
    assert unsure is not None and unsure.all()
    assert Doubt(20, 0.95, (), 5, None, 0.05, features).unsure(guesses, 0.05) is None


def test_an_image_is_as_far_alone_as_among_others() -> None:
    generator = np.random.default_rng(0)
    features, known = generator.normal(size=(2, 300, 64)).astype(np.float32)
    among = distances(features, unit(known), 5)
    for i in (0, 150, 299):
        np.testing.assert_allclose(distances(features[i : i + 1], unit(known), 5), among[i], 1e-9)


def test_images_come_from_tables_and_lists(
    run: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    names = ["test/a/a_000.png", "test/b/b_001.png", "test/b/gone.png"]
    table = place / "data" / "list.csv"
    table.write_text("id;image\n" + "".join(f"{i};{name}\n" for i, name in enumerate(names)))
    assert regraft("predict", run, "--csv", table, "--jsonl", "--top", 1) == 3
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["path"] for row in rows] == [str(place / "data" / name) for name in names]
    assert rows[2]["error"] == "missing: no such file"
    assert [set(row) for row in rows[:2]] == [
        {"path", "predicted", "top", "unsure", "unfamiliar"}
    ] * 2
    table.unlink()
    lines = "".join(f"{place / 'data' / name}\n" for name in names)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    out = tmp_path / "rows.jsonl"
    assert regraft("predict", run, "-", "--out", out) == 3
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["path"] for row in again] == [row["path"] for row in rows]
    assert set(again[0]["probabilities"]) == {"a", "b"}
    with pytest.raises(UsageError, match="no images are named"):
        api.predict(run)
    with pytest.raises(DataError, match="holds no images"):
        api.predict(run, ["-"], lines=["\n"])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert regraft("predict", run, place, "--csv", place / "none.csv") == 2


def test_embeddings_are_the_features_of_the_rows(run: Path, place: Path, tmp_path: Path) -> None:
    file = tmp_path / "features.npy"
    images = place / "data" / "test" / "a"
    assert regraft("predict", run, images, "--embeddings", file, "--out", tmp_path / "p.csv") == 0
    features = np.load(file)
    assert features.shape == (150, Classifier.load(run).backbone.width)
    classifier = Classifier.load(run)
    logits = features @ classifier.head.weight.detach().numpy().T
    logits += classifier.head.bias.detach().numpy()
    rows = list(csv.DictReader(io.StringIO((tmp_path / "p.csv").read_text())))
    assert [("a", "b")[place] for place in logits.argmax(axis=1)] == [r["predicted"] for r in rows]
    assert regraft("predict", run, images, "--embeddings", file) == 2
    assert regraft("predict", run, images, "--embeddings", tmp_path / "f.txt") == 2


def test_parquet_without_its_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(EnvironmentFault, match="Parquet needs `pyarrow`"):
        refuse_unknown_form(Path("x.parquet"))


def test_the_likeliest_classes_come_first_and_doubts_are_columns() -> None:
    share = np.array([[0.2, 0.5, 0.3], [0.6, 0.4, 0.0]])
    marks = np.array([True, False])
    table = Predictions(
        ("x.png", "=y.png"), ("a", "-b", "c"), share, unsure=marks, unfamiliar=~marks
    )
    rows = list(csv.reader(io.StringIO(to_csv(table, [("z.png", "truncated")], top=2))))
    assert rows == [
        ["path", "predicted", "probability", "predicted_2", "probability_2", "unsure",
         "unfamiliar", "error"],
        ["x.png", "'-b", "0.500000", "c", "0.300000", "yes", "no", ""],
        ["'=y.png", "a", "0.600000", "'-b", "0.400000", "no", "yes", ""],
        ["z.png", "", "", "", "", "", "", "truncated"],
    ]  # fmt: skip
    record = to_records(table, (), top=2)[0]
    assert record["top"] == [
        {"class": "-b", "probability": 0.5}, {"class": "c", "probability": 0.3},
    ]  # fmt: skip
    assert (record["unsure"], record["unfamiliar"]) == (True, False)
