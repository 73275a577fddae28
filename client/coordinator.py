"""Whether the coordinator that a node is connected to is still the federation's."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from datetime import UTC, datetime

from crypto.certificates import check_revocations
from crypto.trust import Trust
from protocol.errors import ServerUnavailable

_HANDSHAKE_S = 5.0


class CoordinatorWatch:
    """Looks at a coordinator's certificate again whenever the revocation list has changed.

    The connection itself stays as it is, so that no message is lost because of a list that only names
    others.

    Args:
        trust: The owner's authority and its list as it is now.
        address: ``host:port`` of the coordinator.
        context: Makes the TLS context of a new connection, with the list as it is now.
    """

    def __init__(self, trust: Trust, address: str, context: Callable[[], ssl.SSLContext]) -> None:
        self._trust = trust
        self._host, _, self._port = address.rpartition(":")
        self._context = context
        self._known = trust.revocations

    def check(self) -> None:
        """Return if the coordinator may be talked to now.

        Raises:
            CertificateRefused: The list is missing, forged or stale.
            ServerUnavailable: The coordinator's certificate is no longer accepted.
        """
        revocations = self._trust.revocations
        check_revocations(revocations, self._trust.authority, datetime.now(UTC))
        if revocations is self._known:
            return
        try:
            with (
                socket.create_connection((self._host, int(self._port)), timeout=_HANDSHAKE_S) as raw,
                self._context().wrap_socket(raw, server_hostname=self._host),
            ):
                self._known = revocations
        except OSError:
            raise ServerUnavailable("the coordinator's certificate is no longer accepted") from None
