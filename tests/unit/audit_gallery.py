"""Evidence of runs of every shape: lengths, owners, ends, units, kinds of noise, with or without extras."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding

from audit.evidence.run import EncryptionEvidence, RunEvidence
from crypto.authority import create_authority
from crypto.certificates import OwnerCredentials, describe
from crypto.presets import packing_for
from crypto.signing import sign
from protocol.accounting import calibrate
from protocol.claims import adjacency, planned_worst
from protocol.encoding import digest_bytes
from protocol.evaluation import promised_loss, run_epsilon, worst_run_epsilon
from protocol.messages import LedgerHead, Opening, Statement
from protocol.plan import Plan
from tests.credentials import owner_of
from tests.unit.audit_evidence import END, NOW, START, evidence_fields, name_of, sha

EVALUATED_EVERY = 4


@cache
def members(count: int) -> dict[str, OwnerCredentials]:
    """Return keys and certificates of owners by name."""
    authority = create_authority("Example Federation CA", 900, START)
    names = [f"hospital-{number:03}" for number in range(1, count + 1)]
    return {name: owner_of(authority, name, days=200, now=START) for name in names}


@cache
def plan(noise: str, unit: str, rounds: int, evaluated: bool, owners: int) -> Plan:
    """Return a resolved plan of few steps."""
    client, shared = unit == "client", noise == "distributed"
    privacy: dict[str, Any] = {"noise": noise, "unit": unit, "expected_batch_size": 64.0}
    privacy |= {"sample_rate": 1.0} if client else {"sample_rate": 0.05}
    privacy |= {"max_update_norm": 1.0} if client else {}
    privacy |= {"tolerated_colluders": 1} if shared else {}
    fields: dict[str, Any] = {
        "run": {"name": "readmission-2026", "rounds": rounds, "paid_spares": 0},
        "task": {"name": "image-classification", "input_shape": [8, 8], "classes": 10},
        "model": {"name": "mlp", "hidden": [16], "initial_sha256": sha("model 0")},
        "cohort": {"minimum": min(owners, 4 if shared else 3), "maximum": max(owners, 4)}
        | ({"allow_small": True} if owners < 3 else {}),
        "training": {"local_steps": 1, "learning_rate": 0.25},
        "encryption": {"preset": "exact16", "quorum": min(owners, 2)},
        "privacy": privacy,
    }
    if evaluated:
        fields["evaluation"] = {"every": EVALUATED_EVERY, "holdout_share": 0.2, "noise": "none"} | (
            {} if noise == "none" else {"noise": "local", "target_epsilon": 1.0, "noise_multiplier": 40.0}
        )
    if noise != "none":
        privacy["target_epsilon"] = 4.0
        privacy["noise_multiplier"] = calibrate(Plan.from_fields(fields))
    return Plan.from_fields(fields)


def shipped(file: Path) -> Plan:
    """Return a plan of the scenarios, resolved but for the weights of its first model."""
    given = Plan.from_toml(file.read_text(encoding="utf-8"))
    model = given.model.model_copy(update={"initial_sha256": sha("model 0")})
    named = given.model_copy(update={"model": model})
    noise = named.privacy.model_copy(update={"noise_multiplier": calibrate(named)})
    evaluation = named.evaluation
    if evaluation is not None:
        evaluation = evaluation.model_copy(update={"noise_multiplier": 40.0})
    return named.model_copy(update={"privacy": noise, "evaluation": evaluation})


def _attempt(run: Plan, number: int, purpose: str, owners: int, accuracy: float | None) -> dict[str, Any]:
    keys = list(members(owners).values())
    sums, sums_hash = None, sha(f"sums {number}")
    if purpose == "evaluate":
        # the first evaluation counts too few records for its noise
        sums = _counts(run, owners, *((1.0, 0.0) if number == EVALUATED_EVERY else (900.0, 100.0)))
        sums_hash = digest_bytes(b"".join(value.to_bytes(4, "little") for value in sums))
    body = Opening(
        session=sha("session"),
        attempt=2 * number + (purpose == "evaluate"),
        purpose=purpose,
        list_hash=sha(f"list {number}"),
        headers_hash=sha(f"headers {number}"),
        model_hash=sha(f"model {number - 1}"),
        contributors=len(keys),
        total_weight=float(len(keys)),
        sums_hash=sums_hash,
    )
    return {
        "round": number,
        "attempt": body.attempt,
        "purpose": purpose,
        "contributors": sorted(name_of(key) for key in keys),
        "headers_hash": body.headers_hash,
        "sums_hash": body.sums_hash,
        "openings": [
            sign(key.signing_key, body).model_dump(mode="json") for key in keys[: run.encryption.quorum]
        ],
        "accuracy": accuracy if purpose == "train" else None,
        "sums": sums,
        "seconds": {"fit": 2.5, "seal": 0.4, "open": 0.3},
        "upload_bytes": 29_400,
        "download_bytes": 88_200,
        "void": False,
        "reason": None,
    }


def _counts(run: Plan, owners: int, *counts: float) -> list[int]:
    """Return the integers to which owners' counts of right and wrong answers add up."""
    packing = packing_for(run.encryption.preset, run.cohort.maximum)
    span = 1.0 if run.evaluation is None else run.evaluation.count_range
    return [round((owners + count / span) * packing.half_levels) for count in counts]


