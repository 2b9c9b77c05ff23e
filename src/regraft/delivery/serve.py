"""Serve: a Classifier over HTTP, and its page. The only file that imports the web framework.

`Gate` stands before all of this; images are decoded in `Sandboxes`, and answered in `Batches`.
"""

import asyncio
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from uvicorn.protocols.http.h11_impl import H11Protocol

from regraft.data.decode import UnreadableImage
from regraft.data.sandbox import Sandboxes
from regraft.delivery.batching import Batches
from regraft.delivery.gate import Gate, Limits
from regraft.delivery.pages import asset, source_hash
from regraft.delivery.service import Service
from regraft.errors import EnvironmentFault

IMAGE_BODY = {
    "requestBody": {
        "required": True,
        "description": "The bytes of one image.",
        "content": {
            kind: {"schema": {"type": "string", "format": "binary"}}
            for kind in ("image/*", "application/octet-stream")
        },
    }
}
WITH_IMAGES = frozenset({"/predict", "/explain"})
PROBLEMS: dict[int | str, dict[str, Any]] = {
    401: {"description": "The token is missing or wrong."},
    413: {"description": "Too many bytes."},
    415: {"description": "Not sent as an image."},
    422: {"description": "No image that can be read; `error` is a short stable code."},
    503: {"description": "Too many images at once; `Retry-After` says when to try again."},
}


def listening_socket(host: str, port: int) -> socket.socket:
    """Returns a socket that is bound; port 0 takes a free one.

    Raises:
        EnvironmentFault: The place is taken, or is none of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise EnvironmentFault(
            f"`{host}` port {port} cannot be listened on: {error.strerror or error}",
            hint=f"choose another with `--port`; `ss -ltnp 'sport = {port}'` names who has it",
        ) from error
    return listener


def run(service: Service, listener: socket.socket, server: "Server | None" = None) -> None:
    """Serves until a signal asks to stop (or `server.should_exit`), and finishes what it began."""
    sandboxes = Sandboxes(os.cpu_count() or 1, service.answers.classifier.inputs)
    batches = Batches(service.answers, service.answers.sizes[-1])
    try:
        app = application(service, sandboxes, batches)
        server = server or Server()
        asyncio.run(server.run_until_stopped(app, service, listener))
    finally:
        batches.close()
        sandboxes.close()
        listener.close()


def application(service: Service, sandboxes: Sandboxes, batches: Batches) -> Gate:
    """Returns the ASGI application behind its gate."""
    decoders = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="decode")
    app = FastAPI(
        title="regraft", docs_url=None, redoc_url=None, redirect_slashes=False, responses=PROBLEMS
    )
    page = _page()

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/healthz", summary="Whether it serves, and which weights")
    async def health() -> dict[str, str]:
        return {"status": "ok", "weights_sha256": service.description["weights_sha256"]}

    @app.get("/model", summary="What is served")
    async def model() -> dict[str, Any]:
        return {**service.description, "most_bytes": service.limits.body_bytes}

    @app.post("/predict", summary="Classify one image", openapi_extra=IMAGE_BODY)
    async def predict(request: Request) -> JSONResponse:
        content = await request.body()
        with batches.announced():
            pixels = await asyncio.get_running_loop().run_in_executor(
                decoders, sandboxes.decode, content
            )
        record = await batches.ask(pixels)
        return JSONResponse({key: value for key, value in record.items() if key != "path"})

    @app.post(
        "/explain",
        summary="Show where the evidence was seen (Grad-CAM), as a PNG",
        openapi_extra=IMAGE_BODY,
        response_class=Response,
        responses={200: {"content": {"image/png": {}}, "description": "The image, and over it."}},
    )
    async def explain(request: Request) -> Response:
        content = await request.body()
        pixels = await asyncio.get_running_loop().run_in_executor(
            decoders, sandboxes.decode, content
        )
        picture = await batches.alone(service.answers.explained, pixels)
        return Response(picture, media_type="image/png")

    @app.exception_handler(UnreadableImage)
    async def unreadable(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, UnreadableImage)
        return _problem(422, error.reason, error.detail)

    @app.exception_handler(HTTPException)
    async def refused(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        told = HTTPStatus(error.status_code).phrase
        return _problem(error.status_code, told.lower().replace(" ", "-"), told, error.headers)

    @app.exception_handler(Exception)  # it reaches the gate nevertheless, which tells of it
    async def mistaken(_request: Request, _error: Exception) -> JSONResponse:
        return _problem(500, "mistake", "a mistake in the server")

    return Gate(
        app, frozenset({"/predict", "/explain"}), service.access, service.limits, service.tell
    )


def _problem(status: int, error: str, detail: str, headers: Any = None) -> JSONResponse:
    return JSONResponse({"error": error, "detail": detail}, status, headers)


def _page() -> str:
    page = asset("serve.html").replace("/*style*/", _style())
    return page.replace("/*script*/", asset("serve.js"))


def _style() -> str:
    return asset("style.css") + asset("serve.css")


def security_headers() -> list[tuple[str, str]]:
    """Returns what every answer carries, whoever gives it."""
    script, style = source_hash(asset("serve.js")), source_hash(_style())
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; img-src blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return [
        ("Content-Security-Policy", policy),
        ("X-Content-Type-Options", "nosniff"),
        ("X-Frame-Options", "DENY"),
        ("Referrer-Policy", "no-referrer"),
        ("Cache-Control", "no-store"),
        ("Cross-Origin-Resource-Policy", "same-origin"),
        ("Cross-Origin-Opener-Policy", "same-origin"),
    ]


class Server(uvicorn.Server):
    """uvicorn, with our limits and our signals."""

    def __init__(self) -> None:
        self.headers = security_headers()
        self.port = 0

    async def run_until_stopped(self, app: Any, service: Service, listener: socket.socket) -> None:
        limits = service.limits
        config = uvicorn.Config(
            app,
            http=partial(  # type: ignore[arg-type]  # uvicorn calls it, no more
                _Connection, limits=limits, headers=self.headers
            ),
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            log_level="critical",  # the gate tells; uvicorn would repeat what clients send
            access_log=False,
            proxy_headers=False,
            server_header=False,
            headers=self.headers,
            timeout_graceful_shutdown=int(limits.stop_s),
        )
        super().__init__(config)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, self._stop)
        self.welcome = partial(service.welcome, *listener.getsockname()[:2])
        self.tell = service.tell
        await self.serve([listener])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.tell(self.welcome())  # not before one can ask

    def _stop(self) -> None:
        self.force_exit = self.should_exit  # a second signal waits for nobody
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals alone: uvicorn would raise them again; a stop asked for is no fault."""
        yield


