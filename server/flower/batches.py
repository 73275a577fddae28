"""Several of Flower's requests in one, and waiting for an event in place of asking again and again.

Flower 1.41.0 moves every object of a message by a request of its own, and both sides ask in intervals
whether something has come. A request costs the coordinator about five milliseconds, most of them in ten
layers of middleware, and a round of three exchanges takes hundreds. Here one request carries a message with
its objects, and a request for messages is answered when there is one. What a request does is done by
Flower's own handlers, after Flower's own authentication; its own requests stay as they are, so that
Flower's own nodes can be used.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from itertools import chain
from typing import Any, Final

from fastapi import HTTPException
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PushAppMessagesRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, TASK_TOKEN_HEADER
from flwr.supercore.dependencies.task import authenticate_task
from flwr.supercore.error import http_error_translator
from flwr.supercore.inflatable.inflatable_object import get_object_id, iterate_object_tree
from flwr.superlink.routers.fleet.node_auth import authenticate_node
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.superlink.servicer.runtime import runtime_handlers
from google.protobuf.message import DecodeError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from protocol.batches import (
    ANSWER_PATH,
    LONGEST_WAIT_S,
    PULL_PATH,
    PUSH_PATH,
    RECEIVE_PATH,
)
from protocol.errors import EncodingInvalid
from server.flower.bells import Bells
from server.flower.items import (
    ArrivingItems,
    Item,
    close,
    content_of,
    length_of,
    pieces_of,
    within_limit,
)

_PROTOBUF: Final = "application/protobuf"
_ACTIVATE_PATH: Final = "/v1/fleet/activate-node"
_LOOK_AGAIN_S: Final = 1.0
"""Nodes that vanish, and replies by Flower's own requests, are noticed without a bell after this time."""

_REPLIES: Final = "replies"

_MOST_STORED_AT_ONCE: Final = 2
"""Objects of different requests that are in memory at a time while they are checked and stored."""

Handler = Callable[[Request], Awaitable[Iterable[Item]]]
"""Answers a request by the items of a batch, which are made while they are sent."""


