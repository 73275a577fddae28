"""The run as a Flower strategy: join once, then rounds of three exchanges, then the owners' statements."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from crypto.pki import Trust
from crypto.presets import packing_for
from crypto.signing import verify
from protocol.encoding import digest_bytes
from protocol.errors import FedsealError, ProtocolViolation, QuorumNotMet, RunFailed
from protocol.evaluation import Estimate, run_epsilon
from protocol.messages import CloseReply, CloseRequest, Purpose, Statement
from protocol.optimizers import GlobalModel
from protocol.plan import Plan
from server.exchange import Exchanger, Reply, Request
from server.rounds import Attempt, RoundRunner
from server.session import Joining, Member, ServerSession
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
        self._attempts = 0
        self._spare_evaluations = self._plan.run.paid_spares

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
        """Run the plan to its end.

        Raises:
            QuorumNotMet: Too few owners are there; what was finished is kept.
            RunFailed: All attempts are used up.
        """
        exchanger = Exchanger(grid, self._store)
        joining = Joining(exchanger, self._store, self._plan, self._trust)
        session = joining.establish()
        self._record_session(session)
        packing = packing_for(self._plan.encryption.preset, self._plan.cohort.maximum)
        runner = RoundRunner(exchanger, self._store, self._plan, packing, session)
        model = self._rounds(runner, session)
        self._close(exchanger, runner, session, model)
        self._store.set("state", "finished")
        self._store.set("finished_at", now_text())
        self._store.event("finished", rounds=self._plan.run.rounds)
        return Result()

    def _rounds(self, runner: RoundRunner, session: ServerSession) -> GlobalModel:
        model, trained = self._initial, 0
        self._store.write_checkpoint(0, model)
        last_problem: FedsealError | None = None
        while len(runner.steps) < self._plan.run.rounds:
            trained += 1
            if trained > self._plan.run.rounds + self._plan.run.spare_attempts:
                raise last_problem or RunFailed("all attempts are used up")
            attempt = self._attempt(len(runner.steps) + 1, model, "train")
            try:
                model = runner.run(attempt, model)
            except FedsealError as error:
                last_problem = error
                self._void(attempt, error)
                time.sleep(_RETRY_PAUSE_S)
                continue
            runner.steps.append(attempt.openings)
            self._finish(attempt, model, session)
            if self._plan.is_evaluated(attempt.round):
                self._evaluate_on_owners(runner, session, attempt.round, model)
        return model

    def _attempt(self, round_number: int, model: GlobalModel, purpose: Purpose) -> Attempt:
        """Return the next attempt; training and evaluation share one row of numbers."""
        self._attempts += 1
        return Attempt(self._attempts, round_number, model.sha256(), purpose)

    def _evaluate_on_owners(
        self, runner: RoundRunner, session: ServerSession, round_number: int, model: GlobalModel
    ) -> None:
        """Let the owners evaluate a finished round's model; where that fails the run goes on without.

        Nothing that follows depends on the result: a run is priced as one whose length is fixed.
        """
        while True:
            attempt = self._attempt(round_number, model, "evaluate")
            try:
                estimate = runner.evaluate(attempt)
            except FedsealError as error:
                self._void(attempt, error)
                # counts that were sealed by all may have been opened, and owners open a model once
                if self._spare_evaluations == 0 or attempt.headers:
                    return
                self._spare_evaluations -= 1
                time.sleep(_RETRY_PAUSE_S)
                continue
            self._finish_evaluation(attempt, estimate, session)
            return

    def _finish_evaluation(
        self, attempt: Attempt, estimate: Estimate | None, session: ServerSession
    ) -> None:
        counts = np.frombuffer(attempt.sums, dtype="<u4").tolist()
        facts = {**self._facts(attempt, None), "sums": counts}
        self._store.finish_evaluation(attempt.number, attempt.round, facts, attempt.sums)
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
        for member in session.members.values():
            self._record_member(member)

    def _epsilons(self, session: ServerSession) -> dict[str, float | None]:
        return {
            member.name: run_epsilon(self._plan, member.sealed, member.sealed_evaluations)
            for member in session.members.values()
        }

    def _void(self, attempt: Attempt, error: FedsealError) -> None:
        facts = {**self._facts(attempt, None), "reason": error.code}
        self._store.void_attempt(attempt.number, attempt.purpose, attempt.round, facts)
        self._store.event("void", attempt=attempt.number, round=attempt.round, code=error.code)

    def _finish(self, attempt: Attempt, model: GlobalModel, session: ServerSession) -> None:
        accuracy = self._evaluate(model)
        facts = self._facts(attempt, accuracy)
        self._store.finish_round(attempt.number, attempt.round, facts, attempt.sums, model)
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
        for member in session.members.values():
            self._record_member(member)

    def _facts(self, attempt: Attempt, accuracy: float | None) -> dict[str, Any]:
        return {
            "contributors": [signed.signer for signed in attempt.headers],
            "headers": [signed.model_dump(mode="json") for signed in attempt.headers],
            "openings": [signed.model_dump(mode="json") for signed in attempt.openings],
            "sums_hash": digest_bytes(attempt.sums) if attempt.sums else None,
            "accuracy": accuracy,
            "sums": None,
            "seconds": attempt.seconds,
            "upload_bytes": attempt.upload_bytes,
            "download_bytes": attempt.download_bytes,
            "reason": None,
        }

    def _close(
        self,
        exchanger: Exchanger,
        runner: RoundRunner,
        session: ServerSession,
        model: GlobalModel,
    ) -> None:
        requests = {}
        for member in session.members.values():
            sums = b"".join(
                self._store.sums(number) for number in range(member.known_round + 1, len(runner.steps) + 1)
            )
            message = CloseRequest(
                session=session.session,
                model_hash=model.sha256(),
                steps=runner.steps[member.known_round :],
            )
            if not member.absent:
                requests[member.node] = Request(message.to_bytes(), sums)
        expected = (session.session, self._plan.sha256(), model.sha256())
        for reply in exchanger.ask("query.close", requests, self._plan.deadlines.open_s):
            member = session.by_node(reply.node)
            try:
                self._record_statement(member, reply, expected)
            except FedsealError as error:
                self._store.refuse(member.fingerprint, "query.close", error.code)
        self._store.set("model_hash", model.sha256())

    def _record_statement(self, member: Member, reply: Reply, expected: tuple[str, str, str]) -> None:
        if reply.code is not None:
            self._store.refuse(member.fingerprint, "query.close", reply.code)
            return
        signed = CloseReply.from_bytes(reply.body).statement
        body = verify(signed, member.public_key, Statement)
        if (body.session, body.plan_hash, body.model_hash) != expected:
            raise ProtocolViolation("a statement is about another session, plan or model")
        member.last_head = body.ledger
        self._record_member(member, statement=signed.model_dump(mode="json"))

    def _record_session(self, session: ServerSession) -> None:
        self._store.set("run", session.run)
        self._store.set("session", session.session)
        for member in session.members.values():
            self._record_member(member)
        self._store.event("session", owners=len(session.members))

    def _record_member(self, member: Member, **facts: Any) -> None:
        self._store.put_owner(
            member.fingerprint,
            {
                "name": member.name,
                "certificate": member.joined.model_dump(mode="json")["certificate"],
                "ledger_first": member.first_head.model_dump(mode="json"),
                "ledger_last": member.last_head.model_dump(mode="json"),
                "sealed": member.sealed,
                "sealed_evaluations": member.sealed_evaluations,
                **facts,
            },
        )


def paused_or_failed(error: FedsealError) -> str:
    """Return the state of a run that an error ended: it can go on later, or it cannot."""
    return "paused" if isinstance(error, QuorumNotMet) else "failed"
