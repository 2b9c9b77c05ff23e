"""What a check costs beside decoding the same images once on the same cores.

`python benchmarks/check.py [--images 20000] [--side 224] [--data FOLDER] [--rounds 5]` prints one
JSON document. Without a folder it writes JPEGs of blobs and grain to a temporary one, which weigh
as photographs.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from regraft.data.checks import check_data
from regraft.data.dataset import DataOptions
from regraft.data.decode import map_in_threads, read_content, read_whole
from regraft.data.listing import list_folder

ROUNDS = 5  # the median counts: decoding in threads takes 4.0 or 5.6 s, as the lock is handed on


def write_images(root: Path, number: int, side: int) -> None:
    generator = np.random.default_rng(0)
    for place in range(number):
        layers = []
        for cells, share in ((6, 0.6), (28, 0.3), (112, 0.1)):
            cell = generator.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
            big = Image.fromarray(cell).resize((side, side), Image.Resampling.BICUBIC)
            layers.append(share * np.asarray(big, np.float32))
        folder = root / f"class_{place % 10}"
        folder.mkdir(exist_ok=True)
        pixels = np.clip(sum(layers), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{place:06d}.jpg", quality=90)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Returns seconds on the clock, and of all cores together: a busy machine changes the first."""
    clock, before = time.perf_counter(), os.times()
    work()
    now = os.times()
    return time.perf_counter() - clock, sum(now[:4]) - sum(before[:4])


def _peak_mib(whose: int) -> int:
    return resource.getrusage(whose).ru_maxrss // 1024


def decode_all(root: Path) -> int:
    """Reads and decodes every file, in the threads that a check uses."""
    paths = [image.path for image in list_folder(root).images]
    read = map_in_threads(lambda path: read_whole(read_content(root, path)).shape, paths)
    return sum(1 for _ in read)


def measure(root: Path, num_rounds: int) -> dict[str, Any]:
    number = decode_all(root)  # the files are in memory from here on
    rounds = [  # in turn, so that a disturbance meets both
        (timed(lambda: decode_all(root)), timed(lambda: check_data([root], DataOptions())))
        for _ in range(num_rounds)
    ]
    (decoded, decoding_work), (checked, checking_work) = np.median(rounds, axis=0)
    return {
        "images": number,
        "cores": len(os.sched_getaffinity(0)),
        "decoding_s": [round(one[0], 2) for one, _ in rounds],
        "check_s": [round(one[0], 2) for _, one in rounds],
        "ratio": round(checked / decoded, 2),
        "ratio_of_processor_time": round(checking_work / decoding_work, 2),
        "peak_mib": _peak_mib(resource.RUSAGE_SELF),
        "peak_mib_of_a_reading_process": _peak_mib(resource.RUSAGE_CHILDREN),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    chosen = parser.parse_args()
    if chosen.data is not None:
        print(json.dumps(measure(chosen.data, chosen.rounds)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), chosen.images, chosen.side)
        print(json.dumps(measure(Path(folder), chosen.rounds)))


if __name__ == "__main__":
    main()