class Batches:
    """Flower's SuperLink with batched requests beside its own.

    Assumes that `superlink_app` built the app, that its link state is the one that Flower's routes use, and
    that handlers take ``(request, state)`` or ``(request, state, task)``.

    Args:
        app: From `server.flower.superlink_app`.
    """

    def __init__(self, app: Any) -> None:
        self._app = app
        self._bells = Bells()
        self._newest: dict[int, object] = {}
        self._closing = False
        self._storing = asyncio.Semaphore(_MOST_STORED_AT_ONCE)
        self._fleet: dict[str, Handler] = {RECEIVE_PATH: self._receive, ANSWER_PATH: self._answer}
        self._runtime: dict[str, Handler] = {PULL_PATH: self._pull, PUSH_PATH: self._push}

    async def fleet(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Serve what nodes may ask, as an ASGI app."""
        if scope["type"] == "http" and scope["path"] == _ACTIVATE_PATH and scope["method"] == "POST":
            request = Request({**scope, "app": self._app}, receive, send)
            response = await http_error_translator(request, self._activate)
            await response(scope, receive, send)
            return
        await self._serve(self._fleet, scope, receive, send)

    async def runtime(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Serve what this machine's own processes may ask, as an ASGI app."""
        await self._serve(self._runtime, scope, receive, send)

    def close(self) -> None:
        """Let nobody wait any longer, because the listeners end."""
        self._closing = True
        self._bells.ring_all()

    @property
    def _state(self) -> Any:
        return self._app.state.linkstate_factory.state()

    async def _serve(
        self, handlers: dict[str, Handler], scope: dict[str, Any], receive: Any, send: Any
    ) -> None:
        handler = handlers.get(scope.get("path", "")) if scope["type"] == "http" else None
        if handler is None or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        request = Request({**scope, "app": self._app}, receive, send)
        response = await http_error_translator(request, _answered_by(handler))
        await response(scope, receive, send)

    # --- fleet ---------------------------------------------------------------------------------------

    async def _activate(self, request: Any) -> Response:
        """Activate a node, even one that Flower still takes for connected.

        Where a connection broke unnoticed, Flower by itself refuses the node for a minute.
        """
        try:
            asked = ActivateNodeRequest.FromString(await request.body())
        except DecodeError:
            raise HTTPException(400, "Invalid request") from None
        request.state.protobuf_request, state = asked, self._state
        await asyncio.to_thread(authenticate_node, request)
        node_id = state.get_node_id_by_public_key(asked.public_key)
        if node_id is not None:
            await asyncio.to_thread(state.deactivate_node, node_id)
        answer = await asyncio.to_thread(fleet_handlers.activate_node, asked, state)
        return Response(answer.SerializeToString(), media_type=_PROTOBUF)

    async def _receive(self, request: Request) -> Iterable[Item]:
        """Answer a node's next message with its objects, as soon as there is one.

        Of several such requests of one node only the newest waits: an older one is of a connection or a
        process that is gone, and a message that was handed to it would be lost.
        """
        node = await self._node(request)
        if await self._items(request).all_small():
            raise EncodingInvalid("nothing is to be sent with this request")
        turn, name = object(), _bell_of(node.node_id)
        self._newest[node.node_id] = turn
        self._bells.ring(name)

        async def look() -> Iterable[Item] | None:
            if self._newest.get(node.node_id) is not turn:
                return ()
            return await asyncio.to_thread(self._next_message, node)

        return await self._awaited(request, name, look, LONGEST_WAIT_S, LONGEST_WAIT_S)

    def _next_message(self, node: Node) -> Iterable[Item] | None:
        state = self._state
        found = fleet_handlers.pull_messages(PullMessagesRequest(node=node), state, state.object_store)
        if not found.messages_list:
            return None
        run_id = found.messages_list[0].metadata.run_id

        def content(object_id: str) -> Item:
            held = _held(state, run_id, object_id)
            try:
                if length := length_of(held):
                    state.store_traffic(run_id, bytes_sent=length, bytes_recv=0)
            except BaseException:
                close(held)
                raise
            return held

        contents = within_limit(_objects(found.message_object_trees), content)
        return chain([found.SerializeToString()], contents)

    async def _answer(self, request: Request) -> Iterable[Item]:
        """Take a node's reply with its objects, and its receipt for the message that it answers."""
        node = await self._node(request)
        items = self._items(request)
        received, pushed = await items.small(), await items.small()
        asked = PushMessagesRequest.FromString(pushed)
        if asked.node.node_id != node.node_id or len(asked.messages_list) != 1:
            raise HTTPException(401, "Invalid SuperNode authentication")
        stored = await asyncio.to_thread(self._store_reply, node, received.decode("ascii"), asked)
        state, run_id = self._state, asked.messages_list[0].metadata.run_id

        def store(object_id: str, content: bytes) -> bool:
            # what Flower's handler does for an object, less the copies in a protobuf message
            kept = bool(state.store_object(run_id, stored.session_id, object_id, content))
            if kept:
                state.store_traffic(run_id, bytes_sent=0, bytes_recv=len(content))
            return kept

        await self._store_wanted(stored.objects_to_push, items, store)
        self._bells.ring(_REPLIES)
        return [stored.SerializeToString()]

    def _store_reply(self, node: Node, received: str, asked: PushMessagesRequest) -> Any:
        state, run_id = self._state, asked.messages_list[0].metadata.run_id
        receipt = ConfirmMessageReceivedRequest(node=node, run_id=run_id, message_object_id=received)
        fleet_handlers.confirm_message_received(receipt, state, state.object_store)
        return fleet_handlers.push_messages(asked, state)

    async def _node(self, request: Request) -> Node:
        """Return the node that signed a request; Flower's own check, against the key's own node."""
        encoded = request.headers.get(FLEET_HTTP_PUBLIC_KEY_HEADER, "")
        try:
            key = base64.b64decode(encoded, validate=True)
        except binascii.Error:
            key = b""
        node = Node(node_id=self._state.get_node_id_by_public_key(key) or 0)
        request.state.protobuf_request = PullMessagesRequest(node=node)
        await asyncio.to_thread(authenticate_node, request)
        return node

    # --- runtime -------------------------------------------------------------------------------------

    async def _push(self, request: Request) -> Iterable[Item]:
        """Take messages of the run's own process with their objects, and wake their nodes."""
        task = authenticate_task(request, request.headers.get(TASK_TOKEN_HEADER), self._state)
        items, state = self._items(request), self._state
        asked = PushAppMessagesRequest.FromString(await items.small())
        stored = await asyncio.to_thread(runtime_handlers.push_messages, asked, state, task)

        def store(object_id: str, content: bytes) -> bool:
            return bool(state.store_object(task.run_id, stored.session_id, object_id, content))

        await self._store_wanted(stored.objects_to_push, items, store)
        for message in asked.messages_list:
            self._bells.ring(_bell_of(message.metadata.dst_node_id))
        return [stored.SerializeToString()]

    async def _pull(self, request: Request) -> Iterable[Item]:
        """Answer the replies to some messages with their objects, as soon as there is one.

        The batch holds the request, the longest wait in milliseconds, and receipts for earlier replies.
        """
        task = authenticate_task(request, request.headers.get(TASK_TOKEN_HEADER), self._state)
        items = self._items(request)
        pulled, wait, received = await items.small(), await items.small(), await items.all_small()
        asked = PullAppMessagesRequest.FromString(pulled)
        for identifier in received:
            receipt = ConfirmMessageReceivedRequest(message_object_id=identifier.decode("ascii"))
            await asyncio.to_thread(runtime_handlers.confirm_message_received, receipt, self._state, task)

        async def look() -> Iterable[Item] | None:
            return await asyncio.to_thread(self._replies, asked, task)

        wait_s = min(int.from_bytes(wait[:4], "little") / 1000, LONGEST_WAIT_S)
        return await self._awaited(request, _REPLIES, look, wait_s, _LOOK_AGAIN_S)

    def _replies(self, asked: PullAppMessagesRequest, task: Any) -> Iterable[Item] | None:
        state = self._state
        found = runtime_handlers.pull_messages(asked, state, task)
        if not found.messages_list:
            return None

        def content(object_id: str) -> Item:
            return _held(state, task.run_id, object_id)

        contents = within_limit(_objects(found.message_object_trees), content)
        return chain([found.SerializeToString()], contents)

    # --- items ---------------------------------------------------------------------------------------

    def _items(self, request: Request) -> ArrivingItems:
        return ArrivingItems(request, self._state.object_store.spool)

    async def _store_wanted(
        self, wanted: Any, items: ArrivingItems, store: Callable[[str, bytes], bool]
    ) -> None:
        """Store objects that Flower asked for as they arrive, and take them off its list."""

        def keep(item: Item) -> None:
            content = content_of(item)
            object_id = get_object_id(content)
            if object_id in wanted and store(object_id, content):
                wanted.remove(object_id)

        async for item in items:
            # Flower takes an object as a whole; those of other requests wait in their files
            try:
                async with self._storing:
                    await asyncio.to_thread(keep, item)
            except asyncio.CancelledError:
                close(item)
                raise

    # --- waiting -------------------------------------------------------------------------------------

    async def _awaited(
        self,
        request: Request,
        name: str,
        look: Callable[[], Awaitable[Iterable[Item] | None]],
        wait_s: float,
        again_s: float,
    ) -> Iterable[Item]:
        """Return what `look` finds, looking whenever a bell rings, or an empty batch when time is up."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + wait_s
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            with self._bells.listening(name) as bell:
                while not gone.done() and not self._closing:
                    bell.clear()
                    found = await look()
                    left_s = min(deadline - clock(), again_s)
                    if found is not None or left_s <= 0:
                        return () if found is None else found
                    rung = asyncio.ensure_future(bell.wait())
                    await asyncio.wait({rung, gone}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
                    rung.cancel()
        finally:
            gone.cancel()
            with suppress(asyncio.CancelledError):
                await gone
        return ()


def _answered_by(handler: Handler) -> Callable[[Any], Awaitable[Response]]:
    async def call(request: Any) -> Response:
        try:
            answer = await handler(request)
        except (DecodeError, EncodingInvalid, UnicodeDecodeError):
            raise HTTPException(400, "Invalid batch") from None
        except ClientDisconnect:
            # a peer that goes away in the middle of a request is no fault of this process
            raise HTTPException(400, "Disconnected") from None
        return StreamingResponse(pieces_of(answer), media_type=_PROTOBUF)

    return call


async def _disconnected(request: Request) -> None:
    """Return when the peer of a request that was read to its end has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        continue


def _bell_of(node_id: int) -> str:
    return f"node {node_id}"


def _objects(trees: Iterable[Any]) -> list[str]:
    return [item.object_id for tree in trees for item in iterate_object_tree(tree)]


def _held(state: Any, run_id: int, object_id: str) -> Item:
    """Return an object that the SuperLink holds, empty if there is none; a large one as its file."""
    return state.object_store.open(object_id) or state.get_object(run_id, object_id) or b""