class _Connection(H11Protocol):
    """A connection with a deadline for its headers, and a place among not too many others."""

    def __init__(
        self, *args: Any, limits: Limits, headers: list[tuple[str, str]], **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.limits, self.security = limits, headers
        self.deadline: asyncio.TimerHandle | None = None

    @property
    def is_idle(self) -> bool:
        """Whether no request is being read or answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_headers()
        if len(self.connections) <= self.limits.connections:
            return
        # Who waits longest without asking gives way: whoever asks at once is always served.
        idle = [c for c in self.connections if isinstance(c, _Connection) and c.is_idle]
        longest = min(idle, key=lambda one: one.deadline.when() if one.deadline else 0.0)
        longest.refuse(503, "busy", "too many connections at once; try again in a second")

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self.is_idle:
            self._cancel()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Whether the connection stays: one may close one's own side and wait for the answer."""
        return not self.is_idle and not self.cycle.more_body

    def on_response_complete(self) -> None:
        self._expect_headers()
        super().on_response_complete()
        if not self.is_idle:  # the next request had come already
            self._cancel()

    def _expect_headers(self) -> None:
        self._cancel()
        self.deadline = self.loop.call_later(self.limits.header_s, self._late)

    def _cancel(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None

    def _late(self) -> None:
        self.deadline = None
        self.refuse(408, "too-slow", "the request did not arrive in time")

    def refuse(self, status: int, error: str, detail: str) -> None:
        """Answers by hand, outside of any request, and ends the connection."""
        if not self.transport.is_closing() and self.is_idle:
            body = json.dumps({"error": error, "detail": detail})
            lines = [
                f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
                *(f"{name}: {value}" for name, value in self.security),
                "Content-Type: application/json",
                f"Content-Length: {len(body)}",
                *(["Retry-After: 1"] if status == 503 else []),
                "Connection: close",
            ]
            self.transport.write("\r\n".join([*lines, "", body]).encode("ascii"))
        self.transport.close()
        self.loop.call_later(1, self.transport.abort)  # whoever does not read is not waited for

    def send_400_response(self, msg: str) -> None:
        error = sys.exc_info()[1]
        hint = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        self.refuse(hint if hint in (400, 431, 501) else 400, "bad-request", msg)
