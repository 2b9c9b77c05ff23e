"""How a training stops, and under which other conditions or on which data it does not go on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from interruption import AFTER_S, Child, Stage, eager, newest, tree
from regraft import api
from regraft.errors import ArtefactError, BusyError, DataError, UsageError
from regraft.locks import writing
from regraft.progress import Note, duration
from regraft.run import Run
from regraft.signals import SAME_S
from regraft.training import contract as conditions
from regraft.training import keeping
from regraft.training.keeping import Keeper, Stopped
from regraft.training.plan import Plan
from regraft.training.recipe import Recipe
from regraft.training.records import Step

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage(tmp_path_factory.mktemp("stage"))


@pytest.fixture(autouse=True)
def _built(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    eager(monkeypatch)
    monkeypatch.setenv("REGRAFT_CACHE", str(stage.folder / "cache"))
    if not (stage.folder / "start").exists():
        Stage.build(stage.folder)


def at_step(number: int, act: Callable[[], None]) -> Callable[[Any], None]:
    left = [number]

    def told(record: Any) -> None:
        if isinstance(record, Step):
            left[0] -= 1
            if left[0] == 0:
                act()

    return told


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(SAME_S * 1.2 * (len(numbers) > 1))


def stopped(stage: Stage, kind: str, out: Path, *, step: int = 7) -> Run:
    """A Run that a signal has stopped."""
    with pytest.raises(Stopped):
        stage.begin(kind, out, at_step(step, lambda: send(signal.SIGTERM)))
    return Run.open(out)


@pytest.mark.fault("F5", "F6", "F8")
@pytest.mark.parametrize("kind", ["pretrain", "full", "auto"])
@pytest.mark.parametrize(("number", "code"), [(15, 143), (2, 130), (1, 129)])
def test_a_signal_finishes_the_step_saves_it_and_says_how_to_go_on(
    stage: Stage, tmp_path: Path, kind: str, number: int, code: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(keeping, "SHARE", 0.0)  # nothing but the signal saves
    monkeypatch.setattr(keeping, "SHARE_AT_ENDS", 0.0)
    out, steps = tmp_path / "run", []

    def told(record: Any) -> None:
        if isinstance(record, Step):
            steps.append(record)
            if len(steps) == 9:
                send(number)

    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=f"stopped by {signal.Signals(number).name}") as error:
        stage.begin(kind, out, told)
    assert signal.getsignal(number) is before
    assert error.value.exit_code == code
    assert f"`regraft resume {out}`" in error.value.hint
    assert len(steps) == 9, "no step is begun after the signal"
    assert Run.open(out).status["state"] == "interrupted"
    stage.resume(out, on_progress=told)
    whole = [r for r in counted_steps(stage, kind, tmp_path / "again")]
    assert len(steps) == whole[0], "no finished step was lost, and none done twice"
    stage.carry_out(kind, out)
    assert stage.differing(kind, out) == []


def counted_steps(stage: Stage, kind: str, out: Path) -> list[int]:
    number = [0]

    def told(record: Any) -> None:
        number[0] += isinstance(record, Step)

    stage.begin(kind, out, told)
    return number


@pytest.mark.fault("F6", "F7")
@pytest.mark.parametrize("kind", ["pretrain", "auto"])
def test_a_second_interrupt_stops_now_and_what_was_saved_stays(
    stage: Stage, tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "run"
    twice = at_step(6, lambda: send(signal.SIGINT, signal.SIGINT))
    child = Child.start(lambda: stage.begin(kind, out, twice), tmp_path / "log")
    assert child.wait(AFTER_S) == 130
    assert newest(out) >= child.acknowledged() > 0
    assert Run.open(out).status["state"] == "interrupted"
    stage.carry_out(kind, out)
    assert stage.differing(kind, out) == []


@pytest.mark.fault("F6", "F7")
@pytest.mark.parametrize("signals", [2, 3])
def test_a_write_is_finished_before_a_second_signal_and_given_up_at_the_third(
    stage: Stage, tmp_path: Path, signals: int
) -> None:
    out, written = tmp_path / "run", tmp_path / "written"
    save = Keeper.save

    def slow(self: Keeper) -> None:
        if self.number > 5:
            send(*[signal.SIGINT] * signals)
            written.write_text("whole")
        save(self)

    def work() -> None:
        Keeper.save = slow  # type: ignore[method-assign]
        stage.begin("full", out)

    child = Child.start(work, tmp_path / "log")
    assert child.wait(AFTER_S) == 130
    assert written.exists() == (signals == 2)
    stage.carry_out("full", out)
    assert stage.differing("full", out) == []


def test_one_interrupt_that_comes_twice_counts_once(stage: Stage, tmp_path: Path) -> None:
    def press() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # a launcher has passed it on

    with pytest.raises(Stopped, match="stopped by SIGINT"):
        stage.begin("pretrain", tmp_path / "run", at_step(3, press))


@pytest.mark.fault("F12")
def test_resuming_a_finished_run_changes_nothing_and_says_so(stage: Stage, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(stage.folder / "whole-full", out)
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.rglob("*") if p.is_file()}
    told: list[Any] = []
    stage.resume(out, on_progress=told.append)
    assert [note.text for note in told] == [f"`{out}` is complete already: nothing to do"]
    after = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.rglob("*") if p.is_file()}
    assert before == after


@pytest.mark.fault("F11")
@pytest.mark.parametrize(
    ("field", "changed", "wording"),
    [
        ("threads", 3, "threads: 1 then, 3 now"),
        ("versions", {"torch": "9.9"}, "versions.torch: "),
        ("ONEDNN_MAX_CPU_ISA", "AVX2", "ONEDNN_MAX_CPU_ISA: not set then, AVX2 now"),
        ("precision", "fp64", "precision: "),
        ("memory_format", "contiguous", "memory_format: channels_last then, contiguous now"),
    ],
)
def test_other_conditions_are_named_and_refused(
    stage: Stage, tmp_path: Path, monkeypatch: Any, field: str, changed: Any, wording: str
) -> None:
    run = stopped(stage, "pretrain", tmp_path / "run")
    contract = conditions.contract

    def other(engine: Any) -> dict[str, Any]:
        now = contract(engine)
        return now | {field: now[field] | changed if isinstance(changed, dict) else changed}

    monkeypatch.setattr(conditions, "contract", other)
    with pytest.raises(ArtefactError, match="would not give the same bits here") as error:
        stage.resume(run.folder)
    assert error.value.exit_code == 4
    assert [p for p in error.value.problems if wording in p] and len(error.value.problems) == 1
    assert "--allow-inexact" in error.value.hint
    stage.resume(run.folder, allow_inexact=True)
    assert Run.open(run.folder).status["state"] == "finished"
    page = api.report([run.folder], out=tmp_path / "report.html").read_text()
    assert "not bit-reproducible" in page and field in page


@pytest.mark.fault("F11")
def test_the_threads_and_the_instruction_set_are_looked_at(
    stage: Stage, tmp_path: Path, monkeypatch: Any
) -> None:
    run = stopped(stage, "pretrain", tmp_path / "run")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    torch.set_num_threads(2)
    try:
        with pytest.raises(ArtefactError) as error:
            stage.resume(run.folder)
    finally:
        torch.set_num_threads(1)
    assert error.value.problems == (
        "ONEDNN_MAX_CPU_ISA: not set then, AVX2 now", "threads: 1 then, 2 now",
    )  # fmt: skip
    assert "OMP_NUM_THREADS" in error.value.hint


def test_data_that_has_changed_is_refused_with_counts_and_paths(
    stage: Stage, tmp_path: Path
) -> None:
    run = stopped(stage, "full", tmp_path / "run")
    moved = tmp_path / "moved"
    shutil.copytree(stage.data("full"), moved)
    (moved / "x" / "x00.png").unlink()
    Image.new("L", (12, 12), 7).save(moved / "x" / "x01.png")
    Image.new("L", (12, 12), 9).save(moved / "y" / "new.png")
    with pytest.raises(DataError, match="has changed since the start") as error:
        stage.resume(run.folder, data=moved)
    assert error.value.exit_code == 3
    assert error.value.problems == (
        "1 image gone: `x/x00.png`",
        "1 image new: `y/new.png`",
        "1 image of another content: `x/x01.png`",
    )


@pytest.mark.fault("F20")
def test_a_run_goes_on_elsewhere_with_its_data_elsewhere(stage: Stage, tmp_path: Path) -> None:
    run = stopped(stage, "auto", tmp_path / "run")
    shutil.copytree(run.folder, tmp_path / "copy")
    shutil.rmtree(run.folder)
    shutil.copytree(stage.data("auto"), tmp_path / "data")
    (tmp_path / "copy" / ".place.json").unlink()  # it is of another machine
    with pytest.raises(DataError, match="is not known to lie anywhere") as error:
        stage.resume(tmp_path / "copy")
    assert f"`regraft resume {tmp_path / 'copy'} DATA`" in error.value.hint
    stage.resume(tmp_path / "copy", data=tmp_path / "data")
    stage.carry_out("auto", tmp_path / "copy")
    assert stage.differing("auto", tmp_path / "copy") == []


def test_the_path_of_the_data_is_in_no_file_that_is_shared(stage: Stage, tmp_path: Path) -> None:
    run = stopped(stage, "auto", tmp_path / "run")
    kept = {".place.json", "lock"}
    told = [
        str(path.relative_to(run.folder))
        for path in run.folder.rglob("*")
        if path.is_file()
        and path.name not in kept
        and str(stage.folder).encode() in path.read_bytes()
    ]
    assert told == []


@pytest.mark.fault("F10")
def test_another_number_of_decoding_workers_changes_no_byte(
    stage: Stage, tmp_path: Path, monkeypatch: Any
) -> None:
    run = stopped(stage, "full", tmp_path / "run")
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path / "cache"))  # decoded once more
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    stage.resume(run.folder)
    stage.carry_out("full", run.folder)
    assert stage.differing("full", run.folder) == []


@pytest.mark.fault("F16")
def test_no_other_process_is_ever_started(stage: Stage, tmp_path: Path, monkeypatch: Any) -> None:
    """There are no loading processes that the system could kill: threads decode."""

    def refuse(*_args: Any, **_named: Any) -> Any:
        raise AssertionError("a process was started")

    for owner, name in ((os, "fork"), (os, "posix_spawn"), (subprocess, "Popen")):
        monkeypatch.setattr(owner, name, refuse)
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path / "cache"))
    stage.begin("pretrain", tmp_path / "run")
    assert tree(tmp_path / "run")["final/model.safetensors"]


@pytest.mark.fault("F13")
def test_what_the_logs_say_of_later_than_the_state_goes(
    stage: Stage, tmp_path: Path, monkeypatch: Any
) -> None:
    out, save = tmp_path / "run", Keeper.save

    def early(self: Keeper) -> None:
        if self.number < 8:
            save(self)

    monkeypatch.setattr(Keeper, "save", early)
    child = Child.start(
        lambda: stage.begin("pretrain", out, at_step(14, lambda: os.kill(os.getpid(), 9))),
        tmp_path / "log",
    )
    assert child.wait(AFTER_S) == -9
    monkeypatch.setattr(Keeper, "save", save)
    ahead = len(Run.open(out).epochs())
    assert ahead == 4, "two epochs stand in the log that are after the state"
    stage.carry_out("pretrain", out)
    assert [epoch["epoch"] for epoch in Run.open(out).epochs()] == [1, 2, 3, 4, 5]
    assert stage.differing("pretrain", out) == []


@pytest.mark.fault("H1")
def test_a_run_that_is_under_way_is_not_resumed_a_second_time(stage: Stage, tmp_path: Path) -> None:
    run = stopped(stage, "full", tmp_path / "run")
    with (
        writing(run.folder),
        pytest.raises(BusyError, match="is being written by another") as error,
    ):
        stage.resume(run.folder)
    assert error.value.exit_code == 6


def test_own_code_must_be_named_again(stage: Stage, tmp_path: Path) -> None:
    run = stopped(stage, "full", tmp_path / "run")
    with pytest.raises(UsageError, match=r"has a network of your own, `net\.py:net`"):
        api.resume(run.folder)


def test_a_damaged_state_is_passed_over_and_told(stage: Stage, tmp_path: Path) -> None:
    run = stopped(stage, "full", tmp_path / "run")
    state = run.states.path(run.states.numbers()[-1]) / "state.safetensors"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    told: list[Any] = []
    stage.resume(run.folder, on_progress=told.append)
    notes = [record.text for record in told if isinstance(record, Note)]
    assert any("is passed over" in note and "sha256 differs" in note for note in notes)
    stage.carry_out("full", run.folder)
    assert stage.differing("full", run.folder) == []


@pytest.mark.fault("G10")
def test_a_run_that_ended_without_a_word_is_told_so(stage: Stage, tmp_path: Path) -> None:
    out, told = tmp_path / "run", list[Any]()
    die = at_step(5, lambda: os.kill(os.getpid(), 9))
    child = Child.start(lambda: stage.begin("full", out, die), tmp_path / "log")
    assert child.wait(AFTER_S) == -9
    stage.resume(out, on_progress=told.append)
    notes = [record.text for record in told if isinstance(record, Note)]
    assert any("ended without a word (killed, or out of memory)" in note for note in notes)


def test_a_comparison_goes_on_with_the_arm_under_way(stage: Stage, tmp_path: Path) -> None:
    def begun(out: Path, on_progress: Any = lambda _: None) -> None:
        recipe = Recipe.transfer("lp-ft").changed({"epochs": 3, "batch_size": 8})
        start, data = stage.folder / "start", stage.data("full")
        api.compare(
            data, out=out, start=start, seeds=2, arch=stage.arch, recipe=recipe,
            on_progress=on_progress,
        )  # fmt: skip

    begun(tmp_path / "whole")
    whole = json.loads((tmp_path / "whole" / "comparison.json").read_text())
    total = counted(lambda told: begun(tmp_path / "counted", told))
    for step in range(3, total, total // 4):
        out = tmp_path / f"stopped-{step}"
        with pytest.raises(Stopped):
            begun(out, at_step(step, lambda: send(signal.SIGTERM)))
        done = counted(lambda told, out=out: api.resume(out, arch=stage.arch, on_progress=told))  # type: ignore[misc]
        assert done == total - step, "arms that are done are not done again"
        found = json.loads((out / "comparison.json").read_text())
        assert {**found, "seconds": 0} == {**whole, "seconds": 0}
        assert (out / "report.html").is_file() and not (out / "state").exists()
        for arm in ("transfer-0", "transfer-1", "scratch-0", "scratch-1"):
            assert tree(out / arm) == tree(tmp_path / "whole" / arm)


@pytest.mark.parametrize("strategy", ["auto", "lp-ft"])
def test_a_comparison_tells_once_how_long_the_trainings_left_take(
    stage: Stage, tmp_path: Path, strategy: str
) -> None:
    out, told = tmp_path / "compared", list[str]()

    def noted(record: Any) -> None:
        if isinstance(record, Note):
            told.append(record.text)

    recipe = Recipe.transfer(strategy).changed({"epochs": 3, "batch_size": 8})
    api.compare(
        stage.data("full"), out=out, start=stage.folder / "start", seeds=2, fractions=(0.5,),
        arch=stage.arch, recipe=recipe, on_progress=noted,
    )  # fmt: skip
    first, *later = [number for number, text in enumerate(told) if text.startswith("time: ")]
    assert later == []
    tested = [text.split(":")[0] for text in told[:first] if ": test " in text]
    assert tested == ["transfer seed 0", "scratch  seed 0"]
    place, end = "time: about ", " for the 6 trainings left"
    assert told[first].startswith(place) and told[first].endswith(end)
    if strategy == "auto":
        transfer, scratch = (
            Plan.read(out / arm / "winner.json").seconds for arm in ("transfer-0", "scratch-0")
        )
        total = sum((transfer, scratch, *[transfer / 2, scratch / 2] * 2))
        assert told[first] == f"{place}{duration(total)}{end}"


def test_a_comparison_under_other_conditions_says_so(
    stage: Stage, tmp_path: Path, monkeypatch: Any
) -> None:
    out, start = tmp_path / "compared", stage.folder / "start"
    recipe = Recipe.transfer("lp-ft").changed({"epochs": 2, "batch_size": 8})
    with pytest.raises(Stopped):
        api.compare(
            stage.data("full"), out=out, start=start, seeds=1, arch=stage.arch, recipe=recipe,
            on_progress=at_step(2, lambda: send(signal.SIGTERM)),
        )  # fmt: skip
    contract = conditions.contract

    def other(engine: Any) -> dict[str, Any]:
        return contract(engine) | {"threads": 5}

    monkeypatch.setattr(conditions, "contract", other)
    with pytest.raises(ArtefactError, match="would not give the same bits here"):
        api.resume(out, arch=stage.arch)
    api.resume(out, arch=stage.arch, allow_inexact=True)
    page = (out / "report.html").read_text()
    assert "compared: not bit-reproducible, it went on under other conditions: threads: 1" in page


def counted(work: Callable[[Any], None]) -> int:
    number = [0]

    def told(record: Any) -> None:
        number[0] += isinstance(record, Step)

    work(told)
    return number[0]


@pytest.mark.fault("F5")
def test_the_command_line_stops_with_143_and_goes_on(stage: Stage, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "regraft"]
    begin = [
        "pretrain", stage.data("pretrain"), "--out", out, "--arch", stage.arch, "--image-size",
        "12", "--epochs", "4000", "--batch-size", "8",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, *map(str, begin)], stderr=subprocess.PIPE, text=True, env=environment
    )
    while not (out / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    began = time.monotonic()
    _, told = process.communicate(timeout=AFTER_S)
    assert time.monotonic() - began < 5 + 1  # and a second for Python to end
    assert process.returncode == 143
    assert f"hint: it goes on with `regraft resume {out}`" in told
    assert "Traceback" not in told
    refused = subprocess.run(
        [*command, "resume", out], stderr=subprocess.PIPE, text=True, env=environment, check=False
    )
    assert refused.returncode == 2
    assert "name its code once more: `--arch file.py:factory`" in refused.stderr


@pytest.mark.slow
@pytest.mark.fault("F5", "F9")
def test_vgg16_at_224_px_is_saved_and_gone_in_5_s_and_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.undo()
    data, begun = tmp_path / "data", [0.0]
    generator = np.random.default_rng(0)
    for label in ("a", "b"):
        (data / label).mkdir(parents=True)
        for number in range(8):
            pixels = generator.integers(0, 256, (224, 224, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(data / label / f"{label}{number}.png")
    recipe = Recipe.scratch().changed({"epochs": 2, "batch_size": 4, "image_size": 224})

    def train(out: Path, told: Callable[[Any], None] = lambda _: None) -> None:
        api.pretrain(data, out=out, arch="vgg16", recipe=recipe, on_progress=told)

    def end() -> None:
        begun[0] = time.monotonic()
        send(signal.SIGTERM)

    train(tmp_path / "whole")
    with pytest.raises(Stopped):
        train(tmp_path / "run", at_step(3, end))
    assert time.monotonic() - begun[0] < 5
    api.resume(tmp_path / "run")
    assert tree(tmp_path / "run") == tree(tmp_path / "whole")
