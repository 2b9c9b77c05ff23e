"""Whatever instant the power goes, what was acknowledged is there, and nothing else counts."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from power_loss import Recorder, lay_out
from regraft import disk, manifests, storage
from regraft.changing import append_json_line, cut_log, read_log, replace_files
from regraft.disk import create_array
from regraft.documents import read_json
from regraft.errors import ArtefactError
from regraft.manifests import Manifest, verify_manifest
from regraft.run import FINISHED, Run
from regraft.storage import Store, committed_folder, remove_leftovers, write_json

pytestmark = pytest.mark.fault("F4")
LEAST_STATES = 1000
MOST_AT_ONE_INSTANT = 150


class Violation(Exception):
    pass


def claim(holds: bool, what: object) -> None:
    if not holds:
        raise Violation(what)


def document(number: int) -> dict[str, Any]:
    return {"number": number, "text": f"{number} " * (5 + number % 7)}


class Writer:
    """Something durable: `write` does and promises, `check` is told how much was promised."""

    rounds = 12

    def write(self, root: Path, number: int) -> None:
        raise NotImplementedError

    def check(self, root: Path, promised: int) -> None:
        raise NotImplementedError


class OneFile(Writer):
    rounds = 36

    def write(self, root: Path, number: int) -> None:
        write_json(root / "status.json", document(number))

    def check(self, root: Path, promised: int) -> None:
        remove_leftovers(root)
        claim(not list(root.glob(".*")), "a leftover")
        if promised or (root / "status.json").exists():
            found = read_json(root / "status.json")
            claim(found in (document(promised), document(promised + 1)), found)


class Log(Writer):
    rounds = 40

    def write(self, root: Path, number: int) -> None:
        append_json_line(root / "metrics.jsonl", document(number))

    def check(self, root: Path, promised: int) -> None:
        expected = [document(number) for number in range(1, promised + 2)]
        found = read_log(root / "metrics.jsonl")
        claim(found in (expected[:promised], expected), found)
        append_json_line(root / "metrics.jsonl", "next")
        claim(read_log(root / "metrics.jsonl") == [*found, "next"], "a line before is in the way")


class Steps(Writer):
    rounds = 18

    def content(self, number: int) -> dict[str, bytes]:
        return {"weights.safetensors": bytes([number]) * 50, "state.json": b"%d" % number}

    def write(self, root: Path, number: int) -> None:
        store = Store(root)
        store.commit(number, self.content(number))
        store.prune(keep=2)

    def check(self, root: Path, promised: int) -> None:
        store = Store(root)
        step, _ = store.recover()
        number = step.number if step else 0
        claim(number in (promised, promised + 1), f"step {number} after {promised} were promised")
        if step:
            for name, content in self.content(number).items():
                claim(step.read(name) == content, name)
        claim(not list(root.glob(".*")), "a leftover")
        self.after_rot(root, number)

    def after_rot(self, root: Path, number: int) -> None:
        """The disk also forgets a bit of the newest step: the one before must be found."""
        if number > 1:
            path = root / f"{number:06d}" / "weights.safetensors"
            path.write_bytes(b"\xff" + path.read_bytes()[1:])
            step, skipped = Store(root).newest()
            claim(step is not None and step.number == number - 1, "a step that rotted is taken")
            claim("weights.safetensors" in " ".join(skipped), "what rotted is not told")


class FixedNames(Writer):
    """The files of a Run, which change under their names."""

    rounds = 12

    def contents(self, number: int) -> dict[str, bytes]:
        return {name: json.dumps([name, number]).encode() for name in ("a.json", "b.csv")}

    def write(self, root: Path, number: int) -> None:
        replace_files(root, self.contents(number))

    def check(self, root: Path, promised: int) -> None:
        remove_leftovers(root)
        if not (root / "manifest.json").exists():
            claim(promised == 0, "no manifest")
            return
        verify_manifest(root)
        versions = [self.contents(promised), self.contents(promised + 1)]
        for name in versions[0]:
            if promised or (root / name).exists():
                claim((root / name).read_bytes() in [v[name] for v in versions], name)
        replace_files(root, self.contents(9))
        claim(verify_manifest(root).read("a.json") == self.contents(9)["a.json"], "no way on")


class CacheEntry(Writer):
    """Files that others write, through memory."""

    rounds = 18

    def write(self, root: Path, number: int) -> None:
        with committed_folder(root / f"entry{number}", "cache") as temporary:
            array = create_array(temporary / "images.npy", np.uint8, (3, 4))
            array[:] = number
            array.flush()
            write_json(temporary / "cache.json", document(number))

    def check(self, root: Path, promised: int) -> None:
        remove_leftovers(root)
        claim(not list(root.glob(".*")), "a leftover")
        for number in range(1, self.rounds + 1):
            entry = root / f"entry{number}"
            if number <= promised or entry.exists():
                verify_manifest(entry)
                claim((np.load(entry / "images.npy") == number).all(), "other images")


class WholeRun(Writer):
    """From nothing to finished: what a training does to its folder."""

    rounds = 1

    def write(self, root: Path, number: int) -> None:
        assert number == 1
        run = Run.create(root / "run", self.record(), [{"path": "a", "excluded": "x"}], [])
        for epoch in (1, 2):
            run.append_epoch({"epoch": epoch}, {"epoch": epoch, "elapsed_s": 1.0})
            run.keep_best({"model.json": b"%d" % epoch, "model.safetensors": b"w" * epoch})
        run.set_status("interrupted")
        cut_log(run.folder / "metrics.jsonl", len('{"epoch": 1}\n'))
        run.append_epoch({"epoch": 2}, {"epoch": 2, "elapsed_s": 1.0})
        final = {"model.json": b"3", "model.safetensors": b"www"}
        storage.write_folder(run.final, final, "final")
        run.set_status(FINISHED)
        run.drop_states()

    def record(self) -> dict[str, Any]:
        data: dict[str, Any] = {"name": "d", "fingerprint": "f", "class_names": ["a", "b"]}
        data["options"] = {"relabel": [], "allow": []}
        return {"verb": "pretrain", "arch": "x", "recipe": {}, "data": data}

    def check(self, root: Path, promised: int) -> None:
        folder = root / "run"
        if not (folder / "run.json").is_file():
            claim(promised == 0, "no run")
            return
        run = Run.open(folder)
        claim(not Manifest.open(folder).problems(), Manifest.open(folder).problems())
        state = run.status["state"]
        claim(run.epochs() in [[], [{"epoch": 1}], [{"epoch": 1}, {"epoch": 2}]], run.epochs())
        best, _ = run.best.newest()
        if run.final.exists():
            claim(verify_manifest(run.final).read("model.json") == b"3", "another final")
        elif len(run.epochs()) == 2:
            claim(best is not None, "no classifier, and epoch 2 was promised")
        claim(not promised or (state == FINISHED and run.final.exists()), "not finished")


WRITERS = [OneFile, Log, Steps, FixedNames, CacheEntry, WholeRun]
Mutant = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture
def places(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A folder to write in, and one for the states: in memory, where there is such a disk."""
    memory = Path("/dev/shm")
    home = memory / f"regraft-{tmp_path.name}" if memory.is_dir() else tmp_path / "states"
    home.mkdir()
    (tmp_path / "disk").mkdir()
    yield tmp_path / "disk", home
    shutil.rmtree(home)


