"""A trained classifier over HTTP: the same answers as `predict`, and what it withstands."""

import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from regraft import api
from regraft.data.cache import Cache
from regraft.data.dataset import Dataset
from regraft.data.decode import UnreadableImage, read_input
from regraft.data.sandbox import Sandbox, Sandboxes
from regraft.delivery import serve as web
from regraft.delivery.gate import Access, Gate, Limits, granted
from regraft.delivery.service import Service, web_part
from regraft.documents import sha256_of_file
from regraft.engine import Engine, evaluating
from regraft.errors import EnvironmentFault, UsageError
from regraft.evaluation.answers import Answers
from regraft.evaluation.predictions import eval_batch, outputs_of
from regraft.evaluation.rows import to_records
from regraft.evaluation.testing import own_rows, predict_dataset
from regraft.inputs import InputSpec
from regraft.models.backbone import Backbone
from regraft.models.classifier import Classifier

ENGINE = Engine("cpu")
INPUTS = InputSpec((32, 32), 3, mean=(0.5,) * 3, std=(0.25,) * 3)
NAMES = ("cat", "dog", "<b>eel</b>")
QUICK = Limits(
    body_bytes=2**20, requests=8, connections=16, header_s=0.6, body_s=0.6, total_s=1.5, stop_s=5
)
SECURITY = {
    "content-security-policy", "x-content-type-options", "x-frame-options", "referrer-policy",
    "cache-control", "content-type", "content-length",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loopback alone, where the others allow no connection at all."""
    real = socket.socket.connect

    def only_loopback(self: socket.socket, address: Any) -> None:
        assert address[0] in ("127.0.0.1", "::1"), f"a test tried to connect to {address}"
        real(self, address)

    monkeypatch.setattr(socket.socket, "connect", only_loopback)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare classifier: random weights, but different answers for different images."""
    classifier = Classifier(Backbone.create("resnet10t", INPUTS, seed=1), NAMES)
    with torch.no_grad():
        classifier.head.weight.mul_(50)
    folder = tmp_path_factory.mktemp("model")
    classifier.save(folder)
    return folder


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Running:
    """A server in a thread."""

    port: int
    service: Service
    lines: list[str] = field(default_factory=list)

    def send(self, raw: bytes) -> Reply:
        """Sends bytes as they are, and reads one answer."""
        begun = time.monotonic()
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as connection:
            connection.sendall(raw)
            return read_reply(connection, begun)

    def ask(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> Reply:
        own = {"Host": f"127.0.0.1:{self.port}", "Content-Length": str(len(body))}
        own |= {"Content-Type": "application/octet-stream"} if body else {}
        return self.send(request(method, path, own | (headers or {}), body))


def request(method: str, path: str, headers: dict[str, str], body: bytes = b"") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", *(f"{key}: {value}" for key, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def read_reply(connection: socket.socket, begun: float) -> Reply:
    content = b""
    while b"\r\n\r\n" not in content:
        try:
            part = connection.recv(65536)
        except ConnectionError:
            part = b""
        if not part:
            return Reply(0, {}, content, time.monotonic() - begun)  # closed without a word
        content += part
    head, _, body = content.partition(b"\r\n\r\n")
    first, *rest = head.decode("latin-1").split("\r\n")
    headers = {key.lower(): value for key, value in (line.split(": ", 1) for line in rest)}
    while len(body) < int(headers.get("content-length", 0)):
        part = connection.recv(65536)
        if not part:
            break
        body += part
    return Reply(int(first.split()[1]), headers, body, time.monotonic() - begun)


@contextmanager
def running(model: Path, **changes: Any) -> Iterator[Running]:
    lines: list[str] = []
    service = Service.of(model, Access(), lines.append, arch=None, engine=ENGINE)
    service = replace(service, limits=QUICK)
    service = replace(service, **changes)
    listener = web.listening_socket("127.0.0.1", 0)
    port = listener.getsockname()[1]
    server = web.Server()
    thread = threading.Thread(target=web.run, args=(service, listener, server), daemon=True)
    thread.start()
    while not getattr(server, "started", False):
        time.sleep(0.01)
    yield Running(port, service, lines)
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[Running]:
    with running(model) as server:
        yield server


def picture(seed: int = 0, kind: str = "PNG", mode: str = "RGB", side: int = 40) -> bytes:
    generator = np.random.default_rng(seed)
    shape = (side, side) if mode == "L" else (side, side, 3)
    stream = io.BytesIO()
    Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize("arch", ["resnet18", "convnext_atto"])
def test_an_image_has_the_same_outputs_alone_and_among_others(arch: str) -> None:
    inputs = InputSpec((64, 64), 3, mean=(0.5,) * 3, std=(0.2,) * 3)
    network = Classifier(Backbone.create(arch, inputs, seed=0), ("a", "b", "c"))
    ENGINE.place(network)
    whole = eval_batch(inputs.size, ENGINE.device)
    generator = torch.Generator().manual_seed(0)
    images_BCHW = torch.randn(whole, 64, 64, 3, generator=generator).permute(0, 3, 1, 2)
    with evaluating(network), torch.inference_mode(), ENGINE.autocast():
        among = outputs_of(network, images_BCHW, whole)
        for number in (1, 2, 3, 15, 33):
            alone = outputs_of(network, images_BCHW[-number:], whole)
            np.testing.assert_array_equal(alone, among[-number:])


def test_sizes_that_round_differently_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = Classifier(Backbone.create("resnet10t", INPUTS, seed=1), NAMES)
    own = Answers._outputs

    def rounded(self: Answers, images_BCHW: torch.Tensor, size: int) -> Any:
        return own(self, images_BCHW, size) + np.float32(1e-3 if size in (32, 16) else 0)

    monkeypatch.setattr(Answers, "_outputs", rounded)
    sizes = Answers(classifier, ENGINE).sizes
    assert sizes[-1] == 64
    assert not {1, 16, 32} & set(sizes)


def test_where_the_evidence_was_seen_comes_as_a_picture(served: Running) -> None:
    reply = served.ask("POST", "/explain", picture(3))
    assert (reply.status, reply.headers["content-type"]) == (200, "image/png")
    with Image.open(io.BytesIO(reply.body)) as shown:
        assert (shown.size, shown.mode) == ((32, 32), "RGB")
    assert served.ask("POST", "/explain", b"text").status == 422
    before = served.ask("POST", "/predict", picture(3)).json()
    served.ask("POST", "/explain", picture(3))
    assert served.ask("POST", "/predict", picture(3)).json() == before
    assert served.ask("GET", "/model").json()["explains"] is True


@pytest.mark.fault("K20")
def test_served_predicted_and_evaluated_probabilities_are_equal_to_the_bit(
    served: Running, model: Path, tmp_path: Path
) -> None:
    contents = [picture(i, "JPEG" if i % 2 else "PNG", "L" if i % 3 else "RGB") for i in range(21)]
    for number, content in enumerate(contents):
        folder = tmp_path / ("cat" if number < 10 else "dog")
        folder.mkdir(exist_ok=True)
        (folder / f"{number:02d}.{'jpg' if number % 2 else 'png'}").write_bytes(content)
    table, broken = api.predict(model, [tmp_path], engine=ENGINE)
    expected = to_records(table, broken)
    dataset = Dataset.open(tmp_path, whole=True)
    cache, dataset = Cache.build(dataset, (32, 32), 3)
    evaluated = predict_dataset(Classifier.load(model), dataset, cache, own_rows(dataset), ENGINE)
    assert table is not None
    np.testing.assert_array_equal(evaluated.probabilities, table.probabilities)
    alone = [served.ask("POST", "/predict", content).json() for content in contents[:3]]
    together: list[Any] = [None] * len(contents)

    def post(number: int) -> None:
        reply = served.ask("POST", "/predict", contents[number])
        while reply.status == 503:
            time.sleep(0.05)
            reply = served.ask("POST", "/predict", contents[number])
        together[number] = reply.json()

    threads = [threading.Thread(target=post, args=(number,)) for number in range(len(contents))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({record["probabilities"]["cat"] for record in expected}) == len(contents)
    for record in expected:
        del record["path"]
    assert alone == expected[:3]
    assert together == expected


@pytest.mark.fault("K15")
def test_every_answer_carries_the_security_headers(served: Running) -> None:
    host = {"Host": f"127.0.0.1:{served.port}"}
    large = {"Content-Length": "9999999999", "Content-Type": "image/png"}
    replies = [
        served.ask("GET", "/"),
        served.ask("GET", "/healthz"),
        served.ask("GET", "/model"),
        served.ask("GET", "/openapi.json"),
        served.ask("GET", "/docs"),
        served.ask("POST", "/predict", picture()),
        served.ask("POST", "/predict", b"text"),
        served.ask("DELETE", "/predict"),
        served.ask("GET", "/", headers={"Host": "evil.com"}),
        served.send(request("POST", "/predict", host | large)),
        served.send(b"nonsense\r\n\r\n"),
        served.send(request("GET", "/", host | {"X": "y" * 200_000})),
        served.send(b"GET /"),
    ]
    assert [reply.status for reply in replies] == [
        200, 200, 200, 200, 404, 200, 422, 405, 421, 413, 400, 431, 408,
    ]  # fmt: skip
    for reply in replies:
        assert set(reply.headers) >= SECURITY
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["x-frame-options"] == "DENY"
        assert reply.headers["cache-control"] == "no-store"
        policy = reply.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'sha256-")
        assert "unsafe" not in policy
        assert "server" not in reply.headers
        assert "access-control-allow-origin" not in reply.headers


@pytest.mark.fault("K1")
def test_other_machines_can_ask_only_with_a_token() -> None:
    assert granted("127.0.0.1", None, (), False).only_loopback
    assert granted("::1", None, (), False).only_loopback
    with pytest.raises(UsageError, match="lets other machines ask, and there is no `--token`"):
        granted("0.0.0.0", None, (), False)
    with pytest.raises(UsageError, match="could be guessed"):
        granted("0.0.0.0", "short", (), False)
    assert not granted("0.0.0.0", "s" * 16, (), False).only_loopback
    assert granted("0.0.0.0", None, (), True).token is None


@pytest.mark.fault("K25")
def test_the_token_is_asked_for(model: Path) -> None:
    token = "a-token-of-some-length"
    with running(model, access=Access(token=token)) as server:
        right = {"Authorization": f"Bearer {token}"}
        assert server.ask("GET", "/").status == 200
        assert server.ask("GET", "/healthz").status == 200
        assert server.ask("GET", "/model").status == 401
        assert server.ask("GET", "/model", headers=right).status == 200
        assert server.ask("POST", "/predict", picture(), right).status == 200
        wrong = server.ask("POST", "/predict", picture(), {"Authorization": "Bearer nonsense"})
        assert wrong.status == 401
        assert wrong.headers["www-authenticate"] == "Bearer"
        assert wrong.seconds > 0.5  # a guess costs time
        scheme = server.ask("GET", "/model", headers={"Authorization": f"Basic {token}"})
        assert scheme.status == 401


@pytest.mark.fault("K2")
def test_an_upload_that_says_it_is_large_is_refused_before_it_is_read(served: Running) -> None:
    headers = {"Host": "localhost", "Content-Type": "image/png", "Content-Length": str(2**31)}
    reply = served.send(request("POST", "/predict", headers))
    assert reply.status == 413
    assert reply.json() == {"error": "too-large", "detail": "an image may have 1,048,576 bytes"}
    assert reply.seconds < 1
    expecting = served.send(request("POST", "/predict", headers | {"Expect": "100-continue"}))
    assert expecting.status == 413


@pytest.mark.fault("K3")
def test_an_upload_without_a_length_is_refused_when_the_limit_is_passed(served: Running) -> None:
    headers = {"Host": "localhost", "Content-Type": "image/png", "Transfer-Encoding": "chunked"}
    begun = time.monotonic()
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as connection:
        connection.sendall(request("POST", "/predict", headers))
        chunk = b"10000\r\n" + bytes(2**16) + b"\r\n"
        sent = 0
        try:
            while sent < 2**31:
                connection.sendall(chunk)
                sent += 2**16
        except ConnectionError:
            pass
        reply = read_reply(connection, begun)
    assert reply.status == 413
    assert reply.seconds < 2
    assert sent < 2**25  # what the buffers of both kernels take, no more


@pytest.mark.fault("K3")
def test_bytes_are_counted_as_they_are_read() -> None:
    import asyncio

    read, sent = 0, []

    async def receive() -> dict[str, Any]:
        nonlocal read
        read += 2**16
        return {"type": "http.request", "body": bytes(2**16), "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    async def never(*_: Any) -> None:
        raise AssertionError("nothing behind the gate is asked")

    gate = Gate(never, frozenset({"/predict"}), Access(), QUICK, lambda _: None)
    headers = [(b"host", b"localhost"), (b"content-type", b"image/png")]
    headers += [(b"transfer-encoding", b"chunked")]
    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": headers}
    asyncio.run(gate(scope, receive, send))
    assert sent[0]["status"] == 413
    assert read <= QUICK.body_bytes + 2**16
    assert gate.buffered_bytes == 0


@pytest.mark.fault("K4")
@pytest.mark.parametrize(
    ("lengths", "body", "statuses"),
    [
        (["-1"], b"", {400}),
        (["5", "6"], b"hello", {400}),
        (["5x"], b"hello", {400}),
        (["100000"], b"short", {408}),
        (["3"], b"GET /model HTTP/1.1\r\nHost: localhost\r\n\r\n", {422}),
    ],
)
def test_a_length_that_lies_ends_the_connection(
    served: Running, lengths: list[str], body: bytes, statuses: set[int]
) -> None:
    head = "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
    head += "".join(f"Content-Length: {length}\r\n" for length in lengths)
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as connection:
        connection.sendall((head + "\r\n").encode() + body)
        reply = read_reply(connection, 0)
        assert reply.status in statuses
        rest = connection.recv(65536)
        # What lies behind a short length is a request of its own, and no valid one.
        assert rest == b"" or rest.startswith(b"HTTP/1.1 400")
        assert b"class_names" not in rest


@pytest.mark.fault("K5", "K6")
@pytest.mark.parametrize(
    ("start", "drip", "longest_s"),
    [
        (b"", b"", QUICK.header_s),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ", b"x", QUICK.header_s),
        (
            b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
            b"Content-Length: 500\r\n\r\n",
            b"x",
            QUICK.body_s,
        ),
        (
            b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"x",
            QUICK.header_s,
        ),
    ],
)
def test_slow_clients_are_cut_off(
    served: Running, start: bytes, drip: bytes, longest_s: float
) -> None:
    begun = time.monotonic()
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as connection:
        connection.settimeout(0.1)
        connection.sendall(start or b"G")
        while time.monotonic() - begun < 10:
            try:
                connection.sendall(drip)
                if connection.recv(65536) == b"":
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
    assert 0.5 * longest_s < time.monotonic() - begun < longest_s + 1.5


@pytest.mark.fault("K5", "K6")
def test_the_deadlines_are_those_that_were_promised() -> None:
    limits = Limits()
    assert limits.header_s <= 10
    assert limits.body_s < limits.total_s <= 30
    assert limits.stop_s <= 10


@pytest.mark.fault("K7")
def test_idle_connections_do_not_keep_a_good_client_out(served: Running) -> None:
    def duration() -> float:
        return served.ask("GET", "/healthz").seconds

    idle = []
    try:
        alone = sorted(duration() for _ in range(50))[48]
        for _ in range(500):
            connection = socket.create_connection(("127.0.0.1", served.port), timeout=20)
            connection.sendall(b"GET / HTTP/1.1\r\n")
            idle.append(connection)
        among = sorted(duration() for _ in range(50))[48]
        # Half a hundredth of a second is the clock of this machine when others work on it.
        assert among < 2 * alone + 0.05
        said = read_reply(idle[0], 0)
        assert (said.status, said.headers["retry-after"]) == (503, "1")
    finally:
        for connection in idle:
            connection.close()


def test_more_images_than_places_are_asked_to_come_again(model: Path) -> None:
    with running(model, limits=replace(QUICK, requests=1)) as server:
        replies: list[Reply] = []
        threads = [
            threading.Thread(
                target=lambda: replies.append(server.ask("POST", "/predict", picture()))
            )
            for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {reply.status for reply in replies} <= {200, 503}
        assert {reply.headers.get("retry-after") for reply in replies if reply.status == 503} <= {
            "1"
        }
        assert any(reply.status == 200 for reply in replies)


def claiming(width: int, height: int) -> bytes:
    """Returns a PNG whose header promises more than follows."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + picture()[33:]


@pytest.mark.fault("K8")
@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", "empty-file"),
        (b"hello", "not-an-image"),
        (b"<!doctype html><p>hello", "not-an-image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not-an-image"),
        (b'{"url": "http://169.254.169.254/"}', "not-an-image"),
        (picture(kind="JPEG", side=200)[:900], "truncated"),
        (picture()[:600], "truncated"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "damaged"),
        (claiming(30000, 30000), "too-many-pixels"),
    ],
)
def test_what_is_no_image_is_refused_with_its_reason(
    served: Running, content: bytes, error: str
) -> None:
    reply = served.ask("POST", "/predict", content, {"Content-Type": "image/png"})
    assert reply.status == 422
    assert reply.json()["error"] == error
    assert served.ask("POST", "/predict", picture()).status == 200


@pytest.mark.fault("K9", "B25")
def test_a_decoder_that_dies_or_hangs_takes_nothing_with_it(served: Running) -> None:
    sandboxes = Sandboxes(1, INPUTS)
    (sandbox,) = sandboxes._all
    sandbox.deadline_s = 0.2
    try:
        for number, reason in ((signal.SIGSEGV, "decoder-crash"), (signal.SIGSTOP, "timeout")):
            os.kill(sandbox._process.pid, number)
            with pytest.raises(UnreadableImage, match=reason):
                sandboxes.decode(picture())
            assert sandboxes.decode(picture()).shape == (32, 32, 3)
    finally:
        sandboxes.close()
    for process in decoders_of(os.getpid()):
        os.kill(process, signal.SIGKILL)
    replies = [served.ask("POST", "/predict", picture()) for _ in range(4)]
    assert {reply.status for reply in replies[:2]} <= {200, 422}
    assert replies[3].status == 200


def decoders_of(parent: int) -> list[int]:
    children = Path(f"/proc/{parent}/task").glob("*/children")
    found = [int(child) for file in children for child in file.read_text().split()]
    return [
        child
        for child in found
        if b"regraft.data.sandbox" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def test_pixels_from_the_sandbox_are_those_of_the_decode_rule() -> None:
    window = replace(INPUTS, intensity_range=(0.0, 60000.0), clips=True)
    sandboxes = Sandboxes(1, window)
    deep = io.BytesIO()
    Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40) * 40).save(deep, "PNG")
    try:
        for content in (picture(), picture(1, "JPEG", "L", 300), deep.getvalue()):
            expected = read_input(content, window)
            found = sandboxes.decode(content)
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found, expected)
    finally:
        sandboxes.close()


@pytest.mark.fault("K9")
def test_a_decoder_gets_no_more_memory_and_time_than_it_needs() -> None:
    sandbox = Sandbox(INPUTS)
    try:
        limits = Path(f"/proc/{sandbox._process.pid}/limits").read_text()
        soft = {line[:26].strip(): line[26:47].strip() for line in limits.splitlines()}
        assert 2**30 < int(soft["Max address space"]) < 2**31
        assert soft["Max file size"] == soft["Max core file size"] == "0"
        sandbox.decode(picture())
        limits = Path(f"/proc/{sandbox._process.pid}/limits").read_text()
        (line,) = [line for line in limits.splitlines() if line.startswith("Max cpu time")]
        assert int(line.split()[3]) <= 13
    finally:
        sandbox.close()


@pytest.mark.fault("K10")
@pytest.mark.parametrize("kind", ["application/json", "text/plain", "text/uri-list"])
def test_no_address_and_no_path_is_ever_followed(served: Running, kind: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as canary:
        canary.settimeout(0.2)
        place = f"http://127.0.0.1:{canary.getsockname()[1]}/x.png"
        for text in (json.dumps({"url": place}), place, "file:///etc/passwd", "/etc/passwd"):
            given = text.encode()
            assert served.ask("POST", "/predict", given, {"Content-Type": kind}).status == 415
            assert served.ask("POST", "/predict", given).status == 422
            query = f"/predict?url={place}&path=/etc/passwd"
            assert served.ask("POST", query, given).status == 422
        with pytest.raises(TimeoutError):
            canary.accept()


@pytest.mark.fault("K11")
def test_no_path_leads_out(served: Running) -> None:
    steps = ["../", "..%2f", "%2e%2e/", "%2e%2e%2f", "..\\", "..%5c", "%252e%252e%252f", "....//"]
    ends = ["etc/passwd", "model.json", "etc/passwd%00.png", "windows/win.ini", "serve.js"]
    forms = [f"/{step * 6}{end}" for step in steps for end in ends]
    forms += ["//etc/passwd", "/etc/passwd", "/predict/../../etc/passwd", "/static/serve.js"]
    forms += ["http://localhost/etc/passwd", "/%00", "/%c0%ae%c0%ae/etc/passwd"]
    assert len(forms) >= 40
    for form in forms:
        reply = served.ask("GET", form)
        assert (form, reply.status) == (form, 404)
        assert b"root:" not in reply.body


@pytest.mark.fault("K12")
@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.com", 421),
        ("evil.com:80", 421),
        ("localhost.evil.com", 421),
        ("127.0.0.1.evil.com", 421),
        ("192.168.1.7", 421),
        ("[::2]:80", 421),
        ("", 421),
        ("localhost", 200),
        ("LOCALHOST:123", 200),
        ("127.0.0.1", 200),
        ("[::1]:8000", 200),
    ],
)
def test_a_foreign_name_for_this_machine_is_refused(
    served: Running, host: str, status: int
) -> None:
    assert served.ask("GET", "/model", headers={"Host": host}).status == status


@pytest.mark.fault("K13")
def test_pages_of_other_sites_may_not_ask(served: Running) -> None:
    for origin in ("https://evil.com", "null", "http://localhost.evil.com"):
        reply = served.ask("POST", "/predict", picture(), {"Origin": origin})
        assert reply.status == 403
    own = {"Origin": f"http://127.0.0.1:{served.port}"}
    assert served.ask("POST", "/predict", picture(), own).status == 200
    asking = {"Origin": own["Origin"], "Access-Control-Request-Method": "POST"}
    preflight = served.ask("OPTIONS", "/predict", headers=asking)
    assert preflight.status == 405
    assert not [name for name in preflight.headers if name.startswith("access-control")]


@pytest.mark.fault("K14")
def test_forms_are_not_taken(served: Running) -> None:
    name = "../" * 3000 + "x"
    part = f'--b\r\nContent-Disposition: form-data; name="f"; filename="{name}"\r\n\r\nx\r\n'
    for body in (part.encode() * 20, part.encode() + b"--b--"):
        kind = {"Content-Type": "multipart/form-data; boundary=b"}
        assert served.ask("POST", "/predict", body, kind).status == 415
    for other in ("application/x-www-form-urlencoded", "text/plain", "", "imagex/png"):
        reply = served.ask("POST", "/predict", picture(), {"Content-Type": other})
        assert reply.status == 415
    packed = {"Content-Encoding": "gzip"}
    assert served.ask("POST", "/predict", picture(), packed).status == 415


@pytest.mark.fault("K16")
def test_an_error_tells_nothing_of_the_machine(model: Path, tmp_path: Path) -> None:
    with running(model) as server:
        replies = [
            server.ask("GET", "/nothing"),
            server.ask("POST", "/predict", b"text"),
            server.send(b"x"),
            server.send(b"\x00\r\n\r\n"),
        ]

        def broken(*_: Any) -> Any:
            raise RuntimeError(f"a secret in {tmp_path}")

        object.__setattr__(server.service.answers, "_outputs", broken)
        replies.append(server.ask("POST", "/predict", picture()))
        assert replies[-1].status == 500
        assert replies[-1].json() == {"error": "mistake", "detail": "a mistake in the server"}
        deadline = time.monotonic() + 10
        while not any("a secret in" in line for line in server.lines):  # for whoever runs it
            assert time.monotonic() < deadline
            time.sleep(0.01)
    told = b"".join(reply.body for reply in replies).decode()
    assert not re.search(r"Traceback|File \"|/tmp|/home|site-packages|\.py|\d+\.\d+\.\d+", told)


@pytest.fixture
def child(model: Path) -> Iterator[Any]:
    """A server in a process of its own, as the command starts it."""
    arguments = [sys.executable, "-m", "regraft", "serve", str(model), "--port", "0"]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    port = 0
    for line in process.stderr:
        if found := re.search(r"page: +http://127\.0\.0\.1:(\d+)/", line):
            port = int(found[1])
        if "stop:" in line:
            break
    yield process, port
    process.kill()
    process.wait()
    process.stderr.close()


@pytest.mark.fault("K1", "K17")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_lets_the_image_at_hand_be_answered(child: Any, number: int) -> None:
    process, port = child
    tables = [Path("/proc/net/tcp").read_text(), Path("/proc/net/tcp6").read_text()]
    listening = [
        row.split()[1] for table in tables for row in table.splitlines() if f":{port:04X} " in row
    ]
    assert f"0100007F:{port:04X}" in listening
    assert f"00000000:{port:04X}" not in listening
    content = picture()
    head = {"Host": "localhost", "Content-Type": "image/png", "Content-Length": str(len(content))}
    with socket.create_connection(("127.0.0.1", port), timeout=20) as slow:
        slow.sendall(request("POST", "/predict", head) + content[:-1])
        time.sleep(0.3)
        process.send_signal(number)
        time.sleep(0.5)
        with pytest.raises(ConnectionError):
            socket.create_connection(("127.0.0.1", port), timeout=5)
        slow.sendall(content[-1:])
        assert read_reply(slow, 0).status == 200
    assert process.wait(15) == 0


@pytest.mark.fault("K18")
def test_a_port_in_use_is_an_error_with_a_hint(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EnvironmentFault, match=f"port {port} cannot be listened on") as caught:
            api.serve(model, port=port)
    assert f"ss -ltnp 'sport = {port}'" in caught.value.hint


@pytest.mark.fault("K19")
def test_a_model_that_is_written_over_is_served_as_it_was(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    with running(copy) as server:
        before = server.ask("POST", "/predict", picture()).json()
        weights = copy / "model.safetensors"
        weights.write_bytes(bytes(weights.stat().st_size))
        assert server.ask("POST", "/predict", picture()).json() == before
        told = server.ask("GET", "/healthz").json()
        assert told == {"status": "ok", "weights_sha256": sha256_of_file(model / weights.name)}


@pytest.mark.fault("K21")
@pytest.mark.parametrize(
    ("raw", "statuses"),
    [
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400, 421}),
        (b"TRACE / HTTP/1.1\r\nHost: localhost\r\n\r\n", {405}),
        (b"BREW / HTTP/1.1\r\nHost: localhost\r\n\r\n", {405}),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + bytes([120]) * 2**20, {431}),
        (b"GET / HTTP/1.1\r\n\r\n", {400}),
        (b"GET / HTTP/1.0\r\n\r\n", {421}),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", {400}),
        (b"CONNECT evil.com:443 HTTP/1.1\r\nHost: localhost\r\n\r\n", {404, 405}),
    ],
)
def test_odd_requests_are_refused(served: Running, raw: bytes, statuses: set[int]) -> None:
    assert served.send(raw).status in statuses


def test_requests_may_follow_each_other_without_waiting(served: Running) -> None:
    head = {"Host": "localhost"}
    raw = request("GET", "/healthz", head) * 2 + request(
        "GET", "/x", head | {"Connection": "close"}
    )
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as connection:
        connection.sendall(raw)
        content = b""
        while part := connection.recv(65536):
            content += part
    assert re.findall(rb"HTTP/1.1 (\d+)", content) == [b"200", b"200", b"404"]


@pytest.mark.fault("K22")
def test_a_request_is_one_line_of_the_log(served: Running) -> None:
    served.lines.clear()
    served.ask(
        "GET", "/x%0d%0a127.0.0.1%20GET%20/fake%20200%1b[2J%e2%80%ae", headers={"User-Agent": "a"}
    )
    served.ask("GET", "/healthz")
    while len(served.lines) < 2:
        time.sleep(0.01)
    assert len(served.lines) == 2
    assert served.lines[0].startswith(r"127.0.0.1 GET /x\u000d\u000a127.0.0.1 GET /fake 200\u001b")
    assert not re.search("[\r\n\x1b\u202e]", "".join(served.lines))


@pytest.mark.fault("K24")
def test_parts_and_conditions_are_not_known(served: Running) -> None:
    headers = {"Range": "bytes=0-1", "If-None-Match": "*", "If-Modified-Since": "nonsense"}
    reply = served.ask("GET", "/", headers=headers)
    assert reply.status == 200
    assert len(reply.body) == int(reply.headers["content-length"]) > 1000


@pytest.mark.fault("M3")
def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "regraft.delivery.serve")
    monkeypatch.delattr("regraft.delivery.serve")
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(EnvironmentFault, match="serving needs a package") as caught:
        web_part()
    assert caught.value.hint == "pip install 'regraft[serve]'"


def test_the_description_of_the_interface_names_each_route(served: Running) -> None:
    document = served.ask("GET", "/openapi.json").json()
    assert set(document["paths"]) == {"/explain", "/healthz", "/model", "/predict"}
    assert set(document["paths"]["/predict"]["post"]["requestBody"]["content"]) == {
        "image/*",
        "application/octet-stream",
    }
    told = served.ask("GET", "/model").json()
    assert told["class_names"] == list(NAMES)
    assert told["precision"] == ENGINE.precision
    assert not re.search(r"/tmp|/home", json.dumps(told))
