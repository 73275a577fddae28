"""One exchange: a request to several nodes, and their replies as they come.

The grid may be Flower's own over HTTP or an in-process one. Replies are matched by the message that they
answer, never by the sender that they name. Everything that is sent or received is counted by kind.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid

from protocol.errors import EncodingInvalid
from protocol.records import from_record, to_record
from server.flower import online_nodes, pull
from server.store import RunStore

_LOG = logging.getLogger("fedseal.server")
_CODE = re.compile(r"FS-[A-Z]{1,16}-\d{2}")
_FIRST_POLL_S, _LAST_POLL_S, _ALIVE_CHECK_S = 0.02, 0.25, 2.0

BLOB_CONTENT = {
    ("received", "train.seal"): "ciphertext frames",
    ("received", "query.open"): "opened sums",
    ("sent", "train.fit"): "opened sums",
    ("sent", "query.open"): "ciphertext frames",
    ("sent", "query.close"): "opened sums",
}
"""What the blob beside a message holds; the bodies of all messages are signed metadata."""


@dataclass(frozen=True)
class Reply:
    """A node's answer: its message's bytes, or the code of the error that it answered."""

    node: int
    body: bytes = b""
    blob: bytes = b""
    code: str | None = None


@dataclass(frozen=True)
class Request:
    """What one node is sent."""

    body: bytes
    blob: bytes = b""


class Exchanger:
    """Sends requests over a grid and streams the replies.

    Args:
        grid: Flower's grid.
        store: Counts what crosses the wire.
    """

    def __init__(self, grid: Grid, store: RunStore) -> None:
        self._grid = grid
        self._store = store

    def online(self) -> dict[int, str]:
        """Return the nodes that are online, with the time of their last activation."""
        return online_nodes(self._grid)

    def ask(
        self,
        kind: str,
        requests: Mapping[int, Request],
        deadline_s: float,
    ) -> Iterator[Reply]:
        """Send each node its request and yield replies until all are there or time is up.

        Args:
            kind: Message type, for example ``train.fit``.
            requests: Request by node.
            deadline_s: Longest wait for all replies together.

        Yields:
            One reply per node that answered, errors included; silent nodes yield nothing.
        """
        waiting = self._push(kind, requests)
        deadline = time.monotonic() + deadline_s
        pause, alive_check = _FIRST_POLL_S, time.monotonic() + _ALIVE_CHECK_S
        while waiting and time.monotonic() < deadline:
            messages = pull(self._grid, waiting)
            for message in messages:
                node = waiting.pop(message.metadata.reply_to_message_id, None)
                if node is not None:
                    yield self._received(kind, node, message)
            if messages:
                pause = _FIRST_POLL_S
                continue
            time.sleep(pause)
            pause = min(pause * 1.3, _LAST_POLL_S)
            if time.monotonic() > alive_check:
                online = self.online()
                waiting = {key: node for key, node in waiting.items() if node in online}
                alive_check = time.monotonic() + _ALIVE_CHECK_S

    def _push(self, kind: str, requests: Mapping[int, Request]) -> dict[str, int]:
        nodes = list(requests)
        messages = [
            Message(to_record(requests[node].body, requests[node].blob), node, kind) for node in nodes
        ]
        identifiers = self._grid.push_messages(messages)
        sent = {key: node for key, node in zip(identifiers, nodes, strict=True) if key}
        for node in sent.values():
            self._count("sent", kind, requests[node].body, requests[node].blob)
        return sent

    def _received(self, kind: str, node: int, message: Message) -> Reply:
        if message.has_error():
            reason = message.error.reason or ""
            code = reason if _CODE.fullmatch(reason) else "FS-RUN-01"
            self._store.transfer("received", kind, "error code", len(reason.encode()))
            return Reply(node, code=code)
        try:
            body, blob = from_record(message.content)
        except EncodingInvalid as error:
            self._store.transfer("received", kind, "unclassified", 0)
            return Reply(node, code=error.code)
        self._count("received", kind, body, blob)
        return Reply(node, body, blob)

    def _count(self, direction: str, kind: str, body: bytes, blob: bytes) -> None:
        self._store.transfer(direction, kind, "signed metadata", len(body))
        if blob:
            content = BLOB_CONTENT.get((direction, kind), "unclassified")
            self._store.transfer(direction, kind, content, len(blob))
