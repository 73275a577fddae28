"""Made-up experiments on the run of `audit_evidence`, with values as they are measured on the digits."""

from __future__ import annotations

import base64
import math
import random
import struct
import zlib
from typing import Any

from audit.evidence.experiments import REQUIRED_TESTS, LabEvidence, OwnerFindings
from audit.evidence.findings import sign_findings
from protocol.accounting import epsilon_after
from protocol.messages import Signed
from tests.unit.audit_evidence import OWNERS, credentials, plan, sha

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
    "noise-scale-own-model": (1.004, 1.0),
    "noise-distribution-own-model": (0.0039, 0.0038),
    "noise-across-coordinates-own-model": (0.0104, 0.0109),
    "noise-across-rounds-own-model": (0.0057, 0.0063),
    "clip-in-pieces": (1.0, 1.0),
}
_METHODS = ("one run", "one run, f-DP", "Clopper-Pearson, Gaussian")
_BOUNDS = {"update": (0.6, 0.76, 1.3), "opened sum": (0.31, 0.44, 0.68), "exported model": (0.0, 0.0, 0.12)}
MADE_AT = "2026-12-24T12:00:00+00:00"
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
    groups = [
        group for group in REQUIRED_TESTS if noise != "none" or not group.startswith(("noise", "own"))
    ]
    bounds = [
        _bound(method, observer, epsilon, 7.1 if observer != "exported model" else 0.4)
        for observer, values in _BOUNDS.items()
        for method, epsilon in zip(_METHODS, values, strict=True)
    ]
    return {
        "plan_hash": plan(noise, rounds).sha256(),
        "code_hash": sha("code"),
        "depth": "quick",
        "made_at": MADE_AT,
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
