"""The three exchanges of a round, and the end of a run, as an owner sees them.

Each function checks everything that the coordinator sent, and returns the new state together with the
reply. The caller stores both before the reply leaves the node.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from client.membership import member_keys, require_acceptable, verified_bodies
from client.noise import SecureStream
from client.owner import Owner, PendingUpdate
from client.state import Outcome, RunState
from client.training import local_update
from crypto.agreement import signed_hash
from crypto.frames import SealContext
from crypto.graph import neighbours
from crypto.masks import MaskContext, advance
from crypto.packing import clipped_share, mean_update
from crypto.presets import Packing, packing_for
from crypto.sealing import masks_for, open_frames, seal_frames
from crypto.secret import SealKey
from crypto.signing import sign
from protocol.encoding import digest, digest_bytes
from protocol.errors import (
    AttemptRefused,
    FrameInvalid,
    ModelMismatch,
    OpeningRefused,
    ProtocolViolation,
    RosterRefused,
)
from protocol.messages import (
    CloseReply,
    CloseRequest,
    FitReply,
    FitRequest,
    Header,
    Opening,
    OpenReply,
    OpenRequest,
    Ready,
    SealReply,
    SealRequest,
    Signed,
    Statement,
)
from protocol.optimizers import GlobalModel, apply_update
from protocol.plan import Plan

_LOG = logging.getLogger("fedseal.client")
_SUM_BYTES = 4


def fit(owner: Owner, state: RunState, request: FitRequest, blob: bytes) -> Outcome:
    """Follow the signed openings to this round's model, reserve the cost, and train.

    Raises:
        ModelMismatch: The openings do not lead to the model that the coordinator names.
        BudgetExhausted, AttemptRefused: The ledger does not allow this attempt.
        TrainingFailed: Training stopped. The attempt stays spent: that it stopped may depend on data.
    """
    session, plan = state.keyed_session(), state.parsed_plan()
    if request.attempt > plan.max_attempts:
        raise AttemptRefused(f"the plan allows {plan.max_attempts} attempts")
    model, finished = follow(owner, state, request.steps, blob)
    if model.sha256() != request.model_hash or finished != request.round - 1:
        raise ModelMismatch("the openings lead to another model or another round")
    discard_pending(owner, state)
    owner.ledger.reserve(state.run, request.attempt)
    update = local_update(owner.task(plan), plan, model.weights, owner.examples(plan))
    # whether a value overflowed is told to nobody; it is clamped to the public range when it is sealed
    update = np.nan_to_num(update, nan=0.0, posinf=plan.update_range, neginf=-plan.update_range)
    owner.pending[state.run] = PendingUpdate(request.attempt, request.model_hash, update)
    body = Ready(
        session=session,
        attempt=request.attempt,
        model_hash=request.model_hash,
        ledger=owner.ledger.head(),
    )
    changed = state.with_changes(round=finished)
    return Outcome(changed, FitReply(ready=sign(owner.credentials.signing_key, body)), model=model)


def follow(
    owner: Owner, state: RunState, steps: Sequence[Sequence[Signed]], blob: bytes
) -> tuple[GlobalModel, int]:
    """Apply finished rounds to this owner's model; rounds that it has applied already are skipped.

    Args:
        owner: This owner.
        state: Its state of the run.
        steps: For each finished round, the openings that agree.
        blob: Sums of all steps, little-endian uint32.

    Returns:
        The model after the last step, and the number of rounds it has behind it.

    Raises:
        ModelMismatch: The steps do not start from a model that this owner knows.
        ProtocolViolation: Fewer than a quorum agree, or the sums are not the signed ones.
    """
    plan, keys = state.parsed_plan(), member_keys(owner, state)
    model, finished = owner.store.model(state.run), state.round
    size = model.weights.size * _SUM_BYTES
    if len(blob) != size * len(steps):
        raise ProtocolViolation("the sums do not have the expected length")
    for index, openings in enumerate(steps):
        sums = blob[index * size : (index + 1) * size]
        body = _agreed(plan, state, openings, keys, sums)
        if body.model_hash != model.sha256():
            if finished == state.round:
                continue
            raise ModelMismatch("a step does not start from this owner's model")
        integers = np.frombuffer(sums, dtype="<u4").astype(np.uint64)
        mean = _mean(plan, integers, body.contributors, body.total_weight)
        model = apply_update(model, mean, plan.server_optimizer)
        finished += 1
    return model, finished


def _agreed(
    plan: Plan,
    state: RunState,
    openings: Sequence[Signed],
    keys: dict[str, Ed25519PublicKey],
    sums: bytes,
) -> Opening:
    bodies = verified_bodies(openings, keys, Opening)
    if len(bodies) < plan.encryption.quorum or any(body != bodies[0] for body in bodies):
        raise ProtocolViolation("fewer than a quorum of openers agree")
    body = bodies[0]
    if body.session != state.keyed_session() or body.sums_hash != digest_bytes(sums):
        raise ProtocolViolation("an opening is of another session or for other sums")
    if not plan.cohort.minimum <= body.contributors <= plan.cohort.maximum:
        raise ProtocolViolation("an opening has too few or too many contributors")
    return body


def _mean(plan: Plan, sums: np.ndarray, contributors: int, total_weight: float | None = None) -> np.ndarray:
    return mean_update(sums, contributors, plan.update_range, _packing(plan), total_weight)


def _packing(plan: Plan) -> Packing:
    return packing_for(plan.encryption.preset, plan.cohort.maximum)


def discard_pending(owner: Owner, state: RunState) -> None:
    """Erase an update that was never sealed, and refund its attempt after that."""
    pending = owner.pending.pop(state.run, None)
    if pending is None:
        return
    pending.update.fill(0.0)
    if str(pending.attempt) not in state.sealed:
        owner.ledger.void(state.run, pending.attempt)


def check_round_list(
    owner: Owner, state: RunState, attempt: int, ready: Sequence[Signed]
) -> tuple[str, str]:
    """Verify a round's list; returns (list hash, model hash).

    Raises:
        RosterRefused: The list is not acceptable to this owner, or mixes attempts or models.
    """
    plan = state.parsed_plan()
    bodies = verified_bodies(ready, member_keys(owner, state), Ready)
    require_acceptable(owner, plan, [message.signer for message in ready])
    expected = {(state.keyed_session(), attempt, body.model_hash) for body in bodies[:1]}
    if {(body.session, body.attempt, body.model_hash) for body in bodies} != expected:
        raise RosterRefused("the list mixes sessions, attempts or models")
    return signed_hash(ready), bodies[0].model_hash


def seal(owner: Owner, state: RunState, request: SealRequest) -> Outcome:
    """Quantize, mask and encrypt this attempt's update for exactly one list.

    Raises:
        AttemptRefused: There is no such update, or it was sealed before.
        RosterRefused: The list is not acceptable.
    """
    pending = owner.pending.get(state.run)
    if pending is None or pending.attempt != request.attempt or str(request.attempt) in state.sealed:
        raise AttemptRefused("there is no unsealed update for this attempt")
    list_hash, model_hash = check_round_list(owner, state, request.attempt, request.ready)
    if model_hash != pending.model_hash:
        raise ModelMismatch("the list is about another model than this owner trained")
    plan, signers = state.parsed_plan(), [message.signer for message in request.ready]
    packing = _packing(plan)
    _require_distant(owner, plan, state, signers)
    owner.ledger.commit(state.run, request.attempt)
    context = MaskContext(
        session=state.keyed_session(),
        attempt=request.attempt,
        purpose="train",
        list_hash=list_hash,
        model_hash=model_hash,
        plain_modulus=packing.plain_modulus,
    )
    corrupted = plan.cohort.corrupted_share
    peers = neighbours(owner.fingerprint, signers, str(state.graph_seed), request.attempt, corrupted)
    frames = _encrypted(owner, state, pending, context, peers)
    header = Header(
        version=1,
        session=context.session,
        attempt=request.attempt,
        purpose="train",
        preset_hash=packing.sha256(),
        list_hash=list_hash,
        model_hash=model_hash,
        parameters=pending.update.size,
        frames=len(frames),
        frames_hash=frames_hash(frames),
    )
    changed = state.with_changes(
        sealed={**state.sealed, str(request.attempt): list_hash},
        chain_keys=_ratcheted(state, state.chain_keys, request.attempt + 1),
        chain_attempt=request.attempt + 1,
        lists=state.lists if signers in state.lists else [*state.lists, signers],
    )
    pending.update.fill(0.0)
    del owner.pending[state.run]
    reply = SealReply(header=sign(owner.credentials.signing_key, header))
    return Outcome(changed, reply, b"".join(frames))


def _require_distant(owner: Owner, plan: Plan, state: RunState, signers: Sequence[str]) -> None:
    """Refuse a list that differs from an earlier one in a single owner, where no noise would hide it.

    The same model trained twice without noise gives the same update, and the difference of the two sums
    would be the update of the one owner in which the lists differ.
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
) -> list[bytes]:
    plan = state.parsed_plan()
    chains = _ratcheted(state, peers, pending.attempt)
    masks = masks_for(_packing(plan), owner.fingerprint, chains, context)
    key = SealKey.from_residues(SealContext(_packing(plan)), bytes(state.bfv_key or b""))
    clamped = clipped_share(pending.update, plan.update_range)
    _LOG.info("attempt %d sealed with %d peers; share clamped %.4f", pending.attempt, len(peers), clamped)
    # a public factor of at most 1: post-processing of the private update, and no wider than its range
    weighted = pending.update * plan.cohort.weights.get(owner.fingerprint, 1.0)
    uniforms = SecureStream().uniform
    return list(seal_frames(weighted, plan.update_range, uniforms, masks, key))


