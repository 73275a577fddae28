"""The third exchange, `query.open`: an owner adds all frames itself and opens that sum once."""

from __future__ import annotations

from collections.abc import Sequence

from client.membership import check_round_list, member_keys, verified_bodies
from client.owner import Owner
from client.state import Outcome, RunState
from crypto.agreement import signed_hash
from crypto.frames import SealContext
from crypto.measuring import plan_context
from crypto.presets import packing_for
from crypto.sealing import open_frames
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

    A ciphertext that another party added is never decrypted.

    Raises:
        AttemptRefused: This owner did not seal for this list, or opened another sum for this attempt.
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
    parameters = owner.store.model(state.run).weights.size if training else COUNTS
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
    context = plan_context(plan)
    columns = _checked_columns(context, headers, blob)
    key = SealKey.from_dealt(context, bytes(state.bfv_key or b""))
    answer = open_frames(columns, parameters, key).astype("<u4").tobytes()
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
    return Outcome(changed, OpenReply(opening=sign(owner.credentials.signing_key, body)), answer)


def _checked_headers(owner: Owner, state: RunState, request: OpenRequest, expected: Header) -> list[Header]:
    """Verify the headers of exactly the list; they may differ in the hash of their frames only."""
    headers = verified_bodies(request.headers, member_keys(owner, state), Header)
    if [message.signer for message in request.headers] != [m.signer for m in request.ready]:
        raise RosterRefused("headers are not from exactly the list")
    if any(header != expected.model_copy(update={"frames_hash": header.frames_hash}) for header in headers):
        raise ProtocolViolation("a header is for another session, attempt, purpose, list, model or preset")
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


def frames_hash(frames: Sequence[bytes]) -> str:
    """Return the SHA-256 of the list of per-frame SHA-256, so that frames can be checked one by one."""
    return digest([digest_bytes(frame) for frame in frames])
