"""Whether the coordinator that a node is connected to is still the federation's."""

from __future__ import annotations

from datetime import UTC, datetime

from client.reach import Reach
from crypto.certificates import check_revocations
from crypto.trust import Trust


class CoordinatorWatch:
    """Looks at a coordinator's certificate again whenever the revocation list has changed.

    The connection itself stays as it is, so that no message is lost because of a list that only names
    others.

    Args:
        trust: The owner's authority and its list as it is now.
        reach: The way to the coordinator.
    """

    def __init__(self, trust: Trust, reach: Reach) -> None:
        self._trust = trust
        self._reach = reach
        self._known = trust.revocations

    def check(self) -> None:
        """Return if the coordinator may be talked to now.

        Raises:
            CertificateRefused: The list is missing, forged or stale.
            ServerUnavailable: The coordinator's certificate is no longer accepted, or it is away.
        """
        revocations = self._trust.revocations
        check_revocations(revocations, self._trust.authority, datetime.now(UTC))
        if revocations is self._known:
            return
        with self._reach.connected():
            self._known = revocations
