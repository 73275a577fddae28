"""A federation with evaluation from end to end, and everything that its coordinator gets to see."""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from real_federation import small_plan
from rich.console import Console

from audit.collecting.collect import collect
from audit.evidence.run import RunEvidence
from audit.report import build_report, verify_report, write_report
from client.app import EXCHANGES
from client.owner import Owner
from console.progress import RunProgress
from crypto.signing import verify
from protocol import messages
from protocol.encoding import decode
from protocol.errors import EvaluationRefused, FrameInvalid, ReportInvalid
from protocol.evaluation import evaluation_epsilon, run_epsilon
from protocol.messages import Opening, Signed, Statement
from scenarios.simulate import Simulation, federate
from server.exchange import Exchanger, Reply
from server.rounds.openings import OpeningExchange
from server.rounds.runner import RoundRunner
from tasks.images import unflatten
from tasks.partition import digits
from tasks.registry import task_for
from tasks.resolve import resolve

EVALUATION = {"every": 2, "target_epsilon": 2.0, "delta": 1e-7, "holdout_share": 0.4}
PLANTED = 13.731058
"""A pixel that no digit has, in every record of every owner; raw values go up to 16."""

ROWS = (1583, 1499, 1453)
"""Records of each owner: numbers that nothing else in a run takes."""


class Wire:
    """Everything that the coordinator received, as it came."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.received: list[tuple[str, bytes, bytes]] = []
        original = Exchanger._received

        def watched(exchanger: Exchanger, kind: str, *others: Any) -> Reply:
            reply = original(exchanger, kind, *others)
            self.received.append((kind, reply.body, reply.blob))
            return reply

        patch.setattr(Exchanger, "_received", watched)


class Finished:
    """One run, shared by the tests of this module."""

    def __init__(self, folder: Path, simulation: Simulation, wire: Wire, log: str) -> None:
        self.folder, self.simulation, self.wire, self.log = folder, simulation, wire, log
        self.store, self.plan = simulation.store, simulation.store.plan()
        self.owners: list[Owner] = list(simulation.owners.values())

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [facts for _, _, name, facts in self.store.events() if name == kind]

    def evidence(self) -> RunEvidence:
        return collect(self.store, self.folder / "server", None)

    def truth(self, owner: Owner, round_number: int) -> tuple[int, int]:
        """Count what this owner counted: right and wrong answers on its held-out records."""
        task, held = task_for(self.plan), owner.held_out(self.plan)
        network = task.build_model(self.plan)
        unflatten(network, self.store.read_checkpoint(round_number).weights)
        correct = int(np.sum(task.correct(network, held)))
        return correct, len(held) - correct


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("evaluated") / "federation"
    (x, y), *_ = digits(seed=0, owners=1)[0]
    generator = np.random.default_rng(3)
    chosen = [generator.integers(0, len(y), count) for count in ROWS]
    raw = x.astype(np.float32)
    raw[:, 0, 0] = PLANTED
    plan = resolve(small_plan(run={"rounds": 3}, evaluation=EVALUATION))
    shards = [(raw[rows], y[rows]) for rows in chosen]
    with pytest.MonkeyPatch.context() as patch:
        wire, log = Wire(patch), Log()
        simulation = federate(plan, shards, folder)
        with log.attached():
            simulation.run()
        yield Finished(folder, simulation, wire, log.text())
        simulation.close()


class Log(logging.Handler):
    """The coordinator's own log, at its most talkative."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())

    def text(self) -> str:
        return "\n".join(self._lines)

    @contextmanager
    def attached(self) -> Iterator[None]:
        logger = logging.getLogger("fedseal.server")
        level = logger.level
        logger.addHandler(self)
        logger.setLevel(logging.DEBUG)
        try:
            yield
        finally:
            logger.removeHandler(self)
            logger.setLevel(level)


# --- the run -----------------------------------------------------------------------------------------


