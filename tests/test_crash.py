"""Killed at any place, out of space, shared by many: what was committed stays, and nothing else."""

import errno
import os
import pickle
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from regraft import api, disk, faults, storage
from regraft.data.cache import Cache
from regraft.data.dataset import Dataset
from regraft.documents import read_json
from regraft.errors import BusyError, EnvironmentFault, RegraftError, UsageError
from regraft.faults import FAILPOINTS, armed, failpoint, is_armed
from regraft.locks import LOCK, writing
from regraft.run import FINISHED, Run, refuse_existing
from regraft.storage import (
    Store,
    cache_home,
    committed_folder,
    is_whole,
    remove_leftovers,
    write_file,
    write_json,
)
from regraft.training.recipe import Recipe
from test_power_loss import WRITERS, WholeRun, Writer, places

__all__ = ["places"]  # a fixture

MakeFolder = Callable[..., Path]
KILLED, REFUSED, DONE, WRONG = -signal.SIGKILL, 5, 0, 1


def in_child(work: Callable[[], object]) -> int:
    """Does the work in a forked process; returns its exit code, or minus the signal."""
    child = os.fork()
    if child == 0:
        code = WRONG
        try:
            work()
            code = DONE
        except EnvironmentFault as error:
            code = error.exit_code
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def let_everybody_reach(folder: Path) -> None:
    """Opens the folder, and those of pytest above it: with several workers they are one more."""
    base = Path(tempfile.gettempdir())
    for each in (folder, *folder.parents):
        if each == base or base not in each.parents:
            return
        each.chmod(0o755)


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


# Killed


@pytest.mark.fault("F1", "F21")
@pytest.mark.parametrize("writer", WRITERS)
def test_a_process_killed_at_any_failpoint_loses_nothing_it_promised(
    places: tuple[Path, Path], writer: type[Writer], monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = min(writer.rounds, 2)
    home = places[1]
    passed: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(faults, "failpoint", passed.append)
        (home / "whole").mkdir()
        for number in range(1, rounds + 1):
            writer().write(home / "whole", number)
    assert passed
    assert set(passed) <= set(FAILPOINTS)
    for place in range(1, len(passed) + 1):
        root = home / str(place)
        root.mkdir()
        promised, told = os.pipe()

        def work(root: Path = root, place: int = place, told: int = told) -> None:
            with armed(f"*:{place}:kill"):
                for number in range(1, rounds + 1):
                    writer().write(root, number)
                    os.write(told, b".")

        assert in_child(work) == KILLED
        os.close(told)
        number = len(os.read(promised, 100))
        os.close(promised)
        writer().check(root, number)


def test_a_failpoint_that_is_not_armed_does_nothing_and_others_are_refused() -> None:
    assert not is_armed()
    failpoint("state.renamed")
    with armed("state.renamed:2:raise=ENOSPC"):
        failpoint("state.renamed")
        failpoint("best.renamed")
        with pytest.raises(OSError, match="No space left"):
            failpoint("state.renamed")
    with armed("*.half:1:raise=MemoryError"), pytest.raises(MemoryError):
        failpoint("state.half")
    for text in ("state.renamed", "state.renamed:x:kill", "state.renamed:1:explode"):
        with pytest.raises(UsageError, match="expected name:count:action"), armed(text):
            pass
    assert len(FAILPOINTS) >= 40


@pytest.mark.fault("F21")
def test_leftovers_go_when_the_run_is_next_written_and_not_before(tmp_path: Path) -> None:
    with committed_folder(tmp_path / "mistakes", "mistakes") as at_work:
        (tmp_path / ".final.0a1b2c3d.tmp").mkdir()
        (tmp_path / ".status.json.0a1b2c3d.tmp").write_text("half")
        with writing(tmp_path):
            assert names(tmp_path) == {LOCK, at_work.name}, "another process is still at that one"
    assert names(tmp_path) == {LOCK, "mistakes", "mistakes/manifest.json"}


def test_a_run_killed_before_it_was_one_is_begun_again_without_cleaning_up(tmp_path: Path) -> None:
    (tmp_path / LOCK).touch()
    (tmp_path / "samples.jsonl").write_text("{}\n")
    (tmp_path / ".run.json.0a1b2c3d.tmp").write_text("half")
    refuse_existing(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UsageError, match="exists already"):
        refuse_existing(tmp_path)


# Out of space, and other refusals


def largest(root: Path) -> int:
    return max(path.stat().st_size for path in root.rglob("*") if path.is_file())


@pytest.mark.fault("G1", "G2", "G14")
@pytest.mark.parametrize("writer", [each for each in WRITERS if each.rounds > 1])
@pytest.mark.parametrize("share", [0.0, 1e-9, 0.25, 0.5, 0.99])
def test_a_full_disk_is_exit_5_and_leaves_what_was_there(
    tmp_path: Path, writer: type[Writer], share: float
) -> None:
    whole, root = tmp_path / "whole", tmp_path / "root"
    for place in (whole, root):
        place.mkdir()
        writer().write(place, 1)
    before = names(root)
    writer().write(whole, 2)
    budget = int(largest(whole) * share) if share != 1e-9 else 1

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (budget, budget))
        writer().write(root, 2)

    assert in_child(work) == REFUSED
    assert names(root) == before, "no leftovers"
    writer().check(root, 1)


