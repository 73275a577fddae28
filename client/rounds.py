"""The first two exchanges of an attempt, `train.fit` and `train.seal`, as an owner sees them.

They are the same for training and for evaluation; what is contributed differs.

Each function checks everything that the coordinator sent, and returns the new state together with the
reply. The caller stores both before the reply leaves the node.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import islice

from client.contribution import Floats, contribute, with_share
from client.evaluation import count_range, noised_counts, require_due, require_planned
from client.following import follow
from client.heads import require_held
from client.membership import RoundList, check_round_list
from client.noise import SecureStream
from client.owner import Owner, PendingUpdate, SealingUpdate
from client.state import Answer, Outcome, RunState
from crypto.graph import neighbours
from crypto.masks import MaskContext, advance
from crypto.measuring import plan_context
from crypto.packing import clipped_share
from crypto.parts import seal_parts
from crypto.presets import packing_for
from crypto.sealing import masks_for, seal_frames
from crypto.secret import SealKey
from crypto.signing import sign
from protocol.encoding import digest as digest_of
from protocol.encoding import digest_bytes
from protocol.errors import (
    AttemptRefused,
    ModelMismatch,
    PolicyChanged,
    PolicyRefused,
    ProtocolViolation,
    RosterRefused,
)
from protocol.messages import (
    FitReply,
    FitRequest,
    Header,
    Purpose,
    Ready,
    SealReply,
    SealRequest,
    Signed,
)
from protocol.optimizers import GlobalModel
from protocol.plan import Plan

_LOG = logging.getLogger("fedseal.client")


def fit(owner: Owner, state: RunState, request: FitRequest, blob: bytes) -> Outcome:
    """Follow the signed openings to this attempt's model, reserve the cost, and train or evaluate.

    Raises:
        ModelMismatch: The openings do not lead to the model that the coordinator names.
        PolicyChanged, DataUnavailable: The owner changed its mind since the run was joined.
        BudgetExhausted, AttemptRefused: The ledger does not allow this attempt.
        EvaluationRefused: The plan does not evaluate this model, or it was evaluated before.
        LedgerOutrun: The ledger does not hold a head that this owner signed.
        TrainingFailed: Training stopped. The attempt stays spent: that it stopped may depend on data.
    """
    session, plan = state.keyed_session(), state.parsed_plan()
    if request.attempt > plan.max_attempts:
        raise AttemptRefused(f"the plan allows {plan.max_attempts} attempts")
    if request.purpose == "evaluate":
        require_planned(plan)
    require_held(owner, [] if request.newest is None else [request.newest])
    model, finished = follow(owner, state, request.steps, blob)
    expected = request.round - 1 if request.purpose == "train" else request.round
    if model.sha256() != request.model_hash or finished != expected:
        raise ModelMismatch("the openings lead to another model or another round")
    if request.purpose == "evaluate":
        require_due(plan, state, finished)
    discard_pending(owner, state)
    _require_still_allowed(owner, plan)
    owner.ledger.reserve(state.run, request.attempt, request.purpose)
    values = _contribution(owner, plan, request.purpose, model)
    owner.pending[state.run] = PendingUpdate(
        request.attempt, request.purpose, finished, request.model_hash, values
    )
    body = Ready(
        session=session,
        attempt=request.attempt,
        purpose=request.purpose,
        model_hash=request.model_hash,
        ledger=owner.ledger.head(),
    )
    changed = state.with_changes(round=finished)
    return Outcome(changed, FitReply(ready=sign(owner.credentials.signing_key, body)), model=model)


def _require_still_allowed(owner: Owner, plan: Plan) -> None:
    """Read policy and data again before anything is paid; a run that they do not allow any more is left.

    The session stays: what this owner sealed before can still be opened, and it comes back if its policy
    allows the plan again.

    Raises:
        PolicyChanged: The policy was changed since the run was joined, and forbids it now.
        PolicyInvalid, DatasetRenamed: The policy cannot be used.
        DataUnavailable, DataInvalid: The data was withdrawn, or does not fit any more.
    """
    try:
        owner.require_allowed(plan)
    except PolicyRefused as refused:
        raise PolicyChanged(refused.detail) from None
    owner.require_data(plan)


def _contribution(owner: Owner, plan: Plan, purpose: Purpose, model: GlobalModel) -> Floats:
    task = owner.task(plan)
    if purpose == "evaluate":
        return noised_counts(task, plan, model.weights, owner.held_out(plan))
    return contribute(task, plan, model.weights, owner.examples(plan))


def require_kept(owner: Owner, state: RunState, attempt: int) -> None:
    """Check that what this owner said to be ready is there: it is in memory, and a restart loses it.

    Raises:
        AttemptRefused: It is lost. Who said it again would be listed, and make the attempt void.
    """
    pending = owner.pending.get(state.run)
    if str(attempt) not in state.sealed and (pending is None or pending.attempt != attempt):
        raise AttemptRefused("the contribution to this attempt was lost in a restart")


def discard_pending(owner: Owner, state: RunState) -> None:
    """Erase an update that was never sealed, and refund its attempt after that."""
    sealing = owner.sealing.pop(state.run, None)
    if sealing is not None:
        _LOG.warning("attempt %d was given up while it was sealed", sealing.attempt)
    owner.opening.pop(state.run, None)
    pending = owner.pending.pop(state.run, None)
    if pending is None:
        return
    pending.update.fill(0.0)
    if str(pending.attempt) not in state.sealed:
        owner.ledger.void(state.run, pending.attempt)


def seal(owner: Owner, state: RunState, request: SealRequest) -> Outcome:
    """Quantize, mask and encrypt this attempt's update for exactly one list, and answer one part of it.

    The first request for any part settles the list for good. Parts are sealed in their order; those before
    the one that is asked for are stored, each as the answer to its own request, so that parts may be asked
    for in any order and again, and nothing is encrypted twice. If the process ends before the last part,
    the rest cannot be made any more, and the attempt is void.

    Raises:
        AttemptRefused: There is no such contribution or part, it was sealed for another list, or an answer
            could not be stored and is lost.
        RosterRefused: The list is not acceptable.
        ModelMismatch, ProtocolViolation: The list is for another model or purpose.
    """
    session, sealing, heads = state.keyed_session(), owner.sealing.get(state.run), list[Signed]()
    pending = owner.pending.get(state.run)
    if pending is None or pending.attempt != request.attempt:
        raise AttemptRefused("there is no unsealed update for this attempt")
    listed = check_round_list(owner, state, request.attempt, request.ready)
    if sealing is None:
        # the heads in the joins are kept with the first attempt that the session seals
        joins = [] if session in state.sealed_in else [member.join for member in state.members]
        sealing, state = _begin(owner, state, request, listed, pending)
        heads = [*joins, *request.ready]
        if len(sealing.parts) > 1:
            _settle(owner, state, heads)
        owner.sealing[state.run] = sealing
    if sealing.list_hash != listed.sha256 or request.part >= len(sealing.parts):
        raise AttemptRefused("this update is sealed for another list, or has no such part")
    if request.part < sealing.done:
        raise AttemptRefused("the answer to this part could not be stored, and is lost")
    while sealing.done < request.part:
        earlier = request.model_copy(update={"part": sealing.done})
        answer = Answer(*_next_part(owner, state, sealing, listed))
        digest = digest_bytes(earlier.to_bytes())
        owner.store.keep_answer(state.run, digest, request.attempt, answer)
    body, blob = _next_part(owner, state, sealing, listed)
    return Outcome(state, SealReply.from_bytes(body), blob, heads=heads)


def _begin(
    owner: Owner, state: RunState, request: SealRequest, listed: RoundList, pending: PendingUpdate
) -> tuple[SealingUpdate, RunState]:
    """Check a list against this owner's contribution, and commit to sealing it for that list."""
    if str(request.attempt) in state.sealed:
        raise AttemptRefused("there is no unsealed update for this attempt")
    if listed.model_hash != pending.model_hash:
        raise ModelMismatch("the list is about another model than this owner's contribution")
    if listed.purpose != pending.purpose:
        raise ProtocolViolation("the list is for another purpose than this owner's contribution")
    plan, signers = state.parsed_plan(), [message.signer for message in request.ready]
    packing = packing_for(plan.encryption.preset, plan.cohort.maximum)
    parts = seal_parts(packing, pending.update.size)
    if request.part >= len(parts):
        raise AttemptRefused("the update has no such part")
    _require_distant(owner, plan, state, signers)
    owner.ledger.commit(state.run, request.attempt)
    session = state.keyed_session()
    context = MaskContext(
        session=session,
        attempt=request.attempt,
        purpose=pending.purpose,
        list_hash=listed.sha256,
        model_hash=listed.model_hash,
        plain_modulus=packing.plain_modulus,
    )
    corrupted = plan.cohort.corrupted_share
    peers = neighbours(owner.fingerprint, signers, str(state.graph_seed), request.attempt, corrupted)
    frames = _encrypted(owner, state, pending, context, peers, len(signers))
    sealing = SealingUpdate(request.attempt, listed.sha256, parts, frames)
    changed = state.with_changes(
        sealed={**state.sealed, str(request.attempt): listed.sha256},
        evaluated=_evaluated(state, pending),
        chain_keys=_ratcheted(state, state.chain_keys, request.attempt + 1),
        chain_attempt=request.attempt + 1,
        sealed_in=state.sealed_in if session in state.sealed_in else [*state.sealed_in, session],
        lists=state.lists if signers in state.lists else [*state.lists, signers],
    )
    return sealing, changed


