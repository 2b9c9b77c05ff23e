"""Settings as people write them: `key=value`, TOML, and what is wrong with them."""

import tomllib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from regraft.errors import UsageError, count


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """Reads `key=value` pairs (values as in TOML; bare words are text).

    Raises:
        UsageError: A pair has no `=`.
    """
    changes: dict[str, Any] = {}
    for assignment in assignments:
        key, separator, value = assignment.partition("=")
        if not separator:
            raise UsageError(f"`--set {assignment}` has no `=`", hint="write `--set key=value`")
        try:
            changes[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except ValueError:
            changes[key.strip()] = value.strip()
    return changes


def refusal(
    what: str, error: ValidationError, known: Sequence[str], inner: Mapping[str, Sequence[str]]
) -> UsageError:
    """Returns the error that tells every mistake at once.

    Args:
        what: The document.
        error: Of pydantic.
        known: Keys that could have been meant.
        inner: Those of the entries of a list, by its key.
    """
    entries = error.errors(include_url=False)
    # An entry that does not validate is also missing from its list: one mistake, told once.
    own = [entry for entry in entries if entry["loc"] not in {(key,) for key in inner}]
    problems = [_problem(entry, known, inner) for entry in own or entries]
    return UsageError(
        f"{what} cannot be used: {count(len(problems), 'problem')}",
        problems=problems,
        hint="`regraft recipe scratch` prints every key with its meaning",
    )


def _problem(entry: Any, known: Sequence[str], inner: Mapping[str, Sequence[str]]) -> str:
    # Discriminators of unions ("literal", "int") stand in the location: keep keys and numbers.
    place = [part for part in entry["loc"] if isinstance(part, int) or part.isidentifier()]
    key = str(place[-1]) if place else ""
    if entry["type"] == "extra_forbidden":
        lists = [part for part in place if part in inner]
        close = get_close_matches(key, inner[lists[0]] if lists else known, n=1)
        return f"unknown key `{key}`" + (f"; did you mean `{close[0]}`?" if close else "")
    shown = ".".join(str(part) for part in place if part not in ("int", "float"))
    return f"`{shown}`: {entry['msg'].removeprefix('Value error, ')}, not `{entry['input']}`"


def toml(value: Any) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple):
        return "[" + ", ".join(toml(item) for item in value) + "]"
    return str(value).lower() if isinstance(value, bool) else repr(value)
