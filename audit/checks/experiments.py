"""The checks of experiments made at the auditor's place; pure functions of the report's sections.

No check trusts an experiment that cannot fail: each needs its control, which shows that the same attack
finds something where protection is off. A lower bound or an interval is judged, never a point estimate.
Limits are constants here, or stand in the evidence and are never above the plan's promise: evidence with
others is refused by `audit.checks.contradictions`.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any, get_args

from audit.checks.check import Check, Report, not_applicable, result
from audit.evidence.experiments import FEWEST_OUTSIDERS, REQUIRED_TESTS, Place
from audit.statistics.judging import THRESHOLD
from audit.words import odds

REMEDY = "Run “fedseal audit run” and read its report instead of this one."

LEAST_CONFIDENCE = 0.95
"""Smallest accepted probability with which a lower bound holds."""

LEAST_CANARIES = 100
"""A bound from fewer is below almost every claim."""

LEAST_MEMBERS = 100
"""Of fewer members, an interval is too wide to lie above a ceiling."""

FALSE_POSITIVE_RATE = 0.01
"""False positive rate at which membership inference is judged; guessing has as many true positives."""

CONTROLLED = ("update", "opened sum")
"""Observers for whom a lower bound must have a working control."""

OBSERVERS = ("update", "wire", "opened sum")
"""Observers for whom there must be a lower bound in any plan."""

MEMBERSHIP = tuple(
    product(
        ("LiRA", "RMIA"),
        ("without protection", "as planned"),
        ("all records", "most exposed records"),
    )
)
"""Attack, model and group without which nothing is known of membership inference."""

INVERSION = ("optimization", "imprint")
"""Attacks that can be made on an update of any model."""

_NO_PROMISE = "The plan promises no limit that could be exceeded."
_TOLERANCE = 1 + 1e-6


def untested(report: Report, mechanism: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return what is wrong with tests of a mechanism, and what is lacking.

    Args:
        report: The report, for what its plan promises.
        mechanism: Mechanism evidence as the report spells it.
    """
    tests = mechanism["conformance"]
    deviating = sorted({t["test"] for t in tests if t["p_value"] < max(t["threshold"], THRESHOLD)})
    judged = {t["test"] for t in tests if t["threshold"] >= THRESHOLD and t["samples"] > 0}
    absent = [name for name in required_tests(report) if name not in judged]
    failed = [f"The mechanism deviates from the plan in: {', '.join(deviating)}."] if deviating else []
    missing = [f"These tests are missing: {', '.join(absent)}."] if absent else []
    if mechanism["plan_hash"] != report["subject"]["plan_hash"]:
        missing.append("Another plan was tested.")
    return failed, missing


def required_tests(report: Report) -> list[str]:
    """Return the names of the tests that a report's plan needs, of `REQUIRED_TESTS`.

    Evidence from before a test existed lacks it: when evidence was made is the word of its maker.

    Args:
        report: The report, for what its plan promises.
    """
    promise = report["promise"]
    noisy = promise["noise"] != "none"
    needed = {
        "always": True,
        "noise": noisy,
        "noise per example": noisy and promise["unit"] == "example",
        "sampling": promise["sample_rate"] < 1.0,
        "BFV": report["encryption"]["scheme"] == "BFV",
        "own model": noisy,
        "own model per example": noisy and promise["unit"] == "example",
    }
    return [name for group, names in REQUIRED_TESTS.items() if needed[group] for name in names]


def mechanism_conformance(report: Report) -> Check:
    """Check that the installed mechanism clips, samples and adds noise as the plan says."""
    identifier, title = "mechanism-conformance", "The code clips, samples and adds noise as promised"
    lab = report["laboratory"]
    if lab is None:
        return result(identifier, title, "None.", failed=[], missing=[REMEDY], limit="")
    failed, missing = untested(report, lab["mechanism"])
    tests = lab["mechanism"]["conformance"]
    alarm = sum(test["threshold"] for test in tests)
    return result(
        identifier,
        title,
        f"{len(tests)} tests of the installed code, with made-up records. Correct code fails one with "
        f"a probability of at most {odds(alarm)}.",
        failed=failed,
        missing=missing,
        limit="Tests see deviations that are large enough to matter. They do not prove the code correct.",
    )


