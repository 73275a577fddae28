"""Nodes and coordinator, real processes over TLS, with a proxy between them that delays and cuts."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from real_federation import RealFederation, federation_of, made_federation, small_plan, wait_until
from tcp_proxy import CALM, Weather

from protocol.plan import Plan
from server.store import RunStore

pytestmark = pytest.mark.long
"""Real time limits, which a busy machine breaks; `make test-long` runs them."""

OWNERS = ("owner-1", "owner-2", "owner-3")


@pytest.fixture(scope="module")
def proxied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealFederation]:
    made = made_federation(tmp_path_factory.mktemp("proxied") / "federation", owners=3)
    with federation_of(made, proxied=True) as federation:
        yield federation


@pytest.fixture(autouse=True)
def calm_before_and_after(proxied: RealFederation) -> Iterator[None]:
    proxy(proxied).weather = CALM
    yield
    proxy(proxied).weather = CALM


def proxy(federation: RealFederation):
    assert federation.proxy is not None
    return federation.proxy


def plan(name: str, rounds: int = 2, seconds: float = 40.0) -> Plan:
    return small_plan(
        run={"name": name, "rounds": rounds, "spare_attempts": 8, "paid_spares": 4},
        privacy={"target_epsilon": 0.5},
        deadlines={"join_s": seconds, "fit_s": seconds, "seal_s": seconds, "open_s": seconds},
    )


def check(federation: RealFederation, store: RunStore) -> None:
    """What must hold after any weather."""
    assert store.get("state") == "finished", federation.logs()
    opened = [facts for facts in store.attempts() if not facts["void"]]
    assert len(opened) == store.plan().run.rounds
    for facts in opened:
        assert len(set(facts["contributors"])) == len(facts["contributors"]) == len(OWNERS)
        sums = np.frombuffer(store.sums(facts["round"]), dtype="<u4")
        assert sums.size == 650
    for name in OWNERS:
        with federation.ledger(name) as ledger:
            spent = ledger.spent(str(store.get("run")))
        assert spent.sealed >= len(opened), "a round was not paid for"
        assert "Traceback" not in federation.log(name)
    assert "Traceback" not in federation.log("coordinator")
    assert set(federation.processes.pids()) == {"coordinator", *OWNERS}


def test_a_run_finishes_though_connections_are_delayed_and_cut(proxied: RealFederation) -> None:
    proxy(proxied).weather = Weather(delay_s=0.02, cut=0.6)
    proxy(proxied).cut_all()
    store = proxied.run(plan("cut"))
    check(proxied, store)
    assert proxy(proxied).happened["cut"] > 0
    # every node is connected anew, by TLS again
    proxy(proxied).weather = CALM
    proxy(proxied).cut_all()
    before = proxy(proxied).happened["connections"]
    check(proxied, proxied.run(plan("again", rounds=1)))
    assert proxy(proxied).happened["connections"] >= before + len(OWNERS)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "weather",
    [
        Weather(delay_s=0.3),
        Weather(cut=0.3, refused=0.3, after_bytes=20_000),
        Weather(half_open=0.3, half_open_s=20.0),
        Weather(delay_s=0.05, cut=0.1, half_open=0.1, refused=0.1, half_open_s=10.0),
    ],
    ids=["slow", "cut and refused", "half-open", "all of it"],
)
def test_a_run_finishes_in_worse_weather(proxied: RealFederation, weather: Weather) -> None:
    proxy(proxied).weather = weather
    proxy(proxied).cut_all()
    store = proxied.submit(plan("worse", rounds=2, seconds=120.0))
    proxied.wait_for_end(store, timeout_s=600)
    check(proxied, store)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_run_finishes_though_all_connections_are_cut_again_and_again(proxied: RealFederation) -> None:
    stop = threading.Event()

    def cut() -> None:
        while not stop.wait(1.5):
            proxy(proxied).cut_all()

    cutting = threading.Thread(target=cut)
    cutting.start()
    try:
        store = proxied.submit(plan("again-and-again", rounds=4, seconds=120.0))
        proxied.wait_for_end(store, timeout_s=600)
    finally:
        stop.set()
        cutting.join()
    check(proxied, store)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_nodes_come_back_after_a_long_outage(proxied: RealFederation) -> None:
    store = proxied.submit(plan("outage", rounds=3, seconds=120.0))
    wait_until(store.finished_rounds, 120, "the first round")
    proxy(proxied).weather = Weather(refused=1.0)
    proxy(proxied).cut_all()
    time.sleep(20)
    proxy(proxied).weather = CALM
    proxied.wait_for_end(store, timeout_s=400)
    check(proxied, store)