def _ratcheted(state: RunState, peers: Iterable[str], attempt: int) -> dict[str, bytes]:
    steps = attempt - state.chain_attempt
    return {peer: advance(state.chain_keys[peer], steps) for peer in peers}


def frames_hash(frames: Sequence[bytes]) -> str:
    """Return the SHA-256 of the list of per-frame SHA-256, so that frames can be checked one by one."""
    return digest([digest_bytes(frame) for frame in frames])


def open_sum(owner: Owner, state: RunState, request: OpenRequest, blob: bytes) -> Outcome:
    """Add the frames of all sealed owners, decrypt this own sum, and answer the integers.

    A ciphertext that another party added is never decrypted.

    Raises:
        AttemptRefused: This owner did not seal for this list, or opened another sum for this attempt.
        FrameInvalid, SignatureInvalid, ProtocolViolation: A header or a frame is not what it must be.
        OpeningRefused: The sum does not open to the announced contributors.
    """
    attempt = str(request.attempt)
    list_hash, model_hash = check_round_list(owner, state, request.attempt, request.ready)
    if state.sealed.get(attempt) != list_hash:
        raise AttemptRefused("this owner did not seal its update for this list")
    headers_hash = signed_hash(request.headers)
    if state.opened.get(attempt, headers_hash) != headers_hash:
        raise AttemptRefused("another sum was opened for this attempt")
    packing = _packing(state.parsed_plan())
    context = SealContext(packing)
    parameters = owner.store.model(state.run).weights.size
    headers = _checked_headers(owner, state, request, (list_hash, model_hash), parameters)
    columns = _checked_columns(context, headers, blob)
    key = SealKey.from_residues(context, bytes(state.bfv_key or b""))
    sums = open_frames(columns, parameters, key)
    answer = sums.astype("<u4").tobytes()
    body = Opening(
        session=state.keyed_session(),
        attempt=request.attempt,
        purpose="train",
        list_hash=list_hash,
        headers_hash=headers_hash,
        model_hash=model_hash,
        contributors=len(headers),
        total_weight=state.parsed_plan().total_weight([m.signer for m in request.headers]),
        sums_hash=digest_bytes(answer),
    )
    changed = state.with_changes(opened={**state.opened, attempt: headers_hash})
    return Outcome(changed, OpenReply(opening=sign(owner.credentials.signing_key, body)), answer)


