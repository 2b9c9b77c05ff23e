"""Thousands of broken requests: no answer is 500, nothing dies, memory stays."""

import random
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from test_serve import NAMES, Reply, model, picture, read_reply, request

__all__ = ["model"]

METHODS = ("GET", "POST", "PUT", "HEAD", "OPTIONS", "TRACE", "PATCH", "get", "P\x00ST", "")
PATHS = ("/", "/predict", "/predict", "/explain", "/model", "/healthz", "/openapi.json", "/x", "*",
         "//", "/predict?a=b", "/%", "/%ff", "http://localhost/predict", "")  # fmt: skip
KINDS = ("image/png", "image/jpeg", "application/octet-stream", "text/plain", "", "image/", "\xff",
         "multipart/form-data; boundary=x")  # fmt: skip
HEADERS = (
    ("Transfer-Encoding", ("chunked", "gzip", "chunked, chunked", "identity", "x")),
    ("Expect", ("100-continue", "200-ok")),
    ("Connection", ("close", "keep-alive", "upgrade", ", ,")),
    ("Upgrade", ("websocket", "h2c")),
    ("Host", ("localhost", "evil.com", "[::1", "]", "", "a" * 5000)),
    ("Origin", ("null", "http://localhost", "://", "\xe9")),
    ("Authorization", ("Bearer x", "Bearer", "\xff\xfe", "Basic " + "A" * 3000)),
    ("Content-Length", ("0", "-1", "1e3", "99999999999999999999", "5, 5", "\u0663")),
    ("Content-Encoding", ("gzip", "br")),
    ("Range", ("bytes=0-", "x")),
    ("X" * 200, ("y" * 20_000,)),
)


def broken_request(rng: random.Random, images: list[bytes]) -> bytes:
    """Returns a request that is wrong in some of many ways, or right."""
    body = bytearray(rng.choice(images))
    if rng.random() < 0.6 and body:
        for _ in range(rng.randint(1, 30)):
            body[rng.randrange(len(body))] = rng.randrange(256)
    if rng.random() < 0.2:
        body = body[: rng.randrange(len(body) + 1)]
    headers = {"Host": "localhost", "Content-Type": rng.choice(KINDS)}
    headers["Content-Length"] = str(len(body) + rng.choice((0, 0, 0, 0, -1, 1)))
    for name, values in rng.sample(HEADERS, rng.choice((0, 0, 1, 2))):
        headers[name] = rng.choice(values)
    shown = {key: value.encode("utf-8").decode("latin-1") for key, value in headers.items()}
    method = "POST" if rng.random() < 0.6 else rng.choice(METHODS)
    path = "/predict" if rng.random() < 0.6 else rng.choice(PATHS)
    raw = bytearray(request(method, path, shown, bytes(body)))
    if rng.random() < 0.15:
        for _ in range(rng.randint(1, 5)):
            raw[rng.randrange(min(len(raw), 200))] = rng.randrange(256)
    return bytes(raw[: rng.randrange(len(raw))] if rng.random() < 0.05 else raw)


def ask(port: int, raw: bytes) -> Reply:
    with socket.create_connection(("127.0.0.1", port), timeout=40) as connection:
        try:
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)  # nothing more will come: no deadline is awaited
            return read_reply(connection, 0)
        except ConnectionError:
            return Reply(0, {}, b"", 0)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loopback alone: the server under test."""
    real = socket.socket.connect

    def only_loopback(self: socket.socket, address: Any) -> None:
        assert address[0] == "127.0.0.1", f"a test tried to connect to {address}"
        real(self, address)

    monkeypatch.setattr(socket.socket, "connect", only_loopback)


@pytest.fixture
def child(model: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[Any], int]]:
    """A server in a process of its own, with the limits of the command."""
    log = tmp_path / "log"
    arguments = [sys.executable, "-m", "regraft", "serve", str(model), "--port", "0"]
    with log.open("wb") as stream:
        process = subprocess.Popen(arguments, stderr=stream)
        found = None
        while found is None:
            assert process.poll() is None
            time.sleep(0.1)
            found = re.search(r"page: +http://127\.0\.0\.1:(\d+)/", log.read_text())
        yield process, int(found[1])
        process.kill()
        process.wait()
    assert "Traceback" not in log.read_text(errors="replace")


def resident_bytes(process: subprocess.Popen[Any]) -> int:
    text = Path(f"/proc/{process.pid}/status").read_text()
    (line,) = re.findall(r"VmRSS:\s+(\d+) kB", text)
    return int(line) * 1024


def fuzz(port: int, number: int) -> Counter[int]:
    images = [picture(0), picture(1, "JPEG"), picture(2, "GIF", "L"), picture(3, "WEBP"), b"", b"x"]
    images += [picture(4, "BMP"), picture(5, "TIFF"), picture(6, "JPEG", "L", 300)]
    rng = random.Random(0)
    return Counter(ask(port, broken_request(rng, images)).status for _ in range(number))


@pytest.mark.fault("K4", "K8")
def test_hundreds_of_broken_requests_are_refused_one_by_one(child: Any) -> None:
    process, port = child
    statuses = fuzz(port, 300)
    assert process.poll() is None
    assert statuses[500] == 0
    assert {200, 400, 415, 421, 422} <= set(statuses)
    assert set(statuses) <= {0, 200, 400, 401, 403, 404, 405, 408, 413, 415, 421, 422, 431, 501}
    right = request(
        "POST",
        "/predict",
        {"Host": "localhost", "Content-Type": "image/png", "Content-Length": str(len(picture()))},
        picture(),
    )
    reply = ask(port, right)
    assert set(reply.json()["probabilities"]) == set(NAMES)


@pytest.mark.slow
@pytest.mark.fault("K23")
def test_ten_thousand_broken_requests_leave_no_trace(child: Any) -> None:
    process, port = child
    fuzz(port, 1000)
    before = resident_bytes(process)
    statuses = fuzz(port, 10_000)
    assert process.poll() is None
    assert statuses[500] == statuses[502] == 0
    assert resident_bytes(process) - before < 50 * 2**20


@pytest.mark.slow
@pytest.mark.fault("K2", "K5", "K6")
def test_the_limits_of_the_command_are_as_stated(child: Any) -> None:
    _, port = child
    begun = time.monotonic()
    large = {"Host": "localhost", "Content-Type": "image/png", "Content-Length": str(2**31)}
    with socket.create_connection(("127.0.0.1", port), timeout=40) as connection:
        connection.sendall(request("POST", "/predict", large))
        assert read_reply(connection, begun).status == 413
    assert time.monotonic() - begun < 1
    half = {"Host": "localhost", "Content-Type": "image/png", "Content-Length": "1000"}
    for start, longest_s in (
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n", 10),
        (request("POST", "/predict", half), 30),
    ):
        begun = time.monotonic()
        with socket.create_connection(("127.0.0.1", port), timeout=40) as connection:
            connection.sendall(start)
            assert read_reply(connection, begun).status == 408
            assert connection.recv(1) == b""
        assert time.monotonic() - begun < longest_s + 1
