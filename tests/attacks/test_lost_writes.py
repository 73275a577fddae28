"""An owner whose disk refuses a write: what was not stored does not leave, now or later."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hostile import HostileRun, nothing_released
from in_parts import (
    FRAMES,
    PEER,
    SIZE,
    VICTIM,
    all_sealed,
    long_plan,
    open_requests,
    part_of,
    run_in_parts,
    small_parts,
)

from client.owner import Owner
from crypto.parts import sum_parts
from protocol.errors import FileDamaged

__all__ = ["long_plan", "run_in_parts", "small_parts"]

LOST = FileDamaged.code


@contextmanager
def refusing(owner: Owner, table: str) -> Iterator[None]:
    """Let a table of the owner's database take no row."""
    database = owner.store._database
    for event in ("INSERT", "UPDATE"):
        database.execute(
            f"CREATE TRIGGER no_{event} BEFORE {event} ON {table} BEGIN SELECT RAISE (ABORT, 'full'); END"
        )
    try:
        yield
    finally:
        for event in ("INSERT", "UPDATE"):
            database.execute(f"DROP TRIGGER no_{event}")


@pytest.mark.parametrize("table", ["runs", "heads"])
def test_no_part_leaves_of_an_update_whose_sealing_was_not_stored(run: HostileRun, table: str) -> None:
    ready, owner = run.fit(1), run.owner(VICTIM)
    requests = [run.seal_request(1, ready).model_copy(update={"part": part}) for part in range(FRAMES)]
    with refusing(owner, table):
        assert run.federation.refused(VICTIM, "train.seal", requests[0]) == LOST
    with nothing_released(run):
        for request in requests:
            assert run.federation.refused(VICTIM, "train.seal", request) == "FS-ROUND-01"
    later = run.fit(2)
    assert owner.ledger.spent(run.run).sealed == 1, "it may not be refunded: it was to be sealed"
    for part in range(FRAMES):
        part_of(run, later, VICTIM, part, attempt=2)
    state = run.state(VICTIM)
    assert set(state.sealed) == {"2"}
    assert state.chain_attempt == 3
    assert len(owner.store.heads(run.print_(index) for index in run.indices)) == len(run.indices)


def test_a_part_whose_answer_was_not_stored_is_not_made_of_the_next_frames(run: HostileRun) -> None:
    ready = run.fit(1)
    request = run.seal_request(1, ready)
    with refusing(run.owner(VICTIM), "answers"):
        assert run.federation.refused(VICTIM, "train.seal", request) == LOST
    assert set(run.state(VICTIM).sealed) == {"1"}
    with nothing_released(run):
        assert run.federation.refused(VICTIM, "train.seal", request) == "FS-ROUND-01"
    run.fit(2)


def test_no_sum_leaves_whose_opening_was_not_stored(run: HostileRun) -> None:
    ready, sealed = all_sealed(run)
    requests = open_requests(run, ready, sealed)
    for request in requests[:-1]:
        run.federation.accepted(VICTIM, "query.open", *request)
    with refusing(run.owner(VICTIM), "runs"):
        assert run.federation.refused(VICTIM, "query.open", *requests[-1]) == LOST
    for part in range(FRAMES + 1, FRAMES + 1 + len(sum_parts(SIZE))):
        asked = requests[0][0].model_copy(update={"part": part})
        with nothing_released(run):
            assert run.federation.refused(VICTIM, "query.open", asked) == "FS-ROUND-01"
    for request in requests:
        run.federation.accepted(VICTIM, "query.open", *request)
    assert "1" in run.state(VICTIM).opened
    run.federation.accepted(PEER, "query.open", *requests[0])
