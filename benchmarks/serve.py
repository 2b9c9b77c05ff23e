"""Serving beside predicting: images a second of both on the same images, and the slowest answers.

    python benchmarks/serve.py IMAGES [--arch vgg16_bn] [--size 224] [--clients 16] [--rounds 3]

Clients share the cores with the server, as in a test on one machine; each sends its next image when
it has its answer, over a connection that stays open. Prints one JSON document. Where others work on
the machine, images a second tell little; the processor's seconds for an image (of the server and
its decoders, without the clients) tell more.
"""

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("KMP_BLOCKTIME", "0")  # as the command line does, before torch comes

import numpy as np

from regraft.data.listing import list_images
from regraft.engine import Engine
from regraft.evaluation.predicting import predict_files
from regraft.inputs import InputSpec
from regraft.models.backbone import Backbone
from regraft.models.classifier import Classifier
from regraft.progress import quiet

TARGET = 0.9  # of predict's images a second, at 16 clients


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("images", type=Path)
    parser.add_argument("--arch", default="vgg16_bn")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    files, _ = list_images([chosen.images])
    with tempfile.TemporaryDirectory() as folder:
        inputs = InputSpec((chosen.size, chosen.size), 3, mean=(0.5,) * 3, std=(0.25,) * 3)
        model = Path(folder) / "model"
        Classifier(Backbone.create(chosen.arch, inputs, seed=0), ("a", "b", "c")).save(model)
        predicting, serving, latencies = [], [], []
        for _ in range(chosen.rounds):  # in turn, so that a disturbance meets both
            predicting.append(predict_rate(model, files))
            rate, work, seconds = serve_rate(model, files, chosen.clients)
            serving.append((rate, work))
            latencies += seconds
    predict_rates, predict_work = zip(*predicting, strict=True)
    serve_rates, serve_work = zip(*serving, strict=True)
    share = float(np.median(serve_rates) / np.median(predict_rates))
    work_share = float(np.median(predict_work) / np.median(serve_work))
    document = {
        "arch": chosen.arch,
        "size": chosen.size,
        "images": len(files),
        "clients": chosen.clients,
        "predict_images_per_s": [round(rate, 2) for rate in predict_rates],
        "serve_images_per_s": [round(rate, 2) for rate in serve_rates],
        "share": round(share, 3),
        "predict_processor_s_per_image": [round(work, 4) for work in predict_work],
        "serve_processor_s_per_image": [round(work, 4) for work in serve_work],
        "share_by_processor": round(work_share, 3),
        "target": TARGET,
        "latency_s": {f"p{q}": round(float(np.percentile(latencies, q)), 3) for q in (50, 95, 99)},
    }
    print(json.dumps(document, indent=2))


def predict_rate(model: Path, files: list[tuple[Path, str]]) -> tuple[float, float]:
    """Returns images a second of `predict`, and processor time of one; the model is loaded."""
    engine, classifier = Engine("cpu"), Classifier.load(model)
    engine.place(classifier)
    predict_files(classifier, files[:16], engine, quiet)
    begun, used = time.monotonic(), time.process_time()
    table, broken = predict_files(classifier, files, engine, quiet)
    assert table is not None and not broken
    number = len(files)
    return number / (time.monotonic() - begun), (time.process_time() - used) / number


def serve_rate(
    model: Path, files: list[tuple[Path, str]], clients: int
) -> tuple[float, float, list[float]]:
    """Returns the same of `serve`, and the seconds of each answer."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [sys.executable, "-m", "regraft", "serve", str(model), "--port", "0"]
        with log.open("wb") as stream:
            server = subprocess.Popen(command, stderr=stream)
        try:
            found = None
            while found is None:
                time.sleep(0.2)
                found = re.search(r"page: +http://127\.0\.0\.1:(\d+)/", log.read_text())
            contents = [(root / path).read_bytes() for root, path in files]
            asyncio.run(ask_all(int(found[1]), contents[:16], clients))
            begun, used = time.monotonic(), processor_s(server.pid)
            seconds = asyncio.run(ask_all(int(found[1]), contents, clients))
            elapsed, number = time.monotonic() - begun, len(files)
            return number / elapsed, (processor_s(server.pid) - used) / number, seconds
        finally:
            server.terminate()
            server.wait()


def processor_s(process: int) -> float:
    """Returns the processor time of a process and its children so far."""
    children = Path(f"/proc/{process}/task").glob("*/children")
    own = [process, *(int(child) for file in children for child in file.read_text().split())]
    fields = [Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split() for each in own]
    return sum(int(each[11]) + int(each[12]) for each in fields) / os.sysconf("SC_CLK_TCK")


async def ask_all(port: int, contents: list[bytes], clients: int) -> list[float]:
    waiting, seconds = iter(contents), []

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for content in waiting:
            begun = time.monotonic()
            writer.write(
                b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\n"
                b"Content-Length: %d\r\n\r\n" % len(content) + content
            )
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            length = re.search(rb"content-length: (\d+)", head)
            assert length is not None
            await reader.readexactly(int(length[1]))
            seconds.append(time.monotonic() - begun)
        writer.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return seconds


if __name__ == "__main__":
    main()