def _bounded(epsilon: float | None) -> float | None:
    return None if epsilon is None or math.isinf(epsilon) else epsilon


def _owner(run: Plan, name: str, keys: OwnerCredentials, sealed: int, signed: bool) -> dict[str, Any]:
    epsilon, delta = promised_loss(run)
    spent = run_epsilon(run, sealed, 0) if sealed else 0.0
    worst = worst_run_epsilon(run, sealed, 0) if sealed else 0.0
    statement = Statement(
        session=sha("session"),
        sessions=[sha("session")],
        plan_hash=run.sha256(),
        model_hash=sha("final model"),
        unit=run.privacy.unit,
        epsilon=_bounded(spent),
        epsilon_worst=_bounded(worst),
        delta=0.0 if run.privacy.noise == "none" else run.privacy.delta,
        evaluation_epsilon=0.0,
        evaluation_delta=0.0,
        sealed_attempts=sealed,
        sealed_evaluations=0,
        void_attempts=0,
        ledger=LedgerHead(sequence=9, head=sha(f"last {name}")),
    )
    return {
        "name": name,
        "fingerprint": name_of(keys),
        "signing_certificate": keys.signing_certificate.public_bytes(Encoding.DER),
        "claimed": {
            "unit": run.privacy.unit,
            "adjacency": adjacency(run),
            "epsilon": epsilon,
            "epsilon_worst": _bounded(planned_worst(run)),
            "delta": delta,
        },
        "statement": sign(keys.signing_key, statement).model_dump(mode="json") if signed else None,
        "ledger_first": {"sequence": 7, "head": sha(f"first {name}")},
        "ledger_last": {"sequence": 9, "head": sha(f"last {name}")},
        "sealed_attempts": sealed,
        "sealed_evaluations": 0,
        "present_from": START.isoformat(),
        "present_until": END.isoformat(),
    }


def run_of(
    rounds: int = 8,
    owners: int = 4,
    *,
    noise: str = "local",
    unit: str = "example",
    evaluated: bool = False,
    state: str = "finished",
    finished: int | None = None,
    measured: bool = True,
    signed: bool = True,
    run: Plan | None = None,
    **changes: Any,
) -> RunEvidence:
    """Return evidence of a run.

    Args:
        rounds: Rounds of the plan.
        owners: Owners, all of whom are in each round.
        noise: Kind of noise.
        unit: Unit of privacy.
        evaluated: The plan has federated evaluation every `EVALUATED_EVERY` rounds.
        state: How it ended.
        finished: Rounds that were finished; all of them by default.
        measured: There were public data to measure accuracy with.
        signed: Owners' closing statements arrived.
        run: Another plan than one that is made from the above; all its rounds were finished.
        changes: Other fields that are replaced.
    """
    run = run or plan(noise, unit, rounds, evaluated, owners)
    done = run.run.rounds if finished is None else finished
    attempts = []
    for number in range(1, done + 1):
        accuracy = round(0.5 + 0.45 * (1 - 0.9**number), 4) if measured else None
        attempts.append(_attempt(run, number, "train", owners, accuracy))
        if run.evaluation is not None and number % run.evaluation.every == 0:
            attempts.append(_attempt(run, number, "evaluate", owners, None))
    keys = members(owners)
    listed = [describe(one.signing_certificate, NOW) for one in keys.values()]
    fields = evidence_fields() | {
        "plan": run.fields(),
        "plan_hash": run.sha256(),
        "state": state,
        "rounds_finished": done,
        "attempts_used": len(attempts),
        "encryption": EncryptionEvidence.of_plan(run, 28736 if done else None).fields(),
        "rounds": attempts,
        "owners": [_owner(run, name, one, done, signed) for name, one in keys.items()],
        "refusals": [],
        "certificates": [*evidence_fields()["certificates"][:2], *listed],
    }
    return RunEvidence.from_fields(fields | changes)
