"""What one peer may take of a listener: connections, requests, bytes and time.

A listener must go on serving its other peers while one of them opens connections and says nothing, sends
a byte a minute, or claims that gigabytes will follow. Nothing is ever decompressed, so that what a peer
sends is all the memory that it can fill.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from protocol.admission import REFUSAL_HEADER
from protocol.batches import MAX_BATCH_BYTES

_LOG = logging.getLogger("fedseal.server")

HEAD_S: Final = 20.0
"""Longest time from a connection, or from the first byte of a request, to the end of the request's head."""

BODY_S: Final = 30.0
"""Time for a body of any size; a longer one gets a second more for every `LEAST_RATE` bytes that came."""

LEAST_RATE: Final = 16 * 1024
"""Bytes per second below which a sender counts as stalling."""

MAX_HEAD_BYTES: Final = 64 * 1024
MAX_BODY_BYTES: Final = MAX_BATCH_BYTES + 1024 * 1024
"""Longest body: the longest batch, and room for what stands around it."""

MAX_CONNECTIONS: Final = 4_096
"""Most connections of a listener."""

MAX_REQUESTS: Final = 8
"""Most requests of one peer at a time; a node makes three."""

Receive = Callable[[], Awaitable[Any]]


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol, for peers that may never finish what they begin.

    Assumes that the parser calls `on_message_begin` and `on_headers_complete` of its protocol, and that
    `connections` holds the connections of the listener.
    """

    _head_timer: asyncio.TimerHandle | None = None
    _head_bytes = 0

    def connection_made(self, transport: Any) -> None:
        """Take a connection, unless there are too many."""
        super().connection_made(transport)
        self._await_head()
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._end_of_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes; a head that does not end is cut off."""
        if self._head_timer is not None:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._head_timer is not None and self._head_bytes > MAX_HEAD_BYTES:
            self.transport.abort()

    def on_message_begin(self) -> None:
        """Begin a request."""
        self._await_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Serve a request whose head has come."""
        self._end_of_head()
        super().on_headers_complete()

    def _await_head(self) -> None:
        self._end_of_head()
        self._head_timer = self.loop.call_later(HEAD_S, self.transport.abort)

    def _end_of_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
        self._head_timer, self._head_bytes = None, 0


class Bounded:
    """ASGI filter: bounds the body of every request, its time, and the requests of one peer.

    Args:
        app: The app behind it.
        peer: Key of the scope that names the peer.
    """

    def __init__(self, app: Any, peer: str) -> None:
        self._app = app
        self._peer = peer
        self._requests: Counter[str] = Counter()

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Any) -> None:
        """Serve a request within the limits, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        peer = str(scope.get(self._peer))
        status = 429 if self._requests[peer] >= MAX_REQUESTS else _refusal(dict(scope["headers"]))
        if status:
            await refuse(send, status)
            return
        self._requests[peer] += 1
        try:
            await _served(self._app, scope, _Body(receive), send)
        finally:
            self._requests[peer] -= 1
            if not self._requests[peer]:
                del self._requests[peer]


class _Body:
    """Receives a body as long as it keeps within size and time."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._size = 0
        self._complete = False
        self._started = asyncio.get_running_loop().time()
        self.broken = 0

    async def receive(self) -> Any:
        if self._complete:
            return await self._receive()
        deadline = self._started + BODY_S + self._size / LEAST_RATE
        try:
            async with asyncio.timeout_at(deadline):
                message = await self._receive()
        except TimeoutError:
            return self._give_up(408)
        self._size += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        return self._give_up(413) if self._size > MAX_BODY_BYTES else message

    def _give_up(self, status: int) -> dict[str, str]:
        self.broken, self._complete = status, True
        return {"type": "http.disconnect"}


async def _served(app: Any, scope: dict[str, Any], body: _Body, send: Any) -> None:
    """Let the app answer; where the body broke a limit, the peer gets that status alone."""

    async def unless_broken(message: Any) -> None:
        if not body.broken:
            await send(message)

    try:
        await app(scope, body.receive, unless_broken)
    except Exception:
        # the app was told that its peer is gone, and may say so by any exception
        if not body.broken:
            raise
    if body.broken:
        _LOG.warning("a request was given up: %d", body.broken)
        await refuse(send, body.broken)


def _refusal(headers: dict[bytes, bytes]) -> int:
    """Return the status that refuses a request by its head, or 0."""
    if headers.get(b"content-encoding", b"identity") != b"identity":
        return 415
    length = headers.get(b"content-length", b"0")
    return 413 if len(length) > 12 or int(length or b"0") > MAX_BODY_BYTES else 0


async def refuse(send: Any, status: int, code: str = "") -> None:
    """Answer an HTTP status, the code of an error if there is one, and nothing else; then close."""
    headers = [(b"content-length", b"0"), (b"connection", b"close")]
    if code:
        headers.append((REFUSAL_HEADER.encode(), code.encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


def allow_many_files() -> None:
    """Let this process open as many files and connections as the system allows it."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
