"""Ledger heads that others have seen this owner sign: how a rollback of the whole home is noticed.

Whoever puts back ledger and head copy together leaves no trace on this machine, but owners sign the head
of their ledger in every join and ready message. Each owner keeps, across runs, the highest such message of
every owner that it was in a round's list with, and returns it when the two meet again; the coordinator
returns the newest one of the same run. A ledger that does not hold such a head has lost records.

Guarantee: an owner whose ledger misses a head that it signed reserves nothing, if one honest peer or
the coordinator returns the message; what was returned is kept, so that it goes on refusing until its
ledger holds the head again or the owner adopts the loss. Nobody can forge a head, because it is the owner's
own signature that counts, and an old one is in the chain and harmless. Assumption: a coordinator that
withholds what peers return hides the rollback, as does a coordinator with which all peers collude.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from client.ledger import Adoption
from client.owner import IDENTITY, Owner, open_ledger, open_store, read_policy
from client.spending import Totals
from client.store import StateStore
from crypto.certificates import fingerprint
from crypto.identity import load_owner
from crypto.signing import signed_head
from protocol.errors import EncodingInvalid, LedgerOutrun, SignatureInvalid
from protocol.messages import LedgerHead, Signed


def require_held(owner: Owner, returned: Iterable[Signed] = ()) -> None:
    """Refuse to go on if this owner ever signed a head that its ledger does not hold.

    Args:
        owner: Its store knows what was returned before, and this owner's own highest message.
        returned: What the coordinator relays as this owner's messages. Not trusted: what this owner did
            not sign is ignored.

    Raises:
        LedgerOutrun: There is such a head. It is kept first, so that a repetition is refused too.
    """
    missing = [signed for signed in returned if _is_missing(owner, signed)]
    if missing:
        owner.store.keep_shown(missing)
    known = own_messages(owner.store, owner.fingerprint)
    sequences = [LedgerHead.of(signed).sequence for signed in known if _is_missing(owner, signed)]
    if sequences:
        last = owner.ledger.head().sequence
        raise LedgerOutrun(f"it ends at {last}, a head with number {max(sequences)} was signed")


def adopt(home: Path, passphrase: bytes, epsilon: float, delta: float) -> Totals:
    """Let an owner's ledger go on after a loss of records, at the cost that the owner declares.

    For the owner only, by its own command: the declared cost replaces the lost evidence.

    Args:
        home: The owner's home folder; its node is stopped.
        passphrase: Opens the store, which knows the heads that were returned.
        epsilon: What the lost records cost at most; the whole cap, if the owner does not know.
        delta: Likewise.

    Returns:
        What the dataset has cost now.

    Raises:
        LedgerConflict: Nothing is missing.
    """
    credentials = load_owner(home / IDENTITY, passphrase)
    policy, store = read_policy(home), open_store(home, passphrase)
    try:
        kept = own_messages(store, fingerprint(credentials.signing_key.public_key()))
    finally:
        store.close()
    heads = tuple(LedgerHead.of(signed) for signed in kept)
    ledger = open_ledger(home, policy, Adoption(epsilon, delta, heads))
    try:
        return ledger.totals()
    finally:
        ledger.close()


def own_messages(store: StateStore, own: str) -> list[Signed]:
    """Return an owner's own messages that its store kept: those it was shown, and its highest."""
    return [*store.shown(), *store.heads([own]).values()]


def _is_missing(owner: Owner, signed: Signed) -> bool:
    try:
        head = signed_head(signed, owner.credentials.signing_key.public_key())
    except (SignatureInvalid, EncodingInvalid):
        return False
    return not owner.ledger.holds(head)
