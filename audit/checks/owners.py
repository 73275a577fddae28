"""The checks of what owners found at their own places; pure functions of the report's sections."""

from __future__ import annotations

from typing import Any

from audit.checks.check import Check, Report, by_reason, not_applicable, result
from audit.checks.experiments import untested

REMEDY = "Ask each owner to run “fedseal audit owner” and to send its signed findings."

_SIMULATED = "Simulated owners have no place of their own."
_TOLERANCE = 1e-6


def owner_findings(report: Report) -> dict[str, list[dict[str, Any]]]:
    """Return the validly signed findings about this run or its plan, by the owner's fingerprint."""
    found: dict[str, list[dict[str, Any]]] = {claim["fingerprint"]: [] for claim in report["claims"]}
    run = report["subject"]["run"]
    for finding in report["findings"]:
        body = finding["body"]
        if finding["valid"] and finding["signer"] in found and body["run"] in (None, run):
            found[finding["signer"]].append(body)
    return found


def owner_code(report: Report) -> Check:
    """Check that every owner tested the code that it runs, and that all run the same."""
    identifier, title = "owner-code", "Every owner tested the code that it runs, and all run the same"
    if report["subject"]["kind"] == "simulation":
        return not_applicable(identifier, title, _SIMULATED)
    found, lab = owner_findings(report), report["laboratory"]
    failed, missing = _unsigned(report), _silent(report, found)
    hashes = {body["mechanism"]["code_hash"] for bodies in found.values() for body in bodies}
    hashes |= set() if lab is None else {lab["mechanism"]["code_hash"]}
    if len(hashes) > 1:
        failed.append("Not all of them run the same code, or not the code that was audited.")
    wrong, lacking = [], []
    for claim in report["claims"]:
        for body in found[claim["fingerprint"]]:
            deviating, absent = untested(report, body["mechanism"])
            wrong += [(claim["owner"], reason) for reason in deviating]
            lacking += [(claim["owner"], reason) for reason in absent]
    return result(
        identifier,
        title,
        f"Signed findings of {sum(bool(bodies) for bodies in found.values())} of {len(found)} owners. "
        "The files of the mechanism were compared by their hash.",
        failed=failed + by_reason(wrong),
        missing=missing + by_reason(lacking),
        limit="An owner that lies about its own code harms the privacy of its own records.",
    )


def key_custody(report: Report) -> Check:
    """Check that secrets on disk are encrypted and closed to other users."""
    identifier, title = "key-custody", "Secret keys are encrypted on disk and closed to other users"
    if report["subject"]["kind"] == "simulation":
        return not_applicable(identifier, title, _SIMULATED)
    found = owner_findings(report)
    listed = [key for bodies in found.values() for body in bodies for key in body["custody"]]
    stored = [key for key in listed + report["keys"] if key["place"] != "memory"]
    plain = [key for key in stored if not key["encrypted_at_rest"]]
    opened = [key for key in stored if key["mode"] is None or not closed(key["mode"])]
    failed = _unsigned(report)
    failed += [f"Not encrypted on disk: {_names(plain)}."] if plain else []
    failed += [f"Open to other users: {_names(opened)}."] if opened else []
    kept = {name: [key for body in bodies for key in _stored(body)] for name, bodies in found.items()}
    own = [key for key in report["keys"] if key["holder"] == "coordinator" and key["place"] != "memory"]
    return result(
        identifier,
        title,
        f"{len(stored)} secrets on disk, {len(listed + report['keys']) - len(stored)} in memory only, as "
        "their holders found them.",
        failed=failed,
        missing=_silent(report, found, kept, "keys on disk")
        + ([] if own else ["The coordinator's own keys are not on record."]),
        limit="Whoever controls a holder's machine while it runs can read its memory.",
    )


def _stored(body: dict[str, Any]) -> list[dict[str, Any]]:
    return [key for key in body["custody"] if key["place"] != "memory"]


def closed(mode: str) -> bool:
    """Tell whether a file with these access bits is closed to everybody but its owner, as 0600 is."""
    return int(mode, 8) & 0o077 == 0