def _checked_headers(
    owner: Owner, state: RunState, request: OpenRequest, hashes: tuple[str, str], parameters: int
) -> list[Header]:
    """Verify the headers of exactly the list; they may differ in the hash of their frames only."""
    packing = _packing(state.parsed_plan())
    headers = verified_bodies(request.headers, member_keys(owner, state), Header)
    if [message.signer for message in request.headers] != [m.signer for m in request.ready]:
        raise RosterRefused("headers are not from exactly the list")
    expected = Header(
        version=1,
        session=state.keyed_session(),
        attempt=request.attempt,
        purpose="train",
        preset_hash=packing.sha256(),
        list_hash=hashes[0],
        model_hash=hashes[1],
        parameters=parameters,
        frames=packing.frames_for(parameters),
        frames_hash=headers[0].frames_hash,
    )
    if any(header != expected.model_copy(update={"frames_hash": header.frames_hash}) for header in headers):
        raise ProtocolViolation("a header is for another session, attempt, list, model or preset")
    return headers


def _checked_columns(
    context: SealContext, headers: Sequence[Header], blob: bytes
) -> list[tuple[bytes, ...]]:
    """Cut the blob into each owner's frames, compare digests, and regroup by frame position."""
    count = headers[0].frames
    frames = context.split(blob, count * len(headers))
    rows = [frames[start : start + count] for start in range(0, len(frames), count)]
    if any(frames_hash(row) != header.frames_hash for row, header in zip(rows, headers, strict=True)):
        raise FrameInvalid("frames are not the ones whose digest was signed")
    if len({digest_bytes(frame) for frame in frames}) != len(frames):
        raise OpeningRefused("a frame occurs twice")
    return list(zip(*rows, strict=True))


def close(owner: Owner, state: RunState, request: CloseRequest, blob: bytes) -> Outcome:
    """Follow the last openings, state what the run cost, and erase the session's secrets.

    Raises:
        ModelMismatch: The openings do not lead to the model that the coordinator names.
    """
    session, plan = state.keyed_session(), state.parsed_plan()
    model, finished = follow(owner, state, request.steps, blob)
    if model.sha256() != request.model_hash:
        raise ModelMismatch("the openings lead to another final model")
    discard_pending(owner, state)
    spent = owner.ledger.spent(state.run)
    owner.ledger.close_run(state.run)
    body = Statement(
        session=session,
        plan_hash=plan.sha256(),
        model_hash=request.model_hash,
        unit=plan.privacy.unit,
        epsilon=spent.epsilon,
        delta=spent.delta,
        sealed_attempts=spent.sealed,
        void_attempts=spent.void,
        ledger=owner.ledger.head(),
    )
    changed = state.with_changes(
        stage="closed", round=finished, chain_keys={}, bfv_key=None, hpke_secret=None, halves={}
    )
    reply = CloseReply(statement=sign(owner.credentials.signing_key, body))
    return Outcome(changed, reply, model=model)
