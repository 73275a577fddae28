"""The only module of the owner's node that touches private parts of Flower 1.41.0.

Each function says what it assumes; `tests/integration/test_flower_contract.py` checks every assumption by
name.
"""

from __future__ import annotations

import importlib
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from flwr.app import Context, Message, RecordDict

from crypto.certificates import OwnerCredentials
from crypto.pki import ssl_key_file
from protocol.errors import FlowerChanged, ServerUnavailable

PULL_BACKOFF_S = 0.02
_CONNECT_RETRIES = 0


@dataclass(frozen=True)
class FleetConnection:
    """Flower's fleet API as one node sees it.

    Attributes:
        node_id: The id that the coordinator gave this node; it stays with the transport key.
        receive: Returns the next message of this node without its content, or None.
        deliver: Fetches a message's content, runs an app on it, and sends the app's reply.
    """

    node_id: int
    receive: Callable[[], Any]
    deliver: Callable[[Any, Callable[[Message, Context], Message]], None]


def tls_context(
    authority_file: Path, certificate_file: Path, credentials: OwnerCredentials
) -> ssl.SSLContext:
    """Return a TLS 1.3 context that shows this owner's certificate and trusts one authority only."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(authority_file)
    with ssl_key_file(credentials.transport_key) as (key_file, password):
        context.load_cert_chain(certificate_file, key_file, password)
    return context


@contextmanager
def fleet_connection(
    address: str, context: ssl.SSLContext, credentials: OwnerCredentials
) -> Iterator[FleetConnection]:
    """Connect this node to a coordinator's fleet API and keep its heartbeat.

    Assumes `flwr.supernode.fleet_http_connection.http_request_response`, that it builds its client by
    `FleetHttpClient.from_server_address`, which is replaced here so that the client shows a certificate,
    and that it gives up by `flwr_exit`, which is replaced because it ends the whole process seconds later,
    even if its `SystemExit` is caught.

    Args:
        address: ``host:port`` of the coordinator's fleet listener.
        context: From `tls_context`.
        credentials: The transport key also signs Flower's node authentication.

    Raises:
        ServerUnavailable: The coordinator does not answer, or refuses this node.
        FlowerChanged: Flower does not have what this builds on.
    """
    try:
        fleet: Any = importlib.import_module("flwr.supernode.fleet_http_connection")
        client_class: Any = fleet.FleetHttpClient
        process_exit: Any = fleet.flwr_exit
    except (ImportError, AttributeError) as error:
        raise FlowerChanged("the fleet connection cannot be built") from error

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
            return cls(
                f"https://{server_address}",
                interceptors=interceptors,
                verify=context,
                retry_invoker=retry_invoker,
            )

    keys = (credentials.transport_key, credentials.transport_key.public_key())
    fleet.FleetHttpClient, fleet.flwr_exit = CertifiedClient, _give_up
    try:
        with fleet.http_request_response(
            address, False, None, keys, max_retries=_CONNECT_RETRIES
        ) as callbacks:
            node_id, receive, *rest = callbacks
            delivery = _Delivery(node_id, *rest)
            yield FleetConnection(node_id, _unless_run_ended(receive), _unless_run_ended(delivery.deliver))
    finally:
        fleet.FleetHttpClient, fleet.flwr_exit = client_class, process_exit


def _give_up(*_arguments: Any, **_options: Any) -> NoReturn:
    """Take the place of Flower's `flwr_exit`."""
    raise ServerUnavailable("the coordinator does not answer or refuses this node") from None


def _unless_run_ended(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return None where Flower says that the run has ended, which it does with a BaseException."""
    from flwr.supercore.run import RunNotRunningException

    def guarded(*arguments: Any) -> Any:
        try:
            return call(*arguments)
        except RunNotRunningException:
            return None

    return guarded


class _Delivery:
    """Moves one message's objects in and its reply's objects out.

    Assumes Flower's inflatable objects: a message is a tree of objects, each fetched by id.
    """

    def __init__(self, node_id: int, send: Any, get_run: Any, get_fab: Any, *objects: Any) -> None:
        del get_run, get_fab  # the run's bundle is never fetched: this node runs its own code
        self._node_id = node_id
        self._send = send
        self._pull, self._push, self._confirm = objects

    def deliver(self, received: Any, app: Callable[[Message, Context], Message]) -> None:
        from flwr.app.message import remove_content_from_message
        from flwr.supercore.inflatable.inflatable_object import (
            get_all_nested_objects,
            get_object_tree,
            no_object_id_recompute,
        )
        from flwr.supercore.inflatable.inflatable_utils import push_objects
        from flwr.supercore.task_identity import TaskIdentity

        started = time.monotonic()
        message, tree = received
        run_id = message.metadata.run_id
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, self._node_id, run_id
        full = self._fetch(message, tree)
        context = Context(
            run_id=run_id, node_id=self._node_id, node_config={}, state=RecordDict(), run_config={}
        )
        reply = app(full, context)
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            wanted, session = self._send(
                remove_content_from_message(reply), get_object_tree(reply), time.monotonic() - started
            )
            push_objects(
                get_all_nested_objects(reply),
                lambda identifier, content: self._push(run_id, session, identifier, content),
                object_ids_to_push=wanted,
            )

    def _fetch(self, message: Any, tree: Any) -> Message:
        from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
        from flwr.supercore.inflatable.inflatable_utils import (
            inflate_object_from_contents,
            pull_objects,
        )

        identifier, run_id = message.metadata.message_id, message.metadata.run_id
        contents = pull_objects(
            [item.object_id for item in iterate_object_tree(tree)],
            pull_object_fn=lambda key: self._pull(run_id, key),
            initial_backoff=PULL_BACKOFF_S,
            backoff_cap=1.0,
        )
        full = inflate_object_from_contents(identifier, contents)
        if not isinstance(full, Message):
            raise FlowerChanged("a message does not inflate to a message")
        full.metadata.__dict__["_message_id"] = identifier
        self._confirm(run_id, identifier)
        return full
