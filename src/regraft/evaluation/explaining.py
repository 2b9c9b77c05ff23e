"""Pictures of where the evidence was seen, as a folder: named by number, never by class or file."""

from collections.abc import Sequence
from pathlib import Path

from regraft.data.decode import UnreadableImage, encode_png
from regraft.evaluation.explain import explain_files
from regraft.evaluation.rows import rows_to_csv
from regraft.models.classifier import Classifier
from regraft.progress import OnProgress, counting
from regraft.storage import committed_folder, make_folder, write_file

TABLE = "explained.csv"
HEAD = ("picture", "path", "class", "probability", "error")


def write_explanations(
    classifier: Classifier,
    files: Sequence[tuple[Path, str]],
    out: Path,
    label: str | None,
    stage: int | None,
    on_progress: OnProgress,
) -> tuple[int, list[tuple[str, str]]]:
    """Returns how many pictures were written, and the broken files with their reasons."""
    told, scale = counting(on_progress, "explaining"), classifier.inputs.intensity_range
    rows: list[Sequence[str]] = []
    broken: list[tuple[str, str]] = []
    digits = max(3, len(str(len(files))))
    make_folder(out.parent)
    with committed_folder(out) as folder:
        found = explain_files(classifier, files, label, stage)
        for number, ((root, path), one) in enumerate(zip(files, found, strict=True)):
            told(number + 1, len(files))
            place = str(root / path)
            if isinstance(one, UnreadableImage):
                broken.append((place, str(one)))
                rows.append(("", place, "", "", str(one)))
                continue
            name = f"{number:0{digits}d}.png"
            write_file(folder / name, encode_png(one.picture(scale)))
            rows.append((name, place, one.label, f"{one.probability:.6f}", ""))
        table = rows_to_csv(HEAD, rows)
        write_file(folder / TABLE, table.encode("utf-8", "surrogateescape"))
    return len(files) - len(broken), broken
