"""The README is kept true: its example runs, its commands exist, its promises of place hold."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from regraft import cli

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_first_command_and_the_result_table_come_early() -> None:
    lines = README.splitlines()
    assert "make demo" in lines[:12]
    assert next(i for i, line in enumerate(lines, 1) if line.startswith("|---")) <= 30


def test_the_python_example_runs(
    make_shapes: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_shapes(("bacteria", "normal"), 12, name="chest_xray")
    make_shapes(("mild", "severe"), 12, name="knees", seed=1)
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})  # noqa: S102
    printed = capsys.readouterr().out
    assert re.search(r"^(helped|hurt|cannot tell) -?\d", printed, re.MULTILINE)


def test_every_command_in_the_readme_exists(capsys: pytest.CaptureFixture[str]) -> None:
    commands = set(re.findall(r"^regraft +([a-z]+)", README, re.MULTILINE))
    assert {"pretrain", "finetune", "compare", "evaluate", "predict"} <= commands
    for command in commands:
        with pytest.raises(SystemExit) as ended:
            cli.main([command, "--help"])
        assert ended.value.code == 0
        assert f"regraft {command}" in capsys.readouterr().out