def _settle(owner: Owner, state: RunState, heads: Sequence[Signed]) -> None:
    """Write that an attempt is sealed, before the first of its parts leaves.

    If that fails, no part leaves, now or later: the attempt is paid and void.
    """
    try:
        owner.store.save(state, heads=heads)
    except BaseException:
        del owner.pending[state.run]
        raise


def _next_part(
    owner: Owner, state: RunState, sealing: SealingUpdate, listed: RoundList
) -> tuple[bytes, bytes]:
    """Seal the next part; returns the reply's body and blob. The last part brings the header."""
    frames = list(islice(sealing.frames, len(sealing.parts[sealing.done])))
    sealing.digests += [digest_bytes(frame) for frame in frames]
    sealing.done += 1
    header = None
    if sealing.done == len(sealing.parts):
        header = _header(owner, state, sealing, listed)
        sealing.frames.close()
        del owner.pending[state.run], owner.sealing[state.run]
    return SealReply(header=header).to_bytes(), b"".join(frames)


def _header(owner: Owner, state: RunState, sealing: SealingUpdate, listed: RoundList) -> Signed:
    plan = state.parsed_plan()
    header = Header(
        version=1,
        session=state.keyed_session(),
        attempt=sealing.attempt,
        purpose=listed.purpose,
        preset_hash=packing_for(plan.encryption.preset, plan.cohort.maximum).sha256(),
        list_hash=listed.sha256,
        model_hash=listed.model_hash,
        parameters=owner.pending[state.run].update.size,
        frames=len(sealing.digests),
        frames_hash=digest_of(sealing.digests),
    )
    return sign(owner.credentials.signing_key, header)


