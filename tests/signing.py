"""A manifest for files as they are: of those who change a folder and know how it is signed."""

from collections.abc import Iterable
from pathlib import Path

from regraft.documents import sha256_of_file
from regraft.manifests import MANIFEST, Entry, Manifest


def sign(folder: Path, names: Iterable[str] | None = None) -> None:
    """Lets the manifest vouch for these files, or for all."""
    if names is None:
        names = sorted(path.name for path in folder.iterdir() if path.is_file())
    entries = {
        name: Entry((folder / name).stat().st_size, sha256_of_file(folder / name))
        for name in names
        if name != MANIFEST
    }
    (folder / MANIFEST).write_bytes(Manifest(folder, entries).content())
