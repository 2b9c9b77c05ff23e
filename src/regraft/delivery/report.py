"""Report: one self-contained HTML page about Runs and comparisons. It shows, computes nothing."""

import base64
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from regraft.changing import read_log, write_listed
from regraft.delivery.figures import Series, arms, curves, label_efficiency, paired_differences
from regraft.delivery.pages import placeless, rendered
from regraft.errors import ArtefactError, UsageError, shorten
from regraft.evaluation.compare import LEAST_SEEDS
from regraft.manifests import read_document
from regraft.progress import duration
from regraft.run import FAILED, FINISHED, INTERRUPTED, RUNNING, SCHEMA, Run
from regraft.storage import make_folder

MOST_THUMBNAILS = 24
MOST_CONFUSED = 30  # classes: assumed, a larger matrix cannot be read on a page
MOST_CLASSES = 200  # rows of the table per class, assumed
MOST_NAMES = 50  # class names and excluded files, assumed
METRICS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "auroc": "AUROC",
    "nll": "NLL",
    "ece": "ECE",
}
ARMS = {
    "transfer": "transfer",
    "scratch": "scratch",
    "probe_transplanted": "probe, transplanted",
    "probe_random": "probe, random",
}
CURVES = {
    "train_loss": "training loss",
    "val_loss": "validation loss",
    "val_balanced_accuracy": "validation balanced accuracy",
}
PNG = b"\x89PNG\r\n\x1a\n"


def write_report(folders: list[Path], out: Path) -> Path:
    """Writes the page and returns its path.

    Args:
        folders: Runs and comparisons, in the order of the page.
        out: The HTML file; an earlier one is replaced.

    Raises:
        ArtefactError: A folder is neither a Run nor a comparison, or lacks what the page shows.
        UsageError: `out` is something else than a page.
    """
    refuse_other_page(out)
    page = _rendered(folders)
    make_folder(out.parent)
    write_listed(out, page.encode("utf-8", "surrogateescape"))
    return out


def refuse_other_page(out: Path) -> None:
    """Refuses to replace anything but a page.

    Raises:
        UsageError: `out` is there, and none.
    """
    if out.is_dir() or (out.exists() and out.suffix not in (".html", ".htm")):
        raise UsageError(
            f"`{out}` exists already and is no HTML page",
            hint="choose an `--out` ending in `.html`",
        )


def _rendered(folders: Sequence[Path]) -> str:
    try:
        sections = [_section(folder) for folder in folders]
        styles = ("style.css", "report.css")
        return rendered("report.html.jinja", styles, sections=sections, metrics=METRICS)
    except KeyError as error:
        raise ArtefactError(
            f"{shorten(map(str, folders))} cannot be shown, a file lacks something: {error}",
            hint="use the regraft version that wrote it, or restore the folder from a copy",
        ) from error


def _section(folder: Path) -> dict[str, Any]:
    if (folder / "run.json").is_file():
        run = Run.open(folder)
        return {
            "kind": "run",
            "name": folder.resolve().name,
            "notices": _notices(run),
            "run": _about(run),
            "curves": _curves([run]),
        }
    if (folder / "comparison.json").is_file():
        return _comparison(folder)
    if not folder.exists():
        raise ArtefactError(f"`{folder}` does not exist", hint="check the path")
    if runs := sorted(str(path.parent) for path in folder.glob("*/run.json")):
        raise ArtefactError(
            f"`{folder}` holds runs, but no `comparison.json`: the comparison has not finished",
            hint=f"name the runs themselves: {shorten(runs)}",
        )
    raise ArtefactError(
        f"`{folder}` is neither a run nor a comparison: it has no `run.json` or `comparison.json`",
        hint="name a folder that `regraft pretrain`, `finetune` or `compare` has written",
    )


def _comparison(folder: Path) -> dict[str, Any]:
    comparison = read_document(folder, "comparison.json")
    if comparison.get("schema") != SCHEMA:
        raise ArtefactError(
            f"`{folder}` has schema {comparison.get('schema')}; this version reads {SCHEMA}",
            hint="use the regraft version that wrote it",
        )
    transfer, scratch = _runs(folder, "transfer"), _runs(folder, "scratch")
    seeds = [f"seed {run.record['recipe']['seed']}" for run in transfer]
    if len(seeds) != len(comparison["per_seed"]):
        seeds = [f"seed no. {number + 1}" for number in range(len(comparison["per_seed"]))]
    metric = METRICS[comparison["metric"]]
    known = {arm: name for arm, name in ARMS.items() if arm in comparison["arms"]}
    return {
        "kind": "comparison",
        "name": folder.resolve().name,
        "notices": [
            *_inexact(folder),
            *(notice for run in (*transfer, *scratch) for notice in _notices(run)),
        ],
        "comparison": comparison,
        "has_enough_seeds": comparison["num_seeds"] >= LEAST_SEEDS,
        "metric": metric,
        "arms": known,
        "differences": paired_differences(comparison, seeds, metric),
        "arms_figure": arms(comparison, known, metric),
        "curve_figure": label_efficiency(comparison, metric),
        "curves": _curves([*transfer, *scratch]),
        "run": _about(transfer[0]) if transfer else None,
        "control": _recipe(scratch[0]) if scratch else None,
    }


def _runs(folder: Path, arm: str) -> list[Run]:
    found = [
        (int(match[1]), path.parent)
        for path in folder.glob(f"{arm}-*/run.json")
        if (match := re.fullmatch(rf"{arm}-(\d+)", path.parent.name))
    ]
    return [Run.open(path) for _, path in sorted(found)]


