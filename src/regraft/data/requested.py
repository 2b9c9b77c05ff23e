"""Which images a prediction is asked for: files, folders, a table, or a list of paths."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from regraft.data.listing import list_images
from regraft.data.tables import image_paths
from regraft.errors import DataError, UsageError, count, shorten
from regraft.progress import Note, OnProgress

STDIN = "-"


def requested(
    images: Sequence[Path],
    table: Path | None,
    image_column: str,
    lines: Iterable[str],
    on_progress: OnProgress,
) -> list[tuple[Path, str]]:
    """Returns (folder, path in it) of each image, in the order in which they were named.

    What a table or list names and is not there is left to the reader, which says so of each.

    Args:
        images: Files and folders; `-` stands for the list.
        table: A CSV or JSON Lines; its paths are relative to its own folder.
        image_column: Of the table.
        lines: The list, one path a line.

    Raises:
        DataError: A file or folder is missing, or there are no images at all.
        UsageError: Nothing was named, or the table lacks the column.
    """
    if not images and table is None:
        raise UsageError("no images are named", hint="name files or folders, `--csv FILE`, or `-`")
    if missing := [path for path in images if str(path) != STDIN and not path.exists()]:
        raise DataError(f"image or folder not found: `{missing[0]}`", hint="check the path")
    files: list[tuple[Path, str]] = []
    left_out: list[tuple[str, str]] = []
    for path in images:
        if str(path) == STDIN:
            named = (line.rstrip("\r\n") for line in lines)
            files += [(Path(), name) for name in named if name]
            continue
        found, others = list_images([path])
        files += found
        left_out += others
    if table is not None:
        files += [(table.parent, name) for name in image_paths(table, image_column)]
    if left_out:
        shown = shorten(path for path, _ in left_out)
        on_progress(Note(f"{count(len(left_out), 'file')} left out, no images by name: {shown}"))
    if not files:
        place = table if not images else images[0]
        raise DataError(f"`{place}` holds no images", hint="name image files, or their folder")
    return files
