"""A coordinator against distributed noise: it wants smaller shares, fewer of them, or one of them twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hostile import HostileFederation, HostileRun

import client.rounds as rounds
from client.owner import PendingUpdate, open_owner
from crypto.packing import mean_update
from crypto.signing import sign
from protocol.messages import JoinRequest, Ready
from protocol.plan import Plan
from scenarios.federation import PolicySettings, make_federation

SETTINGS = PolicySettings(
    epsilon_total=1e5,
    epsilon_per_run=50.0,
    delta_total=0.5,
    min_known_peers=2,
    epsilon_worst=1e6,
    units=("example", "client"),
)
VICTIM = 3


@pytest.fixture(scope="module")
def sharing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostileFederation]:
    """Six owners without a single record: whatever they seal is noise."""
    empty = (np.zeros((0, 8, 8), np.float32), np.zeros(0, np.int64))
    made = make_federation(tmp_path_factory.mktemp("sharing") / "federation", [empty] * 6, SETTINGS)
    hostile = HostileFederation([open_owner(home.folder, home.passphrase) for home in made.owners])
    yield hostile
    for owner in hostile.owners:
        owner.close()


@pytest.fixture
def shared_plan(make_plan: Callable[..., Plan]) -> Plan:
    return make_plan(
        privacy={"noise": "distributed"},
        cohort={"minimum": 4, "maximum": 6},
        model={"name": "mlp", "hidden": [256]},
    )


@pytest.fixture
def shared(sharing: HostileFederation, shared_plan: Plan) -> HostileRun:
    return sharing.run(shared_plan, range(6)).established()


def seal_refused(run: HostileRun, attempt: int, ready: Any) -> str:
    return run.federation.refused(VICTIM, "train.seal", run.seal_request(attempt, ready))


def sealed_updates(
    run: HostileRun, attempt: int, indices: list[int], monkeypatch: pytest.MonkeyPatch
) -> list[np.ndarray]:
    """Carry an attempt as far as the frames; returns what each owner rounded."""
    seen: list[np.ndarray] = []
    honest = rounds.seal_frames

    def watched(update: Any, *rest: Any) -> Any:
        seen.append(update.copy())
        return honest(update, *rest)

    monkeypatch.setattr(rounds, "seal_frames", watched)
    run.sealed_attempt(attempt, indices)
    return seen


@pytest.mark.parametrize("owners", [4, 6])
def test_a_share_is_as_large_as_the_verified_list_is_long(
    shared: HostileRun, monkeypatch: pytest.MonkeyPatch, owners: int
) -> None:
    plan = shared.plan
    promised = (plan.privacy.noise_multiplier or 0.0) * plan.sensitivity * plan.update_scale
    updates = sealed_updates(shared, 1, list(range(owners)), monkeypatch)
    assert len(updates) == owners
    for update in updates:
        assert np.std(update) == pytest.approx(promised / np.sqrt(owners - 2), rel=0.05)
    others = np.sum(updates[2:], axis=0)
    assert np.std(others) == pytest.approx(promised, rel=0.05), "without a reader and a colluder"


def test_the_opened_sum_has_the_noise_of_all_shares(shared: HostileRun) -> None:
    plan, packing = shared.plan, shared.packing()
    ready, sealed = shared.sealed_attempt(1)
    sums = np.frombuffer(shared.open(1, ready, sealed, 0)[1], "<u4").astype(np.uint64)
    total = mean_update(sums, 6, plan.update_range, packing, 1.0)
    promised = (plan.privacy.noise_multiplier or 0.0) * plan.sensitivity * plan.update_scale
    # 19,210 values give the deviation to 0.5 %
    assert np.std(total) == pytest.approx(promised * np.sqrt(6 / 4), rel=0.02)
    assert abs(np.mean(total)) < 5 * np.std(total) / np.sqrt(total.size)


def test_a_list_cannot_be_made_longer_than_its_owners(
    shared: HostileRun, sharing: HostileFederation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every invented, repeated or stale entry would shrink the victim's share."""
    monkeypatch.setattr(rounds, "with_share", lambda *_: pytest.fail("a share was drawn"))
    other = sharing.run(shared.plan, range(6)).established()
    ready = shared.fit(1, [0, 1, 2, 3])
    assert seal_refused(shared, 1, [*ready, ready[-1]]) == "FS-ROSTER-01"
    key = shared.owner(0).credentials.signing_key
    body = Ready.from_fields(ready[0].body)
    foreign = sign(key, body).model_copy(update={"signer": shared.print_(5)})
    assert seal_refused(shared, 1, [*ready, foreign]) == "FS-WIRE-02"
    stranger = sign(key, body).model_copy(update={"signer": "f" * 64})
    assert seal_refused(shared, 1, [*ready, stranger]) == "FS-ROSTER-01"
    assert seal_refused(shared, 1, [*ready, *other.fit(1, [4, 5])]) == "FS-ROSTER-01"
    assert shared.owner(VICTIM).ledger.spent(shared.run).sealed == 0