def _evaluated(state: RunState, pending: PendingUpdate) -> dict[str, int]:
    if pending.purpose == "train":
        return state.evaluated
    return {**state.evaluated, str(pending.attempt): pending.finished_rounds}


def _require_distant(owner: Owner, plan: Plan, state: RunState, signers: Sequence[str]) -> None:
    """Refuse a list that differs from an earlier one in a single owner, where no noise would hide it.

    The same model trained or counted twice without noise gives the same values, and the difference of the
    two sums would be those of the one owner in which the lists differ.
    """
    if plan.privacy.noise != "none" or owner.policy.plans.allow_close_lists:
        return
    if any(len(set(earlier) ^ set(signers)) == 1 for earlier in state.lists):
        raise RosterRefused("without noise, a list must not differ from an earlier one in a single owner")


def _encrypted(
    owner: Owner,
    state: RunState,
    pending: PendingUpdate,
    context: MaskContext,
    peers: Sequence[str],
    owners: int,
) -> Generator[bytes, None, None]:
    plan = state.parsed_plan()
    chains = _ratcheted(state, peers, pending.attempt)
    packing = packing_for(plan.encryption.preset, plan.cohort.maximum)
    masks = masks_for(packing, owner.fingerprint, chains, context)
    key = SealKey.from_dealt(plan_context(plan), bytes(state.bfv_key or b""))
    if pending.purpose == "evaluate":
        values, bound = pending.update.copy(), count_range(plan)
    else:
        # the list was verified, and all of it must seal for its masks to cancel: its length is n
        values, bound = with_share(plan, pending.update, owners), plan.update_range
    pending.update.fill(0.0)
    clamped = clipped_share(values, bound)
    _LOG.info("attempt %d sealed with %d peers; share clamped %.4f", pending.attempt, len(peers), clamped)
    if pending.purpose == "train":
        # a public factor of at most 1: post-processing of the private update, no wider than its range
        values *= plan.cohort.weights.get(owner.fingerprint, 1.0)
    return _erasing(values, seal_frames(values, bound, SecureStream().uniform, masks, key))


def _erasing(values: Floats, frames: Iterator[bytes]) -> Generator[bytes, None, None]:
    """Yield frames one by one, and erase the values that they are made of behind the last one."""
    try:
        yield from frames
    finally:
        values.fill(0.0)


def _ratcheted(state: RunState, peers: Iterable[str], attempt: int) -> dict[str, bytes]:
    steps = attempt - state.chain_attempt
    return {peer: advance(state.chain_keys[peer], steps) for peer in peers}
