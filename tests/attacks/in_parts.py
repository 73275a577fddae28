"""Updates of three parts: what tests of them share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Any

import pytest
from hostile import Answered, HostileFederation, HostileRun, Sealed

import crypto.parts
from crypto.frames import SealContext
from crypto.parts import open_parts, seal_parts, sum_parts
from protocol.messages import OpenReply, OpenRequest, SealReply
from protocol.plan import Plan

VICTIM, PEER, EVIL = 3, 2, 1
SIZE, FRAMES = 22_510, 3


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One frame is a part of an owner, one position one of the sum, and 7,200 values one of the result."""
    monkeypatch.setattr(crypto.parts, "PART_BYTES", 28_800)


@pytest.fixture(scope="module")
def long_plan(make_plan: Callable[..., Plan]) -> Plan:
    return make_plan(
        run={"rounds": 2, "spare_attempts": 2},
        cohort={"minimum": 3, "maximum": 4},
        model={"name": "mlp", "hidden": [300]},
    )


@pytest.fixture(name="run")
def run_in_parts(federation: HostileFederation, long_plan: Plan) -> HostileRun:
    made = federation.run(long_plan).established()
    assert len(seal_parts(made.packing(), SIZE)) == FRAMES
    return made


def part_of(run: HostileRun, ready: Any, index: int, part: int, attempt: int = 1) -> Answered:
    request = run.seal_request(attempt, ready).model_copy(update={"part": part})
    return run.federation.accepted(index, "train.seal", request)


def sealed_in_parts(
    run: HostileRun, ready: Any, index: int, order: Sequence[int] = range(FRAMES), attempt: int = 1
) -> Sealed:
    got = {part: part_of(run, ready, index, part, attempt) for part in order}
    headers = {part: SealReply.from_bytes(one.body).header for part, one in got.items()}
    assert [part for part, header in headers.items() if header is not None] == [FRAMES - 1]
    header = headers[FRAMES - 1]
    assert header is not None
    return Sealed(header, b"".join(got[part].blob for part in range(FRAMES)))


def all_sealed(run: HostileRun, attempt: int = 1) -> tuple[Any, dict[int, Sealed]]:
    ready = run.fit(attempt)
    return ready, {index: sealed_in_parts(run, ready, index, attempt=attempt) for index in run.indices}


def frames_of(run: HostileRun, sealed: Sealed) -> list[bytes]:
    return SealContext(run.packing()).split(sealed.frames, FRAMES)


def open_requests(
    run: HostileRun, ready: Any, sealed: dict[int, Sealed]
) -> list[tuple[OpenRequest, bytes]]:
    """Return what an honest coordinator sends an opener, part by part."""
    request, _ = run.open_request(1, ready, sealed)
    rows = [frames_of(run, one) for one in sealed.values()]
    assert len(open_parts(run.packing(), SIZE, len(rows))) == FRAMES
    blobs = [b"".join(sha256(frame).digest() for row in rows for frame in row)]
    blobs += [b"".join(row[position] for row in rows) for position in range(FRAMES)]
    return [(request.model_copy(update={"part": part}), blob) for part, blob in enumerate(blobs)]


def opened_in_parts(
    run: HostileRun, requests: Sequence[tuple[OpenRequest, bytes]], index: int, order: Sequence[int]
) -> Answered:
    for place in order[:-1]:
        receipt = run.federation.accepted(index, "query.open", *requests[place])
        assert OpenReply.from_bytes(receipt.body).opening is None
        assert receipt.blob == b""
    return run.federation.accepted(index, "query.open", *requests[order[-1]])


def fetched_sums(run: HostileRun, request: OpenRequest, index: int) -> bytes:
    numbers = range(FRAMES + 1, FRAMES + 1 + len(sum_parts(SIZE)))
    asked = [request.model_copy(update={"part": number}) for number in numbers]
    return b"".join(run.federation.accepted(index, "query.open", one).blob for one in asked)
