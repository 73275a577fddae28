"""Judge a report: the checks, and the verdict that follows from them.

Everything here is a pure function of the report's own sections, so that a reader who trusts nobody can
repeat it: `checks` looks at the sections, `verdict` looks at the checks, `recompute` does both. A check
passes only on evidence. What has no evidence is *missing*, and a report with something missing is never
a PASS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, Literal

from audit.checks import experiments, owners, privacy
from audit.checks.check import Check, Report, names, not_applicable, result
from audit.words import spans
from crypto.presets import broken_byte_promise

Status = Literal["PASS", "FAIL", "INCONCLUSIVE"]

EXIT_CODES: dict[str, int] = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 2}
"""Exit status of a command that ends with this verdict."""

MINIMUM_SECURITY_BITS = 128
"""Smallest accepted security level of the encryption, against known lattice attacks."""

ERROR_CODE_LIMIT_BYTES = 4096
"""A longer message cannot be called an error code: it could carry data."""

SIMULATED = "A simulation was audited, not a deployment: all parties ran on one machine."
"""First reason of every verdict on a simulation."""

_RECEIVABLE = ("ciphertext frames", "signed metadata", "opened sums", "error code")
_FORMS = {"packed": "packed without gaps", "seal": "in SEAL's own form"}
_ONLY_UNDER = {"ciphertext frames": "train.seal", "opened sums": "query.open"}


def verdict(results: Iterable[Check], kind: str = "deployment") -> dict[str, Any]:
    """Return the verdict that follows from check results.

    Args:
        results: Checks with `title`, `status` (``pass``, ``fail``, ``missing``, ``not applicable``) and
            `gap`.
        kind: What was audited; of anything but a ``deployment`` the first reason says so.

    Returns:
        `status` and `reasons`, of which no two say the same of different checks. One failed check makes it
        FAIL; else one missing check, or no check that applies, makes it INCONCLUSIVE; else it is PASS. An
        unknown status counts as failed.
    """
    listed = [check for check in results if check["status"] != "not applicable"]
    failed = [check for check in listed if check["status"] not in ("pass", "missing")]
    missing = [check for check in listed if check["status"] == "missing"]
    status: Status = "FAIL" if failed else "INCONCLUSIVE" if missing or not listed else "PASS"
    reasons = [
        f"{'; '.join(check['title'] for check in group)}: {group[0]['gap']}"
        for group in [*grouped(failed), *grouped(missing)]
    ]
    preface = [] if kind == "deployment" else [SIMULATED]
    return {"status": status, "reasons": preface + (reasons if listed else ["Nothing was checked."])}


def grouped(listed: Iterable[Check]) -> list[list[Check]]:
    """Return checks in groups of one and the same reason, in order of the first of each."""
    groups: dict[str, list[Check]] = {}
    for check in listed:
        groups.setdefault(check["gap"], []).append(check)
    return list(groups.values())


def recompute(report: Report) -> dict[str, Any]:
    """Return the verdict that the report's sections support, whatever checks and verdict it states."""
    return verdict(checks(report), report["subject"]["kind"])


def exit_code(status: str) -> int:
    """Return 0 for PASS, 1 for FAIL and for anything unknown, 2 for INCONCLUSIVE."""
    return EXIT_CODES.get(status, 1)


def checks(report: Report) -> list[Check]:
    """Return every check of this version, in the order of a report.

    Args:
        report: A report that fits the schema; its `checks`, `verdict` and `signature` are not read.
    """
    return [check(report) for check in _CHECKS]


def _opened(report: Report) -> list[dict[str, Any]]:
    return [entry for entry in report["rounds"] if not entry["void"]]


def _finished(report: Report) -> list[dict[str, Any]]:
    return [entry for entry in _opened(report) if entry["purpose"] == "train"]


def _run_complete(report: Report) -> Check:
    subject, planned = report["subject"], report["promise"]["rounds"]
    counted = len(_finished(report))
    failed = ["The run failed."] if subject["state"] == "failed" else []
    if counted != subject["rounds_finished"]:
        failed.append("The number of finished rounds differs from the rounds on record.")
    missing = [] if subject["state"] == "finished" and counted == planned else ["The run has not ended."]
    return result(
        "run-complete",
        "All planned rounds were finished",
        f"{counted} of {planned} rounds finished, in {subject['attempts_used']} attempts.",
        failed=failed,
        missing=missing,
        limit="",
    )


