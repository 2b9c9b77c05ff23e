"""A comparison on disk: what was asked of it, and the arms that are done, to go on with."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from regraft.changing import replace_files
from regraft.documents import (
    json_content,
    json_lines_content,
    parse_json,
    sealed_content,
    sha256_of_file,
)
from regraft.engine import Engine
from regraft.errors import ArtefactError, UsageError
from regraft.evaluation.metrics import METRICS
from regraft.evaluation.predictions import Predictions
from regraft.evaluation.testing import labelled, tabulate
from regraft.manifests import read_verified, verify_manifest
from regraft.models.classifier import WEIGHTS, final_folder
from regraft.progress import Note
from regraft.run import PLACE, Run
from regraft.storage import Content, Store, make_folder, write_file
from regraft.tensors import MOST_BYTES, packed, unpacked
from regraft.training.contract import contract, place, refuse_other_conditions, same_data
from regraft.training.plan import Plan
from regraft.training.recipe import Recipe
from regraft.training.resuming import Resumption
from regraft.training.session import Session
from regraft.training.start import Start

ASKED = "asked.json"
RESULT = ("comparison.json", "report.html")
VALUES, TENSORS = "done.json", "done.safetensors"


class Asked(BaseModel):
    """What a comparison is to find out; see `api.compare`."""

    model_config = ConfigDict(frozen=True)

    seeds: int
    metric: str
    fractions: tuple[float, ...]
    recipe: Recipe
    adapt: tuple[str, ...]

    def checked(self) -> "Asked":
        """Refuses what cannot be compared.

        Raises:
            UsageError: A number or name does not fit.
        """
        if self.metric not in METRICS or self.seeds < 1:
            raise UsageError(
                f"`--metric {self.metric}` over {self.seeds} seeds is not possible",
                hint=f"use at least 1 seed and one of {', '.join(METRICS)}",
            )
        if not all(0 < share <= 1 for share in self.fractions):
            given = ",".join(map(str, self.fractions))
            raise UsageError(
                f"`--fractions {given}` are no shares of the training images",
                hint="write for example `--fractions 0.1,0.25,0.5,1`",
            )
        return self

    @property
    def shares(self) -> list[float]:
        """All shares that are trained on; one where no curve was asked for."""
        return sorted({*self.fractions, 1.0})


def is_comparison(folder: Path) -> bool:
    return (folder / ASKED).is_file()


def is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in RESULT)


def begin(folder: Path, asked: Asked, session: Session, begun: Start) -> None:
    """Writes what was asked, once: with it the folder is a comparison that can be gone on with."""
    if is_comparison(folder) or not session.engine.is_main:
        return
    samples = [labelled(sample) for sample in session.dataset.samples]
    samples += [{"path": path, "excluded": why} for path, why in session.dataset.excluded]
    document = {
        "schema": 1,
        "verb": "compare",
        "asked": asked.model_dump(mode="json"),
        "start": _sha256(begun),
        "engine": session.engine.describe(),
        "contract": contract(session.engine),
    }
    kept = place(session.dataset) | {"start": str(begun.folder.resolve())}
    write_file(folder / PLACE, sealed_content(kept))
    contents = {"samples.jsonl": json_lines_content(samples)}
    replace_files(folder, {**contents, ASKED: json_content(document)})


def asked_before(folder: Path) -> dict[str, Any]:
    """Returns what `begin` wrote.

    Raises:
        ArtefactError: It was changed.
    """
    document: dict[str, Any] = parse_json(read_verified(folder, ASKED), folder / ASKED)
    return document


def found_start(folder: Path, start: Path | None, asked: Asked, arch: str | None) -> Start:
    """Returns the start of a comparison, where it lay or now lies.

    Raises:
        ArtefactError: It is not there, or is another.
    """
    kept = Run(folder).place
    chosen = start or Path(kept.get("start", ""))
    if (not kept.get("start") and start is None) or not chosen.exists():
        raise ArtefactError(
            f"the start of `{folder}` is not where it was",
            hint=f"say where it lies: `regraft resume {folder} --start RUN`",
        )
    begun = Start.load(chosen, arch, asked.adapt)
    if _sha256(begun) != asked_before(folder)["start"]:
        raise ArtefactError(
            f"`{chosen}` is not the start of `{folder}`: it has other weights",
            hint=f"name the right one: `regraft resume {folder} --start RUN`",
        )
    return begun


def again(
    folder: Path, asked: Asked, begun: Start, how: Resumption, engine: Engine, told: Any
) -> tuple[Session, list[str]]:
    """Returns the session of a comparison once more, and which conditions differ.

    Raises:
        ArtefactError: They do, and may not.
        DataError: The images are others.
    """
    then = asked_before(folder)["contract"]
    different = refuse_other_conditions(then, engine, allow=how.allow_inexact, what=f"`{folder}`")
    kept = Run(folder)  # of which a comparison has these files
    dataset = same_data(kept.place, list(kept.samples()), how.data, str(folder))
    session = Session.prepare(dataset, begun.inputs(asked.recipe, dataset), engine, told)
    return session.pooled(asked.recipe), different


def _sha256(begun: Start) -> str:
    return sha256_of_file(final_folder(begun.folder) / WEIGHTS)


@dataclass(frozen=True)
class Done:
    """What one arm, or a probe, has found."""

    predictions: Predictions
    plan: Plan | None = None
    seconds: float | None = None


@dataclass
class Ledger:
    """The arms and probes that are done, in their order.

    Attributes:
        number: Of the one that was asked for last.
    """

    folder: Path
    session: Session
    number: int = 0

    def next(self, name: str) -> Done | None:
        """Returns what the next one has found, if it is done."""
        self.number += 1
        path = Store(self.folder, "state").path(self.number)
        if not path.is_dir():
            return None
        try:
            manifest = verify_manifest(path)
        except ArtefactError as error:
            self.session.on_progress(Note(f"warning: {name} is done again: {error.message}"))
            return None
        values = parse_json(manifest.read(VALUES), path / VALUES)
        found = unpacked(manifest.read(TENSORS, MOST_BYTES), path / TENSORS)["probabilities"]
        plan = None if values["plan"] is None else Plan.model_validate(values["plan"])
        blank = tabulate(np.zeros(found.shape, np.float32), self.session.dataset, self.rows)
        predictions = replace(blank, probabilities=found.numpy())
        return Done(predictions, plan, values["seconds"])

    def add(self, name: str, done: Done) -> None:
        """Commits what the one that was asked for last has found."""
        if not self.session.engine.is_main:
            return
        values = {
            "name": name,
            "plan": None if done.plan is None else done.plan.model_dump(mode="json"),
            "seconds": done.seconds,
        }
        tensors = {"probabilities": torch.from_numpy(done.predictions.probabilities)}
        make_folder(self.folder)
        contents: dict[str, Content] = {VALUES: json_content(values), TENSORS: packed(tensors)}
        Store(self.folder, "state").commit(self.number, contents)

    @property
    def rows(self) -> Any:
        return self.session.dataset.rows("test")
