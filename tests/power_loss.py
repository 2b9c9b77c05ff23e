"""A disk that loses power: which states may it be in, after what a writer did to it?

`Recorder` notes every operation of `regraft.disk`. The model is as pessimistic as POSIX allows:
until a file is synced, its new bytes may be there, in part, as zeros or not at all; until a folder
is synced, any number of the latest changes of its names may be missing; files and folders fare
independently of each other.
"""

import itertools
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from regraft import disk


@dataclass
class File:
    """Bytes on disk for sure, and as the system shows them."""

    synced: bytes = b""
    seen: bytes = b""

    def options(self) -> list[bytes]:
        """What may be left of it."""
        if self.synced == self.seen:
            return [self.seen]
        size = len(self.seen)
        start = next(
            (i for i, (a, b) in enumerate(zip(self.synced, self.seen, strict=False)) if a != b),
            min(len(self.synced), size),
        )
        kept, new = self.seen[:start], self.seen[start:]
        cuts = sorted({1, len(new) - 1, *(len(new) * part // 16 for part in range(17))})
        torn = [kept + new[:cut] for cut in cuts if 0 <= cut <= len(new)]
        zeros = [kept + bytes(cut) + new[cut:] for cut in (len(new) // 2, len(new))]
        return list(dict.fromkeys([self.synced, *torn, *zeros]))


@dataclass
class Folder:
    """Changes of names, and how many of them are on disk for sure."""

    changes: list[tuple[str, str, Any]] = field(default_factory=list)
    synced: int = 0

    def names(self, number: int | None = None) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for what, name, value in self.changes[:number]:
            if what == "link":
                found[name] = value
            elif what == "unlink":
                found.pop(name, None)
            elif name in found:  # a rename
                found[value] = found.pop(name)
        return found


class Recorder:
    """Follows what is done to the disk below a folder; `acknowledged` counts what was promised."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.top = Folder()
        self.nodes: dict[int, File] = {}
        self.acknowledged = 0
        self.on_change: Callable[[], None] = lambda: None
        for name in (
            "create", "open_log", "write", "sync", "sync_folder", "rename", "remove", "truncate",
            "make_folder", "make_one_folder", "remove_folder",
        ):  # fmt: skip
            patch.setattr(disk, name, self._wrapped(name, getattr(disk, name)))

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if name == "remove_folder" and arguments[0].is_dir():
                self._emptied(arguments[0])
            if name == "make_folder":  # it syncs by itself
                self._make_folder(*arguments)
                real(*arguments)
                return None
            result = real(*arguments)
            getattr(self, f"_{name}")(result, *arguments)
            self.on_change()
            return result

        return call

    def promise(self) -> None:
        self.acknowledged += 1
        self.on_change()

    # What each operation does to the model

    def _create(self, descriptor: int, path: Path) -> None:
        self.nodes[os.fstat(descriptor).st_ino] = node = File()
        self._folder(path.parent).changes.append(("link", path.name, node))

    def _open_log(self, descriptor: int, path: Path) -> None:
        if path.name not in self._folder(path.parent).names():
            self._create(descriptor, path)

    def _write(self, _: None, descriptor: int, _data: memoryview) -> None:
        self._look(descriptor)

    def _truncate(self, _: None, descriptor: int, _size: int) -> None:
        self._look(descriptor)

    def _look(self, descriptor: int) -> File:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        number = os.fstat(descriptor).st_ino
        names = self._folder(path.parent).names()
        if path.name not in names:  # written by others, as arrays are
            self.nodes[number] = File()
            self._folder(path.parent).changes.append(("link", path.name, self.nodes[number]))
        node = self.nodes[number]
        node.seen = path.read_bytes()
        return node

    def _sync(self, _: None, descriptor: int) -> None:
        node = self._look(descriptor)
        node.synced = node.seen

    def _sync_folder(self, _: None, path: Path) -> None:
        folder = self._folder(path)
        folder.synced = len(folder.changes)

    def _rename(self, _: None, source: Path, target: Path) -> None:
        self._folder(source.parent).changes.append(("rename", source.name, target.name))

    def _remove(self, _: None, path: Path) -> None:
        if path.name in self._folder(path.parent).names():
            self._folder(path.parent).changes.append(("unlink", path.name, None))

    def _make_folder(self, path: Path, _mode: int = 0) -> None:
        missing = []
        while path != self.root and path.name not in self._folder(path.parent).names():
            missing.append(path)
            path = path.parent
        for each in reversed(missing):
            self._make_one_folder(None, each)

    def _make_one_folder(self, _: None, path: Path) -> None:
        self._folder(path.parent).changes.append(("link", path.name, Folder()))

    def _emptied(self, path: Path) -> None:
        folder = self._folder(path)
        folder.changes += [("unlink", name, None) for name in folder.names()]

    def _remove_folder(self, _: None, path: Path) -> None:
        self._remove(None, path)

    def _folder(self, path: Path) -> Folder:
        folder = self.top
        for name in path.relative_to(self.root).parts:
            folder = folder.names()[name]
        return folder

    def states(self, most: int, generator: random.Random) -> Iterator[dict[str, Any]]:
        """Yields what the disk may hold if the power goes now: trees of names and bytes."""
        choices: list[tuple[Any, list[Any]]] = []
        _collect(self.top, choices)
        total = 1
        for _, options in choices:
            total *= len(options)
        if total <= most:
            picks: Any = itertools.product(*(options for _, options in choices))
        else:  # the two ends, and draws between them
            ends = [[options[0] for _, options in choices], [options[-1] for _, options in choices]]
            drawn = [[generator.choice(options) for _, options in choices] for _ in range(most)]
            picks = ends + drawn
        for pick in picks:
            chosen = {id(node): value for (node, _), value in zip(choices, pick, strict=True)}
            yield _tree(self.top, chosen)


def _collect(folder: Folder, choices: list[tuple[Any, list[Any]]]) -> None:
    numbers = list(range(folder.synced, len(folder.changes) + 1))
    choices.append((folder, numbers))
    seen = {id(v): v for number in numbers for v in folder.names(number).values()}
    for node in seen.values():
        if isinstance(node, Folder):
            _collect(node, choices)
        else:
            choices.append((node, node.options()))


def _tree(folder: Folder, chosen: dict[int, Any]) -> dict[str, Any]:
    return {
        name: _tree(node, chosen) if isinstance(node, Folder) else chosen[id(node)]
        for name, node in folder.names(chosen[id(folder)]).items()
    }


def lay_out(tree: dict[str, Any], folder: Path) -> None:
    """Writes a state into an empty folder."""
    folder.mkdir()
    for name, content in tree.items():
        if isinstance(content, dict):
            lay_out(content, folder / name)
        else:
            (folder / name).write_bytes(content)
