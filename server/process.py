"""The coordinator's process: opens its key, starts the listeners, writes where it listens."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

from crypto.pki import load_server, ssl_key_file
from protocol.errors import CertificateRefused
from server.app import HOME_VARIABLE
from server.flower import SuperLinkOptions
from server.launcher import ListenerOptions, serve
from server.submit import IDENTITY, MEMBERS, Addresses, forget_addresses, write_addresses


def run_server(
    home: Path,
    passphrase: bytes,
    listener: ListenerOptions,
    control_port: int = 0,
    ready: Callable[[], None] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        home: The coordinator's home, with ``identity/`` and ``members/``.
        passphrase: Opens the TLS key.
        listener: Where owners connect.
        control_port: Loopback port of the control API; 0 takes a free one.
        ready: Called once when both listeners accept connections.

    Raises:
        SecretUnavailable, CertificateRefused: The identity cannot be opened.
    """
    identity = home / IDENTITY
    credentials = load_server(identity, passphrase)
    if not (home / MEMBERS).is_dir():
        raise CertificateRefused("the coordinator's home has no members folder")
    os.environ[HOME_VARIABLE] = str(home.resolve())
    os.environ["FLWR_HOME"] = str((home / "flower").resolve())
    port = control_port or free_port()
    with ssl_key_file(credentials.key) as (key_file, password):
        options = SuperLinkOptions(
            control_port=port,
            authority_file=identity / "ca.crt",
            certificate_file=identity / "server.crt",
            key_file=key_file,
            key_password=password,
        )
        addresses = Addresses(port, listener.host, listener.port)
        forget_addresses(home)
        try:
            serve(options, listener, home / MEMBERS, partial(_announce, home, addresses, ready))
        finally:
            forget_addresses(home)


def _announce(home: Path, addresses: Addresses, ready: Callable[[], None] | None) -> None:
    write_addresses(home, addresses)
    if ready is not None:
        ready()


def free_port() -> int:
    """Return a loopback TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
