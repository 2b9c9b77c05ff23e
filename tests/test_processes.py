"""Several processes give what one gives: started as a user does, by torchrun, over loopback."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

MakeShapes = Callable[..., Path]
# Without BatchNorm: its statistics are those of a process's own images.
NETWORK = """
from torch import nn

def net(channels):
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(channels, 8, 3, 2, 1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
"""
JOB = """
import sys
from pathlib import Path

from regraft import api
from regraft.engine import Engine
from regraft.training.recipe import Recipe

data, out, arch = sys.argv[1:]
engine = Engine("cpu", "fp32")
recipe = Recipe.scratch().changed({
    "image_size": 32, "epochs": 1, "channels": 3, "augment": "none", "optimizer": "sgd",
    "batch_size": 15, "class_weights": "balanced", "label_smoothing": 0.1,
})
run = api.pretrain(data, out=out, arch=arch, recipe=recipe, engine=engine)
print(engine.shard, api.evaluate(out, data, arch=arch, engine=engine)["n"])
"""


def start(folder: Path, *command: object, agents: int = 1, processes: int = 1) -> list[str]:
    """Runs a command, under torchrun where it takes more than one process; returns the outputs."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "REGRAFT_CACHE": str(folder / "cache")}
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    if agents > 1:  # as on several machines: they meet at an address
        torchrun += [f"--nnodes={agents}", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        torchrun[-1] = f"--rdzv-endpoint=localhost:{_free_port()}"
    else:
        torchrun += ["--standalone"]
    prefix = [sys.executable] if processes == agents == 1 else torchrun
    running = [
        subprocess.Popen(
            [*prefix, *map(str, command)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(agents)
    ]
    ended = [process.communicate(timeout=300) for process in running]
    for process, (_, said) in zip(running, ended, strict=True):
        assert process.returncode == 0, said
    return [out for out, _ in ended]


def _free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("localhost", 0))
        return int(one.getsockname()[1])


@pytest.fixture
def job(make_shapes: MakeShapes, tmp_path: Path) -> tuple[Path, Path, str]:
    (tmp_path / "job.py").write_text(JOB)
    (tmp_path / "net.py").write_text(NETWORK)
    return tmp_path / "job.py", make_shapes(("a", "b"), 35), f"{tmp_path / 'net.py'}:net"


@pytest.mark.parametrize(("agents", "processes"), [(1, 2), (2, 1)])
def test_two_processes_equal_one(
    job: tuple[Path, Path, str], tmp_path: Path, agents: int, processes: int
) -> None:
    script, data, arch = job
    (alone,) = start(tmp_path, script, data, tmp_path / "one", arch)
    both = start(tmp_path, script, data, tmp_path / "two", arch, agents=agents, processes=processes)
    number = int(alone.split(")")[1])
    lines = sorted(line for out in both for line in out.splitlines() if line.startswith("("))
    assert lines == [f"(0, 2) {number}", f"(1, 2) {number}"], "every test image exactly once"
    states = [load_file(tmp_path / name / "final" / "model.safetensors") for name in ("one", "two")]
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    kept = [json.loads((tmp_path / name / "metrics.jsonl").read_text()) for name in ("one", "two")]
    assert kept[0]["train_loss"] == pytest.approx(kept[1]["train_loss"], rel=1e-5)
    assert kept[0]["val_loss"] == pytest.approx(kept[1]["val_loss"], rel=1e-4)
    tables = [(tmp_path / name / "predictions.csv").read_text() for name in ("one", "two")]
    assert [t.splitlines()[0] for t in tables] == [tables[0].splitlines()[0]] * 2
    assert len(tables[1].splitlines()) == number + 1


def test_the_story_runs_under_torchrun(make_shapes: MakeShapes, tmp_path: Path) -> None:
    data, other = make_shapes(("a", "b"), 24), make_shapes(("x", "y"), 24, seed=9, name="other")
    options = ("--device", "cpu", "--epochs", 1)
    run = ("-m", "--", "regraft")  # without `--`, torchrun takes `--start` for an option of its own
    source, verdict = tmp_path / "source", tmp_path / "verdict"
    arch = ("--arch", "resnet10t", "--image-size", 32)
    (told,) = start(
        tmp_path, *run, "pretrain", data, "--out", source, *arch, *options,
        "--set", "channels=3", processes=2,
    )  # fmt: skip
    assert told.count("run: ") == 1, "one process speaks"
    (told,) = start(
        tmp_path, *run, "compare", other, "--start", source, "--out", verdict, "--seeds", 1,
        "--strategy", "last:1", *options, "--json", processes=2,
    )  # fmt: skip
    document = json.loads(told)
    assert document == json.loads((verdict / "comparison.json").read_text())
    assert (verdict / "report.html").is_file()
    assert len((verdict / "transfer-0" / "metrics.jsonl").read_text().splitlines()) == 2
    record = json.loads((verdict / "transfer-0" / "run.json").read_text())
    assert record["engine"]["processes"] == 2