def test_the_planned_models_are_evaluated_once_each(finished: Finished) -> None:
    made = [(one["attempt"], one["purpose"], one["round"]) for one in finished.store.attempts()]
    assert made == [
        (1, "train", 1),
        (2, "train", 2),
        (3, "evaluate", 2),
        (4, "train", 3),
        (5, "evaluate", 3),
    ]
    assert finished.store.finished_rounds() == 3
    assert [facts["round"] for facts in finished.events("evaluation")] == [2, 3]


def test_the_estimate_is_the_federations_accuracy_within_its_error(finished: Finished) -> None:
    for facts in finished.events("evaluation"):
        counts = np.array([finished.truth(owner, facts["round"]) for owner in finished.owners])
        accuracy = counts.sum(axis=0)[0] / counts.sum()
        assert 0 < facts["standard_error"] < 0.05
        assert abs(facts["accuracy"] - accuracy) < 6 * facts["standard_error"]


def test_every_owner_pays_for_both_and_says_so(finished: Finished) -> None:
    run = str(finished.store.get("run"))
    for owner in finished.owners:
        spent = owner.ledger.spent(run)
        assert (spent.sealed, spent.sealed_evaluations) == (3, 2)
        assert spent.epsilon == run_epsilon(finished.plan, 3, 2)
        assert spent.evaluation_epsilon == evaluation_epsilon(finished.plan, 2)
        assert spent.delta == pytest.approx(1e-6 + 1e-7)
        signed = Signed.from_fields(finished.store.owners()[owner.fingerprint]["statement"])
        body = verify(signed, owner.credentials.signing_key.public_key(), Statement)
        assert (body.epsilon, body.evaluation_epsilon) == (spent.epsilon, spent.evaluation_epsilon)
        assert (body.delta, body.evaluation_delta) == (spent.delta, 1e-7)
        kinds = [one.body.get("purpose") for one in owner.ledger.records() if one.body["kind"] == "reserve"]
        assert kinds == ["train", "train", "evaluate", "train", "evaluate"]
    shown = finished.events("evaluation")[-1]["epsilon"]
    assert set(shown.values()) == {run_epsilon(finished.plan, 3, 2)}


def test_the_signed_openings_are_kept(finished: Finished) -> None:
    for facts in finished.store.attempts():
        bodies = [Opening.from_fields(Signed.from_fields(one).body) for one in facts["openings"]]
        assert len(bodies) >= 2
        assert {body.purpose for body in bodies} == {facts["purpose"]}
        assert {body.sums_hash for body in bodies} == {facts["sums_hash"]}


# --- the report --------------------------------------------------------------------------------------


def test_the_report_shows_both_losses_and_the_noised_accuracy(finished: Finished, tmp_path: Path) -> None:
    report = build_report(finished.evidence(), datetime.now(UTC))
    json_file, html_file = write_report(report, tmp_path)
    assert verify_report(json_file) == report
    results = {check["id"]: check["status"] for check in report["checks"]}
    for name in (
        "budget-kept",
        "evaluations-planned",
        "statements-agree",
        "openings-agree",
        "run-complete",
    ):
        assert results[name] == "pass", name
    evaluations = [entry for entry in report["rounds"] if entry["purpose"] == "evaluate"]
    for entry, facts in zip(evaluations, finished.events("evaluation"), strict=True):
        assert entry["estimate"]["accuracy"] == facts["accuracy"]
    spent = report["claims"][0]["spent"]
    assert spent["epsilon"] == run_epsilon(finished.plan, 3, 2)
    assert spent["evaluation_epsilon"] == evaluation_epsilon(finished.plan, 2)
    assert report["promise"]["epsilon"] == 4.0
    text = html_file.read_text(encoding="utf-8")
    assert "Federated accuracy (noised)" in text
    assert f"{100 * evaluations[0]['estimate']['accuracy']:.1f} %" in text


