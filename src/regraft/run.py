"""Run: one training on disk. Reads and writes the folder; computes nothing, needs no torch."""

import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError, model_validator

from regraft.changing import append_json_line, read_log, replace_files
from regraft.documents import (
    json_content,
    json_lines_content,
    parse_json_lines,
    read_sealed,
    sha256_of,
)
from regraft.errors import ArtefactError, UsageError, shorten
from regraft.manifests import MANIFEST, read_document, read_verified
from regraft.storage import Content, Store, make_folder, remove_file, remove_folder

SCHEMA = 1
UNBORN = {
    "lock", "manifest.json", "samples.jsonl", "lineage.jsonl", "status.json", "plan.json", "state",
    ".place.json",
}  # fmt: skip
"""What a folder holds in which a Run was about to begin: its run.json is written last."""
CUT_BACK = ("metrics.jsonl", "times.jsonl", "trials.jsonl")
"""Logs that a resume shortens to what its state knew."""
LOGS = (*CUT_BACK, "resumes.jsonl")
PLACE = ".place.json"
FINISHED, INTERRUPTED, RUNNING, FAILED = "finished", "interrupted", "running", "failed"


class _Options(BaseModel):
    relabel: list[str]
    allow: list[str]


class _Data(BaseModel):
    name: str
    fingerprint: str
    class_names: list[str]
    options: _Options


class _RunFile(BaseModel):
    """What this version reads of run.json; the rest is for people."""

    id: str
    verb: str
    arch: str
    recipe: dict[str, Any]
    data: _Data


class _Line(BaseModel):
    """A line of samples.jsonl or lineage.jsonl."""

    sha256: str = ""
    split: Literal["train", "val", "test"] | None = None

    @model_validator(mode="after")
    def _whole(self) -> "_Line":
        if bool(self.sha256) != bool(self.split):
            raise ValueError("a hash and a split belong together")
        return self


