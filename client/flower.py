"""The only module of the owner's node that touches private parts of Flower 1.41.0.

Each function says what it assumes; `tests/integration/test_flower_contract.py` checks every assumption by
name.
"""

from __future__ import annotations

import importlib
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import httpx
from flwr.app import Context, Message, RecordDict

from client.proxy import Proxy
from client.reach import trusting_context
from crypto.certificates import OwnerCredentials
from crypto.identity import load_pair
from protocol.batches import ANSWER_PATH, RECEIVE_PATH, RawMessage, fitting, join_batch, split_batch
from protocol.errors import FedsealError, FlowerChanged, ServerUnavailable

PULL_BACKOFF_S = 0.02
_CONNECT_RETRIES = 0
_TIMEOUT_S = 30.0
_SEND_AGAIN_S = (0.1, 0.3, 1.0, 3.0)
_LIMITS = httpx.Limits(keepalive_expiry=60.0)
"""Connections are kept while an owner trains, which takes longer than the five seconds of httpx; the
coordinator keeps them for 75 seconds."""


@dataclass(frozen=True)
class FleetConnection:
    """Flower's fleet API as one node sees it.

    The three calls may run in three threads at once.

    Attributes:
        node_id: The id that the coordinator gave this node; it stays with the transport key.
        receive: Waits for the next message of this node and returns it; None if none came in some seconds.
        answer: Runs an app on a message and returns its reply, ready to be sent.
        send: Sends a reply.
    """

    node_id: int
    receive: Callable[[], Message | None]
    answer: Callable[[Message, Callable[[Message, Context], Message]], Reply]
    send: Callable[[Reply], None]


@dataclass(frozen=True)
class Reply:
    """A reply as it leaves the node.

    Attributes:
        received: Id of the message that it answers.
        message: The reply without its content.
        tree: The ids of the objects that its content consists of.
        objects: These objects, by id.
        seconds: How long the app took.
    """

    received: str
    message: Message
    tree: Any
    objects: dict[str, Any]
    seconds: float


def tls_context(
    authority_file: Path, certificate_file: Path, credentials: OwnerCredentials
) -> ssl.SSLContext:
    """Return a TLS 1.3 context that shows this owner's certificate and trusts one authority only.

    A coordinator whose certificate is on the revocation list beside `authority_file` is refused, and every
    coordinator once that list is stale.

    Raises:
        CertificateRefused: One of the files cannot be read.
    """
    context = trusting_context(authority_file)
    load_pair(context, certificate_file, credentials.transport_key)
    return context


@contextmanager
def fleet_connection(
    address: str, context: ssl.SSLContext, credentials: OwnerCredentials, proxy: Proxy | None = None
) -> Iterator[FleetConnection]:
    """Connect this node to a coordinator's fleet API and keep its heartbeat.

    Assumes `flwr.supernode.fleet_http_connection.http_request_response`, that it builds its client by
    `FleetHttpClient.from_server_address`, which is replaced here so that the client shows a certificate,
    and that it gives up by `flwr_exit`, which is replaced because it ends the whole process seconds later,
    even if its `SystemExit` is caught. What is raised inside the block would be logged with its text and
    forgotten by it, and is kept from it therefore.

    Args:
        address: ``host:port`` of the coordinator's fleet listener.
        context: From `tls_context`.
        credentials: The transport key also signs Flower's node authentication.
        proxy: What the connection leads through; none that the environment names is ever used.

    Raises:
        ServerUnavailable: The coordinator does not answer or refuses this node, or what was done inside the
            block failed by another error than a coded one.
        FlowerChanged: Flower does not have what this builds on.
        FedsealError: A coded error of the block, as it is.
    """
    try:
        fleet: Any = importlib.import_module("flwr.supernode.fleet_http_connection")
        client_class: Any = fleet.FleetHttpClient
        process_exit: Any = fleet.flwr_exit
    except (ImportError, AttributeError) as error:
        raise FlowerChanged("the fleet connection cannot be built") from error

    made: list[Any] = []

    class CertifiedClient(client_class):  # type: ignore[misc]
        @classmethod
        def from_server_address(
            cls,
            server_address: str,
            _insecure: bool,
            _root_certificates: Any,
            interceptors: Any,
            *,
            retry_invoker: Any = None,
        ) -> Any:
            client = cls(
                f"https://{server_address}",
                interceptors=interceptors,
                verify=context,
                retry_invoker=retry_invoker,
            )
            client._client.close()
            client._client = httpx.Client(
                verify=context,
                timeout=_TIMEOUT_S,
                limits=_LIMITS,
                proxy=None if proxy is None else proxy.for_httpx(),
                trust_env=False,
            )
            made.append(client)
            return client

    keys = (credentials.transport_key, credentials.transport_key.public_key())
    failure: FedsealError | None = None
    fleet.FleetHttpClient, fleet.flwr_exit = CertifiedClient, _give_up
    try:
        with fleet.http_request_response(
            address, False, None, keys, max_retries=_CONNECT_RETRIES
        ) as callbacks:
            node_id, _receive, _send, _get_run, _get_fab, *objects = callbacks
            relay = _Relay(node_id, made[-1], *objects)
            try:
                yield FleetConnection(node_id, relay.receive, relay.answer, relay.send)
            except FedsealError as error:
                failure = error
            except Exception as error:  # its text may quote what was sent
                kind = type(error).__name__
                failure = ServerUnavailable(f"the exchange with the coordinator broke ({kind})")
    finally:
        fleet.FleetHttpClient, fleet.flwr_exit = client_class, process_exit
    if failure is not None:
        raise failure from None