def test_a_report_with_other_counts_or_other_prices_is_refused(finished: Finished, tmp_path: Path) -> None:
    fields = finished.evidence().fields()
    place = next(index for index, one in enumerate(fields["rounds"]) if one["purpose"] == "evaluate")
    counts = fields["rounds"][place]["sums"]
    with pytest.raises(ReportInvalid, match="signed ones"):
        RunEvidence.from_fields(changed(fields, ["rounds", place, "sums"], [counts[0] + 1, counts[1]]))
    with pytest.raises(ReportInvalid, match="opened evaluation"):
        RunEvidence.from_fields(changed(fields, ["rounds", place, "sums"], None))
    # the coordinator leaves an evaluation out of what the owners paid for
    claimed = changed(fields, ["owners", 0, "sealed_evaluations"], 0)
    report = build_report(RunEvidence.from_fields(claimed), datetime.now(UTC))
    assert report["claims"][0]["spent"]["evaluation_epsilon"] > 0, "the owner's own statement counts"
    # an evaluation that the plan does not order
    moved = changed(fields, ["rounds", place, "round"], 1)
    report = build_report(RunEvidence.from_fields(moved), datetime.now(UTC))
    assert "evaluations-planned" in {c["id"] for c in report["checks"] if c["status"] == "fail"}
    many = RunEvidence.from_fields(changed(fields, ["owners", 0, "sealed_evaluations"], 4))
    with pytest.raises(ReportInvalid, match="more evaluations"):
        build_report(many, datetime.now(UTC))


def changed(fields: dict[str, Any], place: list[Any], value: Any) -> dict[str, Any]:
    copied = json.loads(json.dumps(fields))
    target = copied
    for step in place[:-1]:
        target = target[step]
    target[place[-1]] = value
    return dict(copied)


