"""What the records of a privacy ledger amount to; pure, without any storage.

Records follow each other in one order: a genesis, then for each run an opening, attempts that are
reserved and later committed or voided, and a closing. `Spending.apply` refuses every other order.
An adoption may stand anywhere: there the owner declared what lost records cost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from client.entries import Adopt, AnyEntry, CloseRun, Genesis, OpenRun, opening
from client.policy import Budget
from protocol.accounting import Mechanism
from protocol.errors import BudgetExhausted, LedgerConflict
from protocol.messages import PURPOSES, LedgerHead, Purpose
from protocol.plan import Plan

ROUNDING = 1e-9
"""Relative allowance for binary fractions, so that three runs at 0.1 fit into a cap of 0.3."""


_LIMITED: dict[Purpose, str] = {"train": "rounds", "evaluate": "evaluations"}


@dataclass(frozen=True)
class Spent:
    """What one run cost so far.

    Attributes:
        unit: What `epsilon` is about: one example, or all that this owner contributes (client).
        noise: The run's noise; with `distributed`, `epsilon` rests on other owners' noise.
        epsilon: Privacy loss of one unit; None if updates were made without noise.
        epsilon_worst: The same if all other owners collude; equal to `epsilon` with local noise.
        delta: Probability that the bound fails; of training and of evaluations it counts as soon and as
            long as one attempt is charged.
        evaluation_epsilon: The part of `epsilon`, and of `epsilon_worst`, that evaluations cost.
        evaluation_delta: The part of `delta` that they cost.
        sealed: Training attempts that were committed.
        sealed_evaluations: Evaluations that were committed.
        void: Attempts of either purpose that were refunded.
        reserved: Attempts of either purpose that were neither committed nor voided; they count as spent.
    """

    unit: Literal["example", "client"]
    noise: Literal["local", "distributed", "none"]
    epsilon: float | None
    epsilon_worst: float | None
    delta: float
    evaluation_epsilon: float | None
    evaluation_delta: float
    sealed: int
    sealed_evaluations: int
    void: int
    reserved: int


@dataclass(frozen=True)
class Totals:
    """What all runs on the dataset cost.

    Attributes:
        unit: What the sums are about; None before the first run with noise.
        epsilon: Sum over the runs with noise and over adoptions.
        epsilon_worst: The same if all other owners collude in all of the runs.
        delta: Sum over the runs with noise and over adoptions.
        unprotected: Runs that made updates without noise. If there is one, `epsilon` bounds nothing.
    """

    unit: Literal["example", "client"] | None
    epsilon: float
    epsilon_worst: float
    delta: float
    unprotected: tuple[str, ...]


@dataclass(frozen=True)
class Cost:
    """What some rounds of a run with noise cost; fields as in `Spent`."""

    unit: Literal["example", "client"]
    epsilon: float
    epsilon_worst: float
    delta: float


def planned_cost(plan: Plan) -> Cost | None:
    """Return what all paid rounds and evaluations of a plan cost; None without noise."""
    opened = opening("00" * 32, plan, 0)
    return RunSpending(opened).cost(opened.max_rounds, plan.paid_evaluations)


@dataclass
class RunSpending:
    """The attempts of one run by number, each `reserve`, `commit` or `void`."""

    opened: OpenRun
    attempts: dict[int, str] = field(default_factory=dict)
    purposes: dict[int, Purpose] = field(default_factory=dict)
    closed: bool = False

    def charged(self, purpose: Purpose) -> int:
        """Return how many attempts count as spent: all but the void ones."""
        return sum(self._count(kind, purpose) for kind in ("reserve", "commit"))

    def priced(self) -> Mechanism | None:
        """Return the mechanism that the run was opened with; None without noise."""
        opened = self.opened
        if opened.noise_multiplier is None or opened.worst_noise_multiplier is None:
            return None
        return Mechanism(
            sample_rate=opened.sample_rate,
            noise_multiplier=opened.noise_multiplier,
            worst_noise_multiplier=opened.worst_noise_multiplier,
            steps=opened.steps,
            delta=opened.mechanism_delta,
        )

    def priced_evaluation(self) -> Mechanism | None:
        """Return the mechanism of one evaluation; None if there is none, or none with noise."""
        terms = self.opened.evaluation
        if terms is None or terms.noise_multiplier is None:
            return None
        return Mechanism(1.0, terms.noise_multiplier, terms.noise_multiplier, 1, terms.delta)

    def cost(self, rounds: int, evaluations: int) -> Cost | None:
        """Return the price of the schedule's first rounds and evaluations; None without noise.

        What never happened has no delta: nothing of it was released that a bound could fail for.
        """
        priced, evaluation = self.priced(), self.priced_evaluation()
        if priced is None:
            return None
        added = 0.0 if evaluation is None else evaluation.epsilon(evaluations)
        return Cost(
            unit=self.opened.unit,
            epsilon=priced.epsilon(rounds) + added,
            epsilon_worst=priced.worst_epsilon(rounds) + added,
            delta=(self.opened.delta if rounds else 0.0) + self._evaluation_delta(evaluations),
        )

    def cost_with(self, purpose: Purpose) -> Cost | None:
        """Return what the run costs with one more attempt; None without noise."""
        more = {name: self.charged(name) + (name == purpose) for name in PURPOSES}
        return self.cost(more["train"], more["evaluate"])

    def spent(self) -> Spent:
        """Return what the run cost so far."""
        rounds, evaluations = self.charged("train"), self.charged("evaluate")
        cost = self.cost(rounds, evaluations)
        unprotected = None if rounds + evaluations else 0.0
        return Spent(
            unit=self.opened.unit,
            noise=self.opened.noise,
            epsilon=unprotected if cost is None else cost.epsilon,
            epsilon_worst=unprotected if cost is None else cost.epsilon_worst,
            delta=0.0 if cost is None else cost.delta,
            evaluation_epsilon=self._evaluation_epsilon(evaluations),
            evaluation_delta=0.0 if cost is None else self._evaluation_delta(evaluations),
            sealed=self._count("commit", "train"),
            sealed_evaluations=self._count("commit", "evaluate"),
            void=sum(self._count("void", purpose) for purpose in PURPOSES),
            reserved=sum(self._count("reserve", purpose) for purpose in PURPOSES),
        )

    def _evaluation_delta(self, evaluations: int) -> float:
        terms = self.opened.evaluation
        return terms.delta if terms is not None and evaluations else 0.0

    def _evaluation_epsilon(self, evaluations: int) -> float | None:
        if not evaluations:
            return 0.0
        priced = self.priced_evaluation()
        return None if priced is None else priced.epsilon(evaluations)

    def reserve(self, attempt: int, purpose: Purpose) -> None:
        """Add an attempt, or raise LedgerConflict."""
        terms = self.opened.evaluation
        most = self.opened.max_rounds if purpose == "train" else terms.max_evaluations if terms else 0
        if self.attempts and attempt <= max(self.attempts):
            raise LedgerConflict(f"attempt {attempt} is not above every reserved attempt")
        if self.charged(purpose) >= most:
            raise LedgerConflict("the run has used all its " + _LIMITED[purpose])
        if len(self.attempts) >= self.opened.max_attempts:
            raise LedgerConflict("the run has used all its attempts")
        self.attempts[attempt], self.purposes[attempt] = "reserve", purpose

    def purpose(self, attempt: int) -> Purpose:
        """Return what a reserved attempt is for, or raise LedgerConflict."""
        if attempt not in self.purposes:
            raise LedgerConflict(f"attempt {attempt} is not reserved, or already settled")
        return self.purposes[attempt]

    def settle(self, attempt: int, purpose: Purpose, kind: str) -> None:
        """Commit or void a reserved attempt, or raise LedgerConflict."""
        if self.attempts.get(attempt) != "reserve" or self.purposes.get(attempt) != purpose:
            raise LedgerConflict(f"attempt {attempt} is not reserved, or already settled")
        self.attempts[attempt] = kind

    def _count(self, kind: str, purpose: Purpose) -> int:
        return sum(
            state == kind and self.purposes[attempt] == purpose for attempt, state in self.attempts.items()
        )


@dataclass
class Spending:
    """The state that a ledger's records lead to."""

    dataset: str = ""
    runs: dict[str, RunSpending] = field(default_factory=dict)
    adopted: list[Adopt] = field(default_factory=list)

    def apply(self, entry: AnyEntry) -> None:
        """Take one more record into account.

        Raises:
            LedgerConflict: The record does not follow the order of this module.
        """
        if (entry.kind == "genesis") == bool(self.dataset):
            raise LedgerConflict("a ledger has exactly one genesis, as its first record")
        if isinstance(entry, Genesis):
            self.dataset = entry.dataset
        elif isinstance(entry, OpenRun):
            if entry.run in self.runs:
                raise LedgerConflict("the run was opened before")
            self.runs[entry.run] = RunSpending(entry)
        elif isinstance(entry, Adopt):
            self.adopted.append(entry)
            for run in self.runs.values():
                run.closed = True
        elif isinstance(entry, CloseRun):
            self.open_run(entry.run).closed = True
        elif entry.kind == "reserve":
            self.open_run(entry.run).reserve(entry.attempt, entry.purpose)
        else:
            self.open_run(entry.run).settle(entry.attempt, entry.purpose, entry.kind)

    def acknowledges(self, head: LedgerHead) -> bool:
        """Tell whether an adoption stands for the lost records that led to a head."""
        return any(head in entry.heads for entry in self.adopted)

    def run(self, run: str) -> RunSpending:
        """Return a known run, or raise LedgerConflict."""
        if run not in self.runs:
            raise LedgerConflict("the ledger does not know this run")
        return self.runs[run]

    def open_run(self, run: str) -> RunSpending:
        """Return a known run that is not closed, or raise LedgerConflict."""
        if self.run(run).closed:
            raise LedgerConflict("the run is closed")
        return self.runs[run]

    def totals(self, without: str | None = None) -> Totals:
        """Return the sums over all runs, or over all but one, and over what adoptions declared."""
        spent = {name: run.spent() for name, run in self.runs.items() if name != without}
        units = [one.unit for one in spent.values() if one.delta]
        return Totals(
            unit=units[0] if units else None,
            epsilon=math.fsum([one.epsilon or 0.0 for one in spent.values()] + self._declared("epsilon")),
            epsilon_worst=math.fsum(
                [one.epsilon_worst or 0.0 for one in spent.values()] + self._declared("epsilon")
            ),
            delta=math.fsum([one.delta for one in spent.values()] + self._declared("delta")),
            unprotected=tuple(name for name, one in spent.items() if one.epsilon is None),
        )

    def _declared(self, cost: Literal["epsilon", "delta"]) -> list[float]:
        return [getattr(entry, cost) for entry in self.adopted]

    def require_caps(self, budget: Budget, run: str, cost: Cost) -> None:
        """Check that a run may cost this in all, beside what the other runs spent.

        Raises:
            BudgetExhausted: Names the cap, or says that earlier runs were counted in another unit.
        """
        others = self.totals(without=run)
        if others.unit not in (None, cost.unit):
            # one example's loss in a run of unit client, or the reverse, is not that run's epsilon
            raise BudgetExhausted(f"this dataset is counted per {others.unit}, the run per {cost.unit}")
        checked = [
            ("epsilon_per_run", cost.epsilon, budget.epsilon_per_run),
            ("epsilon_total", others.epsilon + cost.epsilon, budget.epsilon_total),
            ("delta_total", others.delta + cost.delta, budget.delta_total),
        ]
        if budget.epsilon_worst is not None or cost.epsilon_worst != cost.epsilon:
            worst = others.epsilon_worst + cost.epsilon_worst
            checked.append(("epsilon_worst", worst, budget.epsilon_worst or 0.0))
        for name, value, cap in checked:
            if not value <= cap * (1 + ROUNDING):
                raise BudgetExhausted(f"budget.{name} is {cap:g}, the cost would be {value:.6g}")