@pytest.mark.fault("G1", "G2", "G7", "G8")
@pytest.mark.parametrize("writer", [each for each in WRITERS if each.rounds > 1])
@pytest.mark.parametrize("refusal", ["full", "fsync", "rename"])
def test_a_refusal_of_the_machine_is_told_and_not_tried_again(
    tmp_path: Path, writer: type[Writer], refusal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer().write(tmp_path, 1)
    before = names(tmp_path)
    calls = []

    def refuse(*_: object) -> None:
        calls.append(refusal)
        if refusal == "full":
            with open("/dev/full", "wb", buffering=0) as full:
                full.write(b"x")
        raise OSError(errno.EIO if refusal == "fsync" else errno.EXDEV, "refused")

    name = {"full": "write", "fsync": "sync", "rename": "rename"}[refusal]
    with monkeypatch.context() as patch:
        patch.setattr(disk, name, refuse)
        if refusal == "rename" and writer.__name__ == "Log":
            return  # a log is never renamed
        with pytest.raises(EnvironmentFault, match="cannot be written") as told:
            writer().write(tmp_path, 2)
    assert told.value.exit_code == REFUSED
    assert len(calls) == 1
    assert names(tmp_path) == before
    writer().check(tmp_path, 1)


@pytest.mark.fault("G3")
def test_what_will_not_fit_is_refused_before_it_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Store(tmp_path).commit(1, {"a": b"1"})
    monkeypatch.setattr(disk, "free_bytes", lambda _: 20_000_000)
    with pytest.raises(EnvironmentFault, match=r"needs 0\.10 GB, 0\.02 GB are free"):
        Store(tmp_path).commit(2, {"a": bytes(100_000_000)})
    assert Store(tmp_path).numbers() == [1]
    assert names(tmp_path) == {"000001", "000001/a", "000001/manifest.json"}


@pytest.mark.fault("G4")
def test_a_place_without_permission_is_refused_before_any_work(tmp_path: Path) -> None:
    place = tmp_path / "closed"
    place.mkdir(mode=0o555)
    let_everybody_reach(tmp_path)

    def work() -> None:
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        disk.require_writable(place / "run")

    assert in_child(work) == REFUSED
    assert names(place) == set()


@pytest.mark.fault("H11")
def test_a_run_that_was_deleted_meanwhile_is_not_half_made_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "state")
    store.folder.mkdir()
    store.commit(1, {"a": b"1"})
    shutil.rmtree(store.folder)
    with pytest.raises(EnvironmentFault, match="cannot be written: No such file"):
        store.commit(2, {"a": b"2"})
    assert names(tmp_path) == set()


# Many processes


