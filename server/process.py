"""The coordinator's process: opens its key, starts the listeners, writes where it listens."""

from __future__ import annotations

import errno
import os
import secrets
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from crypto.auditlog import FOLDER, AuditLog, KeptLog
from crypto.certificates import ServerCredentials, key_sha256
from crypto.identity import load_server, ssl_key_file
from crypto.locks import alone_in
from crypto.trust import load_trust
from protocol.environment import return_large_memory
from protocol.errors import CertificateRefused
from server.addresses import Addresses, forget_addresses, write_addresses
from server.flower.superlink import SuperLinkOptions
from server.home import HOME_VARIABLE, IDENTITY, MEMBERS
from server.listeners.launcher import Coordinator, ListenerOptions, serve

_PORTS, _PORT_TRIES = range(20_000, 32_000), 100


def run_server(
    home: Path,
    passphrase: bytes,
    listener: ListenerOptions,
    runtime_port: int = 0,
    ready: Callable[[], None] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        home: The coordinator's home, with ``identity/`` and ``members/``.
        passphrase: Opens the TLS key.
        listener: Where owners connect.
        runtime_port: Loopback port of Flower's runtime API; 0 takes a free one.
        ready: Called once when all listeners accept connections.

    Raises:
        SecretUnavailable, CertificateRefused: The identity cannot be opened.
        HomeBusy: Another coordinator of this home runs.
        LogBroken: The log of acts is not the one that was written.
    """
    return_large_memory()
    identity = home / IDENTITY
    credentials = load_server(identity, passphrase)
    if not (home / MEMBERS).is_dir():
        raise CertificateRefused("the coordinator's home has no members folder")
    os.environ[HOME_VARIABLE] = str(home.resolve())
    os.environ["FLWR_HOME"] = str((home / "flower").resolve())
    port = runtime_port or free_port()
    with alone_in(home), ssl_key_file(credentials.key) as (key_file, password):
        coordinator = _coordinator(home, credentials)
        options = SuperLinkOptions(
            runtime_port=port,
            authority_file=identity / "ca.crt",
            certificate_file=identity / "server.crt",
            key_file=key_file,
            key_password=password,
            object_folder=home / "flower" / "objects",
        )
        addresses = Addresses(port, listener.host, listener.port)
        forget_addresses(home)
        certificate = key_sha256(credentials.certificate.public_key())
        coordinator.log.record(
            "server.start", certificate=certificate, host=listener.host, port=listener.port
        )
        try:
            serve(options, listener, coordinator, partial(_announce, home, addresses, ready))
        finally:
            forget_addresses(home)
            coordinator.log.record("server.stop")
            coordinator.log.sign()


def _coordinator(home: Path, credentials: ServerCredentials) -> Coordinator:
    trust = load_trust(home / IDENTITY)
    log = KeptLog(AuditLog(home / FOLDER), "coordinator", credentials.key, credentials.certificate)
    log.begin(trust.authority)
    return Coordinator(home, trust, log)


def _announce(home: Path, addresses: Addresses, ready: Callable[[], None] | None) -> None:
    write_addresses(home, addresses)
    if ready is not None:
        ready()


def free_port() -> int:
    """Return a loopback TCP port that is free now.

    It is below those that systems give to outgoing connections: one of these could take it before its
    program listens there, seconds later.

    Raises:
        OSError: None was free in many tries.
    """
    for port in secrets.SystemRandom().sample(_PORTS, _PORT_TRIES):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
