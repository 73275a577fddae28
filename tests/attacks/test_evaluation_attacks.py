"""Attacks on federated evaluation: unplanned counts, and one purpose used as the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hostile import HostileFederation, HostileRun, Sealed, nothing_released, slots_of
from numpy.typing import NDArray

from client import evaluation
from client.following import opened_mean
from client.policy import Policy, admit
from crypto.masks import MaskContext, advance, apply_masks
from crypto.signing import sign
from protocol.encoding import digest_bytes
from protocol.errors import PlanInvalid, PolicyRefused
from protocol.evaluation import COUNTS, evaluation_epsilon, run_epsilon
from protocol.messages import Header, JoinRequest, Opening, Purpose, Ready, Signed
from protocol.optimizers import apply_update
from protocol.plan import Plan
from tasks.resolve import resolve

VICTIM, EVIL = 3, 1
EVALUATION = {"every": 2, "target_epsilon": 1.0, "delta": 1e-7, "holdout_share": 0.3}


@pytest.fixture
def counted(federation: HostileFederation, make_plan: Callable[..., Plan]) -> HostileRun:
    """A run of four rounds with evaluation after the second and the fourth, whose session stands."""
    return federation.run(make_plan(evaluation=EVALUATION)).established()


class Honest:
    """Finishes rounds honestly and keeps what leads to the model."""

    def __init__(self, run: HostileRun) -> None:
        self.run, self.steps, self.sums, self.attempt = run, [], b"", 0
        self.model = run.model(VICTIM)

    def fields(self, round_number: int) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "model_hash": self.model.sha256(),
            "round_number": round_number,
        }

    def train(self) -> tuple[list[Signed], dict[int, Sealed]]:
        self.attempt += 1
        fields = self.fields(len(self.steps) + 1)
        ready, sealed = self.run.sealed_attempt(self.attempt, sums=self.sums, **fields)
        openings = [self.run.open(self.attempt, ready, sealed, index) for index in (0, 1)]
        mean = opened_mean(self.run.plan, np.frombuffer(openings[0][1], "<u4").astype(np.uint64), 4)
        self.model = apply_update(self.model, mean, self.run.plan.server_optimizer)
        self.steps = [*self.steps, [signed for signed, _ in openings]]
        self.sums += openings[0][1]
        return ready, sealed

    def evaluated(self, **changes: Any) -> list[Signed]:
        """Let all owners count; returns their ready messages."""
        self.attempt += 1
        fields = self.fields(len(self.steps)) | changes
        return self.run.fit(self.attempt, sums=self.sums, purpose="evaluate", **fields)

    def refused(self, **changes: Any) -> str:
        """Ask the victim to count; returns the error that must come back."""
        fields = self.fields(len(self.steps)) | changes
        request = self.run.fit_request(self.attempt + 1, purpose="evaluate", **fields)
        with nothing_released(self.run):
            return self.run.federation.refused(VICTIM, "train.fit", request, self.sums)


def due(run: HostileRun) -> Honest:
    """Two finished rounds: the first evaluation is due."""
    honest = Honest(run)
    honest.train()
    honest.train()
    return honest


def without_masks(
    run: HostileRun, chains: dict[str, bytes], sealed: Sealed, purpose: Purpose
) -> NDArray[np.uint64]:
    """Decrypt the victim's frame, and take off the masks that it would have under a purpose."""
    header, modulus = Header.from_fields(sealed.header.body), run.packing().plain_modulus
    context = MaskContext(
        header.session, header.attempt, purpose, header.list_hash, header.model_hash, modulus
    )
    ratcheted = {peer: advance(chain, header.attempt) for peer, chain in chains.items()}
    masked = slots_of(run, sealed.frames, run.bfv_key(EVIL))[0]
    masks = apply_masks(np.zeros_like(masked), run.print_(VICTIM), ratcheted, context)
    stripped: NDArray[np.uint64] = (masked + np.uint64(modulus) - masks) % np.uint64(modulus)
    return stripped


