"""The records of a privacy ledger: what each kind says, and how records are chained.

Their order is the affair of `client.spending`, their storage that of `client.ledger`.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from protocol.accounting import mechanism
from protocol.encoding import Digest, decode, encode
from protocol.messages import Count, LedgerHead, Purpose
from protocol.plan import Plan
from protocol.sections import Name


class Entry(BaseModel):
    """Base of all record bodies: strict, immutable, without unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    time_s: Count = Field(description="Seconds since 1970, by the owner's clock; evidence only.")


class Genesis(Entry):
    """The first record: whose ledger this is."""

    kind: Literal["genesis"] = "genesis"
    dataset: Name
    nonce: Digest


class EvaluationTerms(BaseModel):
    """The evaluations of a run, in all that their price depends on."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    noise_multiplier: float | None
    delta: float
    max_evaluations: Count


class OpenRun(Entry):
    """The fixed schedule of a run's mechanism, in all that its price depends on."""

    kind: Literal["open_run"] = "open_run"
    run: Digest
    plan_hash: Digest
    unit: Literal["example", "client"]
    noise: Literal["local", "distributed", "none"]
    sample_rate: float
    noise_multiplier: float | None
    worst_noise_multiplier: float | None
    steps: Count
    mechanism_delta: float
    delta: float
    max_rounds: Count
    max_attempts: Count
    evaluation: EvaluationTerms | None


class Attempt(Entry):
    """One attempt is reserved, and later either committed or voided."""

    kind: Literal["reserve", "commit", "void"]
    run: Digest
    attempt: Count
    purpose: Purpose
    nonce: Digest


class CloseRun(Entry):
    """A run spends nothing more."""

    kind: Literal["close_run"] = "close_run"
    run: Digest


class Adopt(Entry):
    """The owner's word on lost records: which signed or copied heads they led to, and what they cost.

    It closes every run, because attempts of a run may be among what is lost. Where lost runs had
    distributed noise, `epsilon` is to be declared as if all other owners had colluded.
    """

    kind: Literal["adopt"] = "adopt"
    heads: list[LedgerHead]
    epsilon: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    delta: Annotated[float, Field(ge=0, le=1)]


AnyEntry = Genesis | OpenRun | Attempt | CloseRun | Adopt
_ENTRY: TypeAdapter[AnyEntry] = TypeAdapter(Annotated[AnyEntry, Field(discriminator="kind")])


def genesis(dataset: str, time_s: int) -> Genesis:
    """Return a first record; its random nonce makes two ledgers of one dataset tell apart."""
    return Genesis(dataset=dataset, nonce=secrets.token_hex(32), time_s=time_s)


def opening(run: str, plan: Plan, time_s: int) -> OpenRun:
    """Return the record that opens a run of a resolved plan."""
    priced, evaluation = mechanism(plan), plan.evaluation
    terms = None
    if evaluation is not None:
        terms = EvaluationTerms(
            noise_multiplier=evaluation.noise_multiplier,
            delta=evaluation.delta,
            max_evaluations=plan.paid_evaluations,
        )
    return OpenRun(
        run=run,
        plan_hash=plan.sha256(),
        unit=plan.privacy.unit,
        noise=plan.privacy.noise,
        sample_rate=plan.privacy.sample_rate if priced is None else priced.sample_rate,
        noise_multiplier=None if priced is None else priced.noise_multiplier,
        worst_noise_multiplier=None if priced is None else priced.worst_noise_multiplier,
        steps=plan.training.local_steps if priced is None else priced.steps,
        mechanism_delta=plan.mechanism_delta,
        delta=plan.privacy.delta,
        max_rounds=plan.paid_rounds,
        max_attempts=plan.max_attempts,
        evaluation=terms,
        time_s=time_s,
    )


def marking(
    kind: Literal["reserve", "commit", "void"], run: str, attempt: int, purpose: Purpose, time_s: int
) -> Attempt:
    """Return a record of an attempt; its nonce makes two copies of a ledger differ once both are used."""
    nonce = secrets.token_hex(32)
    return Attempt(kind=kind, run=run, attempt=attempt, purpose=purpose, nonce=nonce, time_s=time_s)


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


def number_after(last: int, entry: AnyEntry) -> int:
    """Return a record's number: one above the last, and above every head that an adoption stands for.

    So the heads that are signed after an adoption are again the highest that peers know.
    """
    heads = entry.heads if isinstance(entry, Adopt) else []
    return max([last, *(head.sequence for head in heads)]) + 1


def link(previous: str | None, body: bytes) -> str:
    """Return a record's hash: SHA-256 of the previous hash (32 zero bytes for the first) and the body."""
    return hashlib.sha256(bytes.fromhex(previous or "00" * 32) + body).hexdigest()
