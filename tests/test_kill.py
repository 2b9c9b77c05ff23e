"""Trainings that are killed anywhere, any number of times, end with the bytes of one left alone."""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from interruption import AFTER_S, KINDS, Child, Stage, eager, newest
from regraft import faults

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


def passed(stage: Stage, kind: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Returns how often an uninterrupted training passes each failpoint, caches empty."""
    names: Counter[str] = Counter()
    monkeypatch.setenv("REGRAFT_CACHE", str(out.with_name(f"{out.name}-cache")))
    monkeypatch.setattr(faults, "failpoint", lambda name: names.update([name]))
    stage.carry_out(kind, out)
    monkeypatch.undo()
    eager(monkeypatch)
    return names


@pytest.mark.fault("F1", "F21")
def test_a_kill_at_each_failpoint_changes_no_byte(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(0)
    of_kind = {k: passed(stage, k, tmp_path / f"passed-{k}", monkeypatch) for k in KINDS}
    points = sorted(set().union(*of_kind.values()))
    assert len(points) >= 60, points
    assert set(points) <= set(faults.FAILPOINTS)
    for number, point in enumerate(points):
        possible = [kind for kind in KINDS if of_kind[kind][point]]
        kind = possible[number % len(possible)]
        out = tmp_path / f"{number}"
        monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path / f"{number}-cache"))
        which = draw.randint(1, of_kind[kind][point])
        child = Child.start(
            carried_out(stage, kind, out), tmp_path / "log", f"{point}:{which}:kill"
        )
        assert child.wait(AFTER_S) == -9, f"{kind} has not died at {point}: {said(tmp_path)}"
        assert newest(out) >= child.acknowledged(), point
        finish(stage, kind, out, tmp_path)
        assert stage.differing(kind, out) == [], point


def carried_out(stage: Stage, kind: str, out: Path) -> Callable[[], None]:
    return lambda: stage.carry_out(kind, out)


def finish(stage: Stage, kind: str, out: Path, tmp_path: Path) -> None:
    child = Child.start(carried_out(stage, kind, out), tmp_path / "log")
    code = child.wait(AFTER_S)
    assert code == 0, said(tmp_path)
    child.acknowledged()


def said(tmp_path: Path) -> str:
    return (tmp_path / "log").read_text() if (tmp_path / "log").is_file() else "nothing"


def killed_at_random(stage: Stage, kills: int, tmp_path: Path, seed: int) -> Counter[str]:
    """Kills trainings of all kinds so often; returns how often one Run was, by its folder."""
    draw, counts, number = random.Random(seed), Counter[str](), 0
    while counts.total() < kills:
        kind = KINDS[number % len(KINDS)]
        out = tmp_path / f"{kind}-{seed}-{number}"
        number += 1
        # Now and then at once, so that a resume is killed while it begins.
        most = draw.choice([0.1, 0.3, 0.6])
        for _ in range(200):
            child = Child.start(carried_out(stage, kind, out), tmp_path / "log")
            code = child.wait(draw.uniform(0.0, most) if counts.total() < kills else AFTER_S)
            if code is not None:
                assert code == 0, said(tmp_path)
                child.acknowledged()
                break
            assert counts.total() < kills, "it hangs"
            child.kill()
            counts[out.name] += 1
            assert newest(out) >= child.acknowledged(), out
            most = min(most * 1.2, 5.0)  # it comes to its end some time
        assert stage.differing(kind, out) == [], out
    return counts


@pytest.mark.fault("F2", "F3", "G10")
def test_random_kills_change_no_byte_and_lose_no_acknowledged_state(
    stage: Stage, tmp_path: Path
) -> None:
    counts = killed_at_random(stage, 100, tmp_path, seed=0)
    assert counts.total() == 100
    assert {name.split("-")[0] for name in counts} == set(KINDS)
    assert max(counts.values()) >= 5, "one Run was killed again and again while it was resumed"


@pytest.mark.slow
@pytest.mark.fault("F2", "F3")
def test_two_thousand_random_kills_change_no_byte(stage: Stage, tmp_path: Path) -> None:
    for seed in range(1, 21):
        killed_at_random(stage, 100, tmp_path, seed)
