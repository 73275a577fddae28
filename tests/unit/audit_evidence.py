"""Evidence of a small, complete run, with real keys, real certificates and real signatures.

Experiments on it are made up, with values as they are measured on the digits.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import math
import random
import struct
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding

from audit.evidence import RunEvidence
from audit.experiments import REQUIRED_TESTS, LabEvidence, OwnerFindings
from audit.findings import sign_findings
from crypto.authority import create_authority
from crypto.certificates import OwnerCredentials, describe, fingerprint
from crypto.signing import sign
from protocol.accounting import calibrate, epsilon_after, worst_epsilon_after
from protocol.claims import planned_worst
from protocol.messages import LedgerHead, Opening, Signed, Statement
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


# --- experiments -------------------------------------------------------------------------------------

_EXPECTED = {
    "noise-scale": (1.0004, 1.0),
    "noise-with-records": (0.9991, 1.0),
    "noise-across-coordinates": (0.0097, 0.0),
    "signal": (0.5013, 0.5),
    "ledger-composition": (1.31, 1.22),
    "clip-own-model": (1.0, 1.0),
    "batch-dispersion": (0.93, 1.0),
    "record-dispersion": (1.02, 1.0),
    "masked": (0.0031, 0.0033),
    "foreign-key": (0.0, 0.0),
    "forged-signature": (0.0, 0.0),
    "changed-header": (0.0, 0.0),
    "export-independent": (0.0, 0.0),
    "noise-distribution": (0.0011, 0.0),
    "noise-across-rounds": (0.0121, 0.0),
    "noise-across-owners": (0.0113, 0.0),
    "record-count": (1.0021, 1.0),
    "clip": (1.0, 1.0),
    "participation-rate": (0.0502, 0.05),
    "divisor": (1.0, 1.0),
    "rounding": (-0.0008, 0.0),
    "frames-uniform": (0.0009, 0.001),
    "frames-fresh": (0.0, 0.0),
    "sum-exact": (0.0, 0.0),
}
_METHODS = ("one run", "one run, f-DP", "Clopper-Pearson, Gaussian")
_BOUNDS = {"update": (0.6, 0.76, 1.3), "opened sum": (0.31, 0.44, 0.68), "exported model": (0.0, 0.0, 0.12)}
CUSTODY = (
    ("signing key", "sealed file", "0600", True),
    ("transport key", "sealed file", "0600", True),
    ("BFV secret key of the session", "memory", None, False),
)


def _test(name: str) -> dict[str, Any]:
    statistic, expected = _EXPECTED[name]
    what = f"{name.replace('-', ' ').capitalize()} of the installed code against the plan"
    return {
        "test": name, "what": what, "statistic": statistic, "expected": expected,
        "samples": 240_000, "p_value": 0.31, "threshold": 1e-6,
    }  # fmt: skip


def _bound(method: str, observer: str, epsilon: float, control: float | None) -> dict[str, Any]:
    return {
        "method": method,
        "observer": observer,
        "canaries": 4000,
        "guesses": 800,
        "correct": 511 if epsilon else 402,
        "epsilon": epsilon,
        "delta": 1e-5,
        "confidence": 0.95,
        "claimed": 1.98,
        "control": control,
        "detectable": None if control is None else 3.0,
        "assumption": "Canaries do not influence each other: each has a coordinate of its own.",
    }


def mechanism_fields(noise: str = "local", rounds: int = 8) -> dict[str, Any]:
    """Fields of `MechanismEvidence` for the plan of a run; with noise, nothing is wrong."""
    groups = [group for group in REQUIRED_TESTS if noise != "none" or not group.startswith("noise")]
    bounds = [
        _bound(method, observer, epsilon, 7.1 if observer != "exported model" else 0.4)
        for observer, values in _BOUNDS.items()
        for method, epsilon in zip(_METHODS, values, strict=True)
    ]
    return {
        "plan_hash": plan(noise, rounds).sha256(),
        "code_hash": sha("code"),
        "depth": "quick",
        "made_at": NOW.isoformat(),
        "conformance": [_test(name) for group in groups for name in REQUIRED_TESTS[group]],
        "bounds": [*bounds, _bound("one run, f-DP", "wire", 0.0, None)] if noise != "none" else [],
    }


def _attack(attack: str, model: str, group: str, strength: float, points: int) -> dict[str, Any]:
    def tpr(fpr: float) -> float:
        return round(1 - (1 - fpr) * (1 - fpr**0.6) ** (3 * strength), 6)

    falses = [round(10 ** (-3 + 3 * i / max(1, points - 1)), 6) for i in range(points)]
    one, tenth = tpr(0.01), tpr(0.001)
    return {
        "attack": attack,
        "model": model,
        "group": group,
        "members": 500,
        "outsiders": 500,
        "shadow_models": 32,
        "auc": round(1 - 0.5 * math.exp(-strength / 2), 4),
        "tpr_at_1_percent": {"value": one, "low": round(0.75 * one, 6), "high": min(1.0, 1.3 * one)},
        "tpr_at_01_percent": {"value": tenth, "low": 0.4 * tenth, "high": min(1.0, 1.9 * tenth)},
        "ceiling_at_1_percent": None if model == "without protection" else 0.0739,
        "curve": [[fpr, tpr(fpr)] for fpr in falses],
    }


def picture(seed: int, noisy: bool) -> str:
    """A grey picture of 16 by 16 as base64 of a PNG: a ring, or nothing but noise."""
    draw = random.Random(seed)

    def grey(x: int, y: int) -> int:
        ring = 235 if 3 < math.hypot(x - 7.5, y - 7.5) < 6 - (seed % 2) else 20
        return draw.randrange(256) if noisy else ring

    rows = b"".join(b"\0" + bytes(grey(x, y) for x in range(16)) for y in range(16))
    header = struct.pack(">IIBBBBB", 16, 16, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + body).decode()


def _inversions(attack: str, batch: int, psnr: float) -> list[dict[str, Any]]:
    shown = (
        ("plain update", max(1, batch - 8), psnr, 0.999, picture(batch, noisy=False)),
        ("private update", 0, 6.2, 0.01, picture(batch, noisy=True)),
        ("received by the coordinator", 0, None, None, ""),
    )
    return [
        {
            "attack": attack, "observed": observed, "batch": batch, "rebuilt": rebuilt, "psnr_db": decibels,
            "ssim": similarity, "original_png": picture(batch, noisy=False), "rebuilt_png": png,
        }
        for observed, rebuilt, decibels, similarity, png in shown
    ]  # fmt: skip


def lab_fields(noise: str = "local", rounds: int = 8, points: int = 60) -> dict[str, Any]:
    """Fields of `LabEvidence` that every check passes; `points` on each ROC curve."""
    models = {"without protection": 1.0, "as planned": 0.03, "exported": 0.02}
    membership = [
        _attack(attack, model, group, strength * factor, points)
        for attack, factor in (("LiRA", 1.0), ("RMIA", 0.8))
        for group, model, strength in [
            *(("all records", *item) for item in models.items()),
            ("most exposed records", "without protection", 6.0),
            ("most exposed records", "as planned", 0.05),
        ]
    ]
    scans = [
        ("wire", 48_211_904, 31),
        ("disk", 21_004_112, 12),
        ("logs", 88_120, 31),
        ("reports", 412_330, 31),
    ]
    return {
        "depth": "quick",
        "mechanism": mechanism_fields(noise, rounds),
        "membership": membership,
        "inversion": [
            *_inversions("analytic", 1, 120.0),
            *_inversions("optimization", 1, 88.2),
            *_inversions("imprint", 64, 96.4),
        ],
        "markers": [
            {"place": place, "searched_bytes": size, "markers": 31, "hits": 0, "control_hits": control}
            for place, size, control in [*scans, ("coordinator memory", 612_368_384, 9)]
        ],
        "ciphertexts": 30,
        "ciphertexts_repeated": 0,
        "seconds": 57.3,
    }


def lab(noise: str = "local", length: int = 8, points: int = 60, /, **changes: Any) -> LabEvidence:
    """Valid `LabEvidence`, with some fields replaced."""
    return LabEvidence.from_fields(lab_fields(noise, length, points) | changes)


def findings_fields(owner: str, noise: str = "local", rounds: int = 8) -> dict[str, Any]:
    """Fields of one owner's `OwnerFindings`, in agreement with its statement."""
    sealed = rounds - 2 if owner == "lab-ost" else rounds
    spent = epsilon_after(plan(noise, rounds), sealed)
    return {
        "owner": owner,
        "run": sha("run"),
        "mechanism": mechanism_fields(noise, rounds) | {"bounds": []},
        "custody": [
            {"what": what, "holder": owner, "place": place, "mode": mode, "encrypted_at_rest": sealed_file}
            for what, place, mode, sealed_file in CUSTODY
        ],
        "ledger": {
            "dataset": sha(f"ledger of {owner}"),
            "spent_epsilon": None if spent is None else spent + 1.5,
            "spent_delta": 2e-5,
            "cap_epsilon": None if noise == "none" else 6.0,
            "cap_delta": 1e-4,
            "this_run_epsilon": spent,
            "runs": 2,
            "sequence": 9 + 2 * sealed,
            "head": sha(f"last {owner}"),
        },
    }


def findings(noise: str = "local", length: int = 8, /, **changes: Any) -> list[Signed]:
    """What every owner signed; `changes` replace fields of the first owner's."""
    fields = [findings_fields(name, noise, length) for name in OWNERS]
    fields[0] |= changes
    return [
        sign_findings(credentials()[1][name].signing_key, OwnerFindings.from_fields(entry))
        for name, entry in zip(OWNERS, fields, strict=True)
    ]


# --- changes -----------------------------------------------------------------------------------------


def leaves(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every value that is not a container, or an empty one."""
    items = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    if value in ({}, []) or not isinstance(value, dict | list):
        yield place
    for step, item in items:
        yield from leaves(item, (*place, step))


def changed(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value[:-1] + ("1" if value[-1:] != "1" else "2")
    return ["x"] if value == [] else 1


def put(report: dict[str, Any], place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    copied = copy.deepcopy(report)
    target: Any = copied
    for step in place[:-1]:
        target = target[step]
    target[place[-1]] = value
    return copied


def get(value: Any, place: tuple[Any, ...]) -> Any:
    for step in place:
        value = value[step]
    return value
