"""Gate: what a request must pass before anything of ours sees it. Plain ASGI, no framework.

It counts bytes as they are read, keeps the deadlines, checks host, origin, token and kind of
content, and answers for what goes wrong behind it. Nothing behind it opens a file or a connection.
"""

import asyncio
import hmac
import ipaddress
import json
import time
import traceback
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from regraft.errors import UsageError, readable

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

OPEN_PATHS = ("/", "/healthz")  # without a token: they tell nothing of the images or the model
WRONG_TOKEN_S = 0.5  # a guess costs time; assumed
LEAST_TOKEN = 16  # characters; assumed
LINGER_S = 0.3  # a refused sender may read why before the connection ends; assumed


@dataclass(frozen=True)
class Limits:
    """What one server grants; all values assumed."""

    body_bytes: int = 32 * 2**20  # above a radiograph of 16 megapixels at 16 bits
    buffered_bytes: int = 256 * 2**20  # of all bodies together
    requests: int = 64  # being decoded or answered
    connections: int = 256
    header_s: float = 10
    body_s: float = 20
    total_s: float = 30
    stop_s: float = 10


@dataclass
class Refusal(Exception):
    """A request that is answered with an error."""

    status: int
    error: str
    detail: str
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)

    def body(self) -> bytes:
        return json.dumps({"error": self.error, "detail": self.detail}).encode("ascii")


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Attributes:
        hosts: Names that may stand in `Host`; addresses always may, unless `only_loopback`.
        token: To be sent as `Authorization: Bearer`; None: nobody needs one.
    """

    hosts: frozenset[str] = frozenset({"localhost"})
    only_loopback: bool = True
    token: str | None = None

    def knows(self, host: str) -> bool:
        """Whether this is a name of ours. A page elsewhere may point a name of its own at us."""
        name = host.lower()
        name = (
            name[1:].partition("]")[0] if name.startswith("[") else name.rpartition(":")[0] or name
        )
        if name in self.hosts:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not self.only_loopback

    def check(self, headers: dict[bytes, str]) -> None:
        """Refuses foreign names and pages."""
        if not self.knows(headers.get(b"host", "")):
            raise Refusal(421, "unknown-host", "this server is not known by that name")
        origin = headers.get(b"origin")
        if origin is not None and not self.knows(origin.partition("://")[2]):
            raise Refusal(403, "foreign-page", "pages of other sites may not ask")

    async def check_token(self, headers: dict[bytes, str]) -> None:
        if self.token is None:
            return
        scheme, _, given = headers.get(b"authorization", "").partition(" ")
        expected = self.token.encode("utf-8")
        if scheme.lower() != "bearer" or not hmac.compare_digest(
            given.strip().encode("utf-8"), expected
        ):
            await asyncio.sleep(WRONG_TOKEN_S if given else 0)
            challenge = [(b"www-authenticate", b"Bearer")]
            raise Refusal(401, "token", "send the token of this server", challenge)


def granted(host: str, token: str | None, names: Sequence[str], insecure: bool) -> Access:
    """Returns who may ask a server that is bound to `host`.

    Raises:
        UsageError: Others than this machine could ask, and no token keeps them out.
    """
    try:
        only_loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        only_loopback = False
    hint = "python -c 'import secrets; print(secrets.token_urlsafe())' makes a token"
    if not only_loopback and token is None and not insecure:
        raise UsageError(
            f"`--host {host}` lets other machines ask, and there is no `--token` to know them by",
            hint=f"give `--token`, or REGRAFT_TOKEN, or `--insecure` if all may ask; {hint}",
        )
    if token is not None and (len(token) < LEAST_TOKEN or not token.isascii()):
        raise UsageError(
            f"the token is not {LEAST_TOKEN} or more plain characters, and could be guessed",
            hint=hint,
        )
    known = {"localhost"} if only_loopback else {"localhost", host.lower()}
    return Access(frozenset(known | {name.lower() for name in names}), only_loopback, token)


class Gate:
    """ASGI middleware.

    Args:
        app: What is behind; it gets whole bodies, and none where it takes none.
        takes_bodies: Paths to which images are sent, by POST.
        tell: Of each request one line, and of our own mistakes a traceback.
    """

    def __init__(
        self,
        app: App,
        takes_bodies: frozenset[str],
        access: Access,
        limits: Limits,
        tell: Callable[[str], None],
    ) -> None:
        self.app, self.takes_bodies = app, takes_bodies
        self.access, self.limits, self.tell = access, limits, tell
        self.buffered_bytes = 0
        self.requests = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = _Request(scope, receive, send)
        try:
            async with asyncio.timeout(self.limits.total_s):
                await self._pass(request)
        except Refusal as refusal:
            await request.refuse(refusal)
        except TimeoutError:
            await request.refuse(Refusal(504, "too-slow", "no answer in time; try again"))
        except Exception:  # noqa: BLE001  a mistake of ours: the asker gets no traceback
            self.tell(traceback.format_exc())
            await request.refuse(Refusal(500, "mistake", "a mistake in the server"))
        finally:
            self.buffered_bytes -= request.num_bytes
            self.tell(request.line())

    async def _pass(self, request: "_Request") -> None:
        self.access.check(request.headers)
        path, method = request.scope["path"], request.scope["method"]
        if path not in OPEN_PATHS:
            await self.access.check_token(request.headers)
        if method == "POST" and path in self.takes_bodies:
            request.check_content()
            await self._read(request)
            if self.requests >= self.limits.requests:
                raise _busy()
            self.requests += 1
            try:
                await self.app(request.scope, request.replay, request.send)
            finally:
                self.requests -= 1
        else:
            await self.app(request.scope, request.replay, request.send)

    async def _read(self, request: "_Request") -> None:
        """Reads the body, and counts."""
        most = self.limits.body_bytes
        too_large = Refusal(413, "too-large", f"an image may have {most:,} bytes")
        if request.announced_bytes > most:
            raise too_large
        parts, more = [], True
        try:
            async with asyncio.timeout(self.limits.body_s):
                while more:
                    message = await request.receive()
                    if message["type"] == "http.disconnect":
                        raise Refusal(400, "cut-off", "the connection ended before the image did")
                    part = message.get("body", b"")
                    request.num_bytes += len(part)
                    self.buffered_bytes += len(part)
                    if request.num_bytes > most:
                        raise too_large
                    if self.buffered_bytes > self.limits.buffered_bytes:
                        raise _busy()
                    parts.append(part)
                    more = message.get("more_body", False)
        except TimeoutError as error:
            raise Refusal(408, "too-slow", "the image did not arrive in time") from error
        request.body = b"".join(parts)
        request.is_read = True


def _busy() -> Refusal:
    retry = [(b"retry-after", b"1")]
    return Refusal(503, "busy", "too many images at once; try again in a second", retry)


class _Request:
    """One request on its way through the gate."""

    def __init__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        self.scope, self.receive = scope, receive
        self.headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        self.status = 0
        self.num_bytes = 0
        self.body = b""
        length = self.headers.get(b"content-length", "")
        self.announced_bytes = int(length) if length.isdigit() else 0
        # What has no body is read; of the others, bytes that nobody wants end the connection.
        self.is_read = not self.announced_bytes and b"transfer-encoding" not in self.headers
        self._send, self._begun = send, time.monotonic()

    def check_content(self) -> None:
        """Takes raw images alone: a foreign page cannot send that type without asking first."""
        kind = self.headers.get(b"content-type", "").partition(";")[0].strip().lower()
        if not (kind.startswith("image/") or kind == "application/octet-stream"):
            detail = "send the bytes of one image, as image/... or application/octet-stream"
            raise Refusal(415, "content-type", detail)
        if b"content-encoding" in self.headers:
            raise Refusal(415, "content-encoding", "send the image as it is, not compressed")

    async def replay(self) -> Message:
        """Gives the body that was read, once; then, that the client is waiting."""
        if self.body is not None:
            body, self.body = self.body, None  # type: ignore[assignment]
            return {"type": "http.request", "body": body, "more_body": False}
        await asyncio.Event().wait()  # until the total deadline
        raise AssertionError("unreachable")

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if not self.is_read:
                message["headers"] = [*message["headers"], (b"connection", b"close")]
        elif not self.is_read and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            await asyncio.sleep(LINGER_S)
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)

    async def refuse(self, refusal: Refusal) -> None:
        if self.status:  # an answer has begun: all that is left is to end it
            return
        body = refusal.body()
        length = str(len(body)).encode("ascii")
        kind = (b"content-type", b"application/json")
        headers = [kind, (b"content-length", length), *refusal.headers]
        await self.send(
            {"type": "http.response.start", "status": refusal.status, "headers": headers}
        )
        await self.send({"type": "http.response.body", "body": body})

    def line(self) -> str:
        client = self.scope.get("client") or ("?", 0)
        path = readable(self.scope["path"])[:100]
        milliseconds = 1000 * (time.monotonic() - self._begun)
        return f"{client[0]} {self.scope['method']} {path} {self.status} {milliseconds:.0f} ms"
