"""Who may speak to a listener: decided at every connection and at every request, by the newest list.

TLS has verified chain and dates when these protocols see a connection. They check again what may change
while it is open: revocation, dates, and the freshness of the revocation list.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography import x509
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from crypto.auditlog import KeptLog
from crypto.certificates import LeafRole, check_certificate, key_sha256
from crypto.trust import Trust
from protocol.errors import CertificateRefused
from server.listeners.limits import BoundedProtocol, refuse

_LOG = logging.getLogger("fedseal.server")
_TCP_TABLE = Path("/proc/net/tcp")
_ESTABLISHED = "01"

PEER = "fedseal.peer"
"""Key of an ASGI scope that holds the fingerprint of the peer's certified key."""


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

    def admits(self, certificate: x509.Certificate | None) -> bool:
        """Tell whether a peer with this certificate is let in now."""
        try:
            if certificate is None:
                raise CertificateRefused("there is no certificate")
            trust = self._trust
            check_certificate(
                certificate, self._role, trust.authority, trust.revocations, datetime.now(UTC)
            )
        except CertificateRefused as error:
            self._note(certificate, error)
            return False
        return True

    def _note(self, certificate: x509.Certificate | None, error: CertificateRefused) -> None:
        """Record a refusal once, so that a stranger who keeps trying does not fill the log."""
        peer = "anonymous" if certificate is None else key_sha256(certificate.public_key())
        if (peer, error.detail) not in self._refused:
            self._refused.add((peer, error.detail))
            _LOG.warning("a peer was refused: %s", error)
            self._log.record("peer.refused", peer, listener=self._role, reason=error.detail)


def certified_protocol(admission: Admission) -> type[HttpToolsProtocol]:
    """Return the HTTP protocol of a listener that lets in whom `admission` admits.

    Assumes that uvicorn's protocol serves every request by ``self.app``.
    """

    class CertifiedProtocol(BoundedProtocol):
        certificate: x509.Certificate | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.certificate = _peer_certificate(transport)
            self.app = _each_request(self.app, admission, self.certificate)
            self.end_unless_admitted()

        def end_unless_admitted(self) -> None:
            """Close the connection, whatever it is doing, if its peer is no longer let in."""
            if not admission.admits(self.certificate):
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
        if certificate is None or not admission.admits(certificate):
            await refuse(send, 403)
            return
        await app({**scope, PEER: key_sha256(certificate.public_key())}, receive, send)

    return serve


def _peer_certificate(transport: Any) -> x509.Certificate | None:
    connection = transport.get_extra_info("ssl_object")
    der = None if connection is None else connection.getpeercert(binary_form=True)
    return None if der is None else x509.load_der_x509_certificate(der)
