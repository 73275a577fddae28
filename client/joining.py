"""Joining a run: `query.join`, `query.roster`, `query.keys`. Once per roster of a run."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding

from client.heads import require_held
from client.membership import (
    member_keys,
    require_acceptable,
    require_certified,
    valid_keys,
    verified_bodies,
)
from client.owner import Owner
from client.rounds import discard_pending
from client.starting import first_model, later_model, require_vouched
from client.state import Outcome, RunState
from crypto.agreement import (
    HpkeKey,
    WrapContext,
    fresh_half_seed,
    open_dealt,
    pair_seed,
    seal_dealt,
    signed_hash,
    wrap,
)
from crypto.graph import graph_seed
from crypto.masks import first_chain_key
from crypto.measuring import plan_context
from crypto.secret import SealKey, self_test
from crypto.signing import sign
from crypto.wraps import WrapTree, require_wrapped, wrap_digests
from protocol.accounting import require_target
from protocol.encoding import digest, digest_bytes
from protocol.errors import ModelMismatch, PlanInvalid, ProtocolViolation, RosterRefused
from protocol.evaluation import require_evaluation_target
from protocol.messages import (
    Join,
    JoinReply,
    JoinRequest,
    KeysReply,
    KeysRequest,
    RosterReply,
    RosterRequest,
    Session,
    Wraps,
)
from protocol.optimizers import GlobalModel
from protocol.plan import Plan
from tasks.resolve import require_shares


def join(owner: Owner, request: JoinRequest, blob: bytes) -> Outcome:
    """Check a plan against policy and ledger, and consent to it; for a later roster, follow the run so far.

    Who was in an earlier roster of the run gives up its session with it: the keys are erased, a
    contribution that was not sealed is refunded, and what was sealed, opened and paid stays known.

    Raises:
        PlanInvalid, NoiseTooSmall, CapacityExceeded: The plan itself is not acceptable.
        PolicyInvalid, PolicyRefused, BudgetExhausted: This owner does not allow it, as of now.
        DataUnavailable, DataInvalid: Its data was withdrawn, or does not fit.
        ModelMismatch: The plan names another initial model than this code builds.
        ProtocolViolation: The run was joined before, and this is not a later roster of it.
        LedgerOutrun: This owner was shown a head that it signed and its ledger does not hold.
    """
    plan = Plan.from_fields(request.plan)
    require_held(owner)
    known, initial = owner.store.find(request.run), check_plan(owner, plan)
    if request.start is None:
        model, computed = first_model(known, request, blob, initial), True
    else:
        model, computed = later_model(owner, known, request, request.start, blob, initial)
    owner.ledger.open_run(request.run, plan)
    if known is not None:
        discard_pending(owner, known)
    hpke_key, nonce = HpkeKey.generate(), secrets.token_hex(32)
    body = Join(
        version=1,
        run=request.run,
        plan_hash=plan.sha256(),
        start=request.start,
        vouches=computed,
        nonce_commitment=digest(nonce),
        hpke_key=hpke_key.public(),
        ledger=owner.ledger.head(),
    )
    certificate = owner.credentials.signing_certificate.public_bytes(Encoding.DER)
    reply = JoinReply(certificate=certificate, join=sign(owner.credentials.signing_key, body))
    state = RunState(
        run=request.run,
        plan=plan.fields(),
        stage="joined",
        join=reply,
        nonce=nonce,
        hpke_secret=hpke_key.secret(),
        start=request.start,
        computed=computed,
        round=0 if request.start is None else request.start.round,
        **_kept(known),
    )
    return Outcome(state, reply, model=model)


def _kept(known: RunState | None) -> dict[str, Any]:
    """Return what a later roster does not change: what this owner did, by numbers that only rise."""
    if known is None:
        return {}
    return {
        name: getattr(known, name)
        for name in ("sealed", "opened", "evaluated", "lists", "sealed_in", "keyed_in")
    }


def check_plan(owner: Owner, plan: Plan) -> GlobalModel:
    """Run every check that needs no other party, and return round 0's model."""
    if plan.privacy.noise != "none" and plan.privacy.noise_multiplier is None:
        raise PlanInvalid("privacy.noise_multiplier: a plan that is sent must be resolved")
    require_target(plan)
    require_evaluation_target(plan)
    require_shares(plan)
    self_test(plan_context(plan))
    owner.require_allowed(plan)
    model = GlobalModel.initial(owner.task(plan).initial_weights(plan))
    if model.sha256() != plan.model.initial_sha256:
        raise ModelMismatch("model.initial_sha256 is not the hash of the model that this code builds")
    owner.examples(plan)
    return model


