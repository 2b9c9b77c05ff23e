"""Features of images as a file for other programs: NumPy, or Parquet (the only pyarrow)."""

import io
from pathlib import Path

import numpy as np

from regraft.changing import write_listed
from regraft.errors import EnvironmentFault, UsageError
from regraft.evaluation.predictions import Predictions

SUFFIXES = (".npy", ".parquet")


def refuse_unknown_form(path: Path) -> None:
    """Refuses a file that could not be written, before hours of work.

    Raises:
        UsageError: Its suffix is not known.
        EnvironmentFault: Parquet is not installed.
    """
    if path.suffix not in SUFFIXES:
        raise UsageError(
            f"`--embeddings {path}` is of no form that is known",
            hint=f"end it in {' or '.join(SUFFIXES)}",
        )
    if path.suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise EnvironmentFault(
                "Parquet needs `pyarrow`, which is not installed",
                hint="pip install pyarrow, or end `--embeddings` in .npy",
            ) from error


def write_embeddings(path: Path, table: Predictions | None) -> None:
    """Commits the features of the images that could be read, in the order of the table.

    `.npy` holds one row of float32 for each; Parquet the path besides.
    """
    features_ND = np.zeros((0, 0), np.float32)
    if table is not None and table.features is not None:
        features_ND = np.ascontiguousarray(table.features)
    stream = io.BytesIO()
    if path.suffix == ".npy":
        np.lib.format.write_array(stream, features_ND, allow_pickle=False)
    else:
        import pyarrow
        from pyarrow import parquet

        paths = [] if table is None else list(table.paths)
        columns = {"path": paths, "embedding": list(features_ND)}
        parquet.write_table(pyarrow.table(columns), stream)
    write_listed(path, stream.getvalue())
