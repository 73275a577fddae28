"""Whatever a network does to messages: sums are exact, nothing counts twice, all privacy is paid for."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from client.app import make_app
from client.owner import Owner, open_owner
from crypto.trust import Trust, load_trust
from protocol.accounting import epsilon_after
from protocol.errors import FedsealError
from protocol.messages import Header
from protocol.plan import Plan
from scenarios.federation import PolicySettings, make_federation
from scenarios.grid import LocalGrid
from server.app import run_plan
from server.store import RunStore
from tasks.partition import digits
from tasks.resolve import resolve
from tests.faults.schedules import BadNetwork, Weather
from tests.virtual_time import virtual_time

FIRST_NODE, OWNERS, ROUNDS = 100, 4, 2
SHORT, LONG = 20, 300
LONGEST_S = 40_000.0
"""Virtual seconds after which a schedule counts as one that never ends: all waits of the plan together."""

SETTINGS = PolicySettings(epsilon_total=1e6, epsilon_per_run=50.0, delta_total=0.5)


@dataclass
class Federation:
    """Owners with a grid that reaches them, shared by all schedules."""

    owners: dict[int, Owner]
    grid: LocalGrid
    trust: Trust
    plan: Plan


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    torch.set_num_threads(1)
    splits, _ = digits(seed=0, owners=OWNERS)
    few = [(x[:40], y[:40]) for x, y in splits]
    made = make_federation(tmp_path_factory.mktemp("weather") / "federation", few, SETTINGS)
    owners = {
        FIRST_NODE + index: open_owner(home.folder, home.passphrase)
        for index, home in enumerate(made.owners)
    }
    apps = {node: make_app(lambda _context, owner=owner: owner) for node, owner in owners.items()}
    plan = resolve(Plan.from_fields(_fields()))
    yield Federation(owners, LocalGrid(apps), load_trust(made.server_home / "identity"), plan)
    for owner in owners.values():
        owner.close()


def _fields() -> dict[str, dict[str, object]]:
    return {
        "run": {"name": "weather", "rounds": ROUNDS, "spare_attempts": 6, "paid_spares": 6},
        "task": {
            "name": "image-classification",
            "input_shape": [8, 8],
            "value_range": [0.0, 16.0],
            "classes": 10,
        },
        "model": {"name": "linear"},
        "cohort": {"minimum": 3, "maximum": OWNERS},
        "training": {"local_steps": 1, "learning_rate": 0.5},
        "privacy": {"target_epsilon": 8.0, "delta": 1e-6, "sample_rate": 0.5, "expected_batch_size": 100.0},
        "encryption": {"preset": "exact16", "quorum": 2},
        "deadlines": {"join_s": 30.0, "fit_s": 30.0, "seal_s": 30.0, "open_s": 30.0},
    }


def schedule(federation: Federation, seed: int, folder: Path) -> tuple[str, Counter[str]]:
    """Play one schedule and check every invariant; returns the run's end and what the network did."""
    rng = random.Random(seed)
    store = RunStore(folder / "run")
    store.set("plan", federation.plan.fields())
    store.set("plan_hash", federation.plan.sha256())
    with virtual_time() as clock:
        network = BadNetwork(federation.grid, rng, Weather.of(rng), clock, federation.owners)
        if rng.random() < 0.5:
            network.comes_late(FIRST_NODE + rng.randrange(OWNERS), rng.uniform(4.0, 120.0))
        started = clock.monotonic()
        with network.witness.watching(), suppress(FedsealError):
            run_plan(network, store, federation.trust)
        assert clock.monotonic() - started < LONGEST_S, "this schedule never ends"
    state = str(store.get("state"))
    assert state in ("finished", "paused", "failed")
    rosters = sum(kind == "session" for _id, _time, kind, _facts in store.events())
    network.happened["later rosters"] += max(0, rosters - 1)
    _check_sums(federation, store, network)
    _check_spending(federation, store, network)
    if state == "finished":
        assert store.finished_rounds() == ROUNDS
    store.close()
    return state, network.happened


def _check_sums(federation: Federation, store: RunStore, network: BadNetwork) -> None:
    nodes = {owner.fingerprint: node for node, owner in federation.owners.items()}
    opened = [facts for facts in store.attempts() if not facts["void"]]
    assert len({facts["attempt"] for facts in opened}) == len(opened)
    for facts in opened:
        contributors = facts["contributors"]
        assert contributors == sorted(set(contributors)), "an owner counts twice"
        assert len(contributors) >= federation.plan.cohort.minimum
        lists = {Header.from_fields(header["body"]).list_hash for header in facts["headers"]}
        assert len(lists) == 1, "owners sealed for different lists"
        updates = [network.witness.updates[nodes[one], facts["attempt"]] for one in contributors]
        assert all(len(calls) == 1 for calls in updates), "an update was sealed twice"
        total = sum(calls[0].astype(np.uint64) for calls in updates)
        sums = np.frombuffer(store.sums(facts["round"]), dtype="<u4").astype(np.uint64)
        assert np.array_equal(sums, total), "the sum is not that of the announced list"
    for calls in network.witness.updates.values():
        assert len(calls) == 1, "one attempt was sealed twice"
    rounds = range(1, store.finished_rounds() + 1)
    models = {store.read_checkpoint(number).sha256() for number in rounds}
    models.add(str(federation.plan.model.initial_sha256))
    for owner in federation.owners.values():
        run = str(store.get("run"))
        if owner.store.find(run) is not None:
            assert owner.store.model(run).sha256() in models, "an owner followed to another model"


def _check_spending(federation: Federation, store: RunStore, network: BadNetwork) -> None:
    for (_node, run), noted in network.spent.items():
        sealed = [spent.sealed for spent, _ in noted]
        assert sealed == sorted(sealed), "a sealed attempt was refunded"
        for spent, _ in noted:
            paid = min(spent.sealed + spent.reserved, federation.plan.paid_rounds)
            assert (spent.epsilon or 0.0) >= (epsilon_after(federation.plan, paid) or 0.0)
        if run == store.get("run"):
            for spent, sealings in noted:
                assert spent.sealed >= sealings, "an owner sealed what it did not pay for"


@pytest.mark.parametrize("seed", range(SHORT))
def test_a_bad_network_breaks_no_promise(federation: Federation, seed: int, tmp_path: Path) -> None:
    schedule(federation, seed, tmp_path)


@pytest.mark.long
@pytest.mark.timeout(3_600)
def test_three_hundred_bad_networks_break_no_promise(federation: Federation, tmp_path: Path) -> None:
    ends: Counter[str] = Counter()
    happened: Counter[str] = Counter()
    for seed in range(1_000, 1_000 + LONG):
        end, seen = schedule(federation, seed, tmp_path / str(seed))
        ends[end] += 1
        happened += seen
    print(dict(ends), dict(happened))
    assert ends["finished"] > LONG // 10, "the weather is too bad to tell anything"
    assert set(happened) >= {"lost", "unheard", "repeated", "late", "away"}
    assert happened["later rosters"] > LONG // 30
