"""Which members of a run still stand, by their certificates and the coordinator's revocation list."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256

from crypto.certificates import check_revocations, verify_signing_certificate
from crypto.trust import Trust
from protocol.errors import CertificateRefused
from protocol.messages import JoinReply
from server.cohort.attendance import exclude
from server.cohort.members import Member
from server.store import RunStore

_LOG = logging.getLogger("fedseal.server")
_POLL_S = 0.2
_MOST_UNFOUNDED = 2
"""Objections of one owner that no lost certificate followed; an honest owner may be some lists ahead."""


class Standing:
    """Judges members by their certificates, and heeds owners that know more about them.

    An owner that will not go on beside a member whose certificate it holds for invalid is not asked again
    before the coordinator has news: another revocation list, or an owner that lost its certificate.

    Args:
        store: Holds all owners' certificates, and records on what grounds they were judged last.
        trust: The federation's authority and its revocation list.
    """

    def __init__(self, store: RunStore, trust: Trust) -> None:
        self._store = store
        self._trust = trust
        self._expelled: tuple[x509.CertificateRevocationList, set[int]] | None = None
        self._waited: dict[str, Any] | None = None

    def judge(self, owners: Collection[Member]) -> list[Member]:
        """Leave owners out whose certificates have expired or were revoked; returns those that are new.

        Raises:
            CertificateRefused: The revocation list itself is not valid; nobody is left out for that.
        """
        grounds = self._grounds()
        lost = [one for one in owners if one.fingerprint in grounds["lost"] and not one.excluded]
        for owner in lost:
            exclude(self._store, owner, "its certificate is not valid any more")
        before = self._store.get("standing") or {"lost": []}
        if grounds != before:
            confirmed = not set(grounds["lost"]) <= set(before["lost"])
            with self._store.transaction():
                self._store.set("standing", grounds)
                for owner in (one for one in owners if one.objects):
                    self._ask_again(owner, confirmed=confirmed)
                    self._store.put_owner(owner.fingerprint, owner.facts())
        return lost

    def has_news(self, owners: Collection[Member]) -> bool:
        """Tell whether owners would be judged on other grounds than the last time."""
        before = self._store.get("standing")
        with suppress(CertificateRefused):
            if before is None or before["list"] != _digest(self._trust.revocations):
                return True
            # an expired certificate is of interest at once only to those that object
            return any(one.objects for one in owners) and bool(self._grounds() != before)
        # the list is being replaced, and is none yet
        return False

    def wait_for_news(self, owners: Collection[Member], limit_s: float) -> None:
        """After an objection, give the operator time to bring the list; once for the same grounds."""
        grounds = self._store.get("standing")
        if grounds == self._waited or not any(one.objects and not one.excluded for one in owners):
            return
        self._waited, deadline = grounds, time.monotonic() + limit_s
        self._store.event("awaiting_list", seconds=limit_s)
        _LOG.warning("waiting up to %.0f s for another revocation list", limit_s)
        while time.monotonic() < deadline and not self.has_news(owners):
            time.sleep(_POLL_S)

    def expelled(self, members: Collection[Member]) -> set[int]:
        """Return the nodes of members that were revoked; no exchange waits for them any more.

        Certificates are looked at when there is another list than the last time.
        """
        known = self._expelled
        with suppress(CertificateRefused):
            newest, now = self._trust.revocations, datetime.now(UTC)
            if known is None or known[0] is not newest:
                check_revocations(newest, self._trust.authority, now)
                gone = {one.node for one in members if not self._is_valid(one.joined, newest, now)}
                self._expelled = known = newest, gone
        # while the list is replaced, or stale, what it says is left to the judgement between rounds
        return set() if known is None else known[1]

    def _grounds(self) -> dict[str, Any]:
        """Return the newest list's digest, and the owners without a valid certificate by fingerprint."""
        newest, now = self._trust.revocations, datetime.now(UTC)
        check_revocations(newest, self._trust.authority, now)
        joins = {
            fingerprint: JoinReply.from_fields(facts["member"]["joined"])
            for fingerprint, facts in self._store.owners().items()
        }
        lost = sorted(one for one, joined in joins.items() if not self._is_valid(joined, newest, now))
        return {"list": _digest(newest), "lost": lost}

    def _is_valid(
        self, joined: JoinReply, revocations: x509.CertificateRevocationList, now: datetime
    ) -> bool:
        try:
            verify_signing_certificate(joined.certificate, self._trust.authority, revocations, now)
        except CertificateRefused:
            return False
        return True

    def _ask_again(self, owner: Member, *, confirmed: bool) -> None:
        owner.objects = False
        owner.unfounded = 0 if confirmed else owner.unfounded + 1
        if owner.unfounded > _MOST_UNFOUNDED and not owner.excluded:
            exclude(self._store, owner, "refuses members again and again whose certificates are valid")


def _digest(revocations: x509.CertificateRevocationList) -> str:
    return revocations.fingerprint(SHA256()).hex()