# --- what may be evaluated ---------------------------------------------------------------------------


def test_an_evaluation_that_the_plan_orders_is_answered_and_charged(counted: HostileRun) -> None:
    honest = due(counted)
    owner = counted.owner(VICTIM)
    before = owner.ledger.spent(counted.run)
    ready = honest.evaluated()
    sealed = counted.seal(honest.attempt, ready, range(4))
    opening, sums = counted.open(honest.attempt, ready, sealed, 0)
    body = Opening.from_fields(opening.body)
    assert (body.purpose, body.total_weight, len(sums)) == ("evaluate", 4.0, 4 * COUNTS)
    assert Header.from_fields(sealed[VICTIM].header.body).parameters == COUNTS
    spent = owner.ledger.spent(counted.run)
    assert (before.evaluation_epsilon, before.evaluation_delta) == (0.0, 0.0)
    assert spent.evaluation_epsilon == evaluation_epsilon(counted.plan, 1)
    assert spent.epsilon == run_epsilon(counted.plan, 2, 1)
    assert spent.delta == counted.plan.privacy.delta + 1e-7
    kinds = [(one.body["kind"], one.body.get("purpose")) for one in owner.ledger.records()[-2:]]
    assert kinds == [("reserve", "evaluate"), ("commit", "evaluate")]


def test_a_run_without_the_section_counts_nothing(session: HostileRun) -> None:
    honest = due(session)
    assert honest.refused() == "FS-ROUND-04"
    assert session.owner(VICTIM).ledger.records()[-1].body.get("purpose") != "evaluate"


def test_only_models_of_the_schedule_are_evaluated(counted: HostileRun) -> None:
    honest = Honest(counted)
    assert honest.refused() == "FS-ROUND-04"  # round 0's model
    honest.train()
    assert honest.refused() == "FS-ROUND-04"  # the first of two
    assert honest.refused(round_number=2) == "FS-ROUND-02"
    honest.train()
    assert honest.refused(model_hash="ab" * 32) == "FS-ROUND-02"
    assert honest.refused(round_number=4) == "FS-ROUND-02"
    assert honest.refused(round_number=1) == "FS-ROUND-02"
    honest.evaluated()


def test_an_earlier_model_is_not_evaluated_later(counted: HostileRun) -> None:
    """An owner that is at round 2 cannot be led back to round 1 or the model of round 2 after round 3."""
    honest = due(counted)
    earlier = {"steps": honest.steps, "model_hash": honest.model.sha256(), "round_number": 2}
    sums = honest.sums
    honest.train()
    honest.attempt += 1
    fields = honest.fields(4)
    counted.fit(honest.attempt, sums=honest.sums, **fields)
    request = counted.fit_request(honest.attempt + 1, purpose="evaluate", **earlier)
    with nothing_released(counted):
        assert counted.federation.refused(VICTIM, "train.fit", request, sums) == "FS-ROUND-02"


def test_a_model_is_opened_once(counted: HostileRun) -> None:
    honest = due(counted)
    ready = honest.evaluated()
    sealed = counted.seal(honest.attempt, ready, range(4))
    counted.open(honest.attempt, ready, sealed, VICTIM)
    assert honest.refused() == "FS-ROUND-04"


def test_a_model_is_sealed_no_more_often_than_there_are_spares(counted: HostileRun) -> None:
    """A coordinator that says that evaluations failed gets one more for each spare, and each is charged."""
    honest, owner = due(counted), counted.owner(VICTIM)
    for sealed in (1, 2):
        counted.seal(honest.attempt + 1, honest.evaluated(), [VICTIM])
        spent = owner.ledger.spent(counted.run)
        assert spent.evaluation_epsilon == evaluation_epsilon(counted.plan, sealed)
    assert counted.plan.run.paid_spares == 1
    assert honest.refused() == "FS-ROUND-04"


