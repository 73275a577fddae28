"""Who may speak to a listener: decided at every connection and at every request, by the newest list.

TLS has verified chain and dates when these protocols see a connection. They check again what may change
while it is open: revocation, dates, and the freshness of the revocation list.
"""

from __future__ import annotations

import logging
import os
import ssl
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from crypto.auditlog import KeptLog
from crypto.certificates import (
    LeafRole,
    check_certificate,
    check_own,
    check_revocations,
    common_name,
    key_sha256,
)
from crypto.trust import Trust
from protocol.admission import REFUSAL_STATUS
from protocol.errors import CertificateRefused, ListStale, OwnCertificateExpired, OwnCertificateRevoked
from server.listeners.limits import BoundedProtocol, refuse

_LOG = logging.getLogger("fedseal.server")
_TCP_TABLE = Path("/proc/net/tcp")
_ESTABLISHED = "01"

PEER = "fedseal.peer"
"""Key of an ASGI scope that holds the fingerprint of the peer's certified key."""

CERTIFICATE = "fedseal.certificate"
"""Key of an ASGI scope that holds the peer's certificate."""


TOLD: Final = (OwnCertificateExpired.code, OwnCertificateRevoked.code, ListStale.code)
"""What a refused peer is told of; whoever has a certificate for another use is just cut off."""

_SAID_AGAIN_S: Final = 60.0
_MOST_NOTES: Final = 5
_DATES: Final = (9, 10)
"""OpenSSL's X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED."""


class Admission:
    """Decides about the certificates of one listener.

    Args:
        trust: The authority, and its list as it is now.
        role: The only role that is let in.
        log: Where the first refusal of every certificate is recorded.
    """

    def __init__(self, trust: Trust, role: LeafRole, log: KeptLog) -> None:
        self._trust = trust
        self._role = role
        self._log = log
        self._refused: set[tuple[str, str]] = set()
        self._noted: dict[tuple[str, str], deque[float]] = {}
        self._said: dict[str, float] = {}

    def admits(self, certificate: x509.Certificate | None) -> bool:
        """Tell whether a peer with this certificate is let in now."""
        return self.refusal(certificate) is None

    def refusal(self, certificate: x509.Certificate | None) -> str | None:
        """Return the code of the error for which a peer is refused now; None if it is let in."""
        now = datetime.now(UTC)
        try:
            if certificate is None:
                raise CertificateRefused("there is no certificate")
            trust = self._trust
            check_certificate(certificate, self._role, trust.authority, trust.revocations, now)
        except CertificateRefused as error:
            code = error.code if certificate is None else self._code_for_its_holder(certificate, now)
            self.note(certificate, code, error.detail)
            return code
        return None

    def _code_for_its_holder(self, certificate: x509.Certificate, now: datetime) -> str:
        trust = self._trust
        try:
            check_revocations(trust.revocations, trust.authority, now)
        except CertificateRefused:
            return ListStale.code
        try:
            check_own(certificate, trust.revocations, now)
        except CertificateRefused as error:
            return error.code
        return CertificateRefused.code

    def note(self, certificate: x509.Certificate | None, code: str, reason: str) -> None:
        """Record a refusal once, or a few times a minute where it comes and goes: nobody fills the log."""
        name, peer = "a peer", "anonymous"
        if certificate is not None:
            # the authority has signed it, so that it is a plain word
            name = common_name(certificate.subject)
            peer = key_sha256(certificate.public_key())
        now, key = time.monotonic(), (peer, code)
        noted = self._noted.setdefault(key, deque(maxlen=_MOST_NOTES))
        is_flood = len(noted) == _MOST_NOTES and now - noted[0] < _SAID_AGAIN_S
        is_new = key not in self._refused and not is_flood
        self._refused.add(key)
        if is_new:
            noted.append(now)
            _LOG.warning("%s: %s was refused: %s", code, name, reason)
            self._log.record("peer.refused", peer, listener=self._role, reason=reason)

    def forgive(self, certificate: x509.Certificate, code: str) -> None:
        """Let a refusal be recorded again, because what it was for is over."""
        self._refused.discard((key_sha256(certificate.public_key()), code))

    def note_handshake(self, error: ssl.SSLError, peer: Any) -> None:
        """Say why a TLS handshake failed, each reason once a minute; silent about what is no TLS at all."""
        code = CertificateRefused.code
        if isinstance(error, ssl.SSLCertVerificationError):
            reason = error.verify_message
            if error.verify_code in _DATES:
                code = OwnCertificateExpired.code
        elif error.reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
            reason = "there is no certificate"
        else:
            return
        now = time.monotonic()
        if now - self._said.get(reason, -_SAID_AGAIN_S) < _SAID_AGAIN_S:
            return
        self._said[reason] = now
        where = f"from {peer[0]} " if peer else ""
        _LOG.warning("%s: a connection %swas refused: %s", code, where, reason)
        self._log.record("peer.refused", "unknown", listener=self._role, reason=reason)


