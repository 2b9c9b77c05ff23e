"""Finding: one kind of thing that a check has found, with a stable code."""

from dataclasses import dataclass, field
from typing import Any, Protocol

ERROR, WARNING, NOTE = "error", "warning", "note"
MOST_EXAMPLES = 10  # of a finding in JSON; every file is listed beside them


class _Named(Protocol):
    place: int
    path: str
    content: bytes


@dataclass(frozen=True)
class FileRef:
    """A file of one of the datasets: which, where below its root, and its content hash."""

    place: int
    path: str
    sha256: str

    @classmethod
    def to(cls, picture: _Named) -> "FileRef":
        return cls(picture.place, picture.path, picture.content.hex())


@dataclass(frozen=True)
class Finding:
    """What was found.

    Attributes:
        code: Stable: `--allow` and `--exclude-from` name findings by it.
        severity: error, warning or note.
        count: How many images, groups or classes it is about.
        told: One sentence for people.
        advice: What to do.
        examples: One line each.
        files: What leaving the finding out would leave out.
        pairs: Files to look at side by side.
        numbers: More figures, for programs.
        allowed: The user accepts it.
    """

    code: str
    severity: str
    count: int
    told: str
    advice: str
    examples: tuple[str, ...] = ()
    files: tuple[FileRef, ...] = ()
    pairs: tuple[tuple[FileRef, FileRef], ...] = ()
    numbers: dict[str, float] = field(default_factory=dict)
    allowed: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {
            "code": self.code,
            "severity": self.severity,
            "count": self.count,
            "message": self.told,
            "advice": self.advice,
            "allowed": self.allowed,
            "examples": list(self.examples[:MOST_EXAMPLES]),
            "numbers": self.numbers,
            "files": [
                {"data": one.place, "path": one.path, "sha256": one.sha256} for one in self.files
            ],
        }