def _plan_binding(report: Report) -> Check:
    subject = report["subject"]
    failed = []
    if subject["plan_hash"] != subject["plan_hash_recomputed"]:
        failed.append("The plan printed here is not the one that the run used.")
    if subject["initial_model_hash"] != subject["initial_model_hash_planned"]:
        failed.append("The run did not start from the model that the plan names.")
    return result(
        "plan-binding",
        "The plan printed here is the plan that was run",
        "The plan's hash was computed again. The first model's hash was compared with the plan.",
        failed=failed,
        missing=[],
        limit="",
    )


def _openings_agree(report: Report) -> Check:
    rounds, quorum = _opened(report), report["promise"]["quorum"]
    weak = [r["round"] for r in rounds if r["agreeing_openings"] < quorum]
    return result(
        "openings-agree",
        "In each round enough owners signed the same sum",
        f"{len(rounds)} sums. At least {quorum} valid, equal signatures are needed in each.",
        failed=[f"Too few valid, equal signatures in round {spans(weak)}."] if weak else [],
        missing=[] if rounds else ["No round was finished."],
        limit="Owners who agree to sign a wrong sum are not detected.",
    )


def _cohort_size(report: Report) -> Check:
    rounds, minimum = _opened(report), report["promise"]["cohort_minimum"]
    sizes = [len(set(entry["contributors"])) for entry in rounds]
    small = [r["round"] for r, size in zip(rounds, sizes, strict=True) if size < minimum]
    known = {claim["fingerprint"] for claim in report["claims"]}
    strangers = [r["round"] for r in rounds if not set(r["contributors"]) <= known]
    failed = [f"Too few owners in round {spans(small)}."] if small else []
    failed += [f"Unknown owners in round {spans(strangers)}."] if strangers else []
    limit = "" if minimum >= 3 else "Fewer than three owners: each can work out the other's update."
    return result(
        "cohort-size",
        "Each sum hides one owner among enough others",
        f"At least {minimum} owners are needed. Smallest round: {min(sizes, default=0)}.",
        failed=failed,
        missing=[] if rounds else ["No round was finished."],
        limit=limit or "Owners who work together lower this number.",
    )


def _model_countersigned(report: Report) -> Check:
    claims = report["claims"]
    absent = [c for c in claims if c["statement"] == "missing"]
    other = [c for c in claims if c["statement"] != "missing" and not c["model_signed"]]
    return result(
        "model-countersigned",
        "Every owner signed the same final model",
        f"{sum(c['model_signed'] for c in claims)} of {len(claims)} owners signed this model's hash.",
        failed=[f"Another model, or an invalid signature, from: {names(other)}."] if other else [],
        missing=[f"No signed statement from: {names(absent)}."] if absent or not claims else [],
        limit="The signature says which model came out. It does not say that the model is good.",
    )


def _simulated(report: Report) -> bool:
    return bool(report["subject"]["kind"] == "simulation")


def _no_server_key(report: Report) -> Check:
    title = "The coordinator could not decrypt"
    if _simulated(report):
        return not_applicable("no-server-key", title, "In a simulation all parties share one machine.")
    held = report["server"]["has_secret_key"]
    return result(
        "no-server-key",
        title,
        "The coordinator's process was searched for decryption keys and for the code that uses them.",
        failed=["The coordinator's process held a decryption key or the code for one."] if held else [],
        missing=[],
        limit="A coordinator that got the key from an owner by other means would not say so.",
    )


def _received_content(report: Report) -> Check:
    received = [entry for entry in report["transcript"] if entry["direction"] == "received"]
    failed = []
    for entry in received:
        content, kind = entry["content"], entry["kind"]
        if content not in _RECEIVABLE:
            failed.append(f"Under {kind} something else arrived: {content}.")
        elif _ONLY_UNDER.get(content, kind) != kind:
            failed.append(f"{content.capitalize()} arrived under {kind}, where they do not belong.")
        elif content == "error code" and entry["max_bytes"] > ERROR_CODE_LIMIT_BYTES:
            failed.append(f"An error under {kind} was too long to be only a code.")
    total = sum(entry["total_bytes"] for entry in received)
    count = sum(entry["count"] for entry in received)
    return result(
        "received-content",
        "The coordinator received only encrypted updates, opened sums and signed notes",
        f"{count} messages, {total} bytes, sorted by what the coordinator's parser made of them.",
        failed=failed,
        missing=[] if received else ["No message is on record."],
        limit="The coordinator keeps this record. Owners can compare it with what they sent.",
    )