def test_the_ledger_holds_all_evaluations_of_a_run(
    counted: HostileRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even a node that forgot its schedule does not get past its ledger."""
    monkeypatch.setattr(evaluation, "require_due", lambda *_: None)
    monkeypatch.setattr("client.rounds.require_due", lambda *_: None)
    honest, owner = due(counted), counted.owner(VICTIM)
    for _ in range(counted.plan.paid_evaluations):
        counted.seal(honest.attempt + 1, honest.evaluated(), [VICTIM])
    assert honest.refused() == "FS-LEDGER-03"
    spent = owner.ledger.spent(counted.run)
    assert spent.sealed_evaluations == counted.plan.paid_evaluations == 3
    assert (spent.evaluation_epsilon or 9.0) <= 1.0


def test_counts_that_were_never_sealed_are_refunded(counted: HostileRun) -> None:
    honest, owner = due(counted), counted.owner(VICTIM)
    honest.evaluated()
    pending = owner.pending[counted.run]
    assert owner.ledger.spent(counted.run).evaluation_epsilon == evaluation_epsilon(counted.plan, 1)
    counted.fit(honest.attempt + 1, sums=honest.sums, **honest.fields(3))
    assert not pending.update.any(), "the counts were not erased"
    spent = owner.ledger.spent(counted.run)
    assert (spent.evaluation_epsilon, spent.void) == (0.0, 1)


# --- one purpose as the other ------------------------------------------------------------------------


def test_counts_are_not_sealed_as_an_update(counted: HostileRun) -> None:
    honest = due(counted)
    ready = honest.evaluated()
    relabelled = [
        sign(counted.owner(index).credentials.signing_key, changed(one, purpose="train"))
        for index, one in enumerate(ready)
    ]
    request = counted.seal_request(honest.attempt, relabelled)
    with nothing_released(counted):
        assert counted.federation.refused(VICTIM, "train.seal", request) == "FS-WIRE-03"
        mixed = counted.seal_request(honest.attempt, [*relabelled[:1], *ready[1:]])
        assert counted.federation.refused(VICTIM, "train.seal", mixed) == "FS-ROSTER-01"


def test_an_update_is_not_sealed_as_counts(counted: HostileRun) -> None:
    honest = due(counted)
    honest.attempt += 1
    ready = counted.fit(honest.attempt, sums=honest.sums, **honest.fields(3))
    relabelled = [
        sign(counted.owner(index).credentials.signing_key, changed(one, purpose="evaluate"))
        for index, one in enumerate(ready)
    ]
    request = counted.seal_request(honest.attempt, relabelled)
    with nothing_released(counted):
        assert counted.federation.refused(VICTIM, "train.seal", request) == "FS-WIRE-03"


def test_frames_of_one_purpose_do_not_open_as_the_other(counted: HostileRun) -> None:
    honest = due(counted)
    ready = honest.evaluated()
    counts = counted.seal(honest.attempt, ready, range(4))
    honest.attempt += 1
    trained = counted.fit(honest.attempt, sums=honest.sums, **honest.fields(3))
    updates = counted.seal(honest.attempt, trained, range(4))
    # an evaluation's frames with headers of the training round, and the other way round
    for number, listed, headers, frames in (
        (honest.attempt, trained, updates, counts),
        (honest.attempt - 1, ready, counts, updates),
        (honest.attempt, trained, counts, counts),
        (honest.attempt - 1, ready, updates, updates),
    ):
        mixed = {i: Sealed(headers[i].header, frames[i].frames) for i in range(4)}
        request, blob = counted.open_request(number, listed, mixed)
        with nothing_released(counted):
            code = counted.federation.refused(VICTIM, "query.open", request, blob)
        assert code in ("FS-FRAME-01", "FS-WIRE-03"), code


def test_replayed_counts_in_a_training_round_do_not_cancel(counted: HostileRun) -> None:
    """A bought owner signs a training header over the victim's counts; the masks give it away."""
    honest = due(counted)
    ready = honest.evaluated()
    counts = counted.seal(honest.attempt, ready, range(4))
    honest.attempt += 1
    trained = counted.fit(honest.attempt, sums=honest.sums, **honest.fields(3))
    updates = counted.seal(honest.attempt, trained, range(4))
    replayed = counted.forged(0, updates[0].header, [counts[VICTIM].frames])
    request, blob = counted.open_request(honest.attempt, trained, {**updates, 0: replayed})
    with nothing_released(counted):
        assert counted.federation.refused(VICTIM, "query.open", request, blob) == "FS-ROUND-03"


def test_masks_of_the_two_purposes_are_unrelated(counted: HostileRun) -> None:
    contexts = [
        MaskContext("aa", 1, purpose, "bb", "cc", counted.packing().plain_modulus).info()
        for purpose in ("train", "evaluate")
    ]
    assert contexts[0] != contexts[1]
    honest = due(counted)
    ready = honest.evaluated()
    sealed = counted.seal(honest.attempt, ready, [VICTIM])
    slots = slots_of(counted, sealed[VICTIM].frames, counted.bfv_key(0))
    # masked: nothing of the counts, nor of the check slots, is legible for a holder of the key
    assert len(np.unique(slots)) > 0.99 * slots.size


def test_only_masks_of_the_purpose_evaluate_come_off_an_evaluation(counted: HostileRun) -> None:
    """With all its chain keys, and the masks that it would have in training, the victim stays hidden."""
    chains = counted.state(VICTIM).chain_keys
    honest = due(counted)
    ready = honest.evaluated()
    sealed = counted.seal(honest.attempt, ready, [VICTIM])[VICTIM]
    assert list(without_masks(counted, chains, sealed, "evaluate")[-4:]) == [1, 1, 1, 1]
    assert not np.any(without_masks(counted, chains, sealed, "train")[-4:] == 1)


def test_opened_counts_are_no_step_of_the_model(counted: HostileRun) -> None:
    honest = due(counted)
    ready = honest.evaluated()
    sealed = counted.seal(honest.attempt, ready, range(4))
    opened = [counted.open(honest.attempt, ready, sealed, index) for index in (0, 1)]
    # bought owners sign them as if they were of a whole update, so that the length fits
    lie = np.zeros(counted.model(0).weights.size, dtype="<u4").tobytes()
    signed = [
        sign(
            counted.owner(index).credentials.signing_key,
            Opening.from_fields(opened[index][0].body).model_copy(update={"sums_hash": digest_bytes(lie)}),
        )
        for index in (0, 1)
    ]
    request = counted.fit_request(
        honest.attempt + 1,
        steps=[*honest.steps, signed],
        model_hash=honest.model.sha256(),
        round_number=4,
    )
    with nothing_released(counted):
        code = counted.federation.refused(VICTIM, "train.fit", request, honest.sums + lie)
    assert code == "FS-WIRE-03"


def changed(signed: Signed, **changes: Any) -> Ready:
    return Ready.from_fields(signed.body).model_copy(update=changes)


# --- what is counted ---------------------------------------------------------------------------------


def test_held_out_records_are_never_trained_on(counted: HostileRun) -> None:
    owner = counted.owner(VICTIM)
    trained, held = owner.examples(counted.plan), owner.held_out(counted.plan)
    rows = {row.tobytes() for row in trained.x} & {row.tobytes() for row in held.x}
    assert not rows
    assert len(trained) + len(held) == 60
    assert 0 < len(held) < 60


def test_a_failed_count_sends_noise_alone(counted: HostileRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a coordinator could ask for models that fail on certain records."""
    honest = due(counted)

    def fails(*_: Any) -> Any:
        raise ValueError("record 7 is out of range")

    monkeypatch.setattr("tasks.images.ImageClassification.correct", fails)
    ready = honest.evaluated()
    assert len(ready) == 4
    section, noise = counted.plan.evaluation, counted.owner(VICTIM).pending[counted.run].update
    assert section is not None
    assert np.all(np.abs(noise) < 9 * (section.noise_multiplier or 0.0))


def test_two_counts_of_one_model_differ_by_fresh_noise(counted: HostileRun) -> None:
    honest = due(counted)
    honest.evaluated()
    first = counted.owner(VICTIM).pending[counted.run].update.copy()
    honest.evaluated()
    assert np.all(counted.owner(VICTIM).pending[counted.run].update != first)


def test_the_split_is_secret_and_each_owners_own(federation: HostileFederation) -> None:
    keys = {owner.store.holdout_key(owner.policy.dataset) for owner in federation.owners}
    assert len(keys) == len(federation.owners)
    owner = federation.owners[0]
    assert owner.store.holdout_key(owner.policy.dataset) in keys
    assert owner.store.holdout_key("another-dataset") not in keys
    sealed = owner.store._database.execute("SELECT key FROM holdout").fetchall()
    assert not any(key in row[0] for key in keys for row in sealed)


# --- plans -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("privacy", "section"),
    [
        ({}, {"noise": "none", "target_epsilon": None}),
        ({"noise": "none", "target_epsilon": None}, {}),
        ({}, {"target_epsilon": None}),
        ({}, {"noise": "none"}),
        ({"unit": "client", "max_update_norm": 1.0}, {}),
    ],
    ids=["no noise beside noise", "noise beside none", "no target", "none with target", "unit client"],
)
def test_a_plan_whose_counts_nothing_bounds_is_invalid(
    make_plan: Callable[..., Plan], privacy: dict[str, Any], section: dict[str, Any]
) -> None:
    with pytest.raises(PlanInvalid):
        make_plan(privacy=privacy, evaluation=EVALUATION | section)


def test_too_little_noise_for_the_evaluations_target_is_refused(
    federation: HostileFederation, make_plan: Callable[..., Plan]
) -> None:
    plan = make_plan(evaluation=EVALUATION)
    section = plan.evaluation
    assert section is not None
    weak = section.model_copy(update={"noise_multiplier": (section.noise_multiplier or 0.0) / 2})
    run = federation.run(plan.model_copy(update={"evaluation": weak}))
    request = JoinRequest(run=run.run, plan=run.plan.fields())
    assert federation.refused(VICTIM, "query.join", request) == "FS-PLAN-03"
    unresolved = section.model_copy(update={"noise_multiplier": None})
    run = federation.run(plan.model_copy(update={"evaluation": unresolved}))
    request = JoinRequest(run=run.run, plan=run.plan.fields())
    assert federation.refused(VICTIM, "query.join", request) == "FS-PLAN-01"


def test_caps_count_training_and_evaluation_together(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(privacy={"target_epsilon": 4.0}, evaluation=EVALUATION)
    fields: dict[str, Any] = {
        "dataset": "ward",
        "data_file": "data.npz",
        "plans": {"tasks": ["image-classification"], "models": ["linear"]},
        "peers": {"min_known_peers": 1},
    }
    for budget, field in (
        ({"epsilon_per_run": 4.5, "epsilon_total": 9.0, "delta_total": 1e-3}, "epsilon_per_run"),
        ({"epsilon_per_run": 5.0, "epsilon_total": 9.0, "delta_total": 1.05e-6}, "delta_total"),
    ):
        with pytest.raises(PolicyRefused, match=field):
            admit(Policy.model_validate(fields | {"budget": budget}), plan)
    enough = {"epsilon_per_run": 5.0, "epsilon_total": 5.0, "delta_total": 1.2e-6}
    admit(Policy.model_validate(fields | {"budget": enough}), plan)
    assert resolve(plan) == plan
