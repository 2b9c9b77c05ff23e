"""regraft beside its peers, in one run on the same images: ratios, not seconds.

    make bench                                       everything, half an hour to an hour on 2 cores
    .venv/bin/python benchmarks/bench.py predict     one of: frozen, first, last, scratch, decode,
                                                     warm, predict, memory

The images are real X-rays (`REGRAFT_TEST_DATA`, or `../shared/data`), enlarged where that is said.
Keras and fastai get environments of their own, which this makes in the user's cache folder, beside
the images. One job after the other, each in a process of its own. Prints a table, and writes
`benchmarks/results/NAME.json`.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

HERE = Path(__file__).parent
HOME = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "regraft-bench"
PLACE = HOME / "images"
XRAYS = Path(os.environ.get("REGRAFT_TEST_DATA") or HERE.parents[1] / "shared" / "data")
SOURCE = XRAYS / "cxr_kermany_1k"
PEERS = {"keras": "tensorflow-cpu==2.21.0 pillow scipy", "fastai": "fastai==2.8.12 timm"}
FROZEN_EPOCHS = 20
Row = dict[str, Any]


def job(tool: str, name: str, *arguments: object, place: Path = PLACE) -> Row:
    """Runs one job in a process of its own and returns what it printed."""
    python = sys.executable if tool in ("regraft", "torch") else str(_environment(tool))
    told = f"{tool} {name}"
    print(f"  {told} ...", file=sys.stderr, flush=True)
    names = (name,) if tool != "fastai" else ()
    done = subprocess.run(
        [python, HERE / f"jobs_{tool}.py", *names, place, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{told} failed:\n{done.stderr[-3000:]}")
    return {"tool": tool, "job": name, **json.loads(done.stdout.splitlines()[-1])}


def _environment(tool: str) -> Path:
    python = HOME / f"environment-{tool}" / "bin" / "python"
    ready = python.parents[1] / "ready"
    if not ready.exists():
        print(f"  setting up {tool} ...", file=sys.stderr, flush=True)
        venv.create(python.parents[1])
        uv = str(Path(sys.executable).parent / "uv")
        install = [uv, "pip", "install", "--quiet", "--python", str(python)]
        subprocess.run([*install, *PEERS[tool].split()], check=True)
        ready.touch()
    return python


def frozen() -> list[Row]:
    _prepare_frozen()
    # Both take seconds, and the machine's mood is a tenth of that: the median of three in turn.
    tries = [[job("regraft", name) for name in ("frozen-limit", "frozen")] for _ in range(3)]
    rows = [sorted(each, key=_seconds)[1] for each in zip(*tries, strict=True)]
    rows += [job("torch", f"frozen-{kind}", FROZEN_EPOCHS) for kind in ("bf16", "fp32")]
    rows += [job(tool, "frozen", FROZEN_EPOCHS) for tool in ("fastai", "keras")]
    return _ratios(rows, rows[1])


def first() -> list[Row]:
    _prepare_frozen()
    rows = [job("regraft", "first"), job("regraft", "first-limit")]
    return _ratios(rows, rows[0])


def last() -> list[Row]:
    _prepare_frozen()
    rows: list[Row] = []
    for side in (128, 224):
        pair = [job("regraft", name, side) for name in ("last-stored", "last-live")]
        pair[1]["same numbers"] = pair[0].pop("losses") == pair[1].pop("losses")
        rows += _ratios([{"side": side, **row} for row in pair], pair[0])
    return rows


def scratch() -> list[Row]:
    _write_images("scratch", 96, (224, 224), "PNG", SOURCE, {})
    rows: list[Row] = []
    for arch in ("vgg16", "resnet50"):
        ours = job("regraft", f"scratch-{arch}")
        others = [job("regraft", f"limit-{arch}"), job("torch", f"scratch-{arch}")]
        others += [job("keras", f"scratch-{arch}")]
        rows += _ratios([ours, *others], ours)
    return rows


def decode() -> list[Row]:
    _write_images("jpeg", 200, (900, 1200), "JPEG", SOURCE, {})
    ours = job("regraft", "decode")
    return _ratios([ours, job("torch", "decode")], ours)


def warm() -> list[Row]:
    return [job("regraft", "warm")]


def predict() -> list[Row]:
    _write_images("predict", 192, (224, 224), "PNG", SOURCE, {})
    rows = [job("regraft", "predict"), job("torch", "predict"), job("keras", "predict")]
    return _ratios(rows, rows[0])


def memory() -> list[Row]:
    rows = []
    for number in (1_000, 10_000, 100_000):
        place = PLACE / f"generated-{number}"
        _write_generated(place / "images", number)
        rows.append({"images": number, **job("regraft", "memory", place=place)})
    return rows


def _seconds(row: Row) -> float:
    return float(row["seconds"])


def _ratios(rows: list[Row], ours: Row) -> list[Row]:
    for row in rows:
        row["times ours"] = row["seconds"] / ours["seconds"]
    return rows


def _write_images(
    name: str, number: int, size: tuple[int, int], kind: str, source: Path, classes: dict[str, str]
) -> None:
    """Writes real images at another size: as many of each class, 4 of 5 to train."""
    if (PLACE / name).exists():
        return
    found = sorted(source.rglob("*.*g"))
    found = [file for file in found if not classes or file.parent.name in classes]
    by_class: dict[str, list[Path]] = {}
    for file in found:
        by_class.setdefault(classes.get(file.parent.name, file.parent.name), []).append(file)
    each = number // len(by_class)
    for label, files in by_class.items():
        for place, file in enumerate(files[: each + (number % len(by_class) > 0)]):
            split = "test" if place % 5 == 4 and name == "frozen" else "train"
            folder = PLACE / name / (split if name in ("frozen", "scratch") else "") / label
            folder.mkdir(parents=True, exist_ok=True)
            image = Image.open(file).convert("RGB" if kind == "JPEG" else "L")
            image = image.resize(size[::-1], Image.Resampling.BICUBIC)
            image.save(folder / f"{place:04d}.{kind.lower()}", kind)


def _prepare_frozen() -> None:
    """Writes the images of the frozen benchmarks, and trains what they start from."""
    _write_images("frozen", 300, (1024, 1024), "PNG", SOURCE, {"normal": "a", "bacteria": "b"})
    _start()


def _write_generated(folder: Path, number: int) -> None:
    """Writes distinct 64 px images of two classes."""
    if folder.exists():
        return
    generator = np.random.default_rng(0)
    for label in "ab":
        (folder / label).mkdir(parents=True)
    for place in range(number):
        coarse = generator.integers(0, 256, (8, 8), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((64, 64))
        image.save(folder / "ab"[place % 2] / f"{place:06d}.png", compress_level=1)


def _start() -> None:
    """Trains a VGG16 that all tools start from, and writes its weights for Keras."""
    regraft, run = Path(sys.executable).parent / "regraft", PLACE / "start"
    verified = subprocess.run([regraft, "verify", run], capture_output=True, check=False)
    if (PLACE / "start.npz").exists() and not verified.returncode:
        return
    shutil.rmtree(run, ignore_errors=True)  # of an earlier version, or cut short
    command = [str(regraft), "pretrain", str(SOURCE), "--arch", "vgg16", "--image-size", "64"]
    options = ["--epochs", "8", "--set", "channels=3", "--out", str(run)]
    subprocess.run([*command, *options], check=True)
    state = load_file(PLACE / "start" / "final" / "model.safetensors")
    inputs = json.loads((PLACE / "start" / "final" / "model.json").read_text())["inputs"]
    arrays = {"mean": np.array(inputs["mean"][0]), "std": np.array(inputs["std"][0])}
    names = sorted(
        (name for name in state if "features" in name and name.endswith("weight")),
        key=lambda name: int(name.split(".")[-2]),
    )
    for number, name in enumerate(names):
        arrays[f"kernel{number}"] = state[name].transpose(2, 3, 1, 0)
        arrays[f"bias{number}"] = state[name.replace("weight", "bias")]
    np.savez(PLACE / "start.npz", allow_pickle=False, **arrays)


def _table(name: str, rows: list[Row]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    shown = [columns] + [[_cell(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(line[place]) for line in shown) for place in range(len(columns))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in shown
    ]
    return "\n".join([f"\n{name}", *lines])


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) and value < 1000 else str(value)


BENCHMARKS: dict[str, Callable[[], list[Row]]] = {
    "warm": warm,
    "decode": decode,
    "predict": predict,
    "first": first,
    "last": last,
    "scratch": scratch,
    "memory": memory,
    "frozen": frozen,
}


def main(names: list[str]) -> None:
    if unknown := set(names) - set(BENCHMARKS):
        raise SystemExit(f"unknown: {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    if not SOURCE.is_dir():
        raise SystemExit(f"`{SOURCE}` is missing: name the folder of the X-rays, REGRAFT_TEST_DATA")
    for name in names or BENCHMARKS:
        rows = BENCHMARKS[name]()
        document = {
            "benchmark": name,
            "when": time.strftime("%Y-%m-%d %H:%M"),
            "cores": len(os.sched_getaffinity(0)),
            "machine": platform.machine(),
            "rows": rows,
        }
        HERE.joinpath("results").mkdir(exist_ok=True)
        (HERE / "results" / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")
        print(_table(name, rows), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