@pytest.mark.fault("H1", "H2")
def test_a_second_writer_is_refused_at_once_and_death_frees_the_lock(tmp_path: Path) -> None:
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        with writing(tmp_path):
            os.write(tell, b".")
            time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    try:
        began = time.monotonic()
        with pytest.raises(BusyError) as refused, writing(tmp_path):
            pass
        assert time.monotonic() - began < 1
        assert refused.value.exit_code == 6
        assert f"pid {child}, host {os.uname().nodename}, start 20" in str(refused.value)
        assert "command " in str(refused.value)
        assert names(tmp_path) == {LOCK}
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with writing(tmp_path):
        pass


@pytest.mark.fault("H12")
def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(EnvironmentFault, match="cannot be locked") as told, writing(tmp_path):
        pass
    assert "put the run on a local disk" in told.value.hint
    with pytest.raises(EnvironmentFault, match=r"predictions\.csv` cannot be written: No locks"):
        write_file(tmp_path / "predictions.csv", b"")
    assert names(tmp_path) == {LOCK}


def test_a_folder_that_the_machine_keeps_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        Store(tmp_path).commit(number, {"a": b"1"})

    def refuse(*_: object) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(disk, "rename", refuse)
    with pytest.raises(EnvironmentFault, match="000001` cannot be written: Permission denied"):
        Store(tmp_path).prune(keep=1)


