"""What a training tells on the way: its steps, epochs and trials."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Step:
    """One optimiser step."""

    epoch: int
    num_epochs: int
    step: int
    num_steps: int
    loss: float
    lr: float
    images_per_s: float
    left_s: float


@dataclass(frozen=True)
class Epoch:
    """One pass over the training images, and how the averaged weights do on validation.

    A head that is solved is the epoch before the next one: 0 at the start. Without validation
    images the validation figures are None.

    Attributes:
        effective_rank: Of the features of the validation images, see `probe`; from scratch only.
        stage_probes: Balanced accuracy of a ridge head on the features of each stage, validation
            images left out in turn; from scratch only.
    """

    epoch: int
    num_epochs: int
    learns: str
    train_loss: float
    elapsed_s: float
    val_loss: float | None = None
    val_accuracy: float | None = None
    val_balanced_accuracy: float | None = None
    is_best: bool = False
    effective_rank: float | None = None
    stage_probes: tuple[float, ...] = ()

    def to_json(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns what belongs into metrics.jsonl, and what into times.jsonl (wall-clock)."""
        fields = dict(vars(self))
        times = {"epoch": self.epoch, "elapsed_s": fields.pop("elapsed_s")}
        return fields, times


@dataclass(frozen=True)
class Trial:
    """One candidate tried, or the probe.

    Attributes:
        share: Of the full schedule; 0 for the probe, 1 for the winner.
        loss: Negative log-likelihood of held-out images at the best temperature; None: diverged.
        is_best: The classifier holds this one now.
    """

    candidate: str
    share: float
    loss: float | None
    balanced_accuracy: float | None
    elapsed_s: float
    is_best: bool = False

    def to_json(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns what belongs into trials.jsonl, and what into times.jsonl (wall-clock)."""
        fields = dict(vars(self))
        times = {"candidate": self.candidate, "elapsed_s": fields.pop("elapsed_s")}
        return fields, times
