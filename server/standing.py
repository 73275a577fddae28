"""Which members of a run still stand, by their certificates and the newest revocation list."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256

from crypto.certificates import check_revocations, verify_signing_certificate
from crypto.trust import Trust
from protocol.errors import CertificateRefused
from server.members import Member
from server.rounds import RoundRunner
from server.store import RunStore


class Standing:
    """Judges members by their certificates.

    Args:
        store: Records by which list members were judged, and what changed for them.
        trust: The federation's authority and its revocation list.
    """

    def __init__(self, store: RunStore, trust: Trust) -> None:
        self._store = store
        self._trust = trust
        self._expelled: tuple[x509.CertificateRevocationList, set[int]] | None = None

    def judge(self, runner: RoundRunner) -> None:
        """Leave members out of the run whose certificates have expired or were revoked.

        Raises:
            CertificateRefused: The revocation list itself is not valid; nobody is left out for that.
        """
        session = runner.session
        check_revocations(self._trust.revocations, self._trust.authority, datetime.now(UTC))
        self.heed_objections((*session.members.values(), *session.left.values()))
        for member in session.members.values():
            if not member.excluded and not self._is_certified(member):
                runner.attendance.exclude(member, "its certificate is not valid any more")
                session.reduced = True

    def heed_objections(self, owners: Iterable[Member]) -> None:
        """Where there is another list, let those be asked again that would not seal beside a member.

        Raises:
            CertificateRefused: The revocation list cannot be read.
        """
        newest = self._trust.revocations
        if not self._is_another(newest):
            return
        with self._store.transaction():
            self._store.set("revocations", _digest(newest))
            for owner in (one for one in owners if one.objects):
                owner.objects = False
                self._store.put_owner(owner.fingerprint, owner.facts())

    def has_another_list(self) -> bool:
        """Tell whether there is another revocation list than that by which members were last judged."""
        with suppress(CertificateRefused):
            return self._is_another(self._trust.revocations)
        # it is being replaced, and is none yet
        return False

    def expelled(self, runner: RoundRunner) -> set[int]:
        """Return the nodes of members that were revoked; no exchange waits for them any more.

        Certificates are looked at when there is another list than the last time.
        """
        known = self._expelled
        try:
            newest = self._trust.revocations
        except CertificateRefused:
            # it is being replaced; what it says is judged between rounds
            return set() if known is None else known[1]
        if known is None or known[0] is not newest:
            members = runner.session.members.values()
            gone = {member.node for member in members if not self._is_certified(member)}
            self._expelled = known = newest, gone
        return known[1]

    def _is_another(self, revocations: x509.CertificateRevocationList) -> bool:
        return bool(self._store.get("revocations") != _digest(revocations))

    def _is_certified(self, member: Member) -> bool:
        trust, now = self._trust, datetime.now(UTC)
        try:
            verify_signing_certificate(member.joined.certificate, trust.authority, trust.revocations, now)
        except CertificateRefused:
            return False
        return True


def _digest(revocations: x509.CertificateRevocationList) -> str:
    return revocations.fingerprint(SHA256()).hex()