def _encryption_strength(report: Report) -> Check:
    encryption = report["encryption"]
    bits, failed = encryption["security_level_bits"], []
    if bits < MINIMUM_SECURITY_BITS:
        failed.append(f"{bits} bit is below {MINIMUM_SECURITY_BITS} bit.")
    if not encryption["exact"]:
        failed.append("Decryption returns approximate numbers, which can leak the key.")
    return result(
        "encryption-strength",
        "The encryption is strong and exact",
        f"{encryption['scheme']}, preset {encryption['preset']}, {bits} bit.",
        failed=failed,
        missing=[],
        limit="Security levels rest on the best attacks that are publicly known.",
    )


def _update_size(report: Report) -> Check:
    encryption = report["encryption"]
    size, form = encryption["frame_bytes"], _FORMS[encryption["frames"]]
    each = (size or 0) / max(1, encryption["values_per_frame"])
    broken = broken_byte_promise(encryption["preset"], each)
    return result(
        "update-size",
        "An encrypted update is as small as promised",
        f"Frames {form}, {each:.2f} bytes per value." if size else f"Frames {form}.",
        failed=[f"{broken}. Frames are {form}."] if broken else [],
        missing=[] if size else ["No frame was sent."],
        limit="For models of many frames; a small model pays for whole frames.",
    )


def _tls(report: Report) -> Check:
    title = "All connections use TLS 1.3, and both sides show a certificate"
    if _simulated(report):
        return not_applicable("tls", title, "A simulation has no connections.")
    tls, failed = report["tls"], []
    if tls["version"] != "TLSv1.3":
        failed.append("The connection is not protected by TLS 1.3.")
    if not tls["client_certificate_required"]:
        failed.append("Owners can connect without a certificate.")
    return result(
        "tls",
        title,
        f"{tls['version']}, client certificate "
        f"{'required' if tls['client_certificate_required'] else 'not required'}.",
        failed=failed,
        missing=[],
        limit="Measured by connecting to the coordinator as a stranger when the run was submitted.",
    )


def _certificates(report: Report) -> Check:
    title = "All certificates were valid during the run"
    if _simulated(report):
        return not_applicable("certificates", title, "Simulated owners have no certificates.")
    start, end = (datetime.fromisoformat(report["subject"][k]) for k in ("started_at", "finished_at"))
    # members' transport certificates are judged when they connect, and may belong to nobody of this run
    listed = [c for c in report["certificates"] if not c["role"].startswith("owner")]
    outside = [
        str(c["subject"])
        for c in listed
        if datetime.fromisoformat(c["not_before"]) > start or datetime.fromisoformat(c["not_after"]) < end
    ]
    outside += [c["owner"] for c in report["claims"] if not c["certificate_covers_run"]]
    failed = [f"Not valid all the time: {', '.join(outside)}."] if outside else []
    if end < start:
        failed.append("The run ended before it started.")
    served = any(certificate["role"] == "server" for certificate in listed)
    return result(
        "certificates",
        title,
        f"{len(listed)} certificates and {len(report['claims'])} signing keys were compared with the "
        "run's dates, an owner's with those of its presence.",
        failed=failed,
        missing=[] if served else ["The coordinator's certificate is not on record."],
        limit="Each owner checked issuer and revocation when it joined; this report does not repeat that.",
    )


_CHECKS: tuple[Callable[[Report], Check], ...] = (
    privacy.noise_on,
    privacy.noise_shares,
    privacy.budget_kept,
    privacy.evaluations_planned,
    privacy.statements_agree,
    privacy.ledger_forward,
    _no_server_key,
    _received_content,
    _cohort_size,
    _openings_agree,
    _model_countersigned,
    _encryption_strength,
    _update_size,
    _tls,
    _certificates,
    _plan_binding,
    _run_complete,
    experiments.mechanism_conformance,
    experiments.lower_bounds,
    experiments.membership_inference,
    experiments.gradient_inversion,
    experiments.marker_scan,
    experiments.ciphertext_reuse,
    owners.owner_code,
    owners.key_custody,
    owners.owner_ledgers,
)
