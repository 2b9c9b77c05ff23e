"""A bounded fuzz run of the decode boundary: whatever bytes come, an image or UnreadableImage.

python benchmarks/fuzz.py [--seconds 60] [--seed 0] [--keep FOLDER] [FOLDER of more seeds]

Seeds are small images of every format, made here, and the files of a folder. Each is cut, flipped,
spliced and rewritten at random. Every input runs under a limit of memory and time in a process of
its own kind: a crash in a decoder's C code is found, too. What fails is kept to be repeated.
"""

import argparse
import hashlib
import io
import multiprocessing
import random
import resource
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from PIL import Image

from regraft.data.decode import UnreadableImage, quiet_codecs, read_header, read_pixels

LONGEST_S = 5.0  # for one input: a hundred times what the slowest seed takes
MEMORY = 6 * 2**30  # of a worker, with its libraries; a bomb would pass it
BYTES = (0, 1, 2, 3, 8, 16, 127, 128, 255)


def seeds(folder: Path | None) -> list[bytes]:
    """Returns small images of every format, and the small files of a folder."""
    import imagecodecs
    import tifffile

    generator = np.random.default_rng(0)
    made = []
    colour = generator.integers(0, 255, (12, 10, 3), dtype=np.uint8)
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"):
        for mode in ("RGB", "L", "P", "1"):
            stream = io.BytesIO()
            if (kind, mode) not in (("JPEG", "P"), ("WEBP", "P"), ("WEBP", "1"), ("JPEG", "1")):
                Image.fromarray(colour).convert(mode).save(stream, kind)
                made.append(stream.getvalue())
    for kind in ("uint8", "uint16", "int16", "float32"):
        for bands in (1, 2, 5):
            values = generator.integers(0, 99, (12, 10, bands)).astype(kind)
            for compression in (None, "lzw", "zlib", "packbits"):
                stream = io.BytesIO()
                planar = {"planarconfig": "contig"} if bands > 1 else {}
                shaped = values if bands > 1 else values[:, :, 0]
                options = {"photometric": "minisblack", "compression": compression, **planar}
                tifffile.imwrite(stream, shaped, **options)
                made.append(stream.getvalue())
            stream = io.BytesIO()
            np.save(stream, values)
            made.append(stream.getvalue())
    made.append(bytes(imagecodecs.png_encode(colour.astype(np.uint16) * 200)))
    files = sorted(folder.rglob("*")) if folder else []
    return made + [f.read_bytes() for f in files if f.is_file() and f.stat().st_size < 200_000]


def mutated(chosen: random.Random, corpus: list[bytes]) -> bytes:
    """Returns a seed with some random changes, most of them near its header."""
    content = bytearray(chosen.choice(corpus))
    for _ in range(chosen.choice((1, 1, 2, 4, 16))):
        if not content:
            break
        near = min(len(content), chosen.choice((32, 256, 1024, len(content))))
        place = chosen.randrange(near)
        how = chosen.randrange(6)
        if how == 0:
            content[place] ^= 1 << chosen.randrange(8)
        elif how == 1:
            content[place] = chosen.choice(BYTES)
        elif how == 2:
            del content[place:]
        elif how == 3:
            content[place : place + 4] = chosen.randbytes(4)
        elif how == 4:
            del content[place : place + chosen.randrange(1, 9)]
        else:
            other = chosen.choice(corpus)
            start = chosen.randrange(max(1, len(other)))
            content[place:place] = other[start : start + chosen.randrange(1, 64)]
    return bytes(content)


def serve(pipe: Connection) -> None:
    """Decodes what comes; answers with what is wrong, or with nothing."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with quiet_codecs():
        while (content := pipe.recv()) is not None:
            told = ""
            try:
                header = read_header(content)
                pixels = read_pixels(content, size=(8, 8), channels=header.channels)
                if pixels.shape != (8, 8, header.channels):
                    told = f"shape {pixels.shape}"
                if pixels.dtype.name != header.pixel_type:
                    told = f"{pixels.dtype} where the header says {header.pixel_type}"
            except UnreadableImage as error:
                told = "" if error.reason and error.detail else "no reason"
            except Exception as error:  # noqa: BLE001 - this is what is looked for
                told = f"{type(error).__name__}: {error}"
            pipe.send(told)


class Worker:
    """A process that decodes; another is started where one has died."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("fork")
        self._start()

    def _start(self) -> None:
        self.pipe, theirs = self.context.Pipe()
        self.process = self.context.Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def verdict(self, content: bytes) -> str:
        """Returns what is wrong with how this content was decoded; nothing is right."""
        try:
            self.pipe.send(content)
            if self.pipe.poll(LONGEST_S):
                return str(self.pipe.recv())
            told = f"longer than {LONGEST_S:g} s"
        except (EOFError, OSError):
            told = "the process died"
        self.process.kill()
        self.process.join()
        self._start()
        return told


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"))
    given = parser.parse_args()
    corpus, chosen, worker = seeds(given.folder), random.Random(given.seed), Worker()
    number, found, start = 0, dict[str, int](), time.monotonic()
    for content in corpus:  # unchanged first
        number += 1
        if told := worker.verdict(content):
            found[told] = found.get(told, 0) + 1
    while time.monotonic() - start < given.seconds:
        content, number = mutated(chosen, corpus), number + 1
        if told := worker.verdict(content):
            kind = told.split(":")[0]
            found[kind] = found.get(kind, 0) + 1
            if found[kind] <= 5:
                given.keep.mkdir(exist_ok=True)
                name = hashlib.sha256(content).hexdigest()[:12]
                (given.keep / name).write_bytes(content)
                print(f"{name}: {told[:200]}", file=sys.stderr)
    print(f"{number:,} inputs from {len(corpus)} seeds, {sum(found.values())} faults {found or ''}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
