"""Who is in a list: checks on members and round lists that joining and rounds share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import NamedTuple, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from client.owner import Owner
from client.state import RunState
from crypto.agreement import signed_hash
from crypto.certificates import CertificateVerifier
from crypto.signing import verify
from protocol.errors import CertificateRefused, MemberUncertified, RosterRefused, SignatureInvalid
from protocol.messages import Body, JoinReply, Purpose, Ready, Signed
from protocol.plan import Plan

B = TypeVar("B", bound=Body)


def valid_keys(owner: Owner, members: Sequence[JoinReply]) -> dict[str, Ed25519PublicKey]:
    """Return the signing keys by fingerprint of those members whose certificates are valid now.

    Raises:
        CertificateRefused: This owner's own is not, or its authority or revocation list.
        SignatureInvalid: A join names another signer than its certificate.
    """
    trust, keys = owner.trust, {}
    verifier = CertificateVerifier(trust.authority, trust.revocations, datetime.now(UTC))
    for reply in members:
        try:
            member = verifier.member(reply.certificate)
        except CertificateRefused:
            if reply.join.signer == owner.fingerprint:
                raise
            continue
        if reply.join.signer != member.fingerprint:
            raise SignatureInvalid("a join is not signed by the certified key")
        keys[member.fingerprint] = member.public_key
    return keys


def member_keys(owner: Owner, state: RunState) -> dict[str, Ed25519PublicKey]:
    """Return the signing keys of a session's members by fingerprint; certificates are checked again.

    A member whose certificate has expired or was revoked since is left out: it is in no list any more.
    Errors as in `valid_keys`.
    """
    return valid_keys(owner, state.members)


def uncertified(members: Sequence[JoinReply], keys: dict[str, Ed25519PublicKey]) -> set[str]:
    """Return the members that `valid_keys` left out."""
    return {reply.join.signer for reply in members} - keys.keys()


def require_certified(
    signers: Iterable[str], members: Sequence[JoinReply], keys: dict[str, Ed25519PublicKey]
) -> None:
    """Check that no signer of a list is a member without a valid certificate.

    Raises:
        MemberUncertified: One is; the coordinator may not know yet.
    """
    if not uncertified(members, keys).isdisjoint(signers):
        raise MemberUncertified("it is on the list all the same")


def verified_bodies(
    messages: Sequence[Signed], keys: dict[str, Ed25519PublicKey], body_type: type[B]
) -> list[B]:
    """Verify signed messages of distinct session members in ascending order of fingerprint.

    Raises:
        RosterRefused: A signer is unknown, occurs twice or is out of order.
        SignatureInvalid: A signature does not verify.
    """
    signers = [message.signer for message in messages]
    if signers != sorted(set(signers)):
        raise RosterRefused("signers are not distinct and in ascending order")
    if not set(signers) <= keys.keys():
        raise RosterRefused("a signer is not in this session")
    return [verify(message, keys[message.signer], body_type) for message in messages]


def require_acceptable(owner: Owner, plan: Plan, signers: Sequence[str]) -> None:
    """Check a roster or a round's list against the plan and this owner's policy.

    Raises:
        RosterRefused: This owner is not in it, it is too small or too large, or too few of the owners
            whose keys this owner has pinned are in it.
    """
    own, policy = owner.fingerprint, owner.policy
    if own not in signers:
        raise RosterRefused("this owner is not in the list")
    smallest = max(plan.cohort.minimum, policy.plans.min_cohort)
    if not smallest <= len(set(signers)) <= plan.cohort.maximum:
        raise RosterRefused(f"the list must have {smallest} to {plan.cohort.maximum} owners")
    known = (set(policy.peers.pinned.values()) & set(signers)) - {own}
    if len(known) < policy.peers.min_known_peers:
        raise RosterRefused(
            f"peers.min_known_peers: {policy.peers.min_known_peers} pinned peers must be in the list, "
            f"{len(known)} are"
        )


class RoundList(NamedTuple):
    """A verified list of one attempt: its hash, and what all its owners signed."""

    sha256: str
    model_hash: str
    purpose: Purpose


def check_round_list(owner: Owner, state: RunState, attempt: int, ready: Sequence[Signed]) -> RoundList:
    """Verify an attempt's list.

    Raises:
        MemberUncertified: A listed owner's certificate has expired or was revoked.
        RosterRefused: The list is not acceptable to this owner, or mixes attempts, purposes or models.
    """
    plan, keys = state.parsed_plan(), member_keys(owner, state)
    require_certified((message.signer for message in ready), state.members, keys)
    bodies = verified_bodies(ready, keys, Ready)
    require_acceptable(owner, plan, [message.signer for message in ready])
    said = {(body.session, body.attempt, body.purpose, body.model_hash) for body in bodies}
    first = bodies[0]
    if said != {(state.keyed_session(), attempt, first.purpose, first.model_hash)}:
        raise RosterRefused("the list mixes sessions, attempts, purposes or models")
    return RoundList(signed_hash(ready), first.model_hash, first.purpose)
