"""The errors a user can meet: each has a code, a message, its problems and a hint.

Exit codes: 2 usage or configuration, 3 data, 4 artefact, 5 environment, 6 busy, 7 numeric
failure.
"""

import unicodedata
from collections.abc import Iterable, Sequence
from typing import ClassVar


class RegraftError(Exception):
    """A mistake or obstacle that the user can act on.

    Args:
        message: What happened, with the values received and what was expected.
        problems: One line for each thing that is wrong, all of one input at once.
        hint: The next action.
    """

    code: ClassVar[str] = "regraft"
    exit_code: ClassVar[int] = 70

    def __init__(self, message: str, *, hint: str, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.problems = tuple(problems)
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.message, *(f"  - {problem}" for problem in self.problems)]
        return spelled("\n".join(lines) + f"\n\nhint: {self.hint}")


class UsageError(RegraftError):
    """The command, an option or a recipe cannot be carried out as given."""

    code = "usage"
    exit_code = 2


class DataError(RegraftError):
    """The images cannot be used as they are."""

    code = "data"
    exit_code = 3


class ArtefactError(RegraftError):
    """A saved Run or Classifier is invalid, incompatible or refused."""

    code = "artefact"
    exit_code = 4


class EnvironmentFault(RegraftError):
    """The machine refuses: disk, permission, memory, a missing extra."""

    code = "environment"
    exit_code = 5


class BusyError(RegraftError):
    """Another process is at work on the Run."""

    code = "busy"
    exit_code = 6


class NumericError(RegraftError):
    """Training diverged or never started to learn."""

    code = "numeric"
    exit_code = 7


def readable(text: str) -> str:
    """Returns text in which control, bidi and undecodable characters are spelled as `\\u202e`."""
    return text if text.isascii() and text.isprintable() else "".join(map(_spelled, text))


def spelled(text: str) -> str:
    """Returns the lines of a text, each `readable`: a name may not move the cursor."""
    return "\n".join(map(readable, text.split("\n")))


def _spelled(character: str) -> str:
    # The two joiners shape letters and emoji; all others of these categories are invisible.
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    if not hidden or character in "\u200c\u200d":
        return character
    code = ord(character)
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def shorten(items: Iterable[str], most: int = 3) -> str:
    """Returns at most `most` items in backticks, and how many more there are."""
    names = list(items)
    shown = ", ".join(f"`{readable(name)}`" for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def count(number: int, noun: str, plural: str | None = None) -> str:
    """Returns `1 image`, `2 images`, `2 classes`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
