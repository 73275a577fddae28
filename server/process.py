"""The coordinator's process: opens its key, starts the listeners, writes where it listens."""

from __future__ import annotations

import os
from collections.abc import Callable
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
from server.listeners.launcher import Coordinator, Sockets, serve
from server.listeners.sockets import ListenerOptions, listening
from server.runs import BegunRuns

_RUNTIME = ListenerOptions("127.0.0.1", 0)
_ENDS_S = 3.0


def run_server(
    home: Path,
    passphrase: bytes,
    listener: ListenerOptions,
    ready: Callable[[], None] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        home: The coordinator's home, with ``identity/`` and ``members/``.
        passphrase: Opens the TLS key.
        listener: Where owners connect.
        ready: Called once when all listeners accept connections.

    Raises:
        SecretUnavailable, CertificateRefused: The identity cannot be opened.
        HomeBusy: Another coordinator of this home runs.
        AddressUnavailable: The coordinator cannot listen there.
        LogBroken: The log of acts is not the one that was written.
    """
    return_large_memory()
    identity = home / IDENTITY
    credentials = load_server(identity, passphrase)
    if not (home / MEMBERS).is_dir():
        raise CertificateRefused("the coordinator's home has no members folder")
    os.environ[HOME_VARIABLE] = str(home.resolve())
    os.environ["FLWR_HOME"] = str((home / "flower").resolve())
    with (
        alone_in(home),
        listening(listener) as owners,
        listening(_RUNTIME) as runtime,
        ssl_key_file(credentials.key) as (key_file, password),
    ):
        port = runtime[0].getsockname()[1]
        coordinator = _coordinator(home, credentials)
        options = SuperLinkOptions(
            runtime_port=port,
            authority_file=identity / "ca.crt",
            certificate_file=identity / "server.crt",
            key_file=key_file,
            key_password=password,
            object_folder=home / "flower" / "objects",
        )
        fleet_port = owners[0].getsockname()[1]
        addresses = Addresses(port, listener.host, fleet_port)
        forget_addresses(home)
        certificate = key_sha256(credentials.certificate.public_key())
        coordinator.log.record("server.start", certificate=certificate, host=listener.host, port=fleet_port)
        coordinator.runs.note_ends(lost=True)
        try:
            serve(
                options, Sockets(owners, runtime), coordinator, partial(_announce, home, addresses, ready)
            )
        finally:
            forget_addresses(home)
            coordinator.runs.note_all(_ENDS_S)
            coordinator.log.record("server.stop")
            coordinator.log.sign()


def _coordinator(home: Path, credentials: ServerCredentials) -> Coordinator:
    trust = load_trust(home / IDENTITY)
    acts = AuditLog(home / FOLDER)
    log = KeptLog(acts, "coordinator", credentials.key, credentials.certificate)
    log.begin(trust.authority)
    return Coordinator(home, trust, log, BegunRuns(home, acts))


def _announce(home: Path, addresses: Addresses, ready: Callable[[], None] | None) -> None:
    write_addresses(home, addresses)
    if ready is not None:
        ready()
