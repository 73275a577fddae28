"""Build, sign, verify and write the audit report of a run.

A report is a plain JSON value that fits ``audit/schema/report-2.json``. It holds the run's evidence
and that of the experiments in full, so that everything else in it - recomputed privacy losses, verified
signatures, checks, verdict - is a function of the report alone. `verify_report` evaluates that function
again and compares.

What a signature proves: the holder of the key wrote this report. What verification without a trusted
public key proves: the report follows from the evidence printed in it, whoever wrote it.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from jsonschema import Draft202012Validator

from audit.checks.contradictions import refuse_contradictions
from audit.checks.reproduce import commands
from audit.checks.verdict import checks, verdict
from audit.evidence.base import parse_time
from audit.evidence.claims import claim, close, estimate, promise, spent_epsilon
from audit.evidence.experiments import LabEvidence
from audit.evidence.findings import finding
from audit.evidence.run import EncryptionEvidence, RunEvidence
from audit.facts import flatten, unflatten
from audit.pages import render
from crypto.certificates import fingerprint
from crypto.signing import sign_bytes, verify_bytes
from crypto.vault import write_public
from protocol.encoding import encode
from protocol.errors import EncodingInvalid, PlanInvalid, ReportInvalid, SignatureInvalid
from protocol.messages import Signed
from protocol.plan import Plan

SCHEMA_ID = "fedseal/report/2"
SIGNATURE_KIND = "report"
MAX_REPORT_BYTES = 64 * 1024 * 1024

CURVE_POINTS = 12
"""Most rounds at which the curve of spent epsilon is evaluated; accounting takes time."""

_SCHEMA_PATH = Path(__file__).parent / "schema" / "report-2.json"
_SAME = (
    "encryption",
    "owners",
    "transcript",
    "refusals",
    "keys",
    "certificates",
    "tls",
    "environment",
)
_RECOMPUTED = ("agreeing_openings", "estimate")
_SUBJECT = (
    "kind",
    "run",
    "name",
    "plan_hash",
    "session",
    "state",
    "rounds_finished",
    "attempts_used",
    "started_at",
    "finished_at",
    "model_hash",
    "initial_model_hash",
)


def build_report(
    evidence: RunEvidence,
    now: datetime,
    signer: Ed25519PrivateKey | None = None,
    lab: LabEvidence | None = None,
    findings: Sequence[Signed] = (),
) -> dict[str, Any]:
    """Return the report of a run.

    Args:
        evidence: What the run left behind.
        now: Time of the report, with a time zone.
        signer: Key that signs the report; without it `signature` is null.
        lab: Experiments made at the auditor's place; without them the report is inconclusive at best.
        findings: What owners found at their places, signed by them; see `audit.evidence.findings`.

    Returns:
        A JSON value that fits ``audit/schema/report-2.json``, without NaN or infinity.

    Raises:
        ReportInvalid: The evidence contradicts its own types or its plan, for example a plan that is not
            one, or another encryption.
        PlanInvalid: The plan in the evidence is not valid or not resolved.
    """
    plan = Plan.from_fields(evidence.plan)
    _check_counts(evidence, plan)
    _check_encryption(evidence, plan)
    fields = evidence.fields()
    report: dict[str, Any] = {
        "schema": SCHEMA_ID,
        "generated_at": now.astimezone(UTC).isoformat(timespec="seconds"),
        "subject": _subject(evidence, plan),
        "plan": flatten(plan.fields()),
        "promise": promise(plan),
        "claims": [claim(evidence, owner, plan) for owner in evidence.owners],
        "spending": _spending(plan, evidence.rounds_finished),
        "rounds": _rounds(evidence, plan),
        "server": {"has_secret_key": evidence.server_has_secret_key, "listening": fields["listening"]},
        "deployment": None if evidence.deployment is None else flatten(evidence.deployment),
        "laboratory": None if lab is None else lab.fields(),
        "findings": [finding(signed, _owner_keys(evidence)) for signed in findings],
    }
    report |= {name: fields[name] for name in _SAME}
    refuse_contradictions(report)
    report["reproduce"] = commands(report)
    report["checks"] = checks(report)
    report["verdict"] = verdict(report["checks"], evidence.kind)
    report["signature"] = None
    _validate(report)
    return report if signer is None else sign_report(report, signer)


def sign_report(report: dict[str, Any], key: Ed25519PrivateKey) -> dict[str, Any]:
    """Return the report with its signature replaced by one of `key`. For the key's owner only."""
    public = key.public_key()
    signature = sign_bytes(key, SIGNATURE_KIND, _signed_part(report))
    return report | {
        "signature": {
            "algorithm": "Ed25519",
            "signer": fingerprint(public),
            "public_key": base64.b64encode(public.public_bytes_raw()).decode("ascii"),
            "value": base64.b64encode(signature).decode("ascii"),
        }
    }


