"""Real processes over mutual TLS: an owner joins during a run, and another one's certificate is revoked."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import pytest
from real_federation import (
    PASSPHRASE,
    RealFederation,
    federation_of,
    made_federation,
    small_plan,
    wait_until,
)

from audit.collecting.collect import collect
from audit.report import build_report
from client.owner import open_owner
from crypto.pki import revoke
from crypto.trust import replace_revocations
from protocol.plan import Plan
from server.store import RunStore

pytestmark = pytest.mark.long
"""A federation of its own for two cases that tests in one process have as well."""

LATE, REVOKED, WAITED_FOR = "owner-4", "owner-2", "owner-1"
ROUNDS = 10


def plan_of(name: str) -> Plan:
    return small_plan(
        run={"name": name, "rounds": ROUNDS},
        cohort={"minimum": 3, "maximum": 4},
        privacy={"target_epsilon": 1.0},
    )


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealFederation]:
    made = made_federation(tmp_path_factory.mktemp("rosters") / "federation", owners=4)
    with federation_of(made, made.owners[:3]) as real:
        yield real


@pytest.fixture(scope="module")
def joined(federation: RealFederation) -> RunStore:
    """A run of three owners that a fourth one joins."""
    store = federation.submit(plan_of("joined"))
    wait_until(store.finished_rounds, 120, lambda: f"the first round; logs: {federation.logs()}")
    with stopped(federation, WAITED_FOR):
        federation.start_owner(LATE)
        wait_until(lambda: "is connected" in federation.log(LATE), 60, "the newcomer's connection")
    federation.wait_for_end(store)
    return store


@pytest.fixture(scope="module")
def revoked(federation: RealFederation, joined: RunStore) -> RunStore:
    """A run of four owners, one of which is revoked behind the first round."""
    store = federation.submit(plan_of("revoked"))
    wait_until(store.finished_rounds, 120, lambda: f"the first round; logs: {federation.logs()}")
    with stopped(federation, WAITED_FOR):
        fresh = revoke(federation.made.folder / "pki", PASSPHRASE, [REVOKED])
        for home in (federation.home, *(owner.folder for owner in federation.made.owners)):
            replace_revocations(home / "identity", fresh)
    federation.wait_for_end(store)
    return store


@contextmanager
def stopped(federation: RealFederation, name: str) -> Iterator[None]:
    """Let a running round wait for an owner while something else happens."""
    (pid,) = (pid for pid, line in federation.living().items() if f"owners/{name}" in " ".join(line))
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def sizes(store: RunStore) -> list[int]:
    return [len(facts["contributors"]) for facts in store.rounds()]


def sessions(store: RunStore) -> list[int]:
    return [facts["owners"] for _id, _time, kind, facts in store.events() if kind == "session"]


def test_an_owner_joins_a_run_under_way(federation: RealFederation, joined: RunStore) -> None:
    assert joined.get("state") == "finished", federation.logs()
    assert sessions(joined) == [3, 4]
    assert sizes(joined) == sorted(sizes(joined)), "from one round on it is there"
    assert (sizes(joined)[0], sizes(joined)[-1]) == (3, 4)
    assert not any(facts["void"] for facts in joined.attempts())


def test_the_newcomer_has_the_model_and_pays_for_its_rounds(
    federation: RealFederation, joined: RunStore
) -> None:
    home, run = federation.owner(LATE), joined.get("run")
    with federation.ledger(LATE) as ledger:
        assert ledger.spent(run).sealed == sizes(joined).count(4)
    with federation.ledger("owner-1") as ledger:
        assert ledger.spent(run).sealed == ROUNDS
    owner = open_owner(home.folder, home.passphrase)
    try:
        assert owner.store.model(run).sha256() == joined.read_checkpoint(ROUNDS).sha256()
    finally:
        owner.close()


def test_the_report_counts_the_openings_of_both_rosters(
    federation: RealFederation, joined: RunStore
) -> None:
    report = build_report(collect(joined, federation.home, None), datetime.now(UTC))
    found = {check["id"]: check["status"] for check in report["checks"]}
    for check in (
        "openings-agree",
        "statements-agree",
        "model-countersigned",
        "cohort-size",
        "run-complete",
    ):
        assert found[check] == "pass", check
    assert "fail" not in found.values()
    assert {claim["statement"] for claim in report["claims"]} == {"valid"}
    assert len(report["claims"]) == 4


def test_a_revoked_owner_is_left_out_and_the_run_goes_on_with_new_keys(
    federation: RealFederation, revoked: RunStore
) -> None:
    assert revoked.get("state") == "finished", federation.logs()
    assert (sizes(revoked)[0], sizes(revoked)[-1]) == (4, 3)
    assert sessions(revoked) == [4, 3]
    prints = {federation.owner(REVOKED).fingerprint}
    assert not prints & set(revoked.rounds()[-1]["contributors"])
    left_out = [facts["owner"] for _id, _time, kind, facts in revoked.events() if kind == "excluded"]
    assert left_out == [REVOKED]
    assert revoked.owners()[prints.pop()]["statement"] is None