@dataclass(frozen=True)
class Run:
    """The folder of one training.

    `run.json` (what was asked and decided), `samples.jsonl` (every image with its content hash and
    split, or why it was left out), `metrics.jsonl` (one line for each epoch), `times.jsonl`,
    `status.json`, `final/` (the Classifier), and what `evaluate` and `report` add.
    """

    folder: Path

    @classmethod
    def create(
        cls,
        folder: Path,
        record: Mapping[str, Any],
        samples: Iterable[Mapping[str, Any]],
        seen: Iterable[Mapping[str, Any]],
        plan: Mapping[str, Any] | None = None,
    ) -> "Run":
        """Starts a new Run.

        Args:
            folder: New or empty.
            record: For run.json.
            samples: For samples.jsonl.
            seen: Content hash and split of every image behind the weights it starts from.
            plan: Of an earlier search, to repeat.

        Raises:
            UsageError: Something is there already.
        """
        refuse_existing(folder)
        document = {"schema": SCHEMA, **record, "versions": versions()}
        document["id"] = sha256_of(document)[:16]
        make_folder(folder)
        contents = {
            "samples.jsonl": json_lines_content(samples),
            "lineage.jsonl": json_lines_content(seen),
            "status.json": json_content({"state": RUNNING}),
            **({} if plan is None else {"plan.json": json_content(plan)}),
            "run.json": json_content(document),  # the last: with it the folder is a Run
        }
        remove_file(folder / MANIFEST)  # of one that was killed before it was a Run
        replace_files(folder, contents)
        return cls(folder)

    @classmethod
    def open(cls, folder: str | Path) -> "Run":
        """Opens a Run for reading.

        Raises:
            ArtefactError: It is no Run, or of a schema that this version does not read.
        """
        folder = Path(folder)
        if not (folder / "run.json").is_file():
            known = "is no run of regraft" if folder.exists() else "does not exist"
            raise ArtefactError(
                f"`{folder}` {known}",
                hint="name a folder that `regraft pretrain` or `regraft finetune` has written",
            )
        run = cls(folder)
        record: Any = run.record
        schema = record.get("schema") if isinstance(record, dict) else None
        if schema != SCHEMA:
            raise ArtefactError(
                f"`{folder}` has schema {schema}; this version reads {SCHEMA}",
                hint="use the regraft version that wrote it",
            )
        try:
            _RunFile.model_validate(record)
        except ValidationError as error:
            places = {".".join(map(str, entry["loc"])) for entry in error.errors()}
            raise ArtefactError(
                f"`{folder / 'run.json'}` was changed: {shorten(sorted(places))} does not fit",
                hint="restore the file from a copy",
            ) from error
        return run

    @cached_property
    def record(self) -> dict[str, Any]:
        """What `run.json` holds: verb, recipe, data, inputs, start, transplant, engine."""
        return self._document("run.json")

    @property
    def status(self) -> dict[str, Any]:
        """`state`, `best_epoch`, and why it ended."""
        return self._document("status.json")

    def set_status(self, state: str, **details: Any) -> None:
        """Writes how it stands; the manifest vouches for the logs as they are now."""
        status = {"status.json": json_content({"state": state, **details})}
        replace_files(self.folder, status, LOGS, grow=state != FINISHED)

    def _document(self, name: str) -> dict[str, Any]:
        return read_document(self.folder, name)  # type: ignore[no-any-return]

    def _document_if_there(self, name: str) -> dict[str, Any] | None:
        return self._document(name) if (self.folder / name).is_file() else None

    def samples(self) -> Iterator[dict[str, Any]]:
        """Every image of the dataset: path, sha256, class, split, group; or path and `excluded`.

        Raises:
            ArtefactError: The file is missing, or not the one that was saved.
        """
        return self._lines("samples.jsonl")

    def seen(self) -> dict[str, str]:
        """Content hash to split, of the images of this Run's dataset and of all it started from.

        An image that any training or validation of the lineage has seen is `train` or `val`, even
        if it is a test image here.
        """
        own = (sample for sample in self.samples() if "sha256" in sample)
        rank = {"test": 0, "val": 1, "train": 2}
        seen: dict[str, str] = {}
        for sample in chain(own, self._lines("lineage.jsonl")):
            before = seen.get(sample["sha256"], "test")
            seen[sample["sha256"]] = max(before, sample["split"], key=rank.__getitem__)
        return seen

    def hashes(self) -> dict[str, str]:
        """Content hash to perceptual hash, of the same images where it is known."""
        lines = chain(self.samples(), self._lines("lineage.jsonl"))
        return {one["sha256"]: one["phash"] for one in lines if one.get("phash")}

    def _lines(self, name: str) -> Iterator[dict[str, Any]]:
        # Without its record of images a Run would take any image for an unseen one.
        if not (self.folder / name).is_file():
            raise ArtefactError(
                f"`{self.folder / name}` is missing", hint="restore the folder from a copy"
            )
        lines = parse_json_lines(read_verified(self.folder, name), self.folder / name)
        for number, line in enumerate(lines, start=1):
            try:
                _Line.model_validate(line)
            except ValidationError as error:
                raise ArtefactError(
                    f"`{self.folder / name}` line {number} is no record of an image",
                    hint="restore the file from a copy",
                ) from error
            yield line

    def append_epoch(self, epoch: Mapping[str, Any], times: Mapping[str, Any]) -> None:
        append_json_line(self.folder / "metrics.jsonl", epoch)
        append_json_line(self.folder / "times.jsonl", times)

    def append_trial(self, trial: Mapping[str, Any], times: Mapping[str, Any]) -> None:
        append_json_line(self.folder / "trials.jsonl", trial)
        append_json_line(self.folder / "times.jsonl", times)

    def trials(self) -> list[dict[str, Any]]:
        """What a search has tried."""
        return read_log(self.folder / "trials.jsonl")

    def plan(self) -> dict[str, Any] | None:
        """What a search had planned; None where nothing was searched for."""
        return self._document_if_there("plan.json")

    def winner(self) -> dict[str, Any] | None:
        """The plan of the winner of a search; None before it is known."""
        return self._document_if_there("winner.json")

    def evaluation(self) -> dict[str, Any] | None:
        """What `evaluate` has found; None before it was called."""
        return self._document_if_there("evaluation.json")

    @property
    def seconds(self) -> float | None:
        """How long the training has taken."""
        times = read_log(self.folder / "times.jsonl")
        return times[-1]["elapsed_s"] if times else None

    def write(self, name: str, document: Mapping[str, Any]) -> None:
        self.write_files({name: json_content(document)})

    def write_files(self, contents: Mapping[str, Content]) -> None:
        """Commits files; the manifest of the Run vouches for them."""
        replace_files(self.folder, contents)

    @property
    def place(self) -> dict[str, Any]:
        """Where the data lies and how it is read: of this machine, and in no other file."""
        path = self.folder / PLACE
        return read_sealed(path) if path.is_file() else {}

    def log_resume(self, record: Mapping[str, Any]) -> None:
        append_json_line(self.folder / "resumes.jsonl", record)

    def resumes(self) -> list[dict[str, Any]]:
        """When it was gone on with, and under which other conditions."""
        return read_log(self.folder / "resumes.jsonl")

    @property
    def best(self) -> Store:
        """Classifiers of a training that has not finished, the newest the best so far."""
        return Store(self.folder / "best", "best")

    @property
    def states(self) -> Store:
        """What a resume needs, by step."""
        return Store(self.folder / "state", "state")

    def keep_best(self, contents: Mapping[str, Content]) -> None:
        """Commits the files of a classifier, the best so far."""
        make_folder(self.best.folder)
        self.best.commit(max(self.best.numbers(), default=0) + 1, contents)
        self.best.prune(keep=1)

    def drop_states(self) -> None:
        """Removes what `final` has made superfluous."""
        remove_folder(self.best.folder)
        remove_folder(self.states.folder)

    def epochs(self) -> list[dict[str, Any]]:
        return read_log(self.folder / "metrics.jsonl")

    @property
    def final(self) -> Path:
        return self.folder / "final"

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.record["data"]["class_names"])


def refuse_existing(folder: Path) -> None:
    """Refuses to write over anything.

    Raises:
        UsageError: `folder` is a file, or a folder that holds more than a Run that was killed
            before it was one.
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if folder.is_file() or any(name not in UNBORN and not _is_leftover(name) for name in names):
        raise UsageError(
            f"`{folder}` exists already", hint="choose another `--out`; nothing is overwritten"
        )


def _is_leftover(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")


def refuse_inside(folder: Path, data: Path) -> None:
    """Refuses to write into a user's data.

    Raises:
        UsageError: `folder` lies in `data`.
    """
    if folder.resolve().is_relative_to(data.resolve()):
        raise UsageError(
            f"`{folder}` lies inside the data folder `{data}`, which is never written to",
            hint="choose an `--out` elsewhere",
        )


def elsewhere(lineage: Iterable[Mapping[str, Any]]) -> list[str]:
    """Returns where weights came from that no training of regraft made; empty for none."""
    imports = [record for record in lineage if record.get("verb") == "import"]
    return [f"{record.get('source')} ({record.get('file')})" for record in imports]


def versions() -> dict[str, str]:
    """Returns the versions that a result depends on."""
    packages = ("regraft", "torch", "timm", "numpy", "scipy", "scikit-learn", "pillow")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}
