"""What the records of a privacy ledger are, and what they amount to; pure, without any storage.

Records follow each other in one order: a genesis, then for each run an opening, attempts that are
reserved and later committed or voided, and a closing. `Spending.apply` refuses every other order.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from client.policy import Budget
from protocol.accounting import epsilon_of_steps
from protocol.encoding import Digest, decode, encode
from protocol.errors import BudgetExhausted, LedgerConflict
from protocol.messages import Count
from protocol.plan import Name, Plan

ROUNDING = 1e-9
"""Relative allowance for binary fractions, so that three runs at 0.1 fit into a cap of 0.3."""


class Entry(BaseModel):
    """Base of all record bodies: strict, immutable, without unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    time_s: Count = Field(description="Seconds since 1970, by the owner's clock; evidence only.")


class Genesis(Entry):
    """The first record: whose ledger this is."""

    kind: Literal["genesis"] = "genesis"
    dataset: Name
    nonce: Digest


class OpenRun(Entry):
    """The fixed schedule of a run's mechanism, in all that its price depends on."""

    kind: Literal["open_run"] = "open_run"
    run: Digest
    plan_hash: Digest
    unit: Literal["example"]
    noise: Literal["local", "none"]
    sample_rate: float
    noise_multiplier: float | None
    local_steps: Count
    delta: float
    max_rounds: Count
    max_attempts: Count


class Attempt(Entry):
    """One attempt is reserved, and later either committed or voided."""

    kind: Literal["reserve", "commit", "void"]
    run: Digest
    attempt: Count


class CloseRun(Entry):
    """A run spends nothing more."""

    kind: Literal["close_run"] = "close_run"
    run: Digest


AnyEntry = Genesis | OpenRun | Attempt | CloseRun
_ENTRY: TypeAdapter[AnyEntry] = TypeAdapter(Annotated[AnyEntry, Field(discriminator="kind")])


@dataclass(frozen=True)
class Spent:
    """What one run cost so far.

    Attributes:
        epsilon: Privacy loss of one example; None if updates were made without noise.
        delta: Probability that the bound fails; counts from the first reservation.
        sealed: Attempts that were committed.
        void: Attempts that were refunded.
        reserved: Attempts that were neither committed nor voided; they count as spent.
    """

    epsilon: float | None
    delta: float
    sealed: int
    void: int
    reserved: int


@dataclass(frozen=True)
class Totals:
    """What all runs on the dataset cost.

    Attributes:
        epsilon: Sum over the runs with noise.
        delta: Sum over the runs with noise.
        unprotected: Runs that made updates without noise. If there is one, `epsilon` bounds nothing.
    """

    epsilon: float
    delta: float
    unprotected: tuple[str, ...]


@dataclass
class RunSpending:
    """The attempts of one run by number, each `reserve`, `commit` or `void`."""

    opened: OpenRun
    attempts: dict[int, str] = field(default_factory=dict)
    closed: bool = False

    def charged(self) -> int:
        """Return how many attempts count as spent: all but the void ones."""
        return len(self.attempts) - self._count("void")

    def epsilon(self, rounds: int) -> float | None:
        """Return epsilon of the schedule's first `rounds` rounds; None without noise."""
        opened = self.opened
        if opened.noise_multiplier is None:
            return None if rounds else 0.0
        steps = rounds * opened.local_steps
        return epsilon_of_steps(opened.sample_rate, opened.noise_multiplier, steps, opened.delta)

    def spent(self) -> Spent:
        """Return what the run cost so far."""
        return Spent(
            epsilon=self.epsilon(self.charged()),
            delta=self.opened.delta if self.attempts and self.opened.noise == "local" else 0.0,
            sealed=self._count("commit"),
            void=self._count("void"),
            reserved=self._count("reserve"),
        )

    def reserve(self, attempt: int) -> None:
        """Add an attempt, or raise LedgerConflict."""
        if self.attempts and attempt <= max(self.attempts):
            raise LedgerConflict(f"attempt {attempt} is not above every reserved attempt")
        if self.charged() >= self.opened.max_rounds:
            raise LedgerConflict("the run has used all its rounds")
        if len(self.attempts) >= self.opened.max_attempts:
            raise LedgerConflict("the run has used all its attempts")
        self.attempts[attempt] = "reserve"

    def settle(self, attempt: int, kind: str) -> None:
        """Commit or void a reserved attempt, or raise LedgerConflict."""
        if self.attempts.get(attempt) != "reserve":
            raise LedgerConflict(f"attempt {attempt} is not reserved, or already settled")
        self.attempts[attempt] = kind

    def _count(self, kind: str) -> int:
        return sum(state == kind for state in self.attempts.values())


@dataclass
class Spending:
    """The state that a ledger's records lead to."""

    dataset: str = ""
    runs: dict[str, RunSpending] = field(default_factory=dict)

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
        elif isinstance(entry, CloseRun):
            self.open_run(entry.run).closed = True
        elif entry.kind == "reserve":
            self.open_run(entry.run).reserve(entry.attempt)
        else:
            self.open_run(entry.run).settle(entry.attempt, entry.kind)

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
        """Return the sums over all runs, or over all but one."""
        spent = {name: run.spent() for name, run in self.runs.items() if name != without}
        return Totals(
            epsilon=math.fsum(one.epsilon or 0.0 for one in spent.values()),
            delta=math.fsum(one.delta for one in spent.values()),
            unprotected=tuple(name for name, one in spent.items() if one.epsilon is None),
        )

    def require_caps(self, budget: Budget, run: str, epsilon: float, delta: float) -> None:
        """Check that a run may cost `epsilon` and `delta` in all, beside what the other runs spent.

        Raises:
            BudgetExhausted: Names the cap.
        """
        others = self.totals(without=run)
        for name, cost, cap in (
            ("epsilon_per_run", epsilon, budget.epsilon_per_run),
            ("epsilon_total", others.epsilon + epsilon, budget.epsilon_total),
            ("delta_total", others.delta + delta, budget.delta_total),
        ):
            if not cost <= cap * (1 + ROUNDING):
                raise BudgetExhausted(f"budget.{name} is {cap:g}, the cost would be {cost:.6g}")


def genesis(dataset: str, time_s: int) -> Genesis:
    """Return a first record; its random nonce makes two ledgers of one dataset tell apart."""
    return Genesis(dataset=dataset, nonce=secrets.token_hex(32), time_s=time_s)


def opening(run: str, plan: Plan, time_s: int) -> OpenRun:
    """Return the record that opens a run of a resolved plan."""
    return OpenRun(
        run=run,
        plan_hash=plan.sha256(),
        unit=plan.privacy.unit,
        noise=plan.privacy.noise,
        sample_rate=plan.privacy.sample_rate,
        noise_multiplier=plan.privacy.noise_multiplier,
        local_steps=plan.training.local_steps,
        delta=plan.privacy.delta,
        max_rounds=plan.paid_rounds,
        max_attempts=plan.max_attempts,
        time_s=time_s,
    )


def to_bytes(entry: AnyEntry) -> bytes:
    """Return the canonical bytes of a record's body."""
    return encode(entry.model_dump(mode="json"))


def from_bytes(body: bytes) -> AnyEntry:
    """Parse a record's body.

    Raises:
        EncodingInvalid: The bytes are not canonical.
        ValidationError: They are no record of a known kind.
    """
    return _ENTRY.validate_python(decode(body))


def link(previous: str | None, body: bytes) -> str:
    """Return a record's hash: SHA-256 of the previous hash (32 zero bytes for the first) and the body."""
    return hashlib.sha256(bytes.fromhex(previous or "00" * 32) + body).hexdigest()
