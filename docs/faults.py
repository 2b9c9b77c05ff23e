"""Writes faults.md: each row of faults.toml, and the tests that answer for it."""

import ast
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
TESTS = HERE.parent / "tests"


@dataclass(frozen=True)
class Row:
    """One case of the catalogue, and the tests that answer for it, as `file::test`."""

    id: str
    priority: int
    case: str
    tests: tuple[str, ...]


def rows() -> dict[str, tuple[str, list[Row]]]:
    """Returns letter to (title, rows)."""
    answers = marked()
    tables = tomllib.loads((HERE / "faults.toml").read_text(encoding="utf-8"))
    return {
        letter: (
            table["title"],
            [
                Row(name, *value, tuple(sorted(answers.get(name, ()))))
                for name, value in table.items()
                if name != "title"
            ],
        )
        for letter, table in tables.items()
    }


def marked() -> dict[str, set[str]]:
    """Returns row id to the tests that carry its mark."""
    found: dict[str, set[str]] = defaultdict(set)
    for file in sorted(TESTS.glob("test_*.py")):
        for test, row in marks_of(ast.parse(file.read_text(encoding="utf-8"))):
            found[row].add(f"{file.name}::{test}")
    return found


def marks_of(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yields (test, row id): marks of functions, of their cases, and of tables of cases."""
    for node in tree.body:
        is_test = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node):
            if isinstance(inner, ast.Call) and ast.unparse(inner.func) == "pytest.mark.fault":
                for argument in inner.args:
                    if isinstance(argument, ast.Constant):
                        yield getattr(node, "name", "") if is_test else "(cases)", argument.value


def page() -> str:
    tables = rows()
    lines = [
        "# The catalogue of faults",
        "",
        "What regraft must survive, and the tests that answer for it. P0: the first release needs "
        "it. Written by `make faults` from `faults.toml` and the marks in the tests.",
        "",
        "| table | P0 rows | with a test | P1 rows | with a test |",
        "|---|---|---|---|---|",
    ]
    for letter, (title, table) in tables.items():
        counts = []
        for priority in (0, 1):
            own = [row for row in table if row.priority == priority]
            covered = sum(bool(row.tests) for row in own)
            share = f" ({covered / len(own):.0%})" if own else ""
            counts += [str(len(own)), f"{covered}{share}"]
        lines.append(f"| {letter}: {title} | {' | '.join(counts)} |")
    for letter, (title, table) in tables.items():
        lines += [
            "",
            f"## {letter}: {title}",
            "",
            "| row | P | case | tests |",
            "|---|---|---|---|",
        ]
        for row in table:
            tests = "<br>".join(f"`{test}`" for test in row.tests) or "none"
            lines.append(f"| {row.id} | {row.priority} | {row.case} | {tests} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (HERE / "faults.md").write_text(page(), encoding="utf-8")
