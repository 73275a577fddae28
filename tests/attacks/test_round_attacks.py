"""Attacks on a round's first two exchanges: models, lists, attempts, and what training gives away."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hostile import HostileFederation, HostileRun, answers, nothing_released

from client import contribution, membership, rounds
from client.following import opened_mean
from client.noise import SecureStream
from client.owner import PendingUpdate
from client.policy import Peers
from crypto.signing import sign
from protocol.encoding import digest_bytes
from protocol.errors import PlanInvalid, TrainingFailed
from protocol.messages import Opening, Ready, Signed
from protocol.optimizers import apply_update
from protocol.plan import Plan

VICTIM, PEER, EVIL = 3, 2, 1
MARKER = "patient-4711-has-a-marker"


def seal_refused(run: HostileRun, attempt: int, ready: Sequence[Signed], index: int = VICTIM) -> str:
    with nothing_released(run):
        return run.federation.refused(index, "train.seal", run.seal_request(attempt, ready))


def evil_ready(run: HostileRun, signed: Signed, **changes: Any) -> Signed:
    body = Ready.from_fields(signed.body).model_copy(update=changes)
    return sign(run.owner(EVIL).credentials.signing_key, body)


# --- the round's list --------------------------------------------------------------------------------


def test_a_victim_among_sybils_does_not_seal(session: HostileRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """The join roster had two pinned peers; the round's list has one of them and two bought owners."""
    ready = session.fit(1)
    pinned = {"first": session.print_(PEER), "second": session.print_(EVIL)}
    policy = session.owner(VICTIM).policy
    peers = Peers(pinned=pinned, min_known_peers=2)
    monkeypatch.setattr(session.owner(VICTIM), "policy", policy.model_copy(update={"peers": peers}))
    assert seal_refused(session, 1, [ready[0], ready[EVIL], ready[VICTIM]]) == "FS-ROSTER-01"
    monkeypatch.setattr(membership, "require_acceptable", lambda *_: None)
    session.seal(1, [ready[0], ready[EVIL], ready[VICTIM]], [VICTIM])


def test_a_malformed_list_is_refused(session: HostileRun) -> None:
    """An owner twice, out of order, without the victim, too small, the victim twice, nobody."""
    ready = session.fit(1)
    for places in ((0, 1, 1, 3), (1, 0, 3), (0, 1, 2), (0, 3), (0, 3, 3), ()):
        assert seal_refused(session, 1, [ready[place] for place in places]) == "FS-ROSTER-01", places


def test_an_owner_outside_the_session_is_refused(federation: HostileFederation, plan: Plan) -> None:
    run = federation.run(plan).established()
    ready = run.fit(1)
    body = Ready.from_fields(ready[0].body)
    stranger = sign(federation.owners[4].credentials.signing_key, body)
    assert seal_refused(run, 1, [*ready, stranger]) == "FS-ROSTER-01"


def test_a_forged_ready_message_is_refused(session: HostileRun) -> None:
    ready = session.fit(1)
    forged = evil_ready(session, ready[PEER]).model_copy(update={"signer": session.print_(PEER)})
    assert seal_refused(session, 1, [ready[0], ready[1], forged, ready[3]]) == "FS-WIRE-02"


@pytest.mark.parametrize(
    "changes", [{"model_hash": "ab" * 32}, {"attempt": 2}, {"session": "cd" * 32}], ids=lambda c: str(*c)
)
def test_a_list_that_mixes_models_attempts_or_sessions_is_refused(
    session: HostileRun, changes: dict[str, Any]
) -> None:
    ready = session.fit(1)
    mixed = [ready[0], evil_ready(session, ready[EVIL], **changes), ready[2], ready[3]]
    assert seal_refused(session, 1, mixed) == "FS-ROSTER-01"


def test_ready_messages_of_an_earlier_attempt_or_run_are_refused(
    federation: HostileFederation, plan: Plan
) -> None:
    earlier = federation.run(plan).established()
    old = earlier.fit(1)
    run = federation.run(plan).established()
    first, second = run.fit(1), run.fit(2)
    assert seal_refused(run, 2, first) == "FS-ROSTER-01"
    assert seal_refused(run, 2, [*first[:3], second[3]]) == "FS-ROSTER-01"
    assert seal_refused(run, 2, [*old[:3], second[3]]) == "FS-ROSTER-01"
    assert seal_refused(run, 1, first) == "FS-ROUND-01"


# --- sealing once ------------------------------------------------------------------------------------


