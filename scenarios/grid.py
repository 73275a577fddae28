"""An in-process grid: the same server and client apps, no sockets, no processes.

Messages are serialized and parsed again on the way, so that a simulated run moves the same bytes as a
deployed one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from protocol.errors import FedsealError
from protocol.records import from_record, to_record
from server.flower.grid import set_identity

_RUN_ID = 1
_SERVER_NODE = 1


@dataclass
class LocalNode:
    """One simulated owner's node: its app and the context that Flower would give it."""

    app: ClientApp
    context: Context


class LocalGrid(Grid):
    """Runs client apps in threads of this process.

    Args:
        nodes: App by node id.
        workers: Apps that run at the same time; 0 runs each one when its reply is pulled.
    """

    def __init__(self, nodes: Mapping[int, ClientApp], workers: int = 0) -> None:
        set_identity(_RUN_ID, _SERVER_NODE)
        self._nodes: dict[int, LocalNode] = {}
        for node, app in nodes.items():
            self.add(node, app)
        self._workers = ThreadPoolExecutor(workers) if workers else None
        self._pending: dict[str, Future[Message] | Message] = {}
        self._count = 0

    def close(self) -> None:
        """Stop the worker threads."""
        if self._workers is not None:
            self._workers.shutdown(wait=True)

    def add(self, node: int, app: ClientApp) -> None:
        """Bring a node online, as if its owner had started it."""
        context = Context(
            run_id=_RUN_ID, node_id=node, node_config={"node": node}, state=RecordDict(), run_config={}
        )
        self._nodes[node] = LocalNode(app, context)

    def remove(self, node: int) -> None:
        """Take a node offline, as if its owner had stopped it."""
        self._nodes.pop(node, None)

    def set_run(self, run: Any) -> None:
        """Accept Flower's run object; nothing here needs it."""

    @property
    def run(self) -> Any:
        """There is no Flower run in a simulated federation."""
        raise NotImplementedError("an in-process grid has no Flower run")

    def create_message(self, *_arguments: Any, **_options: Any) -> Message:
        """Flower's deprecated constructor; use `Message`."""
        raise NotImplementedError("use the Message constructor")

    def get_node_ids(self) -> list[int]:
        """Return the ids of all nodes."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Hand messages to their nodes; returns one id per message, empty for an unknown node."""
        identifiers = []
        for message in messages:
            node = message.metadata.dst_node_id
            if node not in self._nodes:
                identifiers.append("")
                continue
            self._count += 1
            identifier = f"message-{self._count}"
            message.metadata.__dict__["_message_id"] = identifier
            self._pending[identifier] = (
                self._workers.submit(self._deliver, message) if self._workers else message
            )
            identifiers.append(identifier)
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that are there."""
        replies = []
        for identifier in list(message_ids):
            pending = self._pending.get(identifier)
            if pending is None or (isinstance(pending, Future) and not pending.done()):
                continue
            del self._pending[identifier]
            replies.append(pending.result() if isinstance(pending, Future) else self._deliver(pending))
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Push messages and wait for all replies; the timeout does not apply in process."""
        del timeout
        waiting = {identifier for identifier in self.push_messages(messages) if identifier}
        replies: list[Message] = []
        while waiting:
            pulled = self.pull_messages(waiting)
            waiting -= {reply.metadata.reply_to_message_id for reply in pulled}
            replies.extend(pulled)
        return replies

    def _deliver(self, message: Message) -> Message:
        node = self._nodes.get(message.metadata.dst_node_id)
        if node is None:
            return Message(Error(ErrorCode.NODE_UNAVAILABLE, ""), reply_to=message)
        message.content = to_record(*from_record(message.content))
        try:
            return node.app(message, node.context)
        except FedsealError as error:
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, error.code), reply_to=message)