def owner_ledgers(report: Report) -> Check:
    """Check that no owner's budget over all runs is overdrawn, and that no ledger forgot this run."""
    identifier, title = "owner-ledgers", "No owner's budget over all runs is overdrawn"
    if report["subject"]["kind"] == "simulation":
        return not_applicable(identifier, title, _SIMULATED)
    found, failed = owner_findings(report), _unsigned(report)
    tables: dict[str, list[dict[str, Any]]] = {
        name: [body["ledger"] for body in bodies if body["ledger"] is not None]
        for name, bodies in found.items()
    }
    heads = ledger_heads(report)
    failed += by_reason(
        (claim["owner"], reason)
        for claim in report["claims"]
        for table in tables[claim["fingerprint"]]
        for reason in _overdrawn(table, claim, heads[claim["fingerprint"]])
    )
    uncapped = [table["dataset"] for listed in tables.values() for table in listed if not _capped(table)]
    return result(
        identifier,
        title,
        f"Signed ledgers of {sum(map(bool, tables.values()))} of {len(tables)} owners.",
        failed=failed,
        missing=_silent(report, found, tables, "its ledger"),
        limit=f"No cap stands in the ledgers of: {', '.join(uncapped)}."
        if uncapped
        else "People with records under several data sets or owners are counted once for each.",
    )


def ledger_heads(report: Report) -> dict[str, list[dict[str, Any]]]:
    """Return the ledger heads that each owner had signed by the end of the run, by its fingerprint."""
    heads: dict[str, list[dict[str, Any]]] = {}
    for owner in report["owners"]:
        statement = owner["statement"]
        signed = [] if statement is None else [statement["body"]["ledger"]]
        heads.setdefault(owner["fingerprint"], []).extend([owner["ledger_last"], *signed])
    return heads


def _overdrawn(table: dict[str, Any], claim: dict[str, Any], heads: list[dict[str, Any]]) -> list[str]:
    reasons = []
    if _above(table["spent_epsilon"], table["cap_epsilon"]) or _above(
        table["spent_delta"], table["cap_delta"]
    ):
        reasons.append("more is spent than its cap allows.")
    if _number(table["this_run_epsilon"]) < _number(claim["spent"]["epsilon"]) * (1 - _TOLERANCE):
        reasons.append("its ledger says less about this run than the run cost.")
    if any(_behind(table, head) for head in heads):
        reasons.append("its ledger is older than one that it signed before, or another one.")
    return reasons


def _behind(table: dict[str, Any], head: dict[str, Any]) -> bool:
    if table["sequence"] == head["sequence"]:
        return bool(table["head"] != head["head"])
    return bool(table["sequence"] < head["sequence"])


def _capped(table: dict[str, Any]) -> bool:
    return table["cap_epsilon"] is not None and table["cap_delta"] is not None


def _above(spent: float | None, cap: float | None) -> bool:
    return cap is not None and _number(spent) > cap * (1 + _TOLERANCE)


def _number(loss: Any) -> float:
    """Return a loss as a number: None and ``"inf"`` both mean that there is no bound."""
    return float("inf") if loss is None else float(loss)


def _unsigned(report: Report) -> list[str]:
    forged = sum(not finding["valid"] for finding in report["findings"])
    return [f"{forged} findings were not signed by an owner of this run."] if forged else []


def silent(report: Report) -> list[str]:
    """Return the owners of whom there are no signed findings."""
    found = owner_findings(report)
    return sorted(claim["owner"] for claim in report["claims"] if not found[claim["fingerprint"]])


def _silent(
    report: Report, found: dict[str, list[Any]], told: dict[str, list[Any]] | None = None, what: str = ""
) -> list[str]:
    """Return what owners did not say: findings at all, or something that findings should speak about."""
    if not report["claims"]:
        return ["The run has no owner on record."]
    lacking = silent(report)
    reasons = [f"No signed findings from: {', '.join(lacking)}. {REMEDY}"] if lacking else []
    mute = sorted(
        claim["owner"]
        for claim in report["claims"]
        if told is not None and found[claim["fingerprint"]] and not told[claim["fingerprint"]]
    )
    return reasons + ([f"Findings that say nothing about {what}, from: {', '.join(mute)}."] if mute else [])


def _names(keys: list[dict[str, Any]]) -> str:
    return ", ".join(f"{key['what']} of {key['holder']}" for key in keys)
