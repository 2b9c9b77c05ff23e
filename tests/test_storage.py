"""Every durable write is whole or absent, and damage is named."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from regraft.changing import append_json_line, read_log
from regraft.documents import read_json, sha256_of_file, to_json
from regraft.errors import ArtefactError, EnvironmentFault
from regraft.manifests import verify_manifest
from regraft.storage import committed, committed_folder, write_file, write_json
from signing import sign


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_half(path: Path, error: Exception) -> None:
    with committed(path) as temporary:
        temporary.write_text("half of the n")
        raise error


def fill_half(path: Path, error: Exception) -> None:
    with committed_folder(path) as temporary:
        (temporary / "one").write_text("1")
        raise error


def test_a_failed_write_leaves_the_old_content_and_no_temporary_file(tmp_path: Path) -> None:
    write_file(tmp_path / "a.txt", b"old")
    with pytest.raises(RuntimeError, match="half-way"):
        write_half(tmp_path / "a.txt", RuntimeError("half-way"))
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_nothing_stands_under_the_name_before_the_write_is_whole(tmp_path: Path) -> None:
    with committed(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
        assert not (tmp_path / "a.txt").exists()
    assert (tmp_path / "a.txt").read_text() == "new"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_a_full_or_forbidden_disk_is_told_as_such(tmp_path: Path, number: int) -> None:
    write_file(tmp_path / "a.txt", b"old")
    with pytest.raises(EnvironmentFault) as caught:
        write_half(tmp_path / "a.txt", OSError(number, os.strerror(number)))
    assert f"a.txt` cannot be written: {os.strerror(number)}" in str(caught.value)
    assert "hint: check the place, its permissions and the free space" in str(caught.value)
    assert caught.value.exit_code == 5
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask_even_where_the_writer_set_others(
    tmp_path: Path, mask: int, mode: int
) -> None:
    before = os.umask(mask)
    try:
        with committed(tmp_path / "weights") as temporary:
            temporary.write_bytes(b"w")
            temporary.chmod(0o600)  # as safetensors leaves it
        assert os.umask(mask) == mask, "the umask itself must not change"
    finally:
        os.umask(before)
    assert (tmp_path / "weights").stat().st_mode & 0o777 == mode


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="half-way"):
        fill_half(tmp_path / "entry", RuntimeError("half-way"))
    assert names(tmp_path) == []
    with committed_folder(tmp_path / "entry") as temporary:
        (temporary / "one").write_text("1")
        assert not (tmp_path / "entry").exists()
    assert names(tmp_path) == ["entry"]
    assert names(tmp_path / "entry") == ["manifest.json", "one"]
    assert verify_manifest(tmp_path / "entry").entries.keys() == {"one"}


def test_the_first_of_two_folders_under_one_name_stays(tmp_path: Path) -> None:
    with committed_folder(tmp_path / "entry") as late:
        (late / "who").write_text("late")
        with committed_folder(tmp_path / "entry") as early:
            (early / "who").write_text("early")
    assert (tmp_path / "entry" / "who").read_text() == "early"
    assert names(tmp_path) == ["entry"]


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    """A folder of two files under a manifest."""
    write_file(tmp_path / "model.safetensors", b"0123456789")
    write_json(tmp_path / "model.json", {"classes": ["a", "b"]})
    sign(tmp_path)
    verify_manifest(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda p: p.write_bytes(b"0123456780"), "is not the file that was saved (sha256 differs)"),
        (lambda p: p.write_bytes(b"01234"), "has 5 bytes, not 10"),
        (lambda p: p.unlink(), "is missing"),
    ],
    ids=["changed", "short", "missing"],
)
def test_a_damaged_file_is_named(sealed: Path, damage: Callable[[Path], None], told: str) -> None:
    damage(sealed / "model.safetensors")
    with pytest.raises(ArtefactError) as caught:
        verify_manifest(sealed)
    assert caught.value.problems == (f"`model.safetensors` {told}",)
    assert f"`{sealed}` is damaged or was changed" in str(caught.value)


@pytest.mark.parametrize("name", ["../secret", "inner/secret"])
def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run"
    (folder / "inner").mkdir(parents=True)
    secret = folder / name
    secret.write_bytes(b"secret")
    entry = {"size": 6, "sha256": sha256_of_file(secret)}
    write_json(folder / "manifest.json", {"schema": 1, "files": {name: entry}})
    with pytest.raises(ArtefactError) as caught:
        verify_manifest(folder)
    assert f"a name {name!r}" in caught.value.problems[0]


@pytest.mark.parametrize("text", ["{}", "[]", '{"files": []}', '{"files": {"model.json": {}}}'])
def test_a_manifest_of_another_form_is_an_artefact_error(sealed: Path, text: str) -> None:
    (sealed / "manifest.json").write_text(text)
    with pytest.raises(ArtefactError, match="manifest"):
        verify_manifest(sealed)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_refuses_numbers_that_json_has_not(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json({"loss": value})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": value})
    assert names(tmp_path) == []


def test_a_name_that_is_no_unicode_survives_json(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    write_json(tmp_path / "a.json", [name])
    assert read_json(tmp_path / "a.json") == [name]
    assert (tmp_path / "a.json").read_bytes().isascii()


@pytest.mark.parametrize(
    ("content", "told"),
    [(None, "is missing"), (b'{"a": ', "is not valid JSON"), (b"\xff", "is not valid JSON")],
)
def test_json_that_cannot_be_read_names_its_file(
    tmp_path: Path, content: bytes | None, told: str
) -> None:
    path = tmp_path / "run.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArtefactError) as caught:
        read_json(path)
    assert f"`{path}` {told}" in str(caught.value)


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_log(path) == []
    append_json_line(path, {"epoch": 1})
    append_json_line(path, {"epoch": 2})
    path.write_bytes(path.read_bytes()[:-3])
    assert read_log(path) == [{"epoch": 1}]


def test_a_line_after_one_that_was_cut_off_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_json_line(path, {"epoch": 1})
    append_json_line(path, {"epoch": 2})
    path.write_bytes(path.read_bytes()[:-3])
    append_json_line(path, {"epoch": 2})
    assert read_log(path) == [{"epoch": 1}, {"epoch": 2}]
