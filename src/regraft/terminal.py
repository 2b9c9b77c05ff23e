"""What a person sees: results on stdout, progress and errors on stderr.

Beside `cli.py` the only file that prints, and the only one that knows rich.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from regraft.errors import RegraftError, count

SILENCE_S = 30  # without a terminal, long work says so often how far it is; assumed


def print_comparison(comparison: dict[str, Any]) -> None:
    metric = comparison["metric"].replace("_", " ")
    print(f"\nDid the transfer help?  {comparison['verdict'].upper()}")
    print(
        f"{metric}: {comparison['difference']:+.3f} over training from scratch, 95 % interval "
        f"{comparison['low']:+.3f} to {comparison['high']:+.3f}"
    )
    print(
        f"{count(comparison['num_seeds'], 'seed')}, "
        f"{count(comparison['num_images'], 'test image')}; "
        "with more seeds, so many images show a true difference of "
        f"{comparison['least_detectable']:.3f} 4 times in 5\n"
    )
    print(f"{'test images':<36}accuracy         balanced accuracy")
    for arm, label in ARMS.items():
        values = comparison["arms"][arm]
        shown = [_mean_and_spread(values[name]) for name in ("accuracy", "balanced_accuracy")]
        print(f"{label:<36}{shown[0]:<17}{shown[1]}")


ARMS = {
    "transfer": "transferred and fine-tuned",
    "scratch": "trained from scratch",
    "probe_transplanted": "linear probe, transferred features",
    "probe_random": "linear probe, random features",
}


def _mean_and_spread(values: dict[str, Any]) -> str:
    spread = "" if values["std"] is None else f" +- {values['std']:.3f}"
    return f"{values['mean']:.3f}{spread}"


def print_evaluation(document: dict[str, Any]) -> None:
    print(f"{count(document['n'], 'image')}, split {document['split']}; 95 % bootstrap intervals")
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "nll", "ece"):
        numbers = [document[name][key] for key in ("value", "low", "high")]
        shown = ["-" if number is None else f"{number:.4f}" for number in numbers]
        print(f"{name:<18} {shown[0]}  {shown[1]} to {shown[2]}")
    print(f"\n{'class':<24} {'n':>6}  precision  recall  f1")
    for row in document["per_class"]:
        numbers = [row["precision"], row["recall"], row["f1"]]
        shown = ["  -  " if number is None else f"{number:.3f}" for number in numbers]
        print(f"{row['class']:<24} {row['n']:>6}  {shown[0]:<9}  {shown[1]}   {shown[2]}")


def print_json(document: Any) -> None:
    print(json.dumps(document, allow_nan=False, indent=2))


def speaks() -> bool:
    """Whether this is the one process, or the one among several that tells."""
    return os.environ.get("RANK", "0") == "0"


def tell(text: str) -> None:
    if speaks():
        print(text, file=sys.stderr)


def print_error(error: RegraftError) -> None:
    tell(f"error: {error}")


@contextmanager
def progress() -> Iterator[Callable[[Any], None]]:
    """Yields what shows progress on stderr: a bar on a terminal, one line an epoch elsewhere."""
    if not speaks():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[told]}"))
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bars:
        yield Teller(console, bars)


class Teller:
    """Shows the records of long work."""

    def __init__(self, console: Any, bars: Any) -> None:
        self.console = console
        self.bars = bars
        self.task: Any = None
        self.spoke = time.monotonic()

    def __call__(self, record: Any) -> None:
        from regraft.progress import Counting, Note, duration
        from regraft.training.loop import Epoch, Step

        if isinstance(record, Note):
            self.console.print(record.text, markup=False)
        elif isinstance(record, Counting):
            self._advance(record.what, record.done, record.total, f"{record.done}/{record.total}")
        elif isinstance(record, Step):
            told = (
                f"loss {record.loss:.3f}  {record.images_per_s:.0f} images/s  "
                f"{duration(record.left_s)} left"
            )
            what = f"epoch {record.epoch}/{record.num_epochs}"
            self._advance(what, record.step, record.num_steps, told)
        elif isinstance(record, Epoch):
            number = f"epoch {record.epoch}/{record.num_epochs}  {record.learns:<6}"
            number = "head, solved" if record.learns == "head" else number
            losses = f"loss {record.train_loss:.4f}  val loss {record.val_loss:.4f}"
            accuracy = f"val balanced accuracy {record.val_balanced_accuracy:.3f}"
            best = "  best" if record.is_best else ""
            self.console.print(f"{number} {losses}  {accuracy}{best}", markup=False)

    def _advance(self, what: str, done: int, total: int, told: str) -> None:
        if not self.console.is_terminal:
            if time.monotonic() - self.spoke > SILENCE_S:
                self.console.print(f"{what}  {told}", markup=False)
                self.spoke = time.monotonic()
            return
        if self.task is None:
            self.task = self.bars.add_task(what, total=total, told=told)
        self.bars.update(self.task, description=what, completed=done, total=total, told=told)
        if done == total:
            self.bars.remove_task(self.task)
            self.task = None
