"""Recipe and Phase: every choice of a training, with where each number comes from.

A Recipe holds no data and no start. `"auto"` fields are settled once, by `resolved`, from the
backbone and the number of images; what they became is stored in the Run.
"""

import re
import tomllib
from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from regraft.errors import UsageError
from regraft.training.settings import refusal, toml

Auto = Literal["auto"]
SMOOTHING = 0.1  # where a search fine-tunes: arXiv:1512.00567; measured: docs/log.md 2026-11-25
STEPS_TO_LEARN = 500  # for fewer than 20,000 images: BiT-HyperRule, arXiv:1912.11370
SCRATCH_EPOCHS = 30  # assumed: the least that a completed cosine needs; `--epochs` for more
LEAST_EPOCHS, MOST_EPOCHS = 10, 250  # of a fine-tuning; assumed bounds around STEPS_TO_LEARN
MOST_BYTES = 1 << 20  # of a recipe file; assumed, a printed one has 5,000
CONTROL_EPOCHS = 120  # of scratch beside a head that is solved at once; assumed ample


class Phase(BaseModel):
    """A stretch of epochs with one set of learning parameters; everything else is frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    learns: str = Field(
        "all",
        description="what learns: `head`, `last:<n>` (head and last n stages) or `all`; "
        "the rest is frozen, BatchNorm statistics too. `head` is solved exactly, in one epoch",
    )
    epochs: int | Auto = Field(
        "auto", description="passes over the training images; the cosine is always completed"
    )
    lr: float | Auto = Field(
        "auto",
        description="peak learning rate of the head and the last stage. auto for scratch: "
        "0.1 * batch/128 with BatchNorm, 0.05 * batch/128 without (arXiv:1803.05407's VGG), "
        "0.001 * batch/128 for AdamW (assumed)",
    )
    lr_factor: float = Field(
        1.0, gt=0, description="on an automatic learning rate; one that is given stays"
    )
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="learning rate factor per stage below the last one"
    )
    head_factor: float = Field(
        1.0, gt=0, description="learning rate factor of the head over the last stage"
    )
    warmup: float = Field(
        0.05, ge=0, lt=1, description="share of the steps with a rising learning rate (assumed)"
    )
    batch_norm: Literal["auto", "train", "frozen", "adapt"] = Field(
        "auto",
        description="BatchNorm statistics: frozen as they are; adapt: measured again on the "
        "training images, then frozen; train: learning stages follow their batches. auto: train "
        "from scratch; frozen when fine-tuning fewer than 1,000 images or batches under 16 "
        "(assumed)",
    )

    @field_validator("learns")
    @classmethod
    def _known(cls, value: str) -> str:
        if value in ("head", "all") or re.fullmatch(r"last:[1-9]\d*", value):
            return value
        raise ValueError("expected `head`, `last:<n>` or `all`")

    @field_validator("epochs", "lr")
    @classmethod
    def _positive(cls, value: Any) -> Any:
        if value != "auto" and value <= 0:
            raise ValueError("expected a positive number or `auto`")
        return value

    @model_validator(mode="after")
    def _solved_at_once(self) -> "Phase":
        if self.learns == "head" and self.epochs not in ("auto", 1):
            raise ValueError("a head alone is solved in 1 epoch")
        return self

    def learns_stage(self, stage: int, num_stages: int) -> bool:
        """Whether a stage (0 is the stem) learns in this phase."""
        return self.learns == "all" or stage >= num_stages - self.num_last

    @property
    def num_last(self) -> int:
        """The n of `last:<n>`, else 0."""
        return int(self.learns[5:]) if self.learns.startswith("last:") else 0

    def num_frozen(self, num_stages: int) -> int:
        """Returns how many of the lowest stages are frozen."""
        return sum(not self.learns_stage(stage, num_stages) for stage in range(num_stages))


class Recipe(BaseModel):
    """Every choice of a training."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    goal: Literal["scratch", "transfer"] = Field(
        "scratch", description="whether the backbone starts at random or from another run"
    )
    seed: int = Field(
        0, ge=0, lt=2**63, strict=True, description="of weights, order and augmentation"
    )
    image_size: tuple[int, int] | Auto = Field(
        "auto", description="height and width in pixels; auto: 224, or the start's when fine-tuning"
    )
    channels: int | Auto = Field(
        "auto", description="of the network's input; auto: the images', or the start's"
    )
    batch_size: int | Auto = Field(
        "auto",
        description="auto: the power of two nearest to a twentieth of the images, 16 to 128 "
        "(128: arXiv:1803.05407; fewer for small data, so that an epoch has steps; assumed)",
    )
    augment: Literal["auto", "none", "gentle", "medical", "natural", "trivial"] = Field(
        "auto",
        description="gentle, or medical: small turns, shifts, zoom, contrast; natural: also flips "
        "and erasing; trivial: one strong transform an image (arXiv:2103.10158), for photographs. "
        "auto: natural for colour, gentle for grey",
    )
    optimizer: Literal["auto", "sgd", "adamw", "adam"] = Field(
        "auto", description="auto: sgd (Nesterov, momentum 0.9), adamw for networks with LayerNorm"
    )
    weight_decay: float | Auto = Field(
        "auto",
        description="not on biases and norms. auto: 5e-4 from scratch (arXiv:1803.05407), "
        "1e-4 fine-tuning (assumed), 0.05 for adamw",
    )
    clip_norm: float = Field(
        1.0, ge=0, description="largest gradient norm, 0: unlimited; VGG without BatchNorm needs it"
    )
    ema_decay: float = Field(
        0.999, ge=0, lt=1, description="of the averaged weights that are kept (arXiv:2411.18704)"
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of each label that all classes have alike. 0: smoothing harms features "
        "that are to be transferred (arXiv:2010.16402); 0.1 (arXiv:1512.00567) where a search "
        "fine-tunes: measured, docs/log.md 2026-11-25",
    )
    mixup: float = Field(
        0.0,
        ge=0,
        description="alpha of the Beta distribution by which images (or stored activations) and "
        "labels are mixed in pairs (arXiv:1710.09412, there 0.2); 0: not. Of one process only; a "
        "head alone is not mixed",
    )
    class_weights: Literal["none", "balanced"] = Field(
        "none",
        description="balanced: each class weighs the same in the loss, and in the validation loss "
        "that chooses the epoch",
    )
    stall_share: float = Field(
        0.25,
        gt=0,
        le=1,
        description="stop when the loss has not left the entropy of the labels after this share "
        "of a phase (and 100 steps); 1: never stop (measured: docs/log.md 2026-11-23)",
    )
    views: int = Field(
        4,
        ge=1,
        description="augmented views of each image where a part is frozen, used in turn: so many "
        "activations are stored (assumed)",
    )
    search: Literal["none", "auto"] = Field(
        "none",
        description="auto: rate and BatchNorm policy are chosen on held-out images; of the phases "
        "only `epochs` and a given `lr` count then. The test images have no part in it",
    )
    time_budget: float = Field(
        3600.0, gt=0, description="seconds of steps for a search and its training, about (assumed)"
    )
    train_share: float = Field(
        1.0, gt=0, le=1, description="share of the training images that is used, drawn by seed"
    )
    phases: tuple[Phase, ...] = Field((Phase(),), min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("image_size"), int):
            return value | {"image_size": (value["image_size"], value["image_size"])}
        return value

    @field_validator("weight_decay")
    @classmethod
    def _not_negative(cls, value: Any) -> Any:
        if value != "auto" and value < 0:
            raise ValueError("expected a number that is not negative, or `auto`")
        return value

    @field_validator("image_size", "batch_size", "channels")
    @classmethod
    def _positive(cls, value: Any) -> Any:
        sides = value if isinstance(value, tuple) else (value,)
        if value != "auto" and min(sides) < 1:
            raise ValueError("expected positive numbers or `auto`")
        return value

    @model_validator(mode="after")
    def _searchable(self) -> "Recipe":
        learns = [phase.learns for phase in self.phases]
        if self.search == "auto" and learns not in (["head", "all"], ["all"]):
            raise ValueError("a search chooses its own phases: set search = none to give others")
        return self

    @classmethod
    def scratch(cls) -> "Recipe":
        """The whole network from random weights; made for weights that will be transferred."""
        return cls()

    @classmethod
    def transfer(cls, strategy: str = "auto") -> "Recipe":
        """A transplanted backbone under a new head.

        Args:
            strategy: `head` (linear probe), `last:<n>` (then the last n stages too), `full`
                (everything at once), `lp-ft`: the head to convergence, then everything at a tenth
                of the scratch learning rate, falling per stage (arXiv:2202.10054); or `auto`: what
                held-out images like best.

        Raises:
            UsageError: The strategy is not known.
        """
        head = Phase(learns="head", epochs=1)
        decay = 0.7  # per stage; assumed
        if strategy == "head":
            phases: tuple[Phase, ...] = (head,)
        elif strategy == "full":
            phases = (Phase(learns="all"),)
        elif strategy in ("lp-ft", "auto"):
            phases = (head, Phase(learns="all", layer_decay=decay))
        elif re.fullmatch(r"last:[1-9]\d*", strategy):
            phases = (head, Phase(learns=strategy, layer_decay=decay))
        else:
            raise UsageError(
                f"`--strategy {strategy}` is not known",
                hint="use auto, head, last:<n>, lp-ft or full",
            )
        if strategy != "auto":
            return cls(goal="transfer", phases=phases)
        return cls(goal="transfer", phases=phases, search="auto", label_smoothing=SMOOTHING)

    def views_of(self, phase: Phase) -> int | None:
        """Returns how many augmented views of an image a phase uses in turn.

        0: the image as it is; None: a new view each epoch.
        """
        if phase.learns == "all":
            return None
        return 0 if self.augment == "none" else self.views

    @property
    def num_epochs(self) -> int:
        """Of the phases that iterate; a head is solved."""
        return sum(p.epochs for p in self.phases if p.epochs != "auto" and p.learns != "head")

    def as_scratch(self, epochs: int | None = None) -> "Recipe":
        """Returns the control of a comparison, from a resolved transfer recipe.

        Every stage learns, at the scratch learning rate with warm-up, on the same data, with the
        same augmentation, batches and input size, for twice the epochs: a network that starts at
        random needs more steps, and a control that is cut short would make "helped" cheap. Where
        the transfer is searched for, so is the control.

        Args:
            epochs: Of the transfer, where its phases do not say.
        """
        epochs = 2 * (epochs or self.num_epochs) or CONTROL_EPOCHS
        settled = {"goal": "scratch", "phases": (Phase(epochs=epochs),), "weight_decay": "auto"}
        # Three candidates on schedules twice as long: the clock must not cut them short.
        return self.changed(settled | {"time_budget": 4 * self.time_budget})

    def resolved(self, *, normalisation: str, num_images: int, is_grey: bool) -> "Recipe":
        """Returns the recipe with every `auto` settled; what a search decides stays open.

        Args:
            normalisation: `batch`, `other` or `none` (see `Backbone.normalisation`).
            num_images: Training images.
            is_grey: Whether the images have no colour.
        """
        batch = self.batch_size
        if batch == "auto":
            batch = next((size for size in (16, 32, 64) if num_images < 20 * size * 2**0.5), 128)
        optimizer = self.optimizer
        if optimizer == "auto":
            optimizer = "adamw" if normalisation == "other" else "sgd"
        decay = self.weight_decay
        if decay == "auto":
            by_goal = 5e-4 if self.goal == "scratch" else 1e-4
            decay = 0.05 if optimizer == "adamw" else by_goal
        augment = self.augment
        if augment == "auto":
            augment = "gentle" if is_grey else "natural"
        steps = ceil(num_images / int(batch))
        phases = (
            self.phases
            if self.search == "auto"
            else tuple(
                self._resolved_phase(phase, normalisation, optimizer, int(batch), steps, num_images)
                for phase in self.phases
            )
        )
        changes = {"batch_size": batch, "optimizer": optimizer, "weight_decay": decay}
        return self.changed(changes | {"augment": augment, "phases": phases})

    def _resolved_phase(
        self, phase: Phase, normalisation: str, optimizer: str, batch: int, steps: int, images: int
    ) -> Phase:
        epochs: int | Auto = 1 if phase.learns == "head" else phase.epochs
        if epochs == "auto" and self.goal == "scratch":
            epochs = SCRATCH_EPOCHS
        elif epochs == "auto":
            epochs = min(MOST_EPOCHS, max(LEAST_EPOCHS, -(-STEPS_TO_LEARN // steps)))
        lr: float | Auto = phase.lr
        if lr == "auto":
            per_128 = {"sgd": 0.1 if normalisation == "batch" else 0.05}.get(optimizer, 0.001)
            lr = per_128 * batch / 128 * (1.0 if self.goal == "scratch" else 0.1)
            lr *= phase.lr_factor
        batch_norm = phase.batch_norm
        if batch_norm == "auto":
            small = images < 1000 or batch < 16
            batch_norm = "frozen" if self.goal == "transfer" and small else "train"
        settled = {"epochs": epochs, "lr": lr, "lr_factor": 1.0, "batch_norm": batch_norm}
        return phase.model_copy(update=settled)

    def changed(self, changes: Mapping[str, Any]) -> "Recipe":
        """Returns the recipe with other values; `epochs` and `lr` go to the phases that train.

        Raises:
            UsageError: A key is unknown, or a value does not fit or would change nothing.
        """
        document = self.model_dump()
        for key, value in changes.items():
            if key in ("epochs", "lr"):
                if all(phase["learns"] == "head" for phase in document["phases"]):
                    raise UsageError(
                        f"`{key}` would change nothing: the head alone is solved in one pass",
                        hint="leave it out, or use another `--strategy`",
                    )
                for phase in document["phases"]:
                    if phase["learns"] != "head":
                        phase[key] = value
            else:
                document[key] = value
        return _validated(document, "the recipe")

    @classmethod
    def from_toml(cls, file: Path) -> "Recipe":
        """Reads a recipe file.

        Raises:
            UsageError: It is missing, is no TOML, or has unknown keys or values.
        """
        try:
            if file.stat().st_size > MOST_BYTES:
                raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
            document = tomllib.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(
                f"recipe `{file}` cannot be read: {error.strerror}",
                hint="make one with `regraft recipe scratch > recipe.toml`",
            ) from error
        except ValueError as error:
            raise UsageError(f"`{file}` is no TOML: {error}", hint="mend the line") from error
        return _validated(document, f"recipe `{file}`")

    def to_toml(self) -> str:
        """Returns the recipe as TOML with a comment on every key."""
        lines = ["# A recipe for `regraft pretrain` or `finetune --recipe FILE`.", ""]
        for name, field in type(self).model_fields.items():
            if name != "phases":
                lines += [f"# {field.description}", f"{name} = {toml(getattr(self, name))}", ""]
        for number, phase in enumerate(self.phases, start=1):
            lines += [f"# phase {number}", "[[phases]]"]
            for name, field in Phase.model_fields.items():
                comment = [f"# {field.description}"] if number == 1 else []
                lines += [*comment, f"{name} = {toml(getattr(phase, name))}"]
            lines.append("")
        return "\n".join(lines)


def _validated(document: Mapping[str, Any], what: str) -> Recipe:
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        known = [*Recipe.model_fields, "epochs", "lr"]
        raise refusal(what, error, known, {"phases": list(Phase.model_fields)}) from error
