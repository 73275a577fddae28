"""The coordinator's process: opens its key, starts the listeners, writes where it listens."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from cryptography import x509

from crypto.auditlog import FOLDER, AuditLog, KeptLog
from crypto.certificates import (
    ServerCredentials,
    check_own,
    check_revocations,
    format_time,
    key_sha256,
)
from crypto.identity import load_server, ssl_key_file
from crypto.locks import alone_in
from crypto.trust import Trust, load_trust
from protocol.environment import return_large_memory
from protocol.errors import CertificateRefused, ListStale
from server.addresses import Addresses, forget_addresses, write_addresses
from server.flower.superlink import SuperLinkOptions
from server.home import HOME_VARIABLE, IDENTITY, MEMBERS
from server.listeners.launcher import Coordinator, Sockets, serve
from server.listeners.loopback import LOOPBACK, TlsFiles, loopback_certificate
from server.listeners.sockets import ListenerOptions, listening
from server.runs import BegunRuns

EXPIRES_SOON = timedelta(days=14)

_LOG = logging.getLogger("fedseal.server")
_RUNTIME = ListenerOptions(LOOPBACK, 0)
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
        OwnCertificateExpired, OwnCertificateRevoked, ListStale: It would be of no use now.
        HomeBusy: Another coordinator of this home runs.
        AddressUnavailable: The coordinator cannot listen there.
        LogBroken: The log of acts is not the one that was written.
        InsideUnreachable: Connections inside this machine do not work.
    """
    return_large_memory()
    identity = home / IDENTITY
    credentials = load_server(identity, passphrase)
    require_valid_now(credentials.certificate, load_trust(identity), datetime.now(UTC))
    if not (home / MEMBERS).is_dir():
        raise CertificateRefused("the coordinator's home has no members folder")
    os.environ[HOME_VARIABLE] = str(home.resolve())
    os.environ["FLWR_HOME"] = str((home / "flower").resolve())
    with (
        alone_in(home),
        listening(listener) as owners,
        listening(_RUNTIME) as runtime,
        loopback_certificate(home / "flower") as inside,
        ssl_key_file(credentials.key) as (key_file, password),
    ):
        port = runtime[0].getsockname()[1]
        coordinator = _coordinator(home, credentials)
        options = SuperLinkOptions(
            runtime_port=port,
            authority_file=inside.certificate,
            certificate_file=inside.certificate,
            key_file=inside.key,
            key_password=inside.password,
            object_folder=home / "flower" / "objects",
        )
        shown = TlsFiles(identity / "server.crt", key_file, password)
        fleet_port = owners[0].getsockname()[1]
        addresses = Addresses(port, listener.host, fleet_port)
        forget_addresses(home)
        certificate = key_sha256(credentials.certificate.public_key())
        coordinator.log.record("server.start", certificate=certificate, host=listener.host, port=fleet_port)
        coordinator.runs.note_ends(lost=True)
        try:
            announce = partial(_announce, home, addresses, ready)
            serve(options, shown, Sockets(owners, runtime), coordinator, announce)
        finally:
            forget_addresses(home)
            coordinator.runs.note_all(_ENDS_S)
            coordinator.log.record("server.stop")
            coordinator.log.sign()


def require_valid_now(certificate: x509.Certificate, trust: Trust, now: datetime) -> None:
    """Return if a coordinator with this certificate and list would let owners in now, and be accepted.

    A certificate that will not be valid for long is a warning in the log.

    Raises:
        OwnCertificateExpired, OwnCertificateRevoked: Every owner would refuse the coordinator.
        ListStale: The coordinator would refuse every owner.
        CertificateRefused: The list is missing, malformed or not the authority's.
    """
    revocations = trust.revocations
    check_own(certificate, revocations, now)
    try:
        check_revocations(revocations, trust.authority, now)
    except CertificateRefused as error:
        raise ListStale(error.detail) from None
    end = certificate.not_valid_after_utc
    if end - now < EXPIRES_SOON:
        _LOG.warning("the coordinator's certificate is valid until %s only", format_time(end))


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
