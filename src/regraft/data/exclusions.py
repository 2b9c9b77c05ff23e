"""Files that an earlier check has found, to be left out: `--exclude-from check.json`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.documents import read_json
from regraft.errors import ArtefactError, UsageError, shorten


@dataclass(frozen=True)
class Exclusions:
    """Paths with the content they had when they were checked, and the code they were found by."""

    codes: Mapping[tuple[str, str], str]

    @classmethod
    def read(cls, source: str | None) -> "Exclusions":
        """Reads the JSON of a check.

        Args:
            source: `check.json`, or `check.json:leak,copies` for those findings alone.

        Raises:
            UsageError: A code was not found in it.
            ArtefactError: The file is missing, or none of a check.
        """
        if source is None:
            return cls({})
        name, _, chosen = source.rpartition(":")
        if not name or Path(source).exists():
            name, chosen = source, ""
        document = read_json(Path(name))
        try:
            found = {one["code"]: one["files"] for one in document["findings"]}
            wanted = [code.strip() for code in chosen.split(",") if code.strip()] or list(found)
            if unknown := [code for code in wanted if code not in found]:
                raise UsageError(
                    f"`{name}` has no finding {shorten(unknown)}; it has {shorten(found, 20)}",
                    hint="name codes of findings, or none for all",
                )
            return cls(
                {(file["path"], file["sha256"]): code for code in wanted for file in found[code]}
            )
        except (KeyError, TypeError) as error:
            raise ArtefactError(
                f"`{name}` is no check of this version: {error!r}",
                hint="make one with `regraft check DATA --json > check.json`",
            ) from error

    def reason(self, path: str, sha256: str) -> str | None:
        """Returns why a file is left out; None where it stays.

        A file that could not even be read then has no hash to compare.
        """
        code = self.codes.get((path, sha256)) or self.codes.get((path, ""))
        return None if code is None else f"found by a check: {code}"

    def __bool__(self) -> bool:
        return bool(self.codes)


def excluded_name(source: str | None) -> Any:
    """Returns the source without the folder it lies in: Runs keep no places."""
    return None if source is None else Path(source).name
