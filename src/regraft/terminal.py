"""What a person sees: results on stdout, progress and errors on stderr.

Beside the commands the only file that prints, and the only one that knows rich.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from regraft.errors import RegraftError, count, readable, spelled
from regraft.progress import duration

SILENCE_S = 30  # without a terminal, long work says so often how far it is; assumed


def print_comparison(comparison: dict[str, Any]) -> None:
    metric = comparison["metric"].replace("_", " ")
    print(f"\nDid the transfer help?  {comparison['verdict'].upper()}")
    print(
        f"{metric}: {comparison['difference']:+.3f} over training from scratch, 95 % interval "
        f"{_signed(comparison['low'])} to {_signed(comparison['high'])}"
    )
    numbers = [
        count(comparison["num_seeds"], "seed"),
        count(comparison["num_images"], "test image"),
    ]
    least = comparison["least_detectable"]
    power = (
        "too few independent images to know how far others would differ"
        if least is None
        else f"with more seeds, so many images show a true difference of {least:.3f} 4 times in 5"
    )
    print(f"{', '.join(numbers)}; {power}")
    for line in _saved_lines(comparison):
        print(line)
    print()
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


def _signed(number: float | None) -> str:
    return "unknown" if number is None else f"{number:+.3f}"


def _saved_lines(comparison: dict[str, Any]) -> Iterator[str]:
    """Yields what the transfer saves: images, and time."""
    if saved := comparison["saved_images"]:
        most = "at most " if saved["is_upper_bound"] else ""
        yield (
            f"with {most}{saved['images']:,} training images the transfer is as good as scratch "
            f"with {saved['of']:,}"
        )
    seconds = comparison["seconds"]
    if "transfer" in seconds and "scratch" in seconds:
        yield (
            f"one training took {duration(seconds['transfer'])} with transfer, "
            f"{duration(seconds['scratch'])} from scratch (twice the epochs, by rule)"
        )


def _mean_and_spread(values: dict[str, Any]) -> str:
    spread = "" if values["std"] is None else f" +- {values['std']:.3f}"
    return f"{values['mean']:.3f}{spread}"


def print_evaluation(document: dict[str, Any]) -> None:
    print(f"{count(document['n'], 'image')}, split {document['split']}; 95 % bootstrap intervals")
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "nll", "ece"):
        numbers = [document[name][key] for key in ("value", "low", "high")]
        shown = ["-" if number is None else f"{number:.4f}" for number in numbers]
        print(f"{name:<18} {shown[0]}  {shown[1]} to {shown[2]}")
    if (answered := document["answered"]) is not None:
        print(
            f"not unsure: {answered['n']} images ({answered['share']:.0%}), of which "
            f"{answered['errors']} are wrong; promised: at most "
            f"{answered['promised_error_rate']:.0%}"
        )
    print(f"\n{'class':<24} {'n':>6}  precision  recall  f1")
    for row in document["per_class"]:
        numbers = [row["precision"], row["recall"], row["f1"]]
        shown = ["  -  " if number is None else f"{number:.3f}" for number in numbers]
        print(f"{readable(row['class']):<24} {row['n']:>6}  {shown[0]:<9}  {shown[1]}   {shown[2]}")


def print_findings(checked: Any) -> None:
    """Prints a table of findings, the worst first, with what to do about each."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    colours = {"error": "red", "warning": "yellow", "note": "blue"}
    for root, number in zip(checked.roots, checked.num_images, strict=True):
        print(f"{readable(str(root))}: {count(number, 'image')}")
    table = Table(box=None, pad_edge=False, show_header=bool(checked.findings))
    for name in ("severity", "code", "count", "what was found, and what to do"):
        table.add_column(name, justify="right" if name == "count" else "left")
    for finding in checked.findings:
        severity = Text("allowed" if finding.allowed else finding.severity)
        severity.stylize(colours[finding.severity])
        lines = [finding.told, *finding.examples[:3], f"hint: {finding.advice}"]
        told = Text("\n  ".join(map(readable, lines)))
        table.add_row(severity, finding.code, f"{finding.count:,}", told)
    console.print(table)
    numbers = [
        count(sum(one.severity == kind and not one.allowed for one in checked.findings), kind)
        for kind in ("error", "warning", "note")
    ]
    print(f"\n{', '.join(numbers)}")


def print_json(document: Any) -> None:
    print(json.dumps(document, allow_nan=False, indent=2))


def speaks() -> bool:
    """Whether this is the one process, or the one among several that tells."""
    return os.environ.get("RANK", "0") == "0"


def tell(text: str) -> None:
    if speaks():
        print(spelled(text), file=sys.stderr)


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
        """Shows a record; where nobody reads any more (a closed terminal), work goes on."""
        with suppress(OSError):
            self._show(record)

    def _show(self, record: Any) -> None:
        from regraft.progress import Counting, Note

        if isinstance(record, Note):
            self.console.print(spelled(record.text), markup=False)
        elif isinstance(record, Counting):
            self._advance(record.what, record.done, record.total, f"{record.done}/{record.total}")
        else:
            self._show_training(record)

    def _show_training(self, record: Any) -> None:
        from regraft.training.plan import Plan  # torch: not for commands that only look
        from regraft.training.records import Epoch, Step, Trial

        if isinstance(record, Step):
            told = (
                f"loss {record.loss:.3f}  {record.images_per_s:.0f} images/s  "
                f"{duration(record.left_s)} left"
            )
            what = f"epoch {record.epoch}/{record.num_epochs}"
            self._advance(what, record.step, record.num_steps, told)
        elif isinstance(record, Epoch):
            self.console.print(_epoch_line(record), markup=False)
        elif isinstance(record, Trial):
            self.console.print(_trial_line(record), markup=False)
        elif isinstance(record, Plan) and record.rungs:
            self.console.print(record.told(), markup=False)

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


def _epoch_line(record: Any) -> str:
    number = f"epoch {record.epoch}/{record.num_epochs}  {record.learns:<6}"
    number = "head, solved" if record.learns == "head" else number
    line = f"{number} loss {record.train_loss:.4f}"
    if record.val_loss is not None:
        accuracy = f"val balanced accuracy {record.val_balanced_accuracy:.3f}"
        line += f"  val loss {record.val_loss:.4f}  {accuracy}"
    return line + ("  best" if record.is_best else "")


def _trial_line(record: Any) -> str:
    share = f"{record.share:.0%}" if record.share else ""
    line = f"tried {record.candidate:<14} {share:>4}"
    if record.loss is not None:
        accuracy = f"balanced accuracy {record.balanced_accuracy:.3f}"
        line += f"  held out: loss {record.loss:.4f}  {accuracy}"
    return line + f"  {record.elapsed_s:.0f} s" + ("  best so far" if record.is_best else "")
