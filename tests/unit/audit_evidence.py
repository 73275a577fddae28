"""Evidence of a small, complete run, with real keys, real certificates and real signatures."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding

from audit.evidence.run import RunEvidence
from crypto.authority import create_authority
from crypto.certificates import OwnerCredentials, describe, fingerprint
from crypto.signing import sign
from protocol.accounting import calibrate, epsilon_after, worst_epsilon_after
from protocol.claims import planned_worst
from protocol.messages import LedgerHead, Opening, Statement
from protocol.plan import Plan
from tests.credentials import owner_of, server_of

START = datetime(2026, 3, 2, 8, 30, tzinfo=UTC)
END = START + timedelta(minutes=14, seconds=9)
NOW = END + timedelta(minutes=2)
OWNERS = ("clinic-nord", "clinic-sued", "registry-west", "lab-ost")


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@lru_cache(maxsize=1)
def credentials() -> tuple[list[dict[str, Any]], dict[str, OwnerCredentials]]:
    """Descriptions of all certificates, and the owners' keys by name."""
    authority = create_authority("Example Federation CA", 900, START - timedelta(days=30))
    server = server_of(authority, ["localhost"], days=200, now=START - timedelta(days=20))
    owners = {name: owner_of(authority, name, days=200, now=START - timedelta(days=20)) for name in OWNERS}
    listed = [authority.certificate, server.certificate]
    for owner in owners.values():
        listed += [owner.transport_certificate, owner.signing_certificate]
    return [describe(certificate, NOW) for certificate in listed], owners


def name_of(owner: OwnerCredentials) -> str:
    return fingerprint(owner.signing_key.public_key())


@lru_cache(maxsize=4)
def plan(noise: str = "local", rounds: int = 8) -> Plan:
    privacy: dict[str, Any] = {"noise": noise, "sample_rate": 0.05, "expected_batch_size": 64.0}
    fields: dict[str, Any] = {
        "run": {"name": "readmission-2026", "rounds": rounds, "paid_spares": 0},
        "task": {"name": "tabular-classification", "input_shape": [24], "classes": 2},
        "model": {"name": "mlp", "hidden": [64, 32], "initial_sha256": sha("model 0")},
        "cohort": {"minimum": 3, "maximum": 8},
        "training": {"local_steps": 10, "learning_rate": 0.25},
        "privacy": privacy if noise == "none" else privacy | {"target_epsilon": 2.0},
    }
    resolved = Plan.from_fields(fields)
    if noise != "none":
        privacy |= {"target_epsilon": 2.0, "noise_multiplier": calibrate(resolved)}
        resolved = Plan.from_fields(fields | {"privacy": privacy})
    return resolved


def opening_body(number: int, attempt: int, contributors: int) -> Opening:
    return Opening(
        session=sha("session"),
        attempt=attempt,
        purpose="train",
        list_hash=sha(f"list {attempt}"),
        headers_hash=sha(f"headers {attempt}"),
        model_hash=sha(f"model {number - 1}"),
        contributors=contributors,
        total_weight=float(contributors),
        sums_hash=sha(f"sums {attempt}"),
    )


def _round(number: int, attempt: int, names: list[str], void: bool = False) -> dict[str, Any]:
    _, owners = credentials()
    members = [owners[name] for name in names]
    body = opening_body(number, attempt, len(members))
    return {
        "round": number,
        "attempt": attempt,
        "purpose": "train",
        "contributors": sorted(name_of(owner) for owner in members),
        "headers_hash": body.headers_hash,
        "sums_hash": None if void else body.sums_hash,
        "openings": []
        if void
        else [sign(owner.signing_key, body).model_dump(mode="json") for owner in members[:3]],
        "accuracy": None if void else round(0.71 + 0.18 * (1 - 0.72**number), 4),
        "sums": None,
        "seconds": {"fit": 61.2 + number, "seal": 4.1, "open": 0.0 if void else 6.4},
        "upload_bytes": 1_402_112,
        "download_bytes": 4_310_016,
        "void": void,
        "reason": "FS-RUN-01" if void else None,
    }


def statement_body(run_plan: Plan, sealed: int, owner: str, **changes: Any) -> Statement:
    fields: dict[str, Any] = {
        "session": sha("session"),
        "sessions": [sha("session")],
        "plan_hash": run_plan.sha256(),
        "model_hash": sha("final model"),
        "unit": "example",
        "epsilon": epsilon_after(run_plan, sealed),
        "epsilon_worst": worst_epsilon_after(run_plan, sealed),
        "delta": run_plan.privacy.delta if run_plan.privacy.noise == "local" else 0.0,
        "evaluation_epsilon": 0.0,
        "evaluation_delta": 0.0,
        "sealed_attempts": sealed,
        "sealed_evaluations": 0,
        "void_attempts": 0,
        "ledger": LedgerHead(sequence=9 + 2 * sealed, head=sha(f"last {owner}")),
    }
    return Statement.model_validate(fields | changes)


def _owner(run_plan: Plan, name: str, sealed: int) -> dict[str, Any]:
    keys = credentials()[1][name]
    statement = sign(keys.signing_key, statement_body(run_plan, sealed, name))
    return {
        "name": name,
        "fingerprint": name_of(keys),
        "signing_certificate": keys.signing_certificate.public_bytes(Encoding.DER),
        "claimed": {
            "unit": "example",
            "adjacency": "add/remove",
            "epsilon": run_plan.privacy.target_epsilon,
            "epsilon_worst": planned_worst(run_plan),
            "delta": run_plan.privacy.delta,
        },
        "statement": statement.model_dump(mode="json"),
        "ledger_first": {"sequence": 7, "head": sha(f"first {name}")},
        "ledger_last": {"sequence": 9 + 2 * sealed, "head": sha(f"last {name}")},
        "sealed_attempts": sealed,
        "sealed_evaluations": 0,
        "present_from": START.isoformat(),
        "present_until": END.isoformat(),
    }