def roster(owner: Owner, state: RunState, request: RosterRequest) -> Outcome:
    """Check all joins, wrap a half seed for every other member; the dealer wraps the encryption key.

    Raises:
        RosterRefused: The roster is not acceptable, or the run is bound to another one.
        MemberUncertified: Another owner's certificate is not valid.
        SignatureInvalid, CertificateRefused: An entry does not verify, or this owner's own certificate.
    """
    plan = state.parsed_plan()
    if state.stage != "joined":
        raise RosterRefused("this run is bound to a roster already")
    keys = valid_keys(owner, request.members)
    signers = [reply.join.signer for reply in request.members]
    require_certified(signers, request.members, keys)
    joins = verified_bodies([reply.join for reply in request.members], keys, Join)
    require_acceptable(owner, plan, signers)
    if state.join not in request.members:
        raise RosterRefused("this owner's join was replaced")
    if any(body.run != state.run or body.plan_hash != plan.sha256() for body in joins):
        raise RosterRefused("a member joined another run or another plan")
    require_vouched(plan, state.start, joins)
    roster_hash = signed_hash([reply.join for reply in request.members])
    peers = {s: b.hpke_key for s, b in zip(signers, joins, strict=True) if s != owner.fingerprint}
    return _wrap_for_peers(owner, state, request.members, roster_hash, peers)


def _wrap_for_peers(
    owner: Owner,
    state: RunState,
    members: list[JoinReply],
    roster_hash: str,
    peers: dict[str, bytes],
) -> Outcome:
    own, plan = owner.fingerprint, state.parsed_plan()
    halves = {peer: fresh_half_seed() for peer in peers}
    seeds = {
        peer: wrap(key, halves[peer], WrapContext(state.run, roster_hash, own, peer, "pair"))
        for peer, key in peers.items()
    }
    keys: dict[str, bytes] = {}
    dealt, sealed, commitment = None, None, None
    if own == members[0].join.signer:
        bfv_key = SealKey.generate(plan_context(plan))
        dealt, commitment = bfv_key.dealt(), bfv_key.commitment()
        content_key, sealed = seal_dealt(dealt, state.run, roster_hash, own)
        keys = {
            peer: wrap(key, content_key, WrapContext(state.run, roster_hash, own, peer, "bfv"))
            for peer, key in peers.items()
        }
    body = Wraps(
        run=state.run,
        plan_hash=plan.sha256(),
        roster_hash=roster_hash,
        nonce=state.nonce,
        wraps_hash=WrapTree(wrap_digests(seeds, keys, sealed)).root,
        key_commitment=commitment,
    )
    changed = state.with_changes(
        stage="rostered", members=members, roster_hash=roster_hash, halves=halves, bfv_key=dealt
    )
    signed = sign(owner.credentials.signing_key, body)
    heads = owner.store.heads(peers)
    return Outcome(changed, RosterReply(wraps=signed, seeds=seeds, keys=keys, dealt=sealed, heads=heads))


