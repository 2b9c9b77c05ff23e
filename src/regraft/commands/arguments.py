"""Arguments that several commands share: how data is read, and what a training takes."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from regraft.errors import UsageError
from regraft.training.tracking import Tracker

if TYPE_CHECKING:
    from regraft.data.dataset import DataOptions, Dataset
    from regraft.engine import Engine
    from regraft.training.recipe import Recipe

DATA = Group("Data", sort_key=1)
TRAINING = Group("Training", sort_key=2)
INTENSITY = Parameter(group=DATA, allow_leading_hyphen=True)  # a range may begin below zero
Flag = Annotated[bool, Parameter(negative="")]
Json = Annotated[bool, Parameter(name="--json", negative="")]
Many = Annotated[tuple[str, ...], Parameter(negative="", show_default=False)]
"""May be repeated."""
Track = Annotated[Tracker | None, Parameter(group=TRAINING)]
DEFAULT_STRATEGY = "auto"  # as of Recipe.transfer; measured against fixed rules: docs/quality.md


@Parameter(name="*")
@dataclass(frozen=True)
class DataArguments:
    """The same wherever DATA stands."""

    csv: Annotated[Path | None, Parameter(group=DATA)] = None
    """A CSV, TSV or JSON Lines file that names images (relative to DATA) and labels, instead of
    class folders."""
    image_column: Annotated[str, Parameter(group=DATA)] = "image"
    """Column of image paths."""
    label_column: Annotated[str, Parameter(group=DATA)] = "label"
    """Column of class names."""
    group_column: Annotated[str | None, Parameter(group=DATA)] = None
    """Column of groups (patients); a group is never divided between splits."""
    split_column: Annotated[str | None, Parameter(group=DATA)] = None
    """Column of splits: train, val, test."""
    group_regex: Annotated[str | None, Parameter(group=DATA)] = None
    """Groups from file names: the first parenthesis, as in `^([^_]+)_`."""
    group_by: Annotated[str | None, Parameter(group=DATA)] = None
    """patient: those whom DICOM files name are groups, under pseudonyms."""
    intensity_range: Annotated[str | None, INTENSITY] = None
    """The values that are black and white, as 0,4095 or -1024,3071; needed for floats and where
    bit depths are mixed."""
    frames: Annotated[str, Parameter(group=DATA)] = "first"
    """Of several frames or pages the first is read, and that is said; or fail."""
    relabel: Annotated[tuple[str, ...], Parameter(group=DATA, negative="", show_default=False)] = ()
    """New classes from old ones: even=0,2,4,6,8 (once for each class)."""
    per_class: Annotated[int | None, Parameter(group=DATA)] = None
    """At most this many training and this many validation images of a class."""
    allow: Annotated[tuple[str, ...], Parameter(group=DATA, negative="", show_default=False)] = ()
    """Findings to accept: `unreadable` leaves broken files out, `leak` copies and seen images;
    also two-labels, group-leak, spelling."""
    exclude_from: Annotated[str | None, Parameter(group=DATA)] = None
    """check.json of `regraft check --json`: the files it found are left out; check.json:leak,copies
    for some findings only."""

    def options(self) -> "DataOptions":
        from regraft.data.dataset import DataOptions

        given = vars(self) | {"intensity_range": parse_range(self.intensity_range)}
        return DataOptions(**given)

    def options_as_in(self, run: Path) -> "DataOptions":
        """Returns the options, with the classes and findings of a Run where none are given."""
        from regraft.run import Run

        options, kept = self.options(), Run.open(run).record["data"]["options"]
        return replace(
            options,
            relabel=options.relabel or tuple(kept["relabel"]),
            allow=options.allow or tuple(kept["allow"]),
        )

    def open(self, data: Path, told: Callable[[Any], None]) -> "Dataset":
        from regraft.data.dataset import Dataset
        from regraft.progress import Note

        told(Note(f"data: reading `{data}`"))
        return Dataset.open(data, self.options())


@Parameter(name="*")
@dataclass(frozen=True)
class TrainingArguments:
    """What a training takes; every other choice is a key of the recipe."""

    recipe: Annotated[Path | None, Parameter(group=TRAINING)] = None
    """A recipe file (see `regraft recipe`)."""
    set: Annotated[tuple[str, ...], Parameter(group=TRAINING, negative="", show_default=False)] = ()
    """A recipe key, as key=value; may be repeated."""
    epochs: Annotated[int | None, Parameter(group=TRAINING)] = None
    """Passes over the training images."""
    lr: Annotated[float | None, Parameter(group=TRAINING)] = None
    """Peak learning rate."""
    batch_size: Annotated[int | None, Parameter(group=TRAINING)] = None
    """Images in one step."""
    image_size: Annotated[int | None, Parameter(group=TRAINING)] = None
    """Side of the square input in pixels."""
    augment: Annotated[str | None, Parameter(group=TRAINING)] = None
    """none, gentle, medical, natural or trivial."""
    seed: Annotated[int | None, Parameter(group=TRAINING)] = None
    """Of weights, order and augmentation."""
    time_budget: Annotated[str | None, Parameter(group=TRAINING)] = None
    """Time for a search and its training, as 90s, 20m or 2h; default: about 1h at most."""
    device: Annotated[str, Parameter(group=TRAINING)] = "auto"
    """auto, cpu, cuda, cuda:0 or mps."""
    compile: Annotated[bool, Parameter(group=TRAINING, negative="")] = False
    """Compile the network first: minutes at the start, faster steps on a GPU."""

    def settled(self, default: "Recipe") -> "Recipe":
        from regraft.training.recipe import Recipe
        from regraft.training.settings import parse_assignments

        chosen = default if self.recipe is None else Recipe.from_toml(self.recipe)
        own = {name: getattr(self, name) for name in ("epochs", "lr", "batch_size", "seed")}
        own |= {"image_size": self.image_size, "augment": self.augment}
        own["time_budget"] = None if self.time_budget is None else parse_seconds(self.time_budget)
        changes = {key: value for key, value in own.items() if value is not None}
        return chosen.changed(parse_assignments(self.set) | changes)

    def transfer(self, strategy: str | None) -> "Recipe":
        """Returns the recipe of a fine-tuning."""
        from regraft.training.recipe import Recipe

        if strategy is not None and self.recipe is not None:
            raise UsageError(
                "`--strategy` and `--recipe` both say what learns", hint="give one of them"
            )
        return self.settled(Recipe.transfer(strategy or DEFAULT_STRATEGY))

    def engine(self) -> "Engine":
        from regraft.engine import Engine

        return Engine(self.device, compiles=self.compile)


def parse_seconds(text: str) -> float:
    """Reads `90s`, `20m`, `2h` or plain seconds.

    Raises:
        UsageError: It is no such time.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if found is None or not float(found[1]):
        raise UsageError(f"`--time-budget {text}` is no time", hint="write 90s, 20m or 2h")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def parse_range(text: str | None) -> tuple[float, float] | None:
    """Reads `0,4095` or `-1024,3071`.

    Raises:
        UsageError: It is no such range.
    """
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(
            f"`--intensity-range {text}` is no range",
            hint="write the values that are black and white: `--intensity-range 0,4095`",
        ) from error
    return low, high


def parse_shares(text: str) -> tuple[float, ...]:
    """Reads `0.1,0.25,1`."""
    return parse_numbers("fractions", text, "shares", "0.1,0.5,1")


def parse_numbers(
    option: str, text: str, what: str = "numbers", example: str = "0.5,0.5,0.5"
) -> tuple[float, ...]:
    """Reads numbers with commas between.

    Raises:
        UsageError: Something is none.
    """
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise UsageError(
            f"`--{option} {text}` is no list of {what}", hint=f"write `--{option} {example}`"
        ) from error


def required_start(start: Path | None, strategy: str | None) -> Path:
    """Returns the start; without one a frozen backbone would be a random one.

    Raises:
        UsageError: There is none.
    """
    if start is not None:
        return start
    strategy = strategy or DEFAULT_STRATEGY
    frozen = (
        ""
        if strategy in ("full", "auto")
        else (
            f": `--strategy {strategy}` would train a head on a frozen random backbone, which has "
            "learned nothing and never will"
        )
    )
    raise UsageError(
        f"there is no `--start` to carry over{frozen}",
        hint="give the Run to start from with `--start RUN`, or train from random weights with "
        "`regraft pretrain`",
    )