def test_the_same_update_is_not_sealed_for_a_list_with_one_owner_less(
    session: HostileRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = session.fit(1)
    shorter = ready[1:]
    kept = session.owner(VICTIM).pending.get(session.run)
    assert kept is not None
    update = kept.update.copy()
    first = session.seal(1, ready, [VICTIM])[VICTIM]
    assert seal_refused(session, 1, shorter) == "FS-ROUND-01"
    again = session.seal(1, ready, [VICTIM])[VICTIM]
    assert (again.frames, again.header) == (first.frames, first.header)
    # Even a node that kept its update by mistake does not get past its ledger.
    fields = vars(kept) | {"update": update}
    monkeypatch.setitem(session.owner(VICTIM).pending, session.run, PendingUpdate(**fields))
    state = session.state(VICTIM).with_changes(sealed={})
    session.owner(VICTIM).store.save(state)
    assert seal_refused(session, 1, shorter) == "FS-LEDGER-03"


def test_the_update_is_erased_once_it_is_sealed(session: HostileRun) -> None:
    ready = session.fit(1)
    kept = session.owner(VICTIM).pending.get(session.run)
    assert kept is not None
    session.seal(1, ready, [VICTIM])
    assert not kept.update.any()
    assert session.owner(VICTIM).pending.get(session.run) is None


def test_nothing_is_sealed_without_a_paid_update(session: HostileRun) -> None:
    ready = session.fit(1, [0, 1, 2])
    mine = sign(session.owner(VICTIM).credentials.signing_key, Ready.from_fields(ready[0].body))
    assert seal_refused(session, 1, [*ready, mine]) == "FS-ROUND-01"


def test_attempt_numbers_only_rise(session: HostileRun) -> None:
    session.fit(3)
    for attempt in (3, 2, 1, 0):
        changed = session.fit_request(attempt, steps=[])
        if attempt == 3:
            changed = changed.model_copy(update={"round": 1, "model_hash": session.model(0).sha256()})
            repeated = session.federation.accepted(VICTIM, "train.fit", changed)
            assert repeated.error is None
            continue
        assert session.federation.refused(VICTIM, "train.fit", changed) == "FS-LEDGER-03"
    assert session.owner(VICTIM).ledger.spent(session.run).sealed == 0


def test_an_attempt_number_above_all_attempts_of_the_plan_is_refused(session: HostileRun) -> None:
    """2**53 as attempt keeps an owner busy for years in `seal`, under the lock of all its runs."""
    request = session.fit_request(session.plan.max_attempts + 1)
    code = session.federation.refused(VICTIM, "train.fit", request)
    assert code in ("FS-ROUND-01", "FS-LEDGER-03")


def test_a_run_has_a_last_attempt(session: HostileRun) -> None:
    for attempt in range(1, session.plan.max_attempts + 1):
        session.fit(attempt, [VICTIM])
    request = session.fit_request(session.plan.max_attempts + 1)
    assert session.federation.refused(VICTIM, "train.fit", request) in ("FS-LEDGER-03", "FS-ROUND-01")


def test_an_update_is_sealed_in_the_run_that_paid_for_it(
    federation: HostileFederation, make_plan: Callable[..., Plan]
) -> None:
    """Run `dear` trains with little noise, run `cheap` with much; the model and the attempt are equal."""
    cheap = federation.run(make_plan(privacy={"target_epsilon": 1.0})).established()
    dear = federation.run(make_plan(privacy={"target_epsilon": 40.0})).established()
    owner = federation.owners[VICTIM]
    ready = cheap.fit(1)
    own = {index: federation.owners[index].pending[cheap.run].update.copy() for index in range(4)}
    federation.ask(VICTIM, "train.fit", dear.fit_request(1).to_bytes())
    federation.ask(VICTIM, "train.fit", dear.fit_request(1).to_bytes())
    barely_noised = owner.pending[dear.run].update
    kept = barely_noised.copy()
    sealed = cheap.seal(1, ready, range(4))
    sums = np.frombuffer(cheap.open(1, ready, sealed, 0)[1], "<u4").astype(np.uint64)
    grid = cheap.plan.update_range / cheap.packing().half_levels
    mean = opened_mean(cheap.plan, sums, 4)
    np.testing.assert_allclose(mean, sum(own.values()) / 4, atol=grid)
    assert np.array_equal(barely_noised, kept), "the other run's update was touched"
    assert owner.ledger.spent(dear.run).sealed == 0


def test_a_run_can_only_be_sealed_after_its_own_training(
    federation: HostileFederation, make_plan: Callable[..., Plan]
) -> None:
    cheap = federation.run(make_plan(privacy={"target_epsilon": 1.0})).established()
    dear = federation.run(make_plan(privacy={"target_epsilon": 40.0})).established()
    ready = cheap.fit(1)
    federation.owners[VICTIM].pending.pop(cheap.run)
    dear.fit(1, [VICTIM])
    with nothing_released(cheap):
        code = federation.refused(VICTIM, "train.seal", cheap.seal_request(1, ready))
    assert code == "FS-ROUND-01"


def test_one_run_does_not_void_the_attempt_of_another(
    federation: HostileFederation, plan: Plan, make_plan: Callable[..., Plan]
) -> None:
    first = federation.run(plan).established()
    second = federation.run(plan).established()
    first.fit(1, [VICTIM])
    answered = federation.ask(VICTIM, "train.fit", second.fit_request(1).to_bytes())
    assert answered.error is None, "a second run cannot even start beside a first one"


# --- the model ---------------------------------------------------------------------------------------


def fit_refused(run: HostileRun, attempt: int, steps: Any, sums: bytes, **changes: Any) -> str:
    request = run.fit_request(attempt, steps=steps, **changes)
    with nothing_released(run):
        return run.federation.refused(VICTIM, "train.fit", request, sums)


def next_model(run: HostileRun, sums: bytes, contributors: int) -> str:
    mean = opened_mean(run.plan, np.frombuffer(sums, "<u4").astype(np.uint64), contributors)
    return apply_update(run.model(VICTIM), mean, run.plan.server_optimizer).sha256()


def test_a_model_of_the_coordinators_choice_is_refused(session: HostileRun) -> None:
    assert fit_refused(session, 1, [], b"", model_hash="ab" * 32) == "FS-ROUND-02"


def test_models_that_do_not_follow_from_the_openings_are_refused(session: HostileRun) -> None:
    openings, sums = session.finished_round(1)
    follows = next_model(session, sums, 4)
    wrong = bytes([sums[0] ^ 1]) + sums[1:]
    steps = {"steps": [openings], "round_number": 2}
    assert fit_refused(session, 2, **(steps | {"sums": sums, "model_hash": "ab" * 32})) == "FS-ROUND-02"
    assert fit_refused(session, 2, **(steps | {"sums": wrong, "model_hash": follows})) == "FS-WIRE-03"
    assert fit_refused(session, 2, **(steps | {"sums": b"", "model_hash": follows})) == "FS-WIRE-03"
    assert fit_refused(session, 2, [], b"", model_hash=follows, round_number=2) == "FS-ROUND-02"
    ready = session.fit(2, steps=[openings], sums=sums, model_hash=follows, round_number=2)
    assert Ready.from_fields(ready[0].body).model_hash == follows


def test_openings_below_the_quorum_are_refused(session: HostileRun) -> None:
    openings, sums = session.finished_round(1)
    follows = next_model(session, sums, 4)
    fields = {"sums": sums, "model_hash": follows, "round_number": 2}
    assert fit_refused(session, 2, [openings[:1]], **fields) == "FS-WIRE-03"
    assert fit_refused(session, 2, [[]], **fields) == "FS-WIRE-03"
    assert fit_refused(session, 2, [[openings[0], openings[0]]], **fields) == "FS-ROSTER-01"
    renamed = openings[0].model_copy(update={"signer": session.print_(1)})
    assert fit_refused(session, 2, [[openings[0], renamed]], **fields) == "FS-WIRE-02"
    assert fit_refused(session, 2, [openings[::-1]], **fields) == "FS-ROSTER-01"


def test_one_colluding_opener_does_not_lead_to_another_model(session: HostileRun) -> None:
    openings, sums = session.finished_round(1)
    lie = np.full(len(sums) // 4, 7, dtype="<u4").tobytes()
    body = Opening.from_fields(openings[1].body).model_copy(update={"sums_hash": digest_bytes(lie)})
    lied = sign(session.owner(1).credentials.signing_key, body)
    fields = {"model_hash": next_model(session, lie, 4), "round_number": 2}
    assert fit_refused(session, 2, [[lied]], lie, **fields) == "FS-WIRE-03"
    assert fit_refused(session, 2, [[openings[0], lied]], lie, **fields) == "FS-WIRE-03"


def test_steps_are_neither_skipped_nor_repeated(session: HostileRun) -> None:
    first, sums = session.finished_round(1)
    second_model = next_model(session, sums, 4)
    fields = {"model_hash": second_model, "round_number": 2}
    twice = {"model_hash": second_model, "round_number": 3}
    assert fit_refused(session, 2, [first, first], sums + sums, **twice) == "FS-ROUND-02"
    assert fit_refused(session, 2, [first], sums, **twice) == "FS-ROUND-02"
    later, later_sums = session.finished_round(2, steps=[first], sums=sums, **fields)
    third_model = next_model(session, later_sums, 4)
    skipped = {"model_hash": third_model, "round_number": 2}
    assert fit_refused(session, 3, [first], sums, **skipped) == "FS-ROUND-02"
    back = {"model_hash": session.plan.model.initial_sha256, "round_number": 1}
    assert fit_refused(session, 3, [], b"", **back) == "FS-ROUND-02"
    onward = {"model_hash": third_model, "round_number": 3}
    assert session.fit(3, steps=[first, later], sums=sums + later_sums, **onward)


def test_an_owner_that_missed_nothing_accepts_the_same_steps_again(session: HostileRun) -> None:
    """After a restart, or a void attempt, a coordinator sends all finished rounds."""
    openings, sums = session.finished_round(1)
    fields = {"model_hash": next_model(session, sums, 4), "round_number": 2}
    session.fit(2, steps=[openings], sums=sums, **fields)
    session.fit(3, steps=[openings], sums=sums, **fields)


def test_openings_of_another_session_are_refused(federation: HostileFederation, plan: Plan) -> None:
    other = federation.run(plan).established()
    openings, sums = other.finished_round(1)
    run = federation.run(plan).established()
    fields = {"model_hash": next_model(run, sums, 4), "round_number": 2}
    assert fit_refused(run, 1, [openings], sums, **fields) == "FS-WIRE-03"


# --- without noise -----------------------------------------------------------------------------------


def test_two_lists_that_differ_in_one_owner_are_refused_without_noise(
    federation: HostileFederation, make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second attempt starts from the same model; full batches without noise give the same update."""
    for owner in federation.owners:
        plans = owner.policy.plans.model_copy(update={"allow_no_privacy": True})
        monkeypatch.setattr(owner, "policy", owner.policy.model_copy(update={"plans": plans}))
    privacy = {"noise": "none", "target_epsilon": None, "sample_rate": 1.0}
    run = federation.run(make_plan(privacy=privacy)).established()
    truth: list[Any] = []
    honest = contribution.local_update

    def recorded(*arguments: Any) -> Any:
        truth.append(honest(*arguments))
        return truth[-1].copy()

    monkeypatch.setattr(contribution, "local_update", recorded)
    ready, sealed = run.sealed_attempt(1)
    opened = np.frombuffer(run.open(1, ready, sealed, 0)[1], "<u4").astype(np.int64)
    victims = truth[VICTIM]
    shorter = run.fit(2, [0, 1, 2])
    answered = federation.ask(0, "train.seal", run.seal_request(2, shorter).to_bytes())
    if answered.error is None:
        sealed = run.seal(2, shorter, [0, 1, 2])
        without = np.frombuffer(run.open(2, shorter, sealed, 0)[1], "<u4").astype(np.int64)
        grid = run.packing().half_levels / run.plan.update_range
        stolen = (opened - without - run.packing().half_levels) / grid
        np.testing.assert_allclose(stolen, victims, atol=8 / grid)
    assert answered.error == "FS-ROSTER-01", "the coordinator alone has read the victim's update"


# --- what training gives away ------------------------------------------------------------------------


def test_an_update_that_is_not_finite_never_leaves(
    session: HostileRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = session.owner(VICTIM)
    for attempt, value in enumerate((np.nan, np.inf, -np.inf), start=1):
        update = np.zeros(650)
        update[17] = value
        monkeypatch.setattr(contribution, "local_update", lambda *_, update=update: update.copy())
        session.federation.ask(VICTIM, "train.fit", session.fit_request(attempt).to_bytes())
        assert all(bool(np.all(np.isfinite(kept.update))) for kept in owner.pending.values())


def test_extreme_updates_seal_and_open_exactly(
    session: HostileRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = session.packing().half_levels
    for attempt, value in enumerate((5e-324, -5e-324, 1e308, -1e308), start=1):
        monkeypatch.setattr(contribution, "local_update", lambda *_, value=value: np.full(650, value))
        ready, sealed = session.sealed_attempt(attempt)
        sums = np.frombuffer(session.open(attempt, ready, sealed, 0)[1], "<u4").astype(np.int64)
        if abs(value) > 1:
            assert np.all(sums == (8 * levels if value > 0 else 0))
        else:
            assert np.all(np.abs(sums - 4 * levels) <= 4)


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_arguments: Any, **_options: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("place", ["training", "reading"])
def test_only_a_code_leaves_when_training_or_reading_fails(
    session: HostileRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    caplog.set_level(logging.CRITICAL)
    errors = (ValueError(MARKER), TrainingFailed(MARKER), RuntimeError(MARKER), OSError(MARKER))
    for attempt, error in enumerate(errors, start=1):
        if place == "training":
            monkeypatch.setattr(contribution, "local_update", raising(error))
        else:
            monkeypatch.setattr(type(session.owner(VICTIM)), "examples", raising(error))
        answered = session.federation.ask(VICTIM, "train.fit", session.fit_request(attempt).to_bytes())
        assert answered.error in ("FS-TRAIN-01", "FS-GENERAL-01")
    assert MARKER not in str(answers(session.owner(VICTIM), session.run))
    assert session.owner(VICTIM).pending.get(session.run) is None


def test_no_plan_can_make_a_step_overflow(make_plan: Callable[..., Plan]) -> None:
    """With a step size near the largest float32, an answer would tell on which side the data lie."""
    with pytest.raises(PlanInvalid, match=r"training\.learning_rate"):
        make_plan(training={"learning_rate": 8.0e37})


def test_an_update_that_overflows_is_answered_like_any_other(
    session: HostileRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    for attempt, value in enumerate((np.inf, -np.inf, np.nan, 0.0), start=1):
        monkeypatch.setattr(contribution, "local_update", lambda *_, value=value: np.full(650, value))
        answered = session.federation.ask(VICTIM, "train.fit", session.fit_request(attempt).to_bytes())
        assert answered.error is None


def test_training_that_stops_is_not_refunded(session: HostileRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contribution, "local_update", raising(TrainingFailed()))
    assert session.federation.refused(VICTIM, "train.fit", session.fit_request(1)) == "FS-TRAIN-01"
    spent = session.owner(VICTIM).ledger.spent(session.run)
    assert (spent.reserved, spent.void) == (1, 0)


def test_rounding_coins_come_from_a_secure_stream_that_is_new_in_every_attempt(
    session: HostileRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    original = rounds.seal_frames

    def watched(values: Any, bound: float, uniforms: Any, masks: Any, key: Any) -> Any:
        given.append(uniforms)
        return original(values, bound, uniforms, masks, key)

    monkeypatch.setattr(rounds, "seal_frames", watched)
    for attempt in (1, 2):
        session.sealed_attempt(attempt)
    assert {getattr(uniforms, "__func__", None) for uniforms in given} == {SecureStream.uniform}
    assert len({id(uniforms.__self__) for uniforms in given}) == len(given) == 2 * len(session.indices)


# --- public weights ----------------------------------------------------------------------------------


def test_public_weights_enter_the_mean_exactly_as_the_plan_says(
    federation: HostileFederation, make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {federation.owners[0].fingerprint: 0.5, federation.owners[1].fingerprint: 0.75}
    run = federation.run(make_plan(cohort={"weights": weights})).established()
    values = iter([0.01, 0.02, 0.03, 0.04])
    monkeypatch.setattr(contribution, "local_update", lambda *_: np.full(650, next(values)))
    ready, sealed = run.sealed_attempt(1)
    opening, blob = run.open(1, ready, sealed, 0)
    body = Opening.from_fields(opening.body)
    assert (body.contributors, body.total_weight) == (4, 3.25)
    sums = np.frombuffer(blob, "<u4").astype(np.uint64)
    mean = opened_mean(run.plan, sums, 4, body.total_weight)
    expected = (0.5 * 0.01 + 0.75 * 0.02 + 0.03 + 0.04) / 3.25
    grid = run.plan.update_range / run.packing().half_levels
    np.testing.assert_allclose(mean, expected, atol=2 * grid)


def test_an_opening_with_another_weight_does_not_lead_on(session: HostileRun) -> None:
    openings, sums = session.finished_round(1)
    follows = next_model(session, sums, 4)
    fields = {"sums": sums, "model_hash": follows, "round_number": 2}
    body = Opening.from_fields(openings[0].body).model_copy(update={"total_weight": 2.0})
    lied = [
        sign(session.owner(index).credentials.signing_key, body)
        for index, signed in enumerate(session.federation.owners[:4])
    ]
    lied = sorted(lied, key=lambda one: one.signer)[: len(openings)]
    assert fit_refused(session, 2, [lied], **fields) == "FS-ROUND-02"
