"""Tracking: what a training tells, kept by TensorBoard or MLflow too, through accelerate."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from regraft.errors import EnvironmentFault
from regraft.progress import OnProgress
from regraft.training.records import Epoch, Step, Trial

Tracker = Literal["tensorboard", "mlflow"]
FIGURES = ("train_loss", "val_loss", "val_accuracy", "val_balanced_accuracy", "effective_rank")


@contextmanager
def tracked(on_progress: OnProgress, tracker: Tracker | None, out: Path) -> Iterator[OnProgress]:
    """Yields what tells `on_progress` and, of epochs and trials, the tracker.

    It begins with the first step, when the data and `out` have been accepted: nothing is written
    before. TensorBoard's files go into `tensorboard` beside the Run, which lets in nothing foreign;
    MLflow's to where `MLFLOW_TRACKING_URI` says.

    Args:
        on_progress: What is told everything.
        tracker: None: none.
        out: Folder of the Run; its name is that of the tracker's run.

    Raises:
        EnvironmentFault: The tracker is not installed, does not know where to write, or refuses.
    """
    if tracker is None:
        yield on_progress
        return
    _refuse_unready(tracker)
    begun: list[Any] = []

    def tell(record: object) -> None:
        on_progress(record)
        if isinstance(record, Step | Epoch | Trial):
            if not begun:
                begun.append(_begun(tracker, out.resolve()))
            if values := _figures(record):
                place = round(100 * record.share) if isinstance(record, Trial) else record.epoch
                begun[0].log(values, step=place)

    try:
        yield tell
    finally:
        for one in begun:
            one.finish()


def _figures(record: Step | Epoch | Trial) -> dict[str, float]:
    if isinstance(record, Step):
        return {}
    if isinstance(record, Trial):
        own = {"loss": record.loss, "balanced_accuracy": record.balanced_accuracy}
        values = {f"{record.candidate}/{name}": value for name, value in own.items()}
    else:
        values = {name: getattr(record, name) for name in FIGURES}
    return {name: value for name, value in values.items() if value is not None}


def _refuse_unready(tracker: Tracker) -> None:
    from accelerate.utils import is_mlflow_available, is_tensorboard_available

    is_there = {"tensorboard": is_tensorboard_available, "mlflow": is_mlflow_available}[tracker]
    if not is_there():
        hint = f"pip install 'regraft[{tracker}]'"
        raise EnvironmentFault(f"{tracker} is not installed", hint=hint)
    if tracker == "mlflow" and "MLFLOW_TRACKING_URI" not in os.environ:
        raise EnvironmentFault(
            "mlflow is not told where to keep its runs",  # it would choose the current folder
            hint="set MLFLOW_TRACKING_URI, as in sqlite:////home/me/mlflow.db",
        )


def _begun(tracker: Tracker, out: Path) -> Any:
    from accelerate.tracking import MLflowTracker, TensorBoardTracker

    if tracker == "tensorboard":
        tool = TensorBoardTracker(out.name, out.parent / "tensorboard")
        tool.start()
        return tool
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it would report its use
    from mlflow.exceptions import MlflowException

    tool = MLflowTracker("regraft", run_name=out.name)
    try:
        tool.start()
    except MlflowException as error:
        raise EnvironmentFault(
            f"mlflow refuses to begin: {error.message}",
            hint="`regraft resume` goes on without it",
        ) from error
    return tool