def _entry(direction: str, kind: str, content: str, count: int, size: int) -> dict[str, Any]:
    return {
        "direction": direction,
        "kind": kind,
        "content": content,
        "count": count,
        "total_bytes": count * size,
        "min_bytes": size - (0 if content == "ciphertext frames" else 8),
        "max_bytes": size + (0 if content == "ciphertext frames" else 8),
    }


def _transcript() -> list[dict[str, Any]]:
    return [
        _entry("received", "query.join", "signed metadata", 4, 2_311),
        _entry("received", "query.roster", "signed metadata", 4, 5_120),
        _entry("received", "query.keys", "signed metadata", 4, 412),
        _entry("received", "train.fit", "signed metadata", 34, 688),
        _entry("received", "train.fit", "error code", 1, 94),
        _entry("received", "train.seal", "signed metadata", 30, 940),
        _entry("received", "train.seal", "ciphertext frames", 30, 350_528),
        _entry("received", "query.open", "signed metadata", 24, 810),
        _entry("received", "query.open", "opened sums", 24, 15_368),
        _entry("received", "query.close", "signed metadata", 4, 901),
        _entry("sent", "query.roster", "signed metadata", 4, 9_322),
        _entry("sent", "train.fit", "opened sums", 34, 15_368),
        _entry("sent", "train.seal", "signed metadata", 32, 3_011),
        _entry("sent", "query.open", "ciphertext frames", 24, 1_402_112),
    ]


def _key(what: str, holder: str, place: str, encrypted: bool) -> dict[str, Any]:
    mode = "0600" if encrypted else None
    return {"what": what, "holder": holder, "place": place, "mode": mode, "encrypted_at_rest": encrypted}


def evidence_fields(noise: str = "local", rounds: int = 8) -> dict[str, Any]:
    """Fields of `RunEvidence` for a run in which attempt 5 was void and one owner missed two rounds."""
    run_plan = plan(noise, rounds)
    listed, _ = credentials()
    attempts = []
    for number in range(1, rounds + 1):
        if number == 5:
            attempts.append(_round(5, 5, list(OWNERS[:3]), void=True))
        names = list(OWNERS[:3] if number in (2, 3) else OWNERS)
        attempts.append(_round(number, number + (number >= 5), names))
    sealed = dict.fromkeys(OWNERS, rounds) | {"lab-ost": rounds - 2}
    return {
        "run": sha("run"),
        "name": "readmission-2026",
        "plan": run_plan.fields(),
        "plan_hash": run_plan.sha256(),
        "session": sha("session"),
        "state": "finished",
        "rounds_finished": rounds,
        "attempts_used": len(attempts),
        "started_at": START.isoformat(),
        "finished_at": END.isoformat(),
        "model_hash": sha("final model"),
        "initial_model_hash": sha("model 0"),
        "encryption": {
            "scheme": "BFV",
            "preset": "exact16",
            "poly_modulus_degree": 4096,
            "coefficient_modulus_bits": 56,
            "plain_modulus_bits": 47,
            "security_level_bits": 256,
            "exact": True,
            "frames": "packed",
            "frame_bytes": 28736,
            "values_per_frame": 8184,
        },
        "rounds": attempts,
        "owners": [_owner(run_plan, name, sealed[name]) for name in OWNERS],
        "transcript": _transcript(),
        "refusals": [
            {"owner": name_of(credentials()[1]["lab-ost"]), "kind": "train.fit", "code": "FS-TRAIN-01"}
        ],
        "keys": [
            _key("BFV secret key of the session", "each owner", "memory", False),
            _key("signing key", "each owner", "sealed file", True),
            _key("transport key", "each owner", "sealed file", True),
            _key("TLS key", "coordinator", "sealed file", True),
        ],
        "certificates": listed,
        "tls": {
            "version": "TLSv1.3",
            "client_certificate_required": True,
            "cipher": "TLS_AES_256_GCM_SHA384",
        },
        "server_has_secret_key": False,
        "listening": [
            {"address": "0.0.0.0", "port": 9443, "purpose": "owners, mutual TLS"},
            {"address": "127.0.0.1", "port": 41017, "purpose": "Flower control, this machine only"},
        ],
        "deployment": {
            "name": "readmission-2026",
            "files": {"model.onnx": {"size_bytes": 21_504, "sha256": sha("onnx")}},
            "accuracy": {"full": 0.8731, "deployed": 0.8698},
            "steps": [{"step": "prune", "reached": 0.5}, {"step": "quantize", "reached": "int8"}],
        },
        "environment": {
            "python": "3.11.9",
            "platform": "Linux-6.1-x86_64",
            "packages": [
                {"name": "fedseal", "version": "0.1.0", "licence": "Apache-2.0"},
                {"name": "flwr", "version": "1.41.0", "licence": "Apache-2.0"},
                {"name": "opacus", "version": "1.6.0", "licence": None},
            ],
        },
    }


def evidence(noise: str = "local", length: int = 8, /, **changes: Any) -> RunEvidence:
    """A valid `RunEvidence`, with some fields replaced."""
    return RunEvidence.from_fields(evidence_fields(noise, length) | changes)
