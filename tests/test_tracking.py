"""What a training tells stands in TensorBoard and MLflow as it stands in the Run."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from regraft import cli
from regraft.documents import parse_json_lines
from regraft.training.tracking import FIGURES

SMALL = ["--image-size", "32", "--epochs", "2", "--device", "cpu"]
MakeShapes = Callable[..., Path]


def regraft(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([*map(str, arguments)])
    return int(ended.value.code or 0)


def lines(path: Path) -> list[Any]:
    return list(parse_json_lines(path.read_bytes(), path))


@pytest.fixture
def pretrain(
    make_shapes: MakeShapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], int]:
    monkeypatch.chdir(tmp_path)
    data = make_shapes(("a", "b"), 24)
    arguments = ["pretrain", str(data), "--out", "runs/source", "--arch", "resnet10t", *SMALL]
    return lambda tool: regraft(*arguments, "--track", tool)


def test_tensorboard_shows_the_figures_of_the_run(
    pretrain: Callable[[str], int], make_shapes: MakeShapes
) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def shown(run: str, name: str) -> list[tuple[int, Any]]:
        found = events.EventAccumulator(f"runs/tensorboard/{run}").Reload()
        return [(event.step, pytest.approx(event.value)) for event in found.Scalars(name)]

    assert pretrain("tensorboard") == 0
    epochs = lines(Path("runs/source/metrics.jsonl"))
    assert len(epochs) == 2
    for name in FIGURES:
        assert shown("source", name) == [(one["epoch"], one[name]) for one in epochs]
    assert regraft("verify", "runs/source") == 0  # nothing foreign in it

    knees = make_shapes(("c", "d"), 12, name="knees", seed=1)
    options = ["--start", "runs/source", "--out", "runs/target", "--device", "cpu"]
    assert regraft("finetune", str(knees), *options, *SMALL[:4], "--track", "tensorboard") == 0
    tried = [one for one in lines(Path("runs/target/trials.jsonl")) if one["loss"] is not None]
    assert {"probe", "bold", "firm", "head"} <= {one["candidate"] for one in tried}
    for one in tried:
        step = (round(100 * one["share"]), one["loss"])
        assert step in shown("target", f"{one['candidate']}/loss")


def test_mlflow_shows_the_figures_of_the_run(
    pretrain: Callable[[str], int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "kept").as_uri())
    assert pretrain("mlflow") == 5  # it discourages plain files
    assert "mlflow refuses to begin: The filesystem" in capsys.readouterr().err
    assert regraft("resume", "runs/source") == 0
    shutil.rmtree("runs")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert pretrain("mlflow") == 0
    (kept,) = (tmp_path / "kept").rglob("metrics/val_loss")
    values = [float(line.split()[1]) for line in kept.read_text().splitlines()]
    assert values == [one["val_loss"] for one in lines(Path("runs/source/metrics.jsonl"))]


def test_a_tool_that_is_not_there_is_told_before_anything_is_done(
    pretrain: Callable[[str], int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert pretrain("mlflow") == 5
    assert "mlflow is not told where" in capsys.readouterr().err
    monkeypatch.setattr("accelerate.utils.is_mlflow_available", lambda: False)
    assert pretrain("mlflow") == 5
    assert "mlflow is not installed" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_where_a_training_is_refused_nothing_is_written(make_shapes: MakeShapes) -> None:
    data = make_shapes(("a", "b"), 24)
    before = sorted(data.rglob("*"))
    asked = ["pretrain", str(data), "--out", str(data / "run"), "--arch", "resnet10t", *SMALL]
    assert regraft(*asked, "--track", "tensorboard") == 2
    assert sorted(data.rglob("*")) == before
