"""The third exchange, `query.open`: an owner adds all frames itself and opens that sum once."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

from client.membership import check_round_list, member_keys, verified_bodies
from client.owner import OpeningSum, Owner
from client.state import Answer, Outcome, RunState
from crypto.agreement import signed_hash
from crypto.frames import SealContext
from crypto.measuring import plan_context
from crypto.parts import DIGEST_BYTES, SUM_BYTES, open_parts, sum_parts
from crypto.presets import packing_for
from crypto.sealing import RunningSum
from crypto.secret import SealKey
from crypto.signing import sign
from protocol.encoding import digest, digest_bytes
from protocol.errors import (
    AttemptRefused,
    FrameInvalid,
    OpeningRefused,
    ProtocolViolation,
    RosterRefused,
)
from protocol.evaluation import COUNTS
from protocol.messages import Header, Opening, OpenReply, OpenRequest


def open_sum(owner: Owner, state: RunState, request: OpenRequest, blob: bytes) -> Outcome:
    """Add the frames of all sealed owners, decrypt this own sum, and answer the integers.

    A ciphertext that another party added is never decrypted, and nothing is decrypted before the frames of
    all owners were compared with their signed digests and added. The parts before the last get a receipt.

    Raises:
        AttemptRefused: This owner did not seal for this list, opened another sum for this attempt, or does
            not have the part that must come first.
        FrameInvalid, SignatureInvalid, ProtocolViolation: A header or a frame is not what it must be.
        OpeningRefused: The sum does not open to the announced contributors.
    """
    attempt, plan = str(request.attempt), state.parsed_plan()
    listed = check_round_list(owner, state, request.attempt, request.ready)
    if state.sealed.get(attempt) != listed.sha256:
        raise AttemptRefused("this owner did not seal its update for this list")
    headers_hash = signed_hash(request.headers)
    if state.opened.get(attempt, headers_hash) != headers_hash:
        raise AttemptRefused("another sum was opened for this attempt")
    packing = packing_for(plan.encryption.preset, plan.cohort.maximum)
    training = listed.purpose == "train"
    parameters = _parameters(owner, state) if training else COUNTS
    expected = Header(
        version=1,
        session=state.keyed_session(),
        attempt=request.attempt,
        purpose=listed.purpose,
        preset_hash=packing.sha256(),
        list_hash=listed.sha256,
        model_hash=listed.model_hash,
        parameters=parameters,
        frames=packing.frames_for(parameters),
        frames_hash=headers_hash,
    )
    headers = _checked_headers(owner, state, request, expected)
    parts = open_parts(packing, parameters, len(headers))
    if request.part > len(parts) or (len(parts) == 1 and request.part > 0):
        raise AttemptRefused("the sum has no such part")
    if len(parts) == 1:
        total = _added_at_once(state, headers, parts[0], blob)
    else:
        opening = _added_part(owner, state, request, headers, parts, blob)
        if opening.missing:
            return Outcome(state, OpenReply(opening=None), lasting=False)
        total = opening.total
        del owner.opening[state.run]
    answer = total.open(len(headers)).astype("<u4").tobytes()
    last = len(parts) if len(parts) > 1 else 0
    signers = [message.signer for message in request.headers]
    body = Opening(
        session=state.keyed_session(),
        attempt=request.attempt,
        purpose=listed.purpose,
        list_hash=listed.sha256,
        headers_hash=headers_hash,
        model_hash=listed.model_hash,
        contributors=len(headers),
        total_weight=plan.total_weight(signers) if training else float(len(signers)),
        sums_hash=digest_bytes(answer),
    )
    changed = state.with_changes(opened={**state.opened, attempt: headers_hash})
    reply = OpenReply(opening=sign(owner.credentials.signing_key, body))
    slices = sum_parts(parameters)
    if len(slices) == 1:
        return Outcome(changed, reply, answer)
    # the sums leave by themselves from here on, and no other sum may follow them
    owner.store.save(changed)
    receipt = OpenReply(opening=None).to_bytes()
    for number, values in enumerate(slices, start=last + 1):
        part = Answer(receipt, answer[SUM_BYTES * values.start : SUM_BYTES * values.stop])
        asked = digest_bytes(request.model_copy(update={"part": number}).to_bytes())
        owner.store.keep_answer(state.run, asked, request.attempt, part)
    return Outcome(changed, reply)


def _parameters(owner: Owner, state: RunState) -> int:
    """Return the length of an update; a model is not read anew for every part."""
    opening = owner.opening.get(state.run)
    return opening.total.parameters if opening is not None else owner.store.model_size(state.run)


def _checked_headers(owner: Owner, state: RunState, request: OpenRequest, expected: Header) -> list[Header]:
    """Verify the headers of exactly the list; they may differ in the hash of their frames only."""
    headers = verified_bodies(request.headers, member_keys(owner, state), Header)
    if [message.signer for message in request.headers] != [m.signer for m in request.ready]:
        raise RosterRefused("headers are not from exactly the list")
    if any(header != expected.model_copy(update={"frames_hash": header.frames_hash}) for header in headers):
        raise ProtocolViolation("a header is for another session, attempt, purpose, list, model or preset")
    return headers


def _running_sum(state: RunState, context: SealContext, parameters: int) -> RunningSum:
    return RunningSum(parameters, SealKey.from_dealt(context, bytes(state.bfv_key or b"")))


def _added_at_once(state: RunState, headers: Sequence[Header], positions: range, blob: bytes) -> RunningSum:
    """Add the frames of a sum of one part, after comparing all of them with the headers."""
    context = plan_context(state.parsed_plan())
    frames = context.split(blob, len(positions) * len(headers))
    rows = _checked_digests(headers, [sha256(frame).digest() for frame in frames])
    total = _running_sum(state, context, headers[0].parameters)
    _add(total, rows, positions, frames)
    return total


def _added_part(
    owner: Owner,
    state: RunState,
    request: OpenRequest,
    headers: Sequence[Header],
    parts: Sequence[range],
    blob: bytes,
) -> OpeningSum:
    """Take one part: the digests of all frames first, then the frames of consecutive positions."""
    opening, headers_hash = owner.opening.get(state.run), signed_hash(request.headers)
    if opening is not None and (opening.attempt, opening.headers_hash) != (request.attempt, headers_hash):
        opening = None
    if request.part == 0:
        if opening is None:
            rows = _checked_digests(headers, _split_digests(blob, headers[0].frames * len(headers)))
            context = plan_context(state.parsed_plan())
            total = _running_sum(state, context, headers[0].parameters)
            missing = set(range(1, len(parts) + 1))
            opening = OpeningSum(request.attempt, headers_hash, rows, total, missing)
            owner.opening[state.run] = opening
        return opening
    if opening is None:
        raise AttemptRefused("the part with the digests must come first")
    if request.part in opening.missing:
        positions = parts[request.part - 1]
        frames = opening.total.context.split(blob, len(positions) * len(headers))
        _add(opening.total, opening.digests, positions, frames)
        opening.missing.remove(request.part)
    return opening


def _split_digests(blob: bytes, count: int) -> list[bytes]:
    if len(blob) != count * DIGEST_BYTES:
        raise FrameInvalid(f"{count} digests must have {count * DIGEST_BYTES} bytes")
    return [blob[start : start + DIGEST_BYTES] for start in range(0, len(blob), DIGEST_BYTES)]


def _checked_digests(headers: Sequence[Header], digests: Sequence[bytes]) -> list[Sequence[bytes]]:
    """Return each owner's digests, which must be the ones that its header covers."""
    count = headers[0].frames
    rows = [digests[start : start + count] for start in range(0, len(digests), count)]
    for row, header in zip(rows, headers, strict=True):
        if digest([one.hex() for one in row]) != header.frames_hash:
            raise FrameInvalid("frames are not the ones whose digest was signed")
    if len(set(digests)) != len(digests):
        raise OpeningRefused("a frame occurs twice")
    return rows


def _add(
    total: RunningSum, rows: Sequence[Sequence[bytes]], positions: range, frames: Sequence[bytes]
) -> None:
    """Add frames, owner after owner within some positions, after comparing them with their digests."""
    count = len(positions)
    owners = [frames[start : start + count] for start in range(0, len(frames), count)]
    for row, sent in zip(rows, owners, strict=True):
        if any(sha256(frame).digest() != row[place] for place, frame in zip(positions, sent, strict=True)):
            raise FrameInvalid("frames are not the ones whose digest was signed")
    for place, column in zip(positions, zip(*owners, strict=True), strict=True):
        total.add(place, column)
