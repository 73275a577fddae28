"""The owner's node: one warm process that answers a coordinator with the installed code.

Flower's own node starts a Python process for every message and runs code that the coordinator pushed.
This one keeps the owner open, and takes nothing from the coordinator but messages.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from pathlib import Path
from types import FrameType

from client.app import make_app
from client.flower import fleet_connection, tls_context
from client.owner import IDENTITY, Owner, open_owner
from protocol.errors import ServerUnavailable

_LOG = logging.getLogger("fedseal.client")
_ACTIVE_POLL_S, _IDLE_POLL_S, _ACTIVE_FOR_S = 0.03, 0.5, 10.0
_FIRST_RECONNECT_S, _LAST_RECONNECT_S = 0.5, 15.0


def run_node(home: Path, passphrase: bytes, address: str, *, keep_trying: bool = True) -> None:
    """Serve a coordinator until SIGINT or SIGTERM.

    Args:
        home: The owner's home folder.
        passphrase: Opens it.
        address: ``host:port`` of the coordinator's fleet listener.
        keep_trying: Whether to wait for a coordinator that is not there, and to reconnect.

    Raises:
        ServerUnavailable: The coordinator is not there and `keep_trying` is off.
        FedsealError: The owner's home cannot be opened.
    """
    stop = threading.Event()
    _stop_on_signals(stop)
    owner = open_owner(home, passphrase)
    try:
        pause = _FIRST_RECONNECT_S
        while not stop.is_set():
            try:
                _serve(owner, home, address, stop)
                pause = _FIRST_RECONNECT_S
            except ServerUnavailable as error:
                if not keep_trying:
                    raise
                _LOG.warning("%s; trying again in %.1f s", error, pause)
                stop.wait(pause)
                pause = min(pause * 2, _LAST_RECONNECT_S)
    finally:
        owner.close()


def _serve(owner: Owner, home: Path, address: str, stop: threading.Event) -> None:
    identity = home / IDENTITY
    context = tls_context(identity / "ca.crt", identity / "transport.crt", owner.credentials)
    app = make_app(lambda _context: owner)
    with fleet_connection(address, context, owner.credentials) as connection:
        _LOG.info("node of %s is connected", owner.name)
        last_message = time.monotonic()
        while not stop.is_set():
            received = connection.receive()
            if received is not None:
                connection.deliver(received, app)
                last_message = time.monotonic()
                continue
            active = time.monotonic() - last_message < _ACTIVE_FOR_S
            stop.wait(_ACTIVE_POLL_S if active else _IDLE_POLL_S)


def _stop_on_signals(stop: threading.Event) -> None:
    def handle(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
