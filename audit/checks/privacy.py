"""The checks of a report that are about privacy losses; pure functions of the report's sections."""

from __future__ import annotations

from typing import Any

from audit.checks.check import Check, Report, by_reason, names, result
from audit.words import spans


def noise_on(report: Report) -> Check:
    """Check that the plan orders noise."""
    promise = report["promise"]
    on = promise["noise"] != "none"
    return result(
        "noise-on",
        f"Privacy noise protects {promise['covers']}",
        f"Noise: {promise['noise']}. Noise multiplier: {promise['noise_multiplier']}. "
        f"{promise['assumption']}"
        if on
        else "The plan says: noise = none.",
        failed=[] if on else ["The run added no noise. There is no privacy guarantee."],
        missing=[],
        limit="This is what the plan orders. Whether the noise was really drawn is a separate check.",
    )


def noise_shares(report: Report) -> Check:
    """Check that the promise does not rest on other owners' noise."""
    promise = report["promise"]
    shared = promise["noise"] == "distributed"
    return result(
        "noise-shares",
        "The promised epsilon rests on each owner's own noise",
        f"Noise: {promise['noise']}.",
        failed=[],
        missing=[f"{promise['assumption']} This report has no evidence of that."] if shared else [],
        limit="",
    )


def budget_kept(report: Report) -> Check:
    """Check that every loss, recomputed and stated, is within the promise."""
    claims = report["claims"]
    over = [c for c in claims if _largest(c, "epsilon") > float(c["promised"]["epsilon"])]
    over += [c for c in claims if _largest(c, "delta") > c["promised"]["delta"] and c not in over]
    over += [
        c
        for c in claims
        if _largest(c, "epsilon_worst") > float(c["promised"]["epsilon_worst"]) and c not in over
    ]
    unbounded = [c for c in claims if c["spent"]["epsilon"] == "inf"]
    differs = [c for c in claims if not c["promise_matches_plan"]]
    failed = [f"No limit on the privacy loss of: {names(unbounded)}."] if unbounded else []
    failed += [f"More was spent than promised for: {names(over)}."] if over else []
    failed += [f"The recorded promise is not the plan's for: {names(differs)}."] if differs else []
    largest, worst = (
        max((_largest(c, part) for c in claims), default=0.0) for part in ("epsilon", "epsilon_worst")
    )
    return result(
        "budget-kept",
        "No owner's privacy loss went above its promise",
        f"Recomputed from the plan. Largest epsilon spent: {_words(largest)}. "
        f"Promised: {_words(float(report['promise']['epsilon']))}. If all other owners collude: "
        f"{_words(worst)} spent, {_words(float(report['promise']['epsilon_worst']))} planned.",
        failed=failed,
        missing=[] if claims else ["The run has no owner on record."],
        limit="Covers this run. What the same people lost in other runs stands in each owner's ledger.",
    )


def statements_agree(report: Report) -> Check:
    """Check that every owner signed the right figures."""
    claims = report["claims"]
    forged = [c for c in claims if c["statement"] == "invalid" or not c["certificate_matches"]]
    wrong = [c for c in claims if c["disagreements"] and c not in forged]
    absent = [c for c in claims if c["statement"] == "missing"]
    failed = [f"The signature does not verify for: {names(forged)}."] if forged else []
    failed += by_reason(
        (c["owner"], f"signed something else in: {', '.join(c['disagreements'])}.") for c in wrong
    )
    missing = [f"No signed statement from: {names(absent)}."] if absent else []
    return result(
        "statements-agree",
        "Every owner signed what it spent, and the figure is right",
        f"{len(claims) - len(absent)} of {len(claims)} owners signed. "
        "Signatures and figures were computed again.",
        failed=failed,
        missing=missing if claims else ["The run has no owner on record."],
        limit="An owner could still have added too little noise on its own machine.",
    )


def ledger_forward(report: Report) -> Check:
    """Check that the signed ledger heads only go forward."""
    back = [claim for claim in report["claims"] if claim["ledger_went_back"]]
    return result(
        "ledger-forward",
        "No owner's privacy ledger went back",
        "The signed ledger heads at the start and at the end of the run were compared.",
        failed=[f"The ledger went back or was rewritten for: {names(back)}."] if back else [],
        missing=[],
        limit="A ledger that was reset before this run is seen only by peers who know its older head.",
    )


def evaluations_planned(report: Report) -> Check:
    """Check that every evaluation is one that the plan orders, and that no model was opened twice."""
    plan, last = report["promise"]["evaluation"], report["promise"]["rounds"]
    opened = [r["round"] for r in report["rounds"] if r["purpose"] == "evaluate" and not r["void"]]
    tried = sum(r["purpose"] == "evaluate" for r in report["rounds"])
    every, most = (plan["every"], plan["evaluations"]) if plan else (1, 0)
    off = [number for number in opened if number % every and number != last]
    failed = ["There are more evaluations than the plan pays for."] if tried > most else []
    failed += [f"The plan does not evaluate the model after round {spans(off)}."] if off else []
    failed += ["A model was evaluated twice."] if len(set(opened)) < len(opened) else []
    spent = max((float(c["spent"]["evaluation_epsilon"]) for c in report["claims"]), default=0.0)
    return result(
        "evaluations-planned",
        "Owners' records were counted only as planned",
        f"{len(opened)} evaluations were opened. Largest epsilon spent on them: {_words(spent)}. "
        f"Promised: {_words(float(plan['epsilon']))}."
        if plan
        else "The plan orders no evaluation.",
        failed=failed,
        missing=[],
        limit="The epsilon of evaluation is part of every owner's spent epsilon." if plan else "",
    )


def _largest(claim: dict[str, Any], part: str) -> float:
    """Return the larger of the recomputed and the stated loss: an owner may have lost more, not less."""
    return max(float(entry[part]) for entry in (claim["spent"], claim["stated"]) if entry is not None)


def _words(epsilon: float) -> str:
    return "no limit" if epsilon == float("inf") else f"{epsilon:.4g}"
