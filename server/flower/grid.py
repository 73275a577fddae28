"""Messages and nodes as a run's process sees them through Flower's grid."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from flwr.app import Error, Message
from flwr.serverapp import Grid

from protocol.batches import PULL_PATH, PUSH_PATH, RawMessage, fitting, join_batch, split_batch
from protocol.errors import EncodingInvalid

PULL_BACKOFF_S = 0.02
"""First wait for an object that is still being uploaded; Flower's own default is a whole second."""

_SUPERLINK_NODE = 1
_ONE = 1
"""Large objects are moved one after the other: each is copied several times on its way."""

_TRIES = 8
"""Looks for an object that is still being sent: about two seconds, with the waits between them."""


def push(grid: Grid, messages: Sequence[Message]) -> list[str]:
    """Push messages with their objects in one request; returns one id per message, empty if refused.

    Assumes that `HttpGrid` keeps its client as ``_runtime_client`` and makes a message's id as here. What
    does not fit into a batch is pushed by Flower's own requests. Other grids push as they are.
    """
    client = getattr(grid, "_runtime_client", None)
    if client is None:
        return list(grid.push_messages(list(messages)))
    from flwr.app.message import remove_content_from_message
    from flwr.common.serde import message_to_proto
    from flwr.proto.node_pb2 import Node
    from flwr.proto.runtime_pb2 import PushAppMessagesRequest, PushAppMessagesResponse
    from flwr.supercore.inflatable.inflatable_object import (
        get_all_nested_objects,
        get_object_tree,
        no_object_id_recompute,
    )
    from flwr.supercore.inflatable.inflatable_protobuf_utils import make_push_object_fn_protobuf
    from flwr.supercore.inflatable.inflatable_utils import push_objects

    with no_object_id_recompute():
        request, objects = PushAppMessagesRequest(), {}
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.object_id
            request.messages_list.append(message_to_proto(remove_content_from_message(message)))
            request.message_object_trees.append(get_object_tree(message))
            objects.update(get_all_nested_objects(message))
        items = [request.SerializeToString(), *fitting(one.deflate() for one in objects.values())]
        (answered,) = split_batch(_asked(client, PUSH_PATH, items))
        answer = PushAppMessagesResponse.FromString(answered)
        push_object = make_push_object_fn_protobuf(
            client.PushObject, Node(node_id=_SUPERLINK_NODE), 0, answer.session_id
        )
        wanted = set(answer.objects_to_push)
        push_objects(objects, push_object, object_ids_to_push=wanted, max_concurrent_pushes=_ONE)
    return list(answer.message_ids)


class ReplyPuller:
    """Pulls the replies to messages, each as soon as it is there.

    Assumes what `push` does, and that an object that is not there yet is announced by its tree. Content
    that did not fit into a batch is fetched message by message, so that at most one of those is in memory.

    Args:
        grid: Flower's grid over HTTP, or another, which pulls as it is.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._received: list[str] = []

    def pull(self, message_ids: Iterable[str], wait_s: float) -> Iterator[Message]:
        """Yield the replies that are there; if there is none, wait for the first, if the grid can wait."""
        client = getattr(self._grid, "_runtime_client", None)
        if client is None:
            yield from self._grid.pull_messages(set(message_ids))
            return
        from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
        from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

        request = PullAppMessagesRequest(message_ids=list(message_ids)).SerializeToString()
        receipts, self._received = [key.encode() for key in self._received], []
        items = [request, int(1000 * wait_s).to_bytes(4, "little"), *receipts]
        answer = split_batch(_asked(client, PULL_PATH, items))
        if not answer:
            return
        found, contents = PullAppMessagesResponse.FromString(answer[0]), iter(answer[1:])
        batches = []
        for message, tree in zip(found.messages_list, found.message_object_trees, strict=True):
            keys = [item.object_id for item in iterate_object_tree(tree)]
            batches.append((message, {key: next(contents) for key in keys}))
        del answer, contents
        tries = _TRIES if wait_s > 0 else 1
        while batches:
            message, held = batches.pop(0)
            full = self._inflated(client, message, held, tries)
            if full is not None:
                yield full

    def _inflated(
        self, client: Any, message: Any, contents: dict[str, bytes], tries: int
    ) -> Message | None:
        """Return a reply with its content; None if an object does not come, to be pulled again later.

        A node that dies while it sends leaves a reply whose objects never come. Flower would wait for
        them for many minutes, and no deadline of an exchange would hold.
        """
        from flwr.proto.node_pb2 import Node
        from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
        from flwr.supercore.inflatable.inflatable_utils import (
            ObjectPullError,
            inflate_object_from_contents,
            pull_objects,
        )

        identifier = message.metadata.message_id
        missing = [key for key, content in contents.items() if not content]
        pull_object = make_pull_object_fn_protobuf(client.PullObject, Node(node_id=_SUPERLINK_NODE), 0)
        try:
            contents.update(
                pull_objects(
                    missing,
                    pull_object,
                    max_concurrent_pulls=_ONE,
                    max_tries_per_object=tries,
                    initial_backoff=PULL_BACKOFF_S,
                    backoff_cap=1.0,
                )
            )
        except ObjectPullError:
            return None
        self._received.append(identifier)
        try:
            full = inflate_object_from_contents(identifier, contents)
        except Exception:  # a member's bytes: Flower's parsers raise what they like
            full = None
        # an answer, so that its sender is not asked again; its code is that of a malformed message
        return full if isinstance(full, Message) else _standing_for(message, EncodingInvalid.code)


def _standing_for(message: Any, code: str) -> Message:
    """Return the error reply that stands for one that cannot be read."""
    from flwr.app.message import make_message
    from flwr.common.constant import ErrorCode
    from flwr.common.serde import message_from_proto

    metadata = message_from_proto(message).metadata
    return make_message(metadata=metadata, error=Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, code))


def _asked(client: Any, path: str, items: Iterable[bytes]) -> bytes:
    """Send a batch and return the answer's bytes."""
    answer = client._unary_unary(
        path=path,
        rpc_method=path,
        request=RawMessage(join_batch(items)),
        response_type=RawMessage,
    )
    return bytes(answer.content)


def online_nodes(grid: Grid) -> dict[int, str]:
    """Return the nodes that are online, with the time of their last activation.

    Assumes `HttpGrid.get_nodes`; a grid without it reports node ids only.
    """
    get_nodes = getattr(grid, "get_nodes", None)
    if get_nodes is None:
        return dict.fromkeys(grid.get_node_ids(), "")
    return {node.node_id: str(node.last_activated_at) for node in get_nodes()}


def nodes_by_key(grid: Grid) -> dict[str, tuple[int, str]]:
    """Return id and last activation of the nodes that are online, by their public transport key.

    Assumes `Grid.get_nodes`, and that a node's record holds the key that it was registered with. A grid
    whose nodes have no keys reports their ids in place of them.
    """
    return {
        node.public_key.hex() or str(node.node_id): (node.node_id, str(node.last_activated_at))
        for node in grid.get_nodes()
    }


def is_answer(message: Message) -> bool:
    """Tell whether a reply comes from a node's app, and not from Flower for a node that is gone.

    Assumes the error code that `client.app` answers with.
    """
    from flwr.common.constant import ErrorCode

    return not message.has_error() or message.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION


def set_identity(run_id: int, node_id: int) -> None:
    """Give messages that are made in this process a run and a node.

    Assumes `flwr.supercore.task_identity.TaskIdentity`; only for grids without a SuperLink.
    """
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = node_id
    TaskIdentity.task_id = run_id