@pytest.mark.fault("H3")
def test_readers_meet_only_committed_state_while_a_run_is_written(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", WholeRun().record(), [], [])
    run.keep_best({"model.json": b"0"})
    child = os.fork()
    if child == 0:
        for number in range(1, 100_000):
            run.append_epoch({"epoch": number}, {"elapsed_s": number})
            run.set_status("running", best_epoch=number)
            run.keep_best({"model.json": b"%d" % number})
        os._exit(0)
    try:
        seen = set()
        for _ in range(200):
            again = Run.open(run.folder)
            seen.add(again.status.get("best_epoch"))
            epochs = [line["epoch"] for line in again.epochs()]
            assert epochs == list(range(1, len(epochs) + 1))
        assert len(seen) > 2, "the writer was at work"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with writing(run.folder):
        run.set_status(FINISHED)
    assert Run.open(run.folder).status == {"state": FINISHED}


def entry_of(folder: Path, seed: int) -> None:
    """Reads an entry, or makes it: what a cache does. Some processes first damage it."""
    generator = np.random.default_rng(seed)
    for _ in range(6):
        if generator.random() < 0.2 and folder.is_dir():
            storage.remove_folder(folder)
        while not is_whole(folder):
            remove_leftovers(folder.parent)
            with committed_folder(folder, "cache") as temporary:
                values = disk.create_array(temporary / "values.npy", np.int64, (500,))
                values[:] = 7
                values.flush()
        try:
            values = np.load(folder / "values.npy", mmap_mode="r")
        except FileNotFoundError:
            continue  # removed just now: made again in the next turn
        assert (values == 7).all()


@pytest.mark.fault("H4", "H10")
def test_fifty_processes_share_a_cache_and_none_reads_what_is_not_whole(tmp_path: Path) -> None:
    children = []
    for seed in range(50):
        child = os.fork()
        if child == 0:
            code = WRONG
            try:
                entry_of(tmp_path / "entry", seed)
                code = DONE
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [DONE] * 50
    remove_leftovers(tmp_path)
    assert names(tmp_path) <= {"entry", "entry/values.npy", "entry/manifest.json"}


@pytest.mark.fault("H7", "H8")
@pytest.mark.parametrize("damage", ["flip", "cut", "zeros", "pickle"])
def test_a_damaged_cache_is_told_and_made_again(
    make_folder: MakeFolder, damage: str, tmp_path: Path
) -> None:
    dataset = Dataset.open(make_folder({"a": 8, "b": 8}))
    told: list[str] = []
    first, _ = Cache.build(dataset, (6, 5), 1, None, told.append)
    expected = np.array(first.images)
    (path,) = cache_home().glob("*/images.npy")
    content = path.read_bytes()
    path.unlink()
    path.write_bytes({
        "flip": content[:-9] + bytes([content[-9] ^ 4]) + content[-8:],
        "cut": content[:-1],
        "zeros": bytes(len(content)),
        "pickle": pickle.dumps([tmp_path]),
    }[damage])  # fmt: skip
    second, _ = Cache.build(dataset, (6, 5), 1, None, told.append)
    np.testing.assert_array_equal(second.images, expected)
    (warning,) = told
    assert "was damaged: decoding again" in warning


@pytest.mark.fault("G2")
def test_without_room_for_the_cache_the_images_stay_in_memory_and_that_is_told(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = Dataset.open(make_folder({"a": 8, "b": 8}))
    expected, _ = Cache.build(dataset, (6, 5), 1)
    shutil.rmtree(cache_home())
    monkeypatch.setattr(disk, "free_bytes", lambda _: 0)
    told: list[str] = []
    cached, _ = Cache.build(dataset, (6, 5), 1, None, told.append)
    np.testing.assert_array_equal(cached.images, expected.images)
    np.testing.assert_array_equal(cached.hashes, expected.hashes)
    assert (cached.key, cached.is_grey) == (expected.key, expected.is_grey)
    (warning,) = told
    assert "are free; the images stay in memory this time" in warning
    assert list(cache_home().iterdir()) == []
    monkeypatch.setattr("regraft.data.cache.MOST_IN_MEMORY", 100)
    with pytest.raises(EnvironmentFault, match="are free"):
        Cache.build(dataset, (6, 5), 1)


@pytest.mark.fault("G3")
def test_a_training_without_room_is_refused_before_its_first_epoch(
    make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda _: 17_000_000)
    data = make_folder({"a": 8, "b": 8}, size=(32, 32))
    recipe = Recipe.scratch().changed({"image_size": 32, "epochs": 1, "channels": 3})
    with pytest.raises(EnvironmentFault, match=r"needs 0\.0. GB, 0\.02 GB are free"):
        api.pretrain(data, out=tmp_path / "run", arch="test_resnet", recipe=recipe)
    assert not (tmp_path / "run").exists()


@pytest.mark.fault("H8")
def test_nobody_else_may_enter_the_cache(
    make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path / "own"))
    Cache.build(Dataset.open(make_folder({"a": 8, "b": 8})), (6, 5), 1)
    assert (tmp_path / "own").stat().st_mode & 0o777 == 0o700


# Environment


@pytest.mark.fault("M1")
def test_the_newest_step_is_that_of_the_highest_number_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    store.commit(9, {"a": b"9"})
    monkeypatch.setattr(time, "time", lambda: 0.0)
    store.commit(10, {"a": b"10"})
    future = time.monotonic() + 10 * 365 * 86400 + 2e9
    for path in (store.path(9), *store.path(9).iterdir()):
        os.utime(path, (future, future))
    step, skipped = store.newest()
    assert step is not None
    assert (step.number, skipped) == (10, [])
    store.prune(keep=1)
    assert store.numbers() == [10]


@pytest.mark.fault("G15")
@pytest.mark.parametrize(("mask", "mode"), [(0o077, 0o600), (0o022, 0o644), (0o000, 0o666)])
def test_files_have_the_permissions_of_the_umask(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        Store(tmp_path).commit(1, {"a": b"1"})
        write_json(tmp_path / "b", 1)
    finally:
        os.umask(before)
    for path in (tmp_path / "000001" / "a", tmp_path / "000001" / "manifest.json", tmp_path / "b"):
        assert path.stat().st_mode & 0o777 == mode
    assert read_json(tmp_path / "b") == 1


@pytest.mark.fault("G5", "G6")
@pytest.mark.parametrize("closed", ["a/a_001.png", "b"])
def test_an_image_or_a_class_without_permission_is_named_and_never_left_out(
    make_folder: MakeFolder, tmp_path: Path, closed: str
) -> None:
    root = make_folder({"a": 8, "b": 8})
    let_everybody_reach(tmp_path)
    (root / closed).chmod(0)

    def work() -> None:
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        try:
            Dataset.open(root)
        except RegraftError as error:
            os.write(tell, str(error).encode())

    heard, tell = os.pipe()
    try:
        assert in_child(work) == DONE
        os.close(tell)
        said = os.read(heard, 10_000).decode()
    finally:
        (root / closed).chmod(0o755)
    assert Path(closed).name in said
    assert "Permission denied" in said or "1 class folder has no images" in said