def violations(
    writer: Writer, places: tuple[Path, Path], mutant: Mutant, most: int = 5
) -> tuple[int, list[str]]:
    """Returns how many different states there were, and what was wrong with the first few."""
    root, home = places
    states: dict[str, tuple[int, dict[str, Any]]] = {}
    generator = random.Random(0)
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(root, patch)
        mutant(patch)

        def note() -> None:
            for tree in recorder.states(MOST_AT_ONE_INSTANT, generator):
                states[repr((recorder.acknowledged, tree))] = recorder.acknowledged, tree

        recorder.on_change = note
        for number in range(1, writer.rounds + 1):
            writer.write(root, number)
            recorder.promise()
    found: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        mutant(patch)
        for place, (promised, tree) in enumerate(states.values()):
            if len(found) == most:
                break
            folder = home / str(place)
            lay_out(tree, folder)
            try:
                writer.check(folder, promised)
            except (Violation, ArtefactError) as error:
                found.append(f"{error} in {tree}")
            shutil.rmtree(folder)
    return len(states), found


@pytest.mark.parametrize("writer", WRITERS)
def test_no_state_that_a_power_loss_may_leave_loses_what_was_promised(
    writer: type[Writer], places: tuple[Path, Path]
) -> None:
    number, found = violations(writer(), places, lambda _: None)
    assert found == []
    assert number >= LEAST_STATES


def no_file_sync(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(disk, "sync", lambda _: None)


def no_folder_sync(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(disk, "sync_folder", lambda _: None)


def in_place(patch: pytest.MonkeyPatch) -> None:
    def write_file(path: Path, content: bytes) -> None:
        descriptor = disk.open_log(path)
        disk.truncate(descriptor, 0)
        disk.write(descriptor, memoryview(content))
        disk.sync(descriptor)
        disk.sync_folder(path.parent)

    patch.setattr(storage, "write_file", write_file)


def no_hash(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(manifests, "_problem", lambda *_: None)


def prune_before_commit(patch: pytest.MonkeyPatch) -> None:
    commit = Store.commit

    def pruning(self: Store, number: int, contents: dict[str, bytes]) -> None:
        for old in self.numbers():
            storage.remove_folder(self.path(old))
        commit(self, number, contents)

    patch.setattr(Store, "commit", pruning)


@pytest.mark.parametrize(
    ("mutant", "writer"),
    [
        (no_file_sync, Steps),
        (no_file_sync, OneFile),
        (no_file_sync, Log),
        (no_folder_sync, Steps),
        (no_folder_sync, OneFile),
        (in_place, OneFile),
        (no_hash, Steps),
        (prune_before_commit, Steps),
    ],
)
def test_a_protocol_that_lacks_something_is_caught(
    mutant: Mutant, writer: type[Writer], places: tuple[Path, Path]
) -> None:
    _, found = violations(writer(), places, mutant, most=1)
    assert found
