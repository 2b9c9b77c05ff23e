"""Tracking: what a training tells, kept by TensorBoard or MLflow too, through accelerate."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from regraft.errors import EnvironmentFault
from regraft.progress import OnProgress
from regraft.training.records import Epoch, Trial

Tool = Literal["tensorboard", "mlflow"]
FIGURES = ("train_loss", "val_loss", "val_accuracy", "val_balanced_accuracy", "effective_rank")


@contextmanager
def tracked(on_progress: OnProgress, tool: Tool | None, out: Path) -> Iterator[OnProgress]:
    """Yields what tells `on_progress` and, of epochs and trials, the tool; there is an Engine.

    TensorBoard's files go into `tensorboard` beside the Run, which lets in nothing foreign;
    MLflow's to where `MLFLOW_TRACKING_URI` says.

    Args:
        on_progress: What is told everything.
        tool: None: none.
        out: Folder of the Run; its name is that of the tool's run.

    Raises:
        EnvironmentFault: The tool is not installed, or refuses.
    """
    if tool is None:
        yield on_progress
        return
    tracker = _started(tool, out.resolve())

    def tell(record: object) -> None:
        if isinstance(record, Epoch):
            known = {name: getattr(record, name) for name in FIGURES}
            tracker.log({name: x for name, x in known.items() if x is not None}, step=record.epoch)
        elif isinstance(record, Trial):
            known = {"loss": record.loss, "balanced_accuracy": record.balanced_accuracy}
            values = {f"{record.candidate}/{name}": x for name, x in known.items() if x is not None}
            tracker.log(values, step=round(100 * record.share))
        on_progress(record)

    try:
        yield tell
    finally:
        tracker.finish()


def _started(tool: Tool, out: Path) -> Any:
    from accelerate.tracking import MLflowTracker, TensorBoardTracker
    from accelerate.utils import is_mlflow_available, is_tensorboard_available

    is_there = {"tensorboard": is_tensorboard_available, "mlflow": is_mlflow_available}[tool]
    if not is_there():
        raise EnvironmentFault(f"{tool} is not installed", hint=f"pip install 'regraft[{tool}]'")
    if tool == "tensorboard":
        tracker = TensorBoardTracker(out.name, out.parent / "tensorboard")
        tracker.start()
        return tracker
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it would report its use
    from mlflow.exceptions import MlflowException

    tracker = MLflowTracker("regraft", run_name=out.name)
    try:
        tracker.start()
    except MlflowException as error:
        raise EnvironmentFault(
            f"mlflow refuses to begin: {error.message}",
            hint="set MLFLOW_TRACKING_URI to where it keeps its runs",
        ) from error
    return tracker
