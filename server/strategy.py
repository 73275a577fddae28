"""The run as a Flower strategy: join, then rounds of three exchanges, then the owners' statements."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from crypto.presets import packing_for
from crypto.trust import Trust
from protocol.errors import (
    CertificateRefused,
    FedsealError,
    ModelRanAway,
    RunFailed,
    RunInterrupted,
)
from protocol.evaluation import Estimate, run_epsilon
from protocol.messages import Purpose
from protocol.optimizers import GlobalModel
from protocol.plan import Plan
from protocol.storage import STORAGE_FAULTS
from server.closing import close_run
from server.cohort.members import ServerSession
from server.exchange import Exchanger
from server.resume import recorded_model, recorded_past, recorded_session, recorded_steps
from server.rosters import Rosters
from server.rounds.attempts import Attempt
from server.rounds.runner import RoundRunner
from server.store import RunStore, now_text

_LOG = logging.getLogger("fedseal.server")
_RETRY_PAUSE_S = 1.0

Evaluate = Callable[[GlobalModel], float | None]


class SealStrategy(Strategy):
    """Sealed aggregation over Flower's message API.

    Flower's own cycle of train and evaluate does not fit three exchanges a round, so `start` is
    overridden and the hooks of that cycle are not used.

    Args:
        store: The run's store; it holds the resolved plan.
        initial: Round 0's model.
        evaluate: Returns the accuracy of a model on public data, or None without such data.
        trust: The federation's authority and its revocation list.
    """

    def __init__(
        self,
        store: RunStore,
        initial: GlobalModel,
        evaluate: Evaluate,
        trust: Trust,
    ) -> None:
        self._store = store
        self._plan: Plan = store.plan()
        self._initial = initial
        self._evaluate = evaluate
        self._trust = trust

    def summary(self) -> None:
        """Log the plan's size; Flower calls this at the start."""
        _LOG.info("sealed aggregation over %d rounds", self._plan.run.rounds)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Not part of this strategy's cycle."""
        raise RunFailed("sealed aggregation runs through start only")

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Not part of this strategy's cycle."""
        raise RunFailed("sealed aggregation runs through start only")

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Not part of this strategy's cycle."""
        raise RunFailed("sealed aggregation runs through start only")

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Not part of this strategy's cycle."""
        raise RunFailed("sealed aggregation runs through start only")

    def start(self, grid: Grid, *_arguments: Any, **_options: Any) -> Result:
        """Run the plan to its end, from its beginning or after the last finished round.

        Raises:
            QuorumNotMet: Too few owners are there; what was finished is kept.
            RunFailed: All attempts, or the rounds that the noise pays for, are used up.
            ModelRanAway: A round's model is not finite or too large; the round does not count.
            CheckpointInvalid: The last finished round's model is not on the disk any more.
        """
        exchanger = Exchanger(grid, self._store)
        self._rosters = Rosters(exchanger, self._store, self._plan, self._trust)
        session = recorded_session(self._store, self._trust)
        resumed = session is not None
        if session is None:
            session = self._session_anew()
        packing = packing_for(self._plan.encryption.preset, self._plan.cohort.maximum)
        runner = RoundRunner(exchanger, self._store, self._plan, packing, session)
        runner.steps = recorded_steps(self._store)
        exchanger.expelled = partial(self._rosters.expelled, runner)
        if resumed:
            self._store.event("resumed", rounds=len(runner.steps), owners=len(session.members))
            self._rosters.judge(runner)
            runner.attendance.wait(for_all=True, instead=partial(self._rosters.has_news, runner))
        model = self._rounds(runner)
        with suppress(CertificateRefused):
            self._rosters.judge(runner)
        close_run(exchanger, self._store, self._plan, runner, model)
        with self._store.transaction():
            self._store.set("state", "finished")
            self._store.set("finished_at", now_text())
            self._store.event("finished", rounds=self._plan.run.rounds)
        return Result()

    def _session_anew(self) -> ServerSession:
        """Make a run's first roster, or the one that it stopped at."""
        past = recorded_past(self._store, self._trust)
        if past is None:
            return self._rosters.first()
        return self._rosters.again(past, recorded_model(self._store, self._initial))

    def _rounds(self, runner: RoundRunner) -> GlobalModel:
        model = recorded_model(self._store, self._initial)
        if not runner.steps:
            self._store.write_checkpoint(0, model)
        else:
            self._evaluate_if_due(runner, len(runner.steps), model)
        while len(runner.steps) < self._plan.run.rounds:
            self._rosters.renew_if_due(runner, model)
            if not runner.attendance.wait(instead=partial(self._rosters.has_news, runner)):
                continue
            attempt = self._begin(len(runner.steps) + 1, model, "train", runner.session)
            try:
                model = runner.run(attempt, model)
            except STORAGE_FAULTS:
                raise
            except FedsealError as error:
                self._void(attempt, runner.session, error)
                if isinstance(error, ModelRanAway):
                    raise
                self._require_hope(runner, error)
                time.sleep(_RETRY_PAUSE_S)
                self._rosters.wait_for_news(runner)
                continue
            runner.steps.append(attempt.openings)
            self._finish(attempt, model, runner.session)
            self._evaluate_if_due(runner, attempt.round, model)
        return model

    def _begin(
        self, round_number: int, model: GlobalModel, purpose: Purpose, session: ServerSession
    ) -> Attempt:
        """Begin an attempt with a new number; training and evaluation share one row of numbers.

        It is recorded before anybody hears of it, so that its number is never used again.
        """
        number = self._store.last_attempt() + 1
        attempt = Attempt(number, round_number, model.sha256(), session.session, purpose)
        facts = attempt.facts(reason=RunInterrupted.code)
        self._store.void_attempt(attempt.number, purpose, round_number, facts)
        return attempt

    def _require_hope(self, runner: RoundRunner, error: FedsealError) -> None:
        """Raise if a further attempt cannot succeed."""
        if not (runner.attendance.can_go_on() or self._rosters.somebody_waits(runner)):
            raise RunFailed("too few owners have privacy budget left for a further round") from error
        begun = sum(facts["purpose"] == "train" for facts in self._store.attempts())
        if begun >= self._plan.run.rounds + self._plan.run.spare_attempts:
            raise RunFailed(f"all attempts are used up; the last one ended with {error.code}") from error

    def _evaluate_if_due(self, runner: RoundRunner, round_number: int, model: GlobalModel) -> None:
        """Let the owners evaluate a finished round's model; where that fails the run goes on without.

        Whose certificate is not valid any more is left out, while the roster stays as it is.

        Nothing that follows depends on the result: a run is priced as one whose length is fixed.
        """
        while self._may_evaluate(round_number):
            try:
                self._rosters.judge(runner)
            except CertificateRefused:
                # it is judged again before the next round
                return
            attempt = self._begin(round_number, model, "evaluate", runner.session)
            try:
                estimate = runner.evaluate(attempt)
            except STORAGE_FAULTS:
                raise
            except FedsealError as error:
                self._void(attempt, runner.session, error)
                time.sleep(_RETRY_PAUSE_S)
                continue
            self._finish_evaluation(attempt, estimate, runner.session)

    def _may_evaluate(self, round_number: int) -> bool:
        """Tell whether a round's model is still to be evaluated, by what is recorded of it."""
        if not self._plan.is_evaluated(round_number):
            return False
        tried = [facts for facts in self._store.attempts() if facts["purpose"] == "evaluate"]
        same = [facts for facts in tried if facts["round"] == round_number]
        # counts that were sealed by all may have been opened, and owners open a model once
        if any(not facts["void"] or facts["headers"] for facts in same):
            return False
        repeated = len(tried) - len({facts["round"] for facts in tried})
        return not same or repeated < self._plan.run.paid_spares

    def _finish_evaluation(
        self, attempt: Attempt, estimate: Estimate | None, session: ServerSession
    ) -> None:
        with self._store.transaction():
            self._store.finish_evaluation(attempt.number, attempt.round, attempt.facts(), attempt.sums)
            self._store.event(
                "evaluation",
                round=attempt.round,
                attempt=attempt.number,
                accuracy=None if estimate is None else estimate.accuracy,
                standard_error=None if estimate is None else estimate.standard_error,
                contributors=len(attempt.headers),
                epsilon=self._epsilons(session),
                seconds=attempt.seconds,
            )
            self._record_members(session)

    def _epsilons(self, session: ServerSession) -> dict[str, float | None]:
        return {
            member.name: run_epsilon(self._plan, member.sealed, member.sealed_evaluations)
            for member in session.members.values()
        }

    def _void(self, attempt: Attempt, session: ServerSession, error: FedsealError) -> None:
        with self._store.transaction():
            facts = attempt.facts(reason=error.code)
            self._store.void_attempt(attempt.number, attempt.purpose, attempt.round, facts)
            named = {"attempt": attempt.number, "round": attempt.round, "code": error.code}
            if isinstance(error, ModelRanAway):
                self._store.event("ran_away", **named)
            else:
                self._store.event("void", **named)
            self._record_members(session)

    def _finish(self, attempt: Attempt, model: GlobalModel, session: ServerSession) -> None:
        """Make a round count: its model's file first, then all the rest in one transaction."""
        accuracy = self._evaluate(model)
        self._store.write_checkpoint(attempt.round, model)
        with self._store.transaction():
            facts = attempt.facts(accuracy=accuracy)
            self._store.finish_round(attempt.number, attempt.round, facts, attempt.sums, model)
            self._record_members(session)
            self._store.event(
                "round",
                round=attempt.round,
                attempt=attempt.number,
                accuracy=accuracy,
                contributors=len(attempt.headers),
                epsilon=self._epsilons(session),
                seconds=attempt.seconds,
                upload_bytes=attempt.upload_bytes,
                download_bytes=attempt.download_bytes,
            )

    def _record_members(self, session: ServerSession) -> None:
        for member in session.members.values():
            self._store.put_owner(member.fingerprint, member.facts())