def keys(owner: Owner, state: RunState, request: KeysRequest) -> Outcome:
    """Open the wraps for this owner, derive the pair seeds, and fix the session.

    Raises:
        ProtocolViolation: A wrap is missing, was swapped, or the dealer broke its commitment.
        MemberUncertified: Another owner's certificate is not valid any more.
        SignatureInvalid: A signed message does not verify.
        LedgerOutrun: A peer returned a head that this owner signed and its ledger does not hold.
    """
    require_held(owner, request.heads)
    if state.stage != "rostered" or state.roster_hash is None or state.hpke_secret is None:
        raise ProtocolViolation("keys are not expected now")
    public_keys = member_keys(owner, state)
    require_certified((message.signer for message in request.wraps), state.members, public_keys)
    bodies = verified_bodies(request.wraps, public_keys, Wraps)
    if [message.signer for message in request.wraps] != [m.join.signer for m in state.members]:
        raise ProtocolViolation("the wraps are not from exactly the roster")
    if any(body.roster_hash != state.roster_hash for body in bodies):
        raise RosterRefused("a member was shown another roster")
    _check_nonces(state, bodies)
    signed = {message.signer: body for message, body in zip(request.wraps, bodies, strict=True)}
    for sender, body in signed.items():
        if sender != owner.fingerprint:
            _check_wrap(owner.fingerprint, sender, body, list(signed), request)
    hpke_key = HpkeKey.from_secret(state.hpke_secret)
    chains = {
        peer: first_chain_key(_pair(owner.fingerprint, peer, state, hpke_key, request))
        for peer in state.halves
    }
    session = signed_hash(request.wraps)
    changed = state.with_changes(
        stage="keyed",
        session=session,
        keyed_in={**state.keyed_in, session: 0 if state.start is None else state.start.round},
        graph_seed=graph_seed([body.nonce for body in bodies]),
        chain_keys=chains,
        bfv_key=_dealt_key(owner.fingerprint, state, hpke_key, request, signed),
        hpke_secret=None,
        halves={},
        computed=True,
    )
    confirmation = Session(session=changed.keyed_session())
    return Outcome(changed, KeysReply(session=sign(owner.credentials.signing_key, confirmation)))


def _check_nonces(state: RunState, bodies: Sequence[Wraps]) -> None:
    for reply, body in zip(state.members, bodies, strict=True):
        if Join.from_fields(reply.join.body).nonce_commitment != digest(body.nonce):
            raise ProtocolViolation("a member revealed another nonce than it committed to")


def _check_wrap(own: str, sender: str, body: Wraps, roster: Sequence[str], request: KeysRequest) -> None:
    """Check that what a sender wrapped for this owner arrived as it was signed."""
    received = [digest_bytes(request.seeds.get(sender, b""))]
    if body.key_commitment is not None:
        received += [digest_bytes(request.key or b""), digest_bytes(request.dealt or b"")]
    receivers = [name for name in roster if name != sender]
    require_wrapped(body.wraps_hash, own, receivers, received, request.proofs.get(sender, []))


def _pair(own: str, peer: str, state: RunState, hpke_key: HpkeKey, request: KeysRequest) -> bytes:
    context = WrapContext(state.run, str(state.roster_hash), peer, own, "pair")
    peer_half = hpke_key.unwrap(request.seeds[peer], context)
    return pair_seed(own, peer, state.halves[peer], peer_half, str(state.roster_hash))


def _dealt_key(
    own: str,
    state: RunState,
    hpke_key: HpkeKey,
    request: KeysRequest,
    signed: dict[str, Wraps],
) -> bytes:
    dealer = state.members[0].join.signer
    if [signer for signer, body in signed.items() if body.key_commitment] != [dealer]:
        raise ProtocolViolation("exactly the first member must deal the encryption key")
    plan = state.parsed_plan()
    if own == dealer:
        dealt = bytes(state.bfv_key or b"")
    else:
        context = WrapContext(state.run, str(state.roster_hash), dealer, own, "bfv")
        content_key = hpke_key.unwrap(request.key or b"", context)
        dealt = open_dealt(content_key, request.dealt or b"", state.run, str(state.roster_hash), dealer)
    if SealKey.from_dealt(plan_context(plan), dealt).commitment() != signed[dealer].key_commitment:
        raise ProtocolViolation("the encryption key is not the one that the dealer committed to")
    return dealt
