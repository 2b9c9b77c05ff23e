"""Trainings in forked children that are killed, and what they leave. For tests alone.

A child has torch imported already, so that a kill costs a fraction of a second.
"""

import hashlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from regraft import api, disk, faults
from regraft.run import Run
from regraft.training import keeping
from regraft.training.keeping import Keeper
from regraft.training.plan import Plan
from regraft.training.recipe import Phase, Recipe

KINDS = ("pretrain", "head", "full", "auto")
NETWORK = '''
from torch import nn


class Tiny(nn.Module):
    """BatchNorm and dropout in little space."""

    def __init__(self, channels):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        self.top = nn.Sequential(nn.Conv2d(8, 12, 3, stride=2), nn.BatchNorm2d(12), nn.ReLU())
        self.end = nn.Dropout(0.3)

    def forward(self, images_BCHW):
        return self.end(self.top(self.stem(images_BCHW)).mean(dim=(2, 3)))


def net(in_chans=1, **_):
    return Tiny(in_chans)
'''
AFTER_S = 60.0  # what takes longer hangs
FILES = ("metrics.jsonl", "trials.jsonl", "plan.json", "winner.json", "predictions.csv")


def write_images(root: Path, classes: str, number: int, seed: int) -> Path:
    generator = np.random.default_rng(seed)
    for index, label in enumerate(classes):
        (root / label).mkdir(parents=True)
        for i in range(number):
            pixels = generator.normal(100 + 40 * index, 40, (12, 12)).clip(0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(root / label / f"{label}{i:02d}.png")
    return root


def eager(monkeypatch: Any) -> None:
    """Saves at every record, and quickly: how often changes no bits, and more can be lost."""
    monkeypatch.setattr(keeping, "SHARE", 1e9)
    monkeypatch.setattr(keeping, "SHARE_AT_ENDS", 1e9)
    monkeypatch.setattr(keeping, "LEAST_S", 0.0)
    # A killed process loses nothing that the system has taken; power loss has tests of its own.
    monkeypatch.setattr(disk, "sync", lambda _: None)
    monkeypatch.setattr(disk, "sync_folder", lambda _: None)


@dataclass
class Stage:
    """Two datasets, a network, a start, and one uninterrupted Run of each kind."""

    folder: Path

    @classmethod
    def build(cls, folder: Path) -> "Stage":
        stage = cls(folder)
        write_images(folder / "one", "abc", 12, 1)
        write_images(folder / "two", "xy", 14, 2)
        (folder / "net.py").write_text(NETWORK)
        stage.begin("pretrain", folder / "start")
        stage.begin("auto", folder / "planned", plan=None)
        for kind in KINDS:
            stage.carry_out(kind, folder / f"whole-{kind}")
        return stage

    @property
    def arch(self) -> str:
        return f"{self.folder / 'net.py'}:net"

    def data(self, kind: str) -> Path:
        return self.folder / ("one" if kind == "pretrain" else "two")

    def begin(self, kind: str, out: Path, on_progress: Any = lambda _: None, **more: Any) -> None:
        small = {"batch_size": 8, "ema_decay": 0.9, "augment": "natural", "mixup": 0.2}
        told = {"on_progress": on_progress}
        if kind == "pretrain":
            recipe = Recipe.scratch().changed({"image_size": 12, "epochs": 5, **small})
            api.pretrain(self.data(kind), out=out, arch=self.arch, recipe=recipe, **told)
            return
        recipe = Recipe.transfer(kind).changed(small)
        if kind == "full":
            recipe = recipe.changed({"phases": (Phase(epochs=5, lr=0.05, batch_norm="train"),)})
        if kind == "auto":
            recipe = recipe.changed({"epochs": 3})
            if not more:
                more = {"plan": Plan.read(self.folder / "planned" / "plan.json")}
        start = self.folder / "start"
        api.finetune(
            self.data(kind), out=out, start=start, arch=self.arch, recipe=recipe, **told, **more
        )

    def resume(self, out: Path, **more: Any) -> None:
        api.resume(out, arch=self.arch, **more)

    def carry_out(self, kind: str, out: Path, on_progress: Any = lambda _: None) -> None:
        """What a user does: begin, or go on with what is there; then evaluate."""
        if (out / "run.json").is_file():
            self.resume(out, on_progress=on_progress)
        else:
            self.begin(kind, out, on_progress)
        api.evaluate(out, self.data(kind), arch=self.arch)

    def differing(self, kind: str, out: Path) -> list[str]:
        """Returns the files that are not those of the uninterrupted Run, and leftovers."""
        whole = tree(self.folder / f"whole-{kind}")
        found = tree(out)
        names = sorted(whole.keys() | found.keys())
        wrong = [name for name in names if whole.get(name) != found.get(name)]
        return wrong + [str(path) for path in out.rglob(".*.tmp")]


def tree(run: Path) -> dict[str, str]:
    paths = [*(run / "final").iterdir(), *(run / name for name in FILES)]
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
        if path.is_file()
    }


@dataclass
class Child:
    """A forked process, and the numbers of the states that were acknowledged in it."""

    pid: int
    pipe: int
    log: Path

    @classmethod
    def start(cls, work: Callable[[], None], log: Path, fault: str = "") -> "Child":
        reading, writing = os.pipe()
        pid = os.fork()
        if pid:
            os.close(writing)
            return cls(pid, reading, log)
        code = 70
        try:
            code = _run(work, writing, fault)
        except BaseException as error:  # noqa: BLE001  a child must not return into pytest
            log.write_text(traceback.format_exc())
            code = getattr(error, "exit_code", 70)
        finally:
            os._exit(code)

    def wait(self, seconds: float) -> int | None:
        """Returns the exit code, or None after so many seconds."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        return None

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def acknowledged(self) -> int:
        """Returns the number of the last acknowledged state; the child has ended."""
        told = b""
        while part := os.read(self.pipe, 2**16):
            told += part
        os.close(self.pipe)
        return int(told.split()[-1]) if told.split() else 0


def _run(work: Callable[[], None], writing: int, fault: str) -> int:
    torch.set_num_threads(1)
    save = Keeper.save

    def told(self: Keeper) -> None:
        save(self)
        os.write(writing, f"{self.saved} ".encode())

    Keeper.save = told  # type: ignore[method-assign]
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  until the process ends
    with faults.armed(fault):
        work()
    return 0


def newest(out: Path) -> int:
    """Returns the number of the newest state that verifies; a finished Run has none."""
    if not (out / "run.json").is_file():
        return 0
    if Run.open(out).status["state"] == "finished":
        return 10**9
    step, _ = Run.open(out).states.newest()
    assert step is not None
    return step.number