def test_an_owner_that_is_listed_and_never_seals_leaves_the_sum_closed(shared: HostileRun) -> None:
    """The victim drew its share for six; a sum of four would have too little noise."""
    ready = shared.fit(1)
    sealed = shared.seal(1, ready, [0, 1, 2, 3])
    request, blob = shared.open_request(1, ready, sealed)
    assert shared.federation.refused(VICTIM, "query.open", request, blob) == "FS-ROSTER-01"
    shorter = request.model_copy(update={"ready": ready[:4]})
    assert shared.federation.refused(VICTIM, "query.open", shorter, blob) == "FS-ROUND-01"


def test_a_list_below_the_colluders_and_three_is_refused(shared: HostileRun) -> None:
    ready = shared.fit(1)
    for size in (2, 3):
        short = sorted([*ready[:size], ready[VICTIM]], key=lambda message: message.signer)[-size:]
        assert len(short) == size
        assert seal_refused(shared, 1, short) == "FS-ROSTER-01"


def test_a_contribution_gets_one_share_for_one_list(
    shared: HostileRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two shares on one contribution would halve the variance of what hides it."""
    ready = shared.fit(1)
    kept = shared.owner(VICTIM).pending[shared.run]
    first = shared.seal(1, ready, [VICTIM])[VICTIM]
    monkeypatch.setattr(rounds, "with_share", lambda *_: pytest.fail("a second share was drawn"))
    again = shared.seal(1, ready, [VICTIM])[VICTIM]
    assert (again.frames, again.header) == (first.frames, first.header)
    assert seal_refused(shared, 1, ready[1:]) == "FS-ROUND-01"
    fields = vars(kept) | {"update": np.zeros(kept.update.size)}
    monkeypatch.setitem(shared.owner(VICTIM).pending, shared.run, PendingUpdate(**fields))
    shared.owner(VICTIM).store.save(shared.state(VICTIM).with_changes(sealed={}))
    assert seal_refused(shared, 1, ready[1:]) == "FS-LEDGER-03"


def test_an_unnoised_contribution_never_touches_the_disk(
    sharing: HostileFederation, shared: HostileRun
) -> None:
    marker = np.frombuffer(b"MARKER!!", dtype="<f8")
    shared.fit(1)
    shared.owner(VICTIM).pending[shared.run].update[:] = marker[0]
    home = shared.owner(VICTIM).data_file.parent
    shared.fit(2)
    for file in home.rglob("*"):
        assert not file.is_file() or b"MARKER!!" not in file.read_bytes()


def test_a_coordinator_cannot_name_a_plan_with_weaker_shares(
    sharing: HostileFederation, shared_plan: Plan, make_plan: Callable[..., Plan]
) -> None:
    def refusal(**changes: dict[str, Any]) -> str:
        fields = shared_plan.fields()
        for section, values in changes.items():
            fields[section] |= values
        request = JoinRequest(run="77" * 32, plan=fields)
        return sharing.refused(VICTIM, "query.join", request)

    assert refusal(cohort={"minimum": 3}) == "FS-PLAN-01"
    assert refusal(training={"local_steps": 3}) == "FS-PLAN-01"
    assert refusal(cohort={"weights": {"ab" * 32: 0.6}}) == "FS-PLAN-01"
    noise = shared_plan.privacy.noise_multiplier or 0.0
    assert refusal(privacy={"noise_multiplier": 0.9 * noise}) == "FS-PLAN-03"
    # more colluders than this owner knows honest peers
    many = {"tolerated_colluders": 2}
    assert refusal(privacy=many, cohort={"minimum": 5}) == "FS-POLICY-02"
    # so wide a range that a share is below eight steps of the grid
    assert refusal(encryption={"update_range": 1e4}) == "FS-PLAN-04"
    assert refusal(encryption={"update_range": 1e-4}) == "FS-PLAN-01"


def test_a_ledger_that_counts_examples_takes_no_run_of_another_unit(
    sharing: HostileFederation, shared: HostileRun, make_plan: Callable[..., Plan]
) -> None:
    """Such a run would cost an example more than the epsilon that it names."""
    shared.fit(1, [VICTIM])
    plan = make_plan(
        privacy={"noise": "distributed", "unit": "client", "max_update_norm": 0.5},
        cohort={"minimum": 4, "maximum": 6},
    )
    request = JoinRequest(run="88" * 32, plan=plan.fields())
    assert sharing.refused(VICTIM, "query.join", request) == "FS-BUDGET-01"