def _notices(run: Run) -> list[str]:
    """Returns what a reader must know before any number of this Run."""
    name, status, epochs = run.folder.resolve().name, _status(run), run.epochs()
    state = status["state"]
    place = "before the first epoch ended"
    if epochs:
        place = f"after epoch {epochs[-1]['epoch']} of {epochs[-1]['num_epochs']}"
    told = {
        INTERRUPTED: f"{name}: interrupted {place}. Not a finished training.",
        RUNNING: f"{name}: running, or ended without a word, {place}. Not a finished training.",
        FAILED: f"{name}: failed: {placeless(str(status.get('reason', 'no reason given')))}",
    }
    notices = [] if state == FINISHED else [told.get(state, f"{name}: state {state}")]
    if allowed := run.record["data"]["options"].get("allow"):
        notices.append(f"{name}: findings in the data were allowed by name: {', '.join(allowed)}")
    notices += _inexact(run.folder)
    evaluation = run.evaluation()
    if evaluation and evaluation["run"] != run.record["id"]:
        notices.append(f"{name}: its evaluation.json belongs to another run, {evaluation['run']}")
    return notices


def _inexact(folder: Path) -> list[str]:
    """Returns that a Run or comparison went on under other conditions, if it did."""
    resumes = read_log(folder / "resumes.jsonl")
    other = "; ".join(dict.fromkeys(each for resume in resumes for each in resume["inexact"]))
    told = f"{folder.resolve().name}: not bit-reproducible, it went on under other conditions: "
    return [told + other] if other else []


def _status(run: Run) -> dict[str, Any]:
    # A run that dies between its first two files has no status yet.
    return run.status if (run.folder / "status.json").is_file() else {"state": RUNNING}


def _about(run: Run) -> dict[str, Any]:
    evaluation, times = run.evaluation(), read_log(run.folder / "times.jsonl")
    excluded = []
    if run.record["data"]["excluded"]:
        excluded = [sample for sample in run.samples() if "excluded" in sample][:MOST_NAMES]
    return {
        "name": run.folder.resolve().name,
        "record": run.record,
        "status": _status(run),
        "epochs": _trained_epochs(run),
        "best_epoch": _best_epoch(run),
        "duration": duration(times[-1]["elapsed_s"]) if times else None,
        "evaluation": evaluation,
        "confusion": _confusion(evaluation) if evaluation else None,
        "per_class": evaluation["per_class"][:MOST_CLASSES] if evaluation else [],
        "mistakes": _mistakes(run, evaluation) if evaluation else [],
        "plan": run.plan(),
        "kept": _kept(run),
        "recipe": _recipe(run),
        "trials": _trials(run, times),
        "class_names": run.class_names[:MOST_NAMES],
        "excluded": excluded,
    }


def _recipe(run: Run) -> dict[str, Any]:
    """Returns the recipe as it was carried out: a search's winner stands for its phases."""
    recipe: dict[str, Any] = run.record["recipe"]
    winner = run.winner()
    if winner is None:
        return recipe
    epochs = winner["epochs"]
    phases = [
        phase if phase["learns"] == "head" else {**phase, "epochs": epochs}
        for phase in winner["candidates"][0]["phases"]
    ]
    return {**recipe, "phases": phases}


def _kept(run: Run) -> dict[str, Any] | None:
    """Returns the trial whose weights the Run holds; None where nothing was searched for."""
    best = [trial for trial in run.trials() if trial["is_best"]]
    return best[-1] if best else None


def _best_epoch(run: Run) -> int | None:
    """Returns the epoch whose weights the Run holds, if they are those of an epoch.

    A search may keep a probe, a short trial or a blend of weights instead.
    """
    best: int | None = _status(run).get("best_epoch")
    kept, winner = _kept(run), run.winner()
    if kept is None:
        return best
    if winner is None or kept["share"] < 1 or kept["candidate"] != winner["candidates"][0]["name"]:
        return None
    return best


def _trials(run: Run, times: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    spent = [line["elapsed_s"] for line in times if "candidate" in line]
    return [
        {**trial, "elapsed_s": elapsed} for trial, elapsed in zip(run.trials(), spent, strict=False)
    ]


def _confusion(evaluation: dict[str, Any]) -> list[list[tuple[int, int]]] | None:
    """Returns each count with its tenths of the row; None for more classes than can be read."""
    if len(evaluation["class_names"]) > MOST_CONFUSED:
        return None
    return [
        [(number, round(10 * number / max(1, sum(row)))) for number in row]
        for row in evaluation["confusion"]
    ]


def _mistakes(run: Run, evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    shown = []
    for number, mistake in enumerate(evaluation["mistakes"][:MOST_THUMBNAILS]):
        path = run.folder / "mistakes" / f"{number:03d}.png"
        evidence = path.with_name(f"{path.stem}-evidence.png")
        shown.append({**mistake, "image": _embedded(path), "evidence": _embedded(evidence)})
    return shown


def _embedded(path: Path) -> str | None:
    """Returns a PNG as a page holds it; None where there is none."""
    content = path.read_bytes() if path.is_file() else b""
    encoded = base64.b64encode(content).decode("ascii")
    return f"data:image/png;base64,{encoded}" if content.startswith(PNG) else None


def _curves(runs: Sequence[Run]) -> list[str]:
    """Returns the figures; none of what no epoch has measured (a solved head has no epochs)."""
    series = []
    for run in runs:
        arm = "transfer" if run.record["verb"] == "finetune" else "scratch"
        if epochs := _trained_epochs(run):
            series.append(Series(arm, epochs, _best_epoch(run)))
    return [
        curves(series, field, label)
        for field, label in CURVES.items()
        if any(epoch[field] is not None for one in series for epoch in one.epochs)
    ]


def _trained_epochs(run: Run) -> list[dict[str, Any]]:
    return [epoch for epoch in run.epochs() if epoch["epoch"] > 0]