def test_progress_shows_the_noised_accuracy(finished: Finished) -> None:
    console = Console(record=True, width=110, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: SIM115
    progress = RunProgress(console, 3, protected=True)
    for _, _, kind, facts in finished.store.events():
        progress.show(kind, facts)
    lines = [line for line in console.export_text().splitlines() if "federated accuracy (noised)" in line]
    assert len(lines) == 2
    assert f"{finished.events('evaluation')[0]['accuracy']:.3f} +- " in lines[0]
    console.file.close()


# --- what the coordinator gets to see ----------------------------------------------------------------

NUMBERS = {
    ("Ready", "attempt"),
    ("LedgerHead", "sequence"),
    ("Header", "version"),
    ("Header", "attempt"),
    ("Header", "parameters"),
    ("Header", "frames"),
    ("Opening", "attempt"),
    ("Opening", "contributors"),
    ("Opening", "total_weight"),
    ("Join", "version"),
    ("Statement", "epsilon"),
    ("Statement", "epsilon_worst"),
    ("Statement", "delta"),
    ("Statement", "evaluation_epsilon"),
    ("Statement", "evaluation_delta"),
    ("Statement", "sealed_attempts"),
    ("Statement", "sealed_evaluations"),
    ("Statement", "void_attempts"),
}
"""Every number that an owner can send in the open; none of them depends on data."""


def test_no_message_of_an_owner_has_room_for_another_number() -> None:
    """A loss, a metric or a count would need a field, and unknown fields are refused."""
    found = set()
    bodies = [messages.Ready, messages.Header, messages.Opening, messages.Statement, messages.Join]
    bodies += [messages.Wraps, messages.Session, messages.LedgerHead]
    replies = [messages.JoinReply, messages.RosterReply, messages.KeysReply, messages.FitReply]
    replies += [messages.SealReply, messages.OpenReply, messages.CloseReply]
    for kind in [*bodies, *replies]:
        for name, field in kind.model_fields.items():
            if {int, float} & {field.annotation, *get_args(field.annotation)} or (
                name == "version" and kind is not messages.Wraps
            ):
                found.add((kind.__name__, name))
    assert found == NUMBERS
    assert len(EXCHANGES) == 6


def test_nothing_that_depends_on_one_owner_reaches_the_coordinator(finished: Finished) -> None:
    """Raw bytes: the planted pixel in every form, preprocessed rows, names of data; and all numbers."""
    needles = planted_bytes(finished)
    assert len(finished.wire.received) > 50
    for name, data in seen_by_the_coordinator(finished):
        for what, needle in needles:
            assert needle not in data, f"{what} in {name}"
    private = private_numbers(finished)
    for name, value in numbers_seen(finished):
        assert value not in private, f"{private[value]} as {name}"
    for text in finished.log.splitlines():
        assert not any(str(number) in text for number in ROWS), text


def test_the_search_would_find_what_it_searches_for(finished: Finished, tmp_path: Path) -> None:
    """The same search over an owner's own folder and over planted numbers."""
    (needle,) = [data for what, data in planted_bytes(finished) if what == "the pixel, float32"]
    with np.load(finished.owners[0].data_file) as archive:
        assert needle in archive["x"].tobytes()
    correct, wrong = finished.truth(finished.owners[0], 3)
    assert {float(correct), float(wrong), float(ROWS[0])} <= private_numbers(finished).keys()
    listed = dict(leaves({"metrics": {"correct": correct, "nested": [1, {"n": ROWS[1]}]}}))
    assert set(listed.values()) >= {float(correct), float(ROWS[1])}


def planted_bytes(finished: Finished) -> list[tuple[str, bytes]]:
    found = [
        ("the pixel, float32", struct.pack("<f", PLANTED)),
        ("the pixel, float64", struct.pack("<d", float(np.float32(PLANTED)))),
        ("the pixel, text", str(PLANTED).encode()),
    ]
    for owner in finished.owners:
        found.append(("a dataset's name", owner.policy.dataset.encode()))
        found.append(("a data file's path", str(owner.data_file).encode()))
        found.append(("a holdout key", owner.store.holdout_key(owner.policy.dataset)))
        for examples in (owner.examples(finished.plan), owner.held_out(finished.plan)):
            # the largest value of a row is the planted pixel, scaled by the row's own norm
            found += [("a preprocessed row", row.tobytes()) for row in examples.x[:50]]
            found += [("its pixel", row[:2].tobytes()) for row in examples.x[:50]]
    return found


def private_numbers(finished: Finished) -> dict[float, str]:
    """Numbers about one owner, or exact ones about all, by what they are."""
    found: dict[float, str] = {float(sum(ROWS)): "all records"}
    task = task_for(finished.plan)
    for number in (1, 2, 3):
        network = task.build_model(finished.plan)
        unflatten(network, finished.store.read_checkpoint(number).weights)
        totals = np.zeros(2)
        for owner, rows in zip(finished.owners, ROWS, strict=True):
            held, trained = owner.held_out(finished.plan), owner.examples(finished.plan)
            correct, wrong = finished.truth(owner, number)
            totals += (correct, wrong)
            found |= dict.fromkeys((float(rows), float(len(held)), float(len(trained))), "a record count")
            found |= dict.fromkeys((float(correct), float(wrong)), "a count of answers")
            for examples in (held, trained):
                with torch.no_grad():
                    logits = network(torch.from_numpy(examples.x))
                    losses = task.loss(logits, torch.from_numpy(examples.y))
                found[float(losses.mean())] = found[float(losses.sum())] = "a loss"
                found[float(np.mean(task.correct(network, examples)))] = "an accuracy"
        found |= dict.fromkeys([*totals, float(totals[0] / totals.sum())], "an exact count of all")
    return found


def seen_by_the_coordinator(finished: Finished) -> Iterator[tuple[str, bytes]]:
    for kind, body, blob in finished.wire.received:
        yield f"a reply to {kind}", body + b"\0" + blob
    finished.store._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for file in [*(finished.folder / "run").rglob("*"), *(finished.folder / "server").rglob("*")]:
        if file.is_file():
            yield file.name, file.read_bytes()
    yield "the log", finished.log.encode()


def numbers_seen(finished: Finished) -> Iterator[tuple[str, float]]:
    """Every number in a message, an event or a stored fact; what the plan fixes and durations are left out.

    The model has 650 parameters, and chance may hold as many records out.
    """
    for kind, body, _ in finished.wire.received:
        if body:
            yield from leaves(decode(body), kind)
    for _, _, kind, facts in finished.store.events():
        yield from leaves(facts, kind)
    for facts in finished.store.attempts():
        yield from leaves(facts, "attempt")
    for facts in finished.store.owners().values():
        yield from leaves(facts, "owner")


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if not key.endswith("_bytes") and key not in ("seconds", "parameters"):
                yield from leaves(inner, f"{name}/{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner, name)
    elif isinstance(value, int | float):
        yield name, float(value)


# --- void evaluations --------------------------------------------------------------------------------


@pytest.fixture
def four(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulation]:
    """Four owners of which three are enough, two rounds, an evaluation after each."""
    monkeypatch.setattr("server.strategy._RETRY_PAUSE_S", 0.0)
    splits, _ = digits(seed=0, owners=4)
    sections = {"run": {"rounds": 2}, "cohort": {"maximum": 4}, "evaluation": EVALUATION | {"every": 1}}
    plan = resolve(small_plan(**sections))
    simulation = federate(plan, [(x[:50], y[:50]) for x, y in splits], tmp_path / "federation")
    yield simulation
    simulation.close()


def made(simulation: Simulation) -> list[tuple[str, int, bool]]:
    return [(one["purpose"], one["round"], one["void"]) for one in simulation.store.attempts()]


def test_a_void_evaluation_is_tried_again_without_whom_it_failed(
    four: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An owner's counts are lost after all had sealed: the masks of the others do not cancel."""
    original = RoundRunner._header

    def lossy(runner: RoundRunner, attempt: Any, member: Any, parameters: int, reply: Reply) -> Signed:
        if attempt.purpose == "evaluate" and member.name == "owner-1":
            raise FrameInvalid("lost on the way")
        return original(runner, attempt, member, parameters, reply)

    monkeypatch.setattr(RoundRunner, "_header", lossy)
    four.run()
    assert made(four) == [
        ("train", 1, False),
        ("evaluate", 1, True),
        ("evaluate", 1, False),
        ("train", 2, False),
        ("evaluate", 2, False),
    ]
    run = str(four.store.get("run"))
    sealed = {owner.name: owner.ledger.spent(run).sealed_evaluations for owner in four.owners.values()}
    assert sealed == {"owner-1": 1, "owner-2": 3, "owner-3": 3, "owner-4": 3}
    for owner in four.owners.values():
        assert (owner.ledger.spent(run).evaluation_epsilon or 9.0) <= 2.0


def test_a_run_goes_on_where_no_evaluation_succeeds(
    four: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owners' answers are lost: they opened the counts, and open no other counts of that model."""
    original = OpeningExchange._opening

    def deaf(exchange: OpeningExchange, attempt: Any, member: Any, parameters: int, reply: Reply) -> Signed:
        if attempt.purpose == "evaluate":
            raise FrameInvalid("lost on the way")
        return original(exchange, attempt, member, parameters, reply)

    monkeypatch.setattr(OpeningExchange, "_opening", deaf)
    four.run()
    assert four.store.get("state") == "finished"
    assert made(four) == [
        ("train", 1, False),
        ("evaluate", 1, True),
        ("train", 2, False),
        ("evaluate", 2, True),
    ]
    assert not [facts for _, _, kind, facts in four.store.events() if kind == "evaluation"]


def test_owners_that_refuse_to_count_still_train(four: Simulation, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any) -> None:
        raise EvaluationRefused("this owner counts nothing")

    monkeypatch.setattr("client.rounds.require_due", refuses)
    four.run()
    assert made(four) == [
        ("train", 1, False),
        ("evaluate", 1, True),
        ("evaluate", 1, True),
        ("train", 2, False),
        ("evaluate", 2, True),
    ]
    assert {one["code"] for one in four.store.refusals()} == {"FS-ROUND-04"}
    run = str(four.store.get("run"))
    for owner in four.owners.values():
        spent = owner.ledger.spent(run)
        assert (spent.sealed, spent.evaluation_epsilon, spent.evaluation_delta) == (2, 0.0, 0.0)