def _give_up(*_arguments: Any, **_options: Any) -> NoReturn:
    """Take the place of Flower's `flwr_exit`."""
    raise ServerUnavailable("the coordinator does not answer or refuses this node") from None


class _Relay:
    """Moves messages with their objects in, and replies with theirs out, by the coordinator's batches.

    Assumes Flower's inflatable objects: a message is a tree of objects, each with an id of its own. What
    does not fit into a batch is moved object by object, by Flower's own requests. The run's bundle is
    never fetched: this node runs its own code.
    """

    def __init__(self, node_id: int, client: Any, pull: Any, push: Any, _confirm: Any) -> None:
        self._node_id = node_id
        self._client = client
        self._pull, self._push = pull, push

    def receive(self) -> Message | None:
        from flwr.proto.fleet_pb2 import PullMessagesResponse

        answered = _unless_run_ended(self._asked, RECEIVE_PATH, []) or b""
        with _readable():
            answer = split_batch(answered)
            if not answer:
                return None
            found = PullMessagesResponse.FromString(answer[0])
            return self._inflated(found.messages_list[0], found.message_object_trees[0], answer[1:])

    def _inflated(self, proto: Any, tree: Any, contents: Sequence[bytes]) -> Message | None:
        from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
        from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects

        identifier, run_id = proto.metadata.message_id, proto.metadata.run_id
        keys = [item.object_id for item in iterate_object_tree(tree)]
        held = dict(zip(keys, contents, strict=True))
        missing = [key for key, content in held.items() if not content]
        pulled = _unless_run_ended(
            pull_objects,
            missing,
            lambda key: self._pull(run_id, key),
            max_concurrent_pulls=1,
            initial_backoff=PULL_BACKOFF_S,
            backoff_cap=1.0,
        )
        if pulled is None:
            return None
        held.update(pulled)
        full = inflate_object_from_contents(identifier, held)
        if not isinstance(full, Message):
            raise ServerUnavailable("the coordinator sent an object that is no message")
        full.metadata.__dict__["_message_id"] = identifier
        return full

    def answer(self, message: Message, app: Callable[[Message, Context], Message]) -> Reply:
        from flwr.app.message import remove_content_from_message
        from flwr.supercore.inflatable.inflatable_object import (
            get_all_nested_objects,
            get_object_tree,
            no_object_id_recompute,
        )
        from flwr.supercore.task_identity import TaskIdentity

        started, run_id = time.monotonic(), message.metadata.run_id
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, self._node_id, run_id
        context = Context(
            run_id=run_id, node_id=self._node_id, node_config={}, state=RecordDict(), run_config={}
        )
        reply = app(message, context)
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            return Reply(
                message.metadata.message_id,
                remove_content_from_message(reply),
                get_object_tree(reply),
                get_all_nested_objects(reply),
                time.monotonic() - started,
            )

    def send(self, reply: Reply) -> None:
        from flwr.common.serde import message_to_proto
        from flwr.proto.fleet_pb2 import PushMessagesRequest, PushMessagesResponse
        from flwr.proto.node_pb2 import Node
        from flwr.supercore.inflatable.inflatable_object import no_object_id_recompute
        from flwr.supercore.inflatable.inflatable_utils import push_objects

        request = PushMessagesRequest(
            node=Node(node_id=self._node_id),
            messages_list=[message_to_proto(reply.message)],
            message_object_trees=[reply.tree],
            clientapp_runtime_list=[reply.seconds],
        )
        with no_object_id_recompute():
            contents = fitting(one.deflate() for one in reply.objects.values())
            items = [reply.received.encode(), request.SerializeToString(), *contents]
            answered = _unless_run_ended(self._delivered, items)
            if answered is None:
                return
            with _readable():
                stored = PushMessagesResponse.FromString(split_batch(answered)[0])
            run_id = reply.message.metadata.run_id
            _unless_run_ended(
                push_objects,
                reply.objects,
                lambda key, content: self._push(run_id, stored.session_id, key, content),
                object_ids_to_push=set(stored.objects_to_push),
                max_concurrent_pushes=1,
            )

    def _delivered(self, items: list[bytes]) -> bytes:
        """Send an answer, again where its connection breaks; what came twice is one answer."""
        for pause in _SEND_AGAIN_S:
            try:
                return self._asked(ANSWER_PATH, items)
            except httpx.TransportError:
                time.sleep(pause)
        return self._asked(ANSWER_PATH, items)

    def _asked(self, path: str, items: Iterable[bytes]) -> bytes:
        request = RawMessage(join_batch(items))
        answer = self._client._unary_unary(
            path=path, rpc_method=path, request=request, response_type=RawMessage
        )
        return bytes(answer.content)


@contextmanager
def _readable() -> Iterator[None]:
    """Refuse what a coordinator sends where it cannot be read; the node connects anew then.

    Raises:
        ServerUnavailable: Flower's parsers, which raise a dozen types, or the batch's cannot read it.
    """
    try:
        yield
    except (ServerUnavailable, FlowerChanged, httpx.HTTPError):
        raise
    except (
        Exception
    ) as error:  # whose text may quote what was sent; its type tells a fault of our own apart
        kind = type(error).__name__
        raise ServerUnavailable(f"the coordinator sent what cannot be read ({kind})") from None


def _unless_run_ended(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Return None where Flower says that the run has ended: by a BaseException, or by status 403."""
    from flwr.supercore.run import RunNotRunningException

    try:
        return call(*arguments, **options)
    except RunNotRunningException:
        return None
    except httpx.HTTPStatusError as error:
        if error.response.status_code != httpx.codes.FORBIDDEN:
            raise
        return None
