"""Every row of the catalogue that the first release needs has a test that answers for it."""

import ast
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "docs" / "faults.py"
WHOLE = "ADEKLFHM"  # tables whose P0 rows all have a test; add letters as they become so


def _loaded() -> Any:
    """Returns the script that lies beside its catalogue, in no package."""
    spec = importlib.util.spec_from_file_location("faults_of_the_catalogue", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


faults = _loaded()


@pytest.mark.parametrize("letter", WHOLE)
def test_every_row_of_the_first_release_has_a_test(letter: str) -> None:
    missing = [row.id for row in faults.rows()[letter][1] if row.priority == 0 and not row.tests]
    assert missing == []


def test_every_mark_names_a_row() -> None:
    known = {row.id for _, table in faults.rows().values() for row in table}
    assert set(faults.marked()) - known == set()


def test_ids_are_those_of_their_table() -> None:
    for letter, (_, table) in faults.rows().items():
        assert [row.id for row in table] == [f"{letter}{n}" for n in range(1, len(table) + 1)]
        assert {row.priority for row in table} <= {0, 1}


def test_a_row_without_a_test_is_seen_and_marks_of_cases_count() -> None:
    source = (
        '@pytest.mark.fault("A1")\ndef test_a(): ...\n'
        "@pytest.mark.parametrize('x', [pytest.param(1, marks=pytest.mark.fault('B2', 'B3'))])\n"
        "def test_b(x): ...\n"
        "CASES = [pytest.param(1, marks=pytest.mark.fault('C4'))]\n"
    )
    assert list(faults.marks_of(ast.parse(source))) == [
        ("test_a", "A1"),
        ("test_b", "B2"),
        ("test_b", "B3"),
        ("(cases)", "C4"),
    ]
    assert "| A1 | 0 |" in faults.page()