def certified_protocol(admission: Admission) -> type[HttpToolsProtocol]:
    """Return the HTTP protocol of a listener that lets in whom `admission` admits.

    Assumes that uvicorn's protocol serves every request by ``self.app``.
    """

    class CertifiedProtocol(BoundedProtocol):
        certificate: x509.Certificate | None = None
        is_told = False

        def handshake_failed(self, error: ssl.SSLError, peer: Any) -> None:
            """Note why a connection was not made; see `server.listeners.handshakes`."""
            admission.note_handshake(error, peer)

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.certificate = _peer_certificate(transport)
            self.app = _each_request(self.app, admission, self.certificate)
            code = admission.refusal(self.certificate)
            # its first request is answered with the code, and it has the time of a request's head for it
            self.is_told = code in TOLD
            if code is not None and not self.is_told:
                self.transport.abort()

        def end_unless_admitted(self) -> None:
            """Close the connection, whatever it is doing, if its peer is no longer let in."""
            if not self.is_told and not admission.admits(self.certificate):
                self.transport.abort()

    return CertifiedProtocol


class SameUserProtocol(HttpToolsProtocol):
    """The HTTP protocol of the loopback listener: only processes of this user are let in.

    The kernel's table says to whom the other end of a loopback connection belongs.
    """

    def connection_made(self, transport: Any) -> None:
        """Close a connection that another user of this machine has opened."""
        super().connection_made(transport)
        peer, own = (transport.get_extra_info(end) for end in ("peername", "sockname"))
        if loopback_user(peer, own) != os.geteuid():
            _LOG.warning("a connection of another user of this machine was closed")
            transport.abort()


def loopback_user(
    peer: tuple[str, int] | None, own: tuple[str, int], table: Path = _TCP_TABLE
) -> int | None:
    """Return the user id that owns the other end of a connection on this machine; None if it is not found.

    Both ends are compared: sockets of two users may have one port, if they are connected to different ones.

    Args:
        peer: IPv4 address and port of the other end.
        own: The same of this end.
        table: The kernel's table of IPv4 sockets, see proc(5).
    """
    if peer is None:
        return None
    wanted = [_as_in_the_table(peer), _as_in_the_table(own), _ESTABLISHED]
    for line in table.read_text(encoding="ascii").splitlines()[1:]:
        fields = line.split()
        if fields[1:4] == wanted:
            return int(fields[7])
    return None


def _as_in_the_table(address: tuple[str, int]) -> str:
    octets = bytes(map(int, address[0].split(".")))
    return f"{int.from_bytes(octets, 'little'):08X}:{address[1]:04X}"


def end_refused_connections(connections: set[Any]) -> None:
    """Close the open connections of a listener whose peers are no longer let in."""
    for connection in list(connections):
        check: Callable[[], None] | None = getattr(connection, "end_unless_admitted", None)
        if check is not None:
            check()


def _each_request(app: Any, admission: Admission, certificate: x509.Certificate | None) -> Any:
    async def serve(scope: dict[str, Any], receive: Any, send: Any) -> None:
        code = admission.refusal(certificate)
        if certificate is None or code is not None:
            await refuse(send, REFUSAL_STATUS, code or "")
            return
        peer = {PEER: key_sha256(certificate.public_key()), CERTIFICATE: certificate}
        await app({**scope, **peer}, receive, send)

    return serve


def _peer_certificate(transport: Any) -> x509.Certificate | None:
    connection = transport.get_extra_info("ssl_object")
    der = None if connection is None else connection.getpeercert(binary_form=True)
    return None if der is None else x509.load_der_x509_certificate(der)
