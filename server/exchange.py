"""One exchange: a request to several nodes, and their replies as they come.

The grid may be Flower's own over HTTP or an in-process one. Replies are matched by the message that they
answer, never by the sender that they name. Everything that is sent or received is counted by kind.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid

from protocol.errors import EncodingInvalid
from protocol.records import from_record, to_records
from server.flower.grid import ReplyPuller, is_answer, nodes_by_key, online_nodes, push
from server.store import RunStore

_LOG = logging.getLogger("fedseal.server")
_CODE = re.compile(r"FS-[A-Z]{1,16}-\d{2}")
_FIRST_POLL_S, _LAST_POLL_S, _ALIVE_CHECK_S = 0.01, 0.25, 2.0

BLOB_CONTENT = {
    ("sent", "query.join"): "opened sums",
    ("received", "train.seal"): "ciphertext frames",
    ("received", "query.open"): "opened sums",
    ("sent", "train.fit"): "opened sums",
    ("sent", "query.open"): "ciphertext frames",
    ("sent", "query.close"): "opened sums",
}
"""What the blob beside a message holds; the bodies of all messages are signed metadata."""


@dataclass(frozen=True)
class Reply:
    """A node's answer: its message's bytes, or the code of the error that it answered.

    `part` says which of the requests to this node it answers.
    """

    node: int
    body: bytes = b""
    blob: bytes = b""
    code: str | None = None
    part: int = 0


@dataclass(frozen=True)
class Request:
    """What one node is sent; `content` says what the blob holds where `BLOB_CONTENT` does not."""

    body: bytes
    blob: bytes = b""
    content: str | None = None


Place = tuple[int, int]
"""A node and the number of one of its requests."""


class Exchanger:
    """Sends requests over a grid and streams the replies.

    Args:
        grid: Flower's grid.
        store: Counts what crosses the wire.

    Attributes:
        expelled: Gives the nodes that count as gone although Flower still takes them for connected.
    """

    def __init__(self, grid: Grid, store: RunStore) -> None:
        self._grid = grid
        self._store = store
        self._puller = ReplyPuller(grid)
        self._overdue: dict[str, int] = {}
        self._connected: dict[int, str] = {}
        self.expelled: Callable[[], Collection[int]] = tuple

    def online(self) -> dict[int, str]:
        """Return the nodes that are online, with the time of their last activation."""
        self._connected = online_nodes(self._grid)
        return self._connected

    def online_by_key(self) -> dict[str, tuple[int, str]]:
        """Return id and last activation of the nodes that are online, by public transport key."""
        found = nodes_by_key(self._grid)
        self._connected = dict(found.values())
        return found

    def late(self) -> Iterator[int]:
        """Yield the nodes whose answers came after their deadline; the answers are dropped."""
        if not self._overdue:
            return
        for message in self._puller.pull(list(self._overdue), 0.0):
            node = self._overdue.pop(message.metadata.reply_to_message_id, None)
            if node is not None and is_answer(message):
                _LOG.warning("an answer to %s came late and is dropped", message.metadata.message_type)
                yield node

    def ask(
        self,
        kind: str,
        requests: Mapping[int, Request] | Mapping[int, Sequence[Request]],
        deadline_s: float,
    ) -> Iterator[Reply]:
        """Send each node its requests and yield replies until all are there or time is up.

        Args:
            kind: Message type, for example ``train.fit``.
            requests: Request by node, or several of them, in the order in which they are numbered.
            deadline_s: Longest wait for all replies together.

        Yields:
            One reply per request that was answered, errors included; silent nodes yield nothing.
        """
        numbered = _numbered(requests)
        waiting = self._push(kind, numbered)
        lost, connected, gone = set[Place](), dict(self._connected), set[int]()
        deadline = time.monotonic() + deadline_s
        pause, alive_check = _FIRST_POLL_S, time.monotonic() + _ALIVE_CHECK_S
        while (waiting or lost) and time.monotonic() < deadline:
            asked_at = time.monotonic()
            replied = False
            for message in self._replies(waiting, min(deadline - asked_at, _ALIVE_CHECK_S)):
                place = waiting.pop(message.metadata.reply_to_message_id, None)
                self._overdue.pop(message.metadata.reply_to_message_id, None)
                if place is None:
                    continue
                if not is_answer(message):
                    lost.add(place)
                    continue
                replied = True
                waiting = {key: other for key, other in waiting.items() if other != place}
                yield self._received(kind, *place, message)
            if replied:
                pause = _FIRST_POLL_S
                continue
            # a grid that waits for replies itself has used this time up
            time.sleep(max(0.0, pause - (time.monotonic() - asked_at)))
            pause = min(pause * 1.3, _LAST_POLL_S)
            if time.monotonic() > alive_check:
                expelled = self.expelled()
                online = {node: since for node, since in self.online().items() if node not in expelled}
                missing = {node for node, _part in (*waiting.values(), *lost)} - online.keys()
                # a node that connects anew is off for a moment
                waiting = {key: place for key, place in waiting.items() if place[0] not in missing & gone}
                lost = {place for place in lost if place[0] not in missing & gone}
                back = {node for node, since in online.items() if connected.get(node, since) != since}
                again = {place for place in waiting.values() if place[0] in back}
                again |= {place for place in lost if place[0] in online}
                waiting |= self._ask_again(kind, {place: numbered[place] for place in sorted(again)})
                lost, connected, gone = lost - again, connected | online, missing
                alive_check = time.monotonic() + _ALIVE_CHECK_S

    def _replies(self, waiting: Mapping[str, Place], wait_s: float) -> Iterator[Message]:
        return self._puller.pull(list(waiting), wait_s) if waiting else iter(())

    def _ask_again(self, kind: str, numbered: Mapping[Place, Request]) -> dict[str, Place]:
        """Repeat requests to nodes that connected anew: they, or the answers, may have been lost.

        A node gives the same bytes again for the same request, so that nothing is done twice.
        """
        if not numbered:
            return {}
        _LOG.warning("%s is asked again of nodes that connected anew", kind)
        return self._push(kind, numbered)

    def _push(self, kind: str, numbered: Mapping[Place, Request]) -> dict[str, Place]:
        """Send requests; returns the node and the number of each by the id of its message."""
        records = to_records((one.body, one.blob) for one in numbered.values())
        messages = [
            Message(record, node, kind) for record, (node, _part) in zip(records, numbered, strict=True)
        ]
        identifiers = push(self._grid, messages)
        sent = {key: place for key, place in zip(identifiers, numbered, strict=True) if key}
        for place in sent.values():
            one = numbered[place]
            self._count("sent", kind, one.body, one.blob, one.content)
        self._overdue |= {key: node for key, (node, _part) in sent.items()}
        return sent

    def _received(self, kind: str, node: int, part: int, message: Message) -> Reply:
        if message.has_error():
            reason = message.error.reason or ""
            code = reason if _CODE.fullmatch(reason) else "FS-RUN-01"
            self._store.transfer("received", kind, "error code", len(reason.encode()))
            return Reply(node, code=code, part=part)
        try:
            body, blob = from_record(message.content)
        except EncodingInvalid as error:
            self._store.transfer("received", kind, "unclassified", 0)
            return Reply(node, code=error.code, part=part)
        self._count("received", kind, body, blob)
        return Reply(node, body, blob, part=part)

    def _count(
        self, direction: str, kind: str, body: bytes, blob: bytes, content: str | None = None
    ) -> None:
        self._store.transfer(direction, kind, "signed metadata", len(body))
        if blob:
            content = content or BLOB_CONTENT.get((direction, kind), "unclassified")
            self._store.transfer(direction, kind, content, len(blob))


def _numbered(requests: Mapping[int, Request] | Mapping[int, Sequence[Request]]) -> dict[Place, Request]:
    return {
        (node, part): one
        for node, asked in requests.items()
        for part, one in enumerate([asked] if isinstance(asked, Request) else asked)
    }