def lower_bounds(report: Report) -> Check:
    """Check that no empirical lower bound on epsilon exceeds what is claimed, and that they could have."""
    identifier, title = "lower-bounds", "Attacks with planted records find no more than promised"
    if report["promise"]["noise"] == "none":
        return not_applicable(identifier, title, _NO_PROMISE)
    bounds = all_bounds(report)
    above = [b for b in bounds if b["claimed"] is not None and b["epsilon"] > b["claimed"]]
    weak = [b for b in bounds if not _bound_counts(report, b)]
    counted = [b for b in bounds if b not in weak]
    unseen = [name for name in CONTROLLED if not any(b["observer"] == name and alarms(b) for b in counted)]
    failed = [
        f"{_observer(b)}: at least {b['epsilon']:.3g} where {b['claimed']:.3g} is claimed." for b in above
    ]
    watching = OBSERVERS + (("exported model",) if report["promise"]["unit"] == "example" else ())
    absent = [name for name in watching if not any(b["observer"] == name for b in counted)]
    missing = []
    if not bounds:
        missing.append(REMEDY)
    elif unseen:
        missing.append(
            f"No bound for {' and '.join(unseen)} exceeds the claim when the noise is off, with its "
            "smallest detectable epsilon stated. Such a bound shows nothing."
        )
    elif absent:
        missing.append(f"No bound for: {', '.join(absent)}.")
    if weak:
        missing.append(
            f"{len(weak)} bounds have no claim, too little confidence, another delta or fewer than "
            f"{LEAST_CANARIES} canaries."
        )
    largest = max((b["epsilon"] for b in bounds), default=0.0)
    confidence = min((b["confidence"] for b in bounds), default=0.0)
    return result(
        identifier,
        title,
        f"{len(bounds)} lower bounds, each valid with a probability of {100 * confidence:g} % or more. "
        f"Largest: {largest:.3g}. {sum(map(alarms, bounds))} exceed the claim when the noise is off."
        if bounds
        else "None.",
        failed=failed,
        missing=missing,
        limit="A lower bound finds faults. That it is low does not prove that the true loss is low.",
    )


def all_bounds(report: Report) -> list[dict[str, Any]]:
    """Return the bounds for this plan: the laboratory's, and those that owners signed for this run."""
    subject, lab = report["subject"], report["laboratory"]
    made = [] if lab is None else [lab["mechanism"]]
    for finding in report["findings"]:
        if finding["valid"] and finding["body"]["run"] in (None, subject["run"]):
            made.append(finding["body"]["mechanism"])
    return [bound for m in made if m["plan_hash"] == subject["plan_hash"] for bound in m["bounds"]]


def alarms(bound: dict[str, Any]) -> bool:
    """Tell whether a bound exceeds its claim when the noise is off, and says what it can detect."""
    stated = bound["control"] is not None and bound["claimed"] is not None
    return bool(stated and bound["control"] > bound["claimed"] and bound["detectable"] is not None)


def _bound_counts(report: Report, bound: dict[str, Any]) -> bool:
    return bool(
        bound["claimed"] is not None
        and bound["confidence"] >= LEAST_CONFIDENCE
        and bound["delta"] <= report["promise"]["delta"] * _TOLERANCE
        and bound["canaries"] >= LEAST_CANARIES
    )


def _observer(bound: dict[str, Any]) -> str:
    return f"{bound['observer'].capitalize()}, {bound['method']}"


def membership_inference(report: Report) -> Check:
    """Check that membership inference does not exceed the ceiling, and works on an unprotected model."""
    identifier, title = "membership-inference", "Attacks on the model find members no better than promised"
    if report["promise"]["noise"] == "none":
        return not_applicable(identifier, title, _NO_PROMISE)
    attacks = [] if report["laboratory"] is None else report["laboratory"]["membership"]
    protected = [a for a in attacks if a["model"] != "without protection"]
    above = [a for a in protected if _rate(a, "low") > _ceiling(a)]
    working = [a for a in attacks if membership_control_works(a, attacks)]
    missing = []
    if not protected:
        missing.append(REMEDY)
    elif not working:
        missing.append("No attack finds members of a model without protection. Such attacks show nothing.")
    elif absent := [" ".join(parts) for parts in MEMBERSHIP if not _tried(attacks, parts)]:
        missing.append(f"Not tried: {', '.join(absent)}.")
    if any(_small(attack) for attack in attacks):
        missing.append(
            f"Attacks were made on fewer than {LEAST_MEMBERS} members or {FEWEST_OUTSIDERS} outsiders."
        )
    if any(a["ceiling_at_1_percent"] is None for a in protected):
        missing.append("For some attacks it is not stated what the promise allows.")
    best = max((_rate(a, "value") for a in protected), default=0.0)
    control = max((_rate(a, "value") for a in working), default=0.0)
    return result(
        identifier,
        title,
        f"{len(protected)} attacks on protected models. Where 1 % of outsiders is accused, the best finds "
        f"{100 * best:.1f} % of the members, and {100 * control:.1f} % without protection."
        if protected
        else "None.",
        failed=[f"{a['attack']} on {a['group']} finds more than the promise allows." for a in above],
        missing=missing,
        limit="Made with public records. Better attacks may exist; the promise covers those too.",
    )


def _tried(attacks: Iterable[dict[str, Any]], parts: tuple[str, str, str]) -> bool:
    return any((a["attack"], a["model"], a["group"]) == parts for a in attacks)


