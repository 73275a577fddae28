"""The owner's node: one warm process that answers a coordinator with the installed code.

Flower's own node starts a Python process for every message and runs code that the coordinator pushed.
This one keeps the owner open, and takes nothing from the coordinator but messages.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from flwr.app import Context, Message

from client.address import Address, parse_address
from client.coordinator import CoordinatorWatch
from client.flower import FleetConnection, fleet_connection, tls_context
from client.owner import IDENTITY, Owner, open_owner
from client.proxy import Proxy
from client.reach import Reach
from crypto.certificates import check_own
from crypto.locks import alone_in
from protocol.batches import LONGEST_RECONNECT_S
from protocol.environment import heeded, importing
from protocol.errors import (
    CertificateRefused,
    EnvironmentUnfit,
    FedsealError,
    OwnCertificateExpired,
    OwnCertificateRevoked,
    ServerUnavailable,
)

_LOG = logging.getLogger("fedseal.client")
_STOP_CHECK_S = 0.2
T = TypeVar("T")
_FIRST_RECONNECT_S = 0.5
_LASTING_S = 0.2
"""A connection that stood for so long is made anew at once; if one breaks sooner, there is a pause."""


@dataclass(frozen=True)
class Way:
    """How a node gets to its coordinator.

    Attributes:
        address: Where the coordinator listens.
        proxy: What connections lead through, if anything.
    """

    address: Address
    proxy: Proxy | None


@dataclass
class Link:
    """One connection to a coordinator.

    Attributes:
        since: When it stood, by the monotonic clock; None if it never did.
    """

    since: float | None = None


def run_node(
    home: Path, passphrase: bytes, address: str, *, keep_trying: bool = True, proxy: Proxy | None = None
) -> None:
    """Serve a coordinator until SIGINT, SIGTERM or SIGHUP.

    Args:
        home: The owner's home folder.
        passphrase: Opens it.
        address: ``host:port`` of the coordinator's fleet listener.
        keep_trying: Whether to wait where waiting may help, and to reconnect: for a coordinator that is not
            there or does not let this owner in, and for a newer revocation list.
        proxy: What connections to the coordinator lead through.

    Raises:
        AddressMalformed: `address` is not one.
        OwnCertificateExpired: By this machine's clock the owner's certificate is not valid.
        OwnCertificateRevoked: The owner's certificate is revoked.
        ServerUnavailable: The coordinator is not there, is another, or does not let this owner in, and
            `keep_trying` is off; the class says why.
        CertificateRefused: The revocation list is missing or stale, or the coordinator does not take the
            owner's certificate, and `keep_trying` is off.
        EnvironmentUnfit: What trains cannot be imported.
        HomeBusy: Another node of this home runs.
        FedsealError: The owner's home cannot be opened.
    """
    where, stop = parse_address(address), threading.Event()
    _stop_on_signals(stop)
    with alone_in(home), closing(open_owner(home, passphrase)) as owner:
        pause = _FIRST_RECONNECT_S
        while not stop.is_set():
            link = Link()
            try:
                _serve(owner, home, Way(where, proxy), stop, link)
            except (ServerUnavailable, CertificateRefused) as error:
                if _is_final(owner, error):
                    raise
                if link.since is not None:
                    lasted = time.monotonic() - link.since
                    pause = 0.0 if lasted >= _LASTING_S else _FIRST_RECONNECT_S
                elif not keep_trying:
                    raise
                _LOG.warning("%s; trying again in %.1f s", error, pause)
                stop.wait(pause)
                pause = min(max(pause * 2, _FIRST_RECONNECT_S), LONGEST_RECONNECT_S)


def _is_final(owner: Owner, error: FedsealError) -> bool:
    """Tell whether waiting is of no use: a certificate that ran out, by this clock too, or is revoked."""
    if isinstance(error, OwnCertificateExpired):
        certificate, now = owner.credentials.transport_certificate, datetime.now(UTC)
        return not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc
    return isinstance(error, OwnCertificateRevoked)


def _serve(owner: Owner, home: Path, way: Way, stop: threading.Event, link: Link) -> None:
    """Answer a coordinator until told to stop, or until the connection breaks, which raises."""
    owner.describe_data()
    identity, credentials = home / IDENTITY, owner.credentials
    check_own(credentials.transport_certificate, owner.trust.revocations, datetime.now(UTC))
    context = partial(tls_context, identity / "ca.crt", identity / "transport.crt", credentials)
    reach = Reach(way.address, context, way.proxy)
    watch = CoordinatorWatch(owner.trust, reach)
    try:
        with fleet_connection(str(way.address), context(), credentials, way.proxy) as connection:
            app = _app_of(owner)
            link.since = time.monotonic()
            _LOG.info("node of %s is connected", owner.name)
            relay(connection, app, stop, watch.check)
    except ServerUnavailable:
        if link.since is None:
            # Flower's client does not say why; if it works now, the next try will too
            reach.require_admitted()
        raise


def _app_of(owner: Owner) -> Callable[[Message, Context], Message]:
    """Import what trains, which takes seconds and which a node that is not let in needs nothing of."""
    try:
        with importing():
            from client.app import make_app
    except Exception as error:  # its text has paths, and a library may raise anything
        raise EnvironmentUnfit(f"what trains cannot be imported ({type(error).__name__})") from None
    return make_app(lambda _context: owner)


def relay(
    connection: FleetConnection,
    app: Callable[[Message, Context], Message],
    stop: threading.Event,
    check: Callable[[], None],
) -> None:
    """Answer a coordinator's messages, one after the other, until told to stop.

    The next message comes in while one is answered, and a reply leaves meanwhile.

    Args:
        connection: From `client.flower.fleet_connection`.
        app: Answers a message.
        stop: Set to stop.
        check: Called several times a second; whatever it raises ends this.
    """
    receiving, sending = _begin(connection.receive), _begin(lambda: None)

    def check_all() -> None:
        check()
        if sending.done():
            sending.result()

    while _is_done(receiving, stop, check_all):
        message = receiving.result()
        receiving = _begin(connection.receive)
        if message is not None:
            reply = connection.answer(message, app)
            sending.result()
            sending = _begin(connection.send, reply)
    sending.result()


def _begin(call: Callable[..., T], *arguments: Any) -> Future[T]:
    """Run a call in a thread that does not keep the process from ending."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _is_done(future: Future[Any], stop: threading.Event, check: Callable[[], None]) -> bool:
    """Wait for a call; return False if the node is to stop first."""
    while not stop.is_set():
        check()
        if wait([future], _STOP_CHECK_S).done:
            return True
    return False


def _stop_on_signals(stop: threading.Event) -> None:
    def handle(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    for number in heeded(signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, handle)
