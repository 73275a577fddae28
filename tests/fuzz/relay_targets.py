"""What a coordinator answers a node: its next message with its objects, and the receipt of a reply."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

from flwr.app import Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.task_identity import TaskIdentity

from client.flower import _Relay
from protocol.batches import RawMessage, join_batch
from protocol.errors import ServerUnavailable
from protocol.records import from_record, to_record
from tests.fuzz.mutations import mutate_bytes
from tests.fuzz.target import Target, require


def relay_targets() -> list[Target]:
    """Return both targets."""
    from flwr.proto.fleet_pb2 import PullMessagesResponse, PushMessagesResponse

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 3, 1, 3
    message = Message(to_record(b'{"a":1}', bytes(range(256))), 7, "train.fit")
    message.metadata.__dict__["_message_id"] = message.object_id
    with no_object_id_recompute():
        tree, objects = get_object_tree(message), get_all_nested_objects(message)
        contents = [objects[item.object_id].deflate() for item in iterate_object_tree(tree)]
        pulled = PullMessagesResponse(
            messages_list=[message_to_proto(remove_content_from_message(message))],
            message_object_trees=[tree],
        ).SerializeToString()
    stored = PushMessagesResponse(objects_to_push=["a1" * 32], session_id="s").SerializeToString()

    def relay(answer: bytes) -> _Relay:
        client = SimpleNamespace(_unary_unary=lambda **_request: RawMessage(answer))

        def gone(*_arguments: Any) -> bytes:
            raise ServerUnavailable("the object is not there")

        return _Relay(7, client, gone, lambda *_arguments: None, None)

    received = relay(join_batch([pulled, *contents])).receive()
    require(
        received is not None and from_record(received.content)[0] == b'{"a":1}', "the seed is no message"
    )
    reply = relay(b"").answer(received, lambda one, _context: Message(RecordDict(), reply_to=one))

    def make_pulled(rng: random.Random) -> bytes:
        items = [pulled, *contents]
        place = rng.randrange(len(items) + 1)
        if place == len(items):
            return mutate_bytes(join_batch(items), rng)
        items[place] = mutate_bytes(items[place], rng, contents)
        return join_batch(items[: rng.randint(1, len(items))] if rng.random() < 0.2 else items)

    def make_stored(rng: random.Random) -> bytes:
        whole = join_batch([stored])
        return mutate_bytes(whole, rng) if rng.random() < 0.5 else join_batch([mutate_bytes(stored, rng)])

    return [
        Target("a node's next message", 6, make_pulled, lambda data: void(relay(data).receive())),
        Target("receipts of replies", 3, make_stored, lambda data: relay(data).send(reply)),
    ]


def void(_value: object) -> None:
    """Drop a value: whatever a coordinator sends whole is a message."""
