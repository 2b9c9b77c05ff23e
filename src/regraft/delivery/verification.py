"""Verification: is every file what was saved, and where do the weights come from?"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regraft.documents import sha256_of
from regraft.errors import ArtefactError, count, readable, shorten
from regraft.manifests import MANIFEST, Manifest, verify_manifest
from regraft.models.architectures import is_own
from regraft.models.classifier import (
    MODEL,
    Classifier,
    final_folder,
    read_description,
    read_weights,
)
from regraft.run import FINISHED, PLACE, Run, elsewhere

OWN = {"lock", MANIFEST, "best", "state", "final", "mistakes"}
"""What no manifest of a Run lists: the lock, itself, and folders with manifests of their own."""


@dataclass
class Verification:
    """What was found.

    Attributes:
        files: How many were verified, each by size and sha256.
        problems: What is wrong.
        strangers: Files that nothing vouches for; regraft never reads them.
        lineage: One record for each training behind the weights, the oldest first.
    """

    folder: Path
    files: int = 0
    size_bytes: int = 0
    problems: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)
    lineage: list[Mapping[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "verified": not self.problems,
            "files": self.files,
            "bytes": self.size_bytes,
            "not_vouched_for": self.strangers,
            "lineage": [dict(record) for record in self.lineage],
            "weights_from_elsewhere": elsewhere(self.lineage),
        }

    def take(self, manifest: Manifest) -> None:
        self.files += 1 + len(manifest.entries)
        self.size_bytes += sum(entry.size for entry in manifest.entries.values())

    def at(self, folder: Path, error: ArtefactError) -> None:
        """Notes what is wrong in a folder."""
        inner = folder.relative_to(self.folder).as_posix()
        where = "" if inner == "." else f"{inner}: "
        self.problems += [f"{where}{problem}" for problem in error.problems or (error.message,)]


def verify(folder: Path) -> Verification:
    """Checks a Run, a comparison or a classifier folder: every file, and that they fit together.

    Raises:
        ArtefactError: Something is not what was saved.
    """
    found = Verification(folder)
    if (folder / "comparison.json").is_file():
        _check_listed(
            found, folder, OWN | {path.name for path in folder.iterdir() if path.is_dir()}
        )
        for run in sorted(path.parent for path in folder.glob("*/run.json")):
            _check_run(found, run)
    elif (folder / "run.json").is_file():
        _check_run(found, folder)
    else:
        _check_classifier(found, final_folder(folder))
    if found.problems:
        raise ArtefactError(
            f"`{folder}` is damaged or was changed: {count(len(found.problems), 'problem')}",
            problems=found.problems,
            hint="restore the folder from a copy, or train again",
        )
    return found


def _check_run(found: Verification, folder: Path) -> None:
    _check_listed(found, folder, OWN)
    for inner in _inner_folders(folder):
        try:
            found.take(verify_manifest(inner))
        except ArtefactError as error:
            found.at(inner, error)
    try:
        run = Run.open(folder)
        run.seen()
        document = {key: value for key, value in run.record.items() if key != "id"}
        if sha256_of(document)[:16] != run.record["id"]:
            found.problems.append("`run.json` is not the record that its id was made of")
        if run.status["state"] == FINISHED or run.best.numbers():
            _check_classifier(found, final_folder(folder), run)
    except ArtefactError as error:
        found.at(folder, error)


def _inner_folders(folder: Path) -> Iterator[Path]:
    if (folder / "mistakes").exists():
        yield folder / "mistakes"
    for store in (Run(folder).best, Run(folder).states):
        yield from (store.path(number) for number in store.numbers())


def _check_listed(found: Verification, folder: Path, others: set[str]) -> None:
    try:
        manifest = Manifest.open(folder)
        while problems := manifest.problems():
            if manifest == (manifest := Manifest.open(folder)):  # nobody changes it meanwhile
                found.at(folder, ArtefactError("damaged", problems=problems, hint="-"))
                break
        found.take(manifest)
        found.files += (folder / PLACE).is_file()
        _ = Run(folder).place  # vouches for itself
        found.strangers += [name for name in manifest.strangers() if name not in others]
    except ArtefactError as error:
        found.at(folder, error)


def _check_classifier(found: Verification, folder: Path, run: Run | None = None) -> None:
    try:
        manifest = verify_manifest(folder)
        description = read_description(manifest)
        read_weights(manifest)
    except ArtefactError as error:
        found.at(folder, error)
        return
    if folder.parent.name != "best":  # counted there
        found.take(manifest)
    lineage = description.lineage
    found.lineage = list(lineage)
    if not found.problems and not is_own(description.arch):  # own code is never run unasked
        try:
            Classifier.load(folder, needs_head=False)
        except ArtefactError as error:
            found.at(folder, error)
    if run is None:
        return
    own: Mapping[str, Any] = lineage[-1] if lineage else {}
    expected = {"run": run.record["id"], "data": run.record["data"]["fingerprint"]}
    if {key: own.get(key) for key in expected} != expected:
        found.problems.append(f"`{MODEL}` is not that of this run: its lineage ends elsewhere")
    if list(run.class_names) != description.class_names:
        found.problems.append(f"`{MODEL}` has other classes than `run.json`")


def told(document: Mapping[str, Any]) -> str:
    """Returns what was verified and the lineage, for people."""
    lines = [
        f"{count(document['files'], 'file')} verified by sha256 "
        f"({document['bytes'] / 1e6:,.1f} MB): all as they were saved"
    ]
    if document["not_vouched_for"]:
        lines.append(f"not of this run, and never read: {shorten(document['not_vouched_for'])}")
    for record in document["lineage"]:
        if record.get("verb") == "import":
            lines.append(f"file {record.get('file')} -> import")
            continue
        source = f"data {record.get('data', 'not told')}"
        if "train_images" in record:
            source += f" ({count(record['train_images'], 'training image')})"
        lines.append(f"{source} -> {record.get('verb')} -> run {record.get('run')}")
    imports = "; ".join(document["weights_from_elsewhere"])
    lines.append(f"weights from elsewhere: {imports or 'none'}")
    return "\n".join(readable(line) for line in lines)