def _small(attack: dict[str, Any]) -> bool:
    few = attack["members"] < LEAST_MEMBERS or attack["outsiders"] < FEWEST_OUTSIDERS
    return bool(attack["group"] == "all records" and few)


def membership_control_works(attack: dict[str, Any], attacks: Iterable[dict[str, Any]]) -> bool:
    """Tell whether an attack is a control that works.

    It must find more members without protection than by guessing, and than it finds in the planned model.
    """
    same = [
        _rate(other, "value")
        for other in attacks
        if other["model"] == "as planned"
        and (other["attack"], other["group"]) == (attack["attack"], attack["group"])
    ]
    lowest = _rate(attack, "low")
    return attack["model"] == "without protection" and lowest > max(
        [FALSE_POSITIVE_RATE, *same] if same else [1.0]
    )


def _rate(attack: dict[str, Any], part: str) -> float:
    return float(attack["tpr_at_1_percent"][part])


def _ceiling(attack: dict[str, Any]) -> float:
    return 1.0 if attack["ceiling_at_1_percent"] is None else float(attack["ceiling_at_1_percent"])


def gradient_inversion(report: Report) -> Check:
    """Check that no record was rebuilt from protected updates where plain ones give records away."""
    identifier, title = "gradient-inversion", "No record could be rebuilt from a protected update"
    attacks = [] if report["laboratory"] is None else report["laboratory"]["inversion"]
    noisy = report["promise"]["noise"] != "none"
    watched = ["received by the coordinator"] + (["private update"] if noisy else [])
    rebuilt = [a for a in attacks if a["observed"] in watched and a["rebuilt"]]
    control = max((a["rebuilt"] for a in attacks if a["observed"] == "plain update"), default=0)
    made = {(a["attack"], a["observed"]) for a in attacks}
    absent = [pair for pair in product(INVERSION, ["plain update", *watched]) if pair not in made]
    missing = []
    if not attacks:
        missing.append(REMEDY)
    elif not control:
        missing.append("The attacks rebuild nothing from a plain update either. They show nothing.")
    elif absent:
        missing.append(f"Not tried: {', '.join(' on '.join(pair) for pair in absent)}.")
    return result(
        identifier,
        title,
        f"{len(attacks)} attempts. From a plain update up to {control} records were rebuilt."
        if attacks
        else "None.",
        failed=[
            f"{a['rebuilt']} records were rebuilt, {a['attack']}, from: {a['observed']}." for a in rebuilt
        ],
        missing=missing,
        limit="Made with public pictures. A blurred trace below the threshold is not counted.",
    )


def marker_scan(report: Report) -> Check:
    """Check that planted values were found nowhere, and that the search finds them without encryption."""
    scans = [] if report["laboratory"] is None else report["laboratory"]["markers"]
    found = [f"{scan['hits']} in {scan['place']}" for scan in scans if scan["hits"]]
    searched = [scan for scan in scans if scan["markers"] > 0 and scan["searched_bytes"] > 0]
    absent = [place for place in get_args(Place) if not any(s["place"] == place for s in searched)]
    working = {scan["place"] for scan in searched if scan["control_hits"]}
    blind = sorted({scan["place"] for scan in searched} - working)
    missing = [REMEDY] if not scans else []
    if scans and absent:
        missing.append(f"Not searched: {', '.join(absent)}.")
    if blind:
        missing.append(f"The search finds nothing without encryption either in: {', '.join(blind)}.")
    size = sum(scan["searched_bytes"] for scan in scans)
    control = sum(scan["control_hits"] or 0 for scan in scans)
    return result(
        "marker-scan",
        "Values planted in updates were found nowhere outside their owner",
        f"{size / 1e6:.0f} MB in {len(scans)} places. Its controls find {control}." if scans else "None.",
        failed=[f"Planted values were found: {', '.join(found)}."] if found else [],
        missing=missing,
        limit="A value in a spelling that was not searched for would be overlooked.",
    )


def ciphertext_reuse(report: Report) -> Check:
    """Check that no encrypted frame arrived twice, and that as many were compared as were in the sums."""
    lab = report["laboratory"]
    summed = sum(len(entry["contributors"]) for entry in report["rounds"] if not entry["void"])
    short = "Fewer frames were compared than owners sent updates that are in the sums."
    count, repeated = (0, 0) if lab is None else (lab["ciphertexts"], lab["ciphertexts_repeated"])
    return result(
        "ciphertext-reuse",
        "No ciphertext was used twice",
        f"{count} encrypted frames were compared." if count else "None.",
        failed=[f"{repeated} frames had arrived before."] if repeated else [],
        missing=[] if count >= max(1, summed) else [short if count else REMEDY],
        limit="Equal frames are found. Equal keys behind different frames are not.",
    )