def write_report(report: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Write ``report.json`` and the self-contained ``report.html`` into `folder`.

    Each file appears whole or not at all.

    Returns:
        The two paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, page = folder / "report.json", folder / "report.html"
    _write(path, _spelling(report))
    write_page(report, page)
    return path, page


def write_page(report: dict[str, Any], page: Path) -> None:
    """Write the self-contained HTML page of a report that was verified or just built.

    The file appears whole or not at all.
    """
    _write(page, render.html(report))


def _write(path: Path, text: str) -> None:
    write_public(path, text.encode())


def verify_report(path: Path, public_key: Ed25519PublicKey | None = None) -> dict[str, Any]:
    """Read a report and check all that can be checked with it alone.

    Checks, in this order: size and spelling, signature, schema, and that claims, checks and verdict
    follow from the evidence in the report, signatures of owners and privacy accounting included.

    Args:
        path: A ``report.json``.
        public_key: Key of the expected signer. Without it a signature is checked against the key that
            the report itself names, and an unsigned report is accepted: that finds damage, not forgery.

    Returns:
        The report.

    Raises:
        ReportInvalid: Says which of these does not hold.
    """
    report = _read(path)
    _check_signature(report, public_key)
    _validate(report)
    try:
        again = build_report(
            _evidence_of(report),
            parse_time(report["generated_at"]),
            lab=None if report["laboratory"] is None else LabEvidence.from_fields(report["laboratory"]),
            findings=[_signed_of(entry) for entry in report["findings"]],
        )
    except (ValueError, EncodingInvalid, PlanInvalid) as error:
        raise ReportInvalid("the evidence in the report is not well-formed") from error
    difference = _first_difference(again, report | {"signature": None}, "")
    if difference is not None:
        raise ReportInvalid(f"{difference} does not follow from the evidence in the report")
    return report


# --- sections ----------------------------------------------------------------------------------------


def _subject(evidence: RunEvidence, plan: Plan) -> dict[str, Any]:
    fields = evidence.fields()
    return {name: fields[name] for name in _SUBJECT} | {
        "plan_hash_recomputed": plan.sha256(),
        "initial_model_hash_planned": plan.model.initial_sha256,
    }


def _spending(plan: Plan, rounds: int) -> list[dict[str, Any]]:
    """Return the loss of an owner that took part in every finished round, at up to `CURVE_POINTS`."""
    steps = min(rounds, CURVE_POINTS)
    points = sorted({0} | {round(rounds * (i + 1) / steps) for i in range(steps)})
    return [{"round": point, "epsilon": spent_epsilon(plan, point)} for point in points]


def _owner_keys(evidence: RunEvidence) -> dict[str, Ed25519PublicKey]:
    known = {owner.fingerprint: owner.public_key() for owner in evidence.owners}
    return {name: key for name, key in known.items() if key is not None}


def _sessions(evidence: RunEvidence, plan: Plan) -> set[str]:
    """Return the run's sessions: the last, and the earlier ones that a quorum of its statements names.

    Where fewer statements than a quorum arrived, all of them must; the report says that others are missing.

    Without any statement from the last session, as of a run that has not ended, the openings' own word is
    taken: such a report says that the statements are missing, and cannot pass.
    """
    statements = [owner.verified_statement() for owner in evidence.owners]
    named = [set(one.sessions) for one in statements if one is not None and one.session == evidence.session]
    if not named:
        opened = (signed.body for entry in evidence.rounds for signed in entry.openings)
        return {str(body.get("session")) for body in opened}
    counts = Counter(session for sessions in named for session in sessions)
    quorum = min(plan.encryption.quorum, len(named))
    return {str(evidence.session)} | {session for session, count in counts.items() if count >= quorum}


def _rounds(evidence: RunEvidence, plan: Plan) -> list[dict[str, Any]]:
    keys, sessions = _owner_keys(evidence), _sessions(evidence, plan)
    return [
        entry.fields()
        | {
            "agreeing_openings": entry.agreeing_openings(sessions, keys),
            "estimate": estimate(plan, entry),
        }
        for entry in evidence.rounds
    ]


# --- verification ------------------------------------------------------------------------------------


def _check_counts(evidence: RunEvidence, plan: Plan) -> None:
    """Refuse counts that no run of this plan can have; accounting for them could take for ever."""
    counts = [
        evidence.rounds_finished,
        evidence.attempts_used,
        *(owner.sealed_attempts for owner in evidence.owners),
    ]
    if max(counts) > plan.max_attempts:
        raise ReportInvalid("the evidence counts more attempts than the plan allows")
    if max((owner.sealed_evaluations for owner in evidence.owners), default=0) > plan.paid_evaluations:
        raise ReportInvalid("the evidence counts more evaluations than the plan allows")


def _check_encryption(evidence: RunEvidence, plan: Plan) -> None:
    """Refuse any other encryption than the plan's: its strength is not for the coordinator to state."""
    if evidence.encryption != EncryptionEvidence.of_plan(plan, evidence.encryption.frame_bytes):
        raise ReportInvalid("the encryption on record is not the one of the plan")


def _evidence_of(report: dict[str, Any]) -> RunEvidence:
    """Return the evidence that a report holds; the inverse of what `build_report` lays out."""
    fields = {name: report["subject"][name] for name in _SUBJECT} | {name: report[name] for name in _SAME}
    deployment = report["deployment"]
    return RunEvidence.from_fields(
        fields
        | {
            "plan": unflatten(report["plan"]),
            "rounds": [
                {name: value for name, value in entry.items() if name not in _RECOMPUTED}
                for entry in report["rounds"]
            ],
            "server_has_secret_key": report["server"]["has_secret_key"],
            "listening": report["server"]["listening"],
            "deployment": None if deployment is None else unflatten(deployment),
        }
    )


def _signed_of(entry: dict[str, Any]) -> Signed:
    return Signed.from_fields({name: value for name, value in entry.items() if name != "valid"})


def _spelling(report: dict[str, Any]) -> str:
    """Return the one text of a report: sorted keys, indented by two, ASCII, a newline at the end."""
    return json.dumps(report, indent=2, sort_keys=True, ensure_ascii=True, allow_nan=False) + "\n"


def _signed_part(report: dict[str, Any]) -> bytes:
    return encode({name: value for name, value in report.items() if name != "signature"})


def _read(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_REPORT_BYTES:
        raise ReportInvalid(f"the file is longer than {MAX_REPORT_BYTES} bytes")
    try:
        text = path.read_bytes().decode("ascii")
        report = json.loads(text)
        canonical = _spelling(report)
    except (ValueError, RecursionError):
        raise ReportInvalid("the file is not a report in JSON") from None
    if canonical != text or not isinstance(report, dict):
        # One spelling only, so that nobody can read another value out of the same verified file.
        raise ReportInvalid("the file is not spelled as fedseal writes it")
    return report


@lru_cache(maxsize=1)
def _validator() -> Draft202012Validator:
    return Draft202012Validator(json.loads(_SCHEMA_PATH.read_text(encoding="utf-8")))


def _validate(report: dict[str, Any]) -> None:
    problem = next(_validator().iter_errors(report), None)
    if problem is not None:
        raise ReportInvalid(f"{problem.json_path} does not fit the schema ({problem.validator})")


def _check_signature(report: dict[str, Any], public_key: Ed25519PublicKey | None) -> None:
    signature = report.get("signature")
    if signature is None:
        if public_key is not None:
            raise ReportInvalid("the report is not signed")
        return
    try:
        named = Ed25519PublicKey.from_public_bytes(base64.b64decode(signature["public_key"]))
        value, signer = base64.b64decode(signature["value"]), signature["signer"]
        verify_bytes(named, SIGNATURE_KIND, _signed_part(report), value)
    except (TypeError, KeyError, ValueError, EncodingInvalid, SignatureInvalid):
        raise ReportInvalid("the signature does not verify") from None
    if signer != fingerprint(named):
        raise ReportInvalid("the signature names another signer than its key")
    if public_key is not None and fingerprint(public_key) != fingerprint(named):
        raise ReportInvalid("the report is signed by somebody else")


def _first_difference(first: Any, second: Any, pointer: str) -> str | None:
    """Return the JSON pointer of the first place where two JSON values differ, or None."""
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        places = [(first[key], second[key], f"{pointer}/{key}") for key in first]
    elif isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        places = [(a, b, f"{pointer}/{i}") for i, (a, b) in enumerate(zip(first, second, strict=True))]
    else:
        same = type(first) is type(second) and close(first, second)
        return None if same else pointer or "/"
    return next((found for place in places if (found := _first_difference(*place))), None)
