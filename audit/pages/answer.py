"""The first screen of the page: what a person needs to know before signing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from audit.checks.exposure import Exposure, exposure
from audit.checks.next_steps import Step, next_steps
from audit.checks.verdict import grouped
from audit.words import some

MOST_OWNERS = 10
"""Most owners that the first screen names."""

Band = Literal["small", "middle", "large", "none"]

JUDGEMENTS: dict[Band, tuple[str, str]] = {
    "small": ("Small", "An epsilon of at most 1 is a strong formal guarantee."),
    "middle": (
        "Not small",
        "An epsilon between 1 and 10 is common in machine learning and called reasonable there. It is no "
        "strong guarantee: it leaves an attacker room.",
    ),
    "large": (
        "Large",
        "An epsilon above 10 is by itself a weak formal guarantee, or none. Do not rely on the number.",
    ),
    "none": ("No limit", "Nothing limits what can be learned about single records. There is no epsilon."),
}
"""In how far an epsilon is small: in a word, and in a sentence. The bands are those of `SOURCES`."""

SOURCES = (
    "Bands: Ponomareva et al., “How to DP-fy ML”, Journal of Artificial Intelligence Research 77 (2023). "
    "NIST SP 800-226 (2025) names no epsilon that is safe everywhere: it is to be weighed together with "
    "the unit of privacy, the trust model and the correctness of the code, which follow below."
)


@dataclass(frozen=True)
class Answer:
    """What the first screen says.

    Attributes:
        look: How the verdict is drawn: a signed report of a real run, an unsigned one, a simulation.
        purpose: What the plan says the model is for.
        progress: How far the run came.
        owners: Owners in a sentence, and how many there are.
        accuracy: One sentence for each figure that was measured.
        exposure: Epsilon, and what the best attack could make of it.
        unit: What one unit of privacy is, for a sentence.
        band: Size of epsilon; `judgement` and `reason` say it in words.
        tried: What attacks on the model found; empty if none was tried.
        missing: Each reason with the checks that it keeps from passing.
        failed: The same of the checks that failed.
        steps: The next steps, each with the parties that take it.
    """

    look: Literal["signed", "unsigned", "simulation"]
    purpose: str
    progress: str
    owners: str
    count: int
    accuracy: list[str]
    exposure: Exposure
    unit: str
    band: Band
    judgement: str
    reason: str
    tried: str
    missing: list[list[dict[str, str]]]
    failed: list[list[dict[str, str]]]
    steps: list[Step]

    @property
    def placeholders(self) -> bool:
        """Tell whether a command names a folder that only its party knows."""
        return any(" DIR" in line or " HOME" in line for step in self.steps for line in step.commands)


def answer(report: dict[str, Any]) -> Answer:
    """Return what the first screen of a report says."""
    lost = exposure(report)
    band = band_of(lost.epsilon)
    judgement, reason = JUDGEMENTS[band]
    subject, checks = report["subject"], report["checks"]
    names = sorted(claim["owner"] for claim in report["claims"])
    simulated = subject["kind"] == "simulation"
    return Answer(
        look="simulation" if simulated else "unsigned" if report["signature"] is None else "signed",
        purpose=_purpose(report),
        progress=f"{subject['rounds_finished']} of {report['promise']['rounds']} rounds, "
        f"{subject['state']}",
        owners=some(names, MOST_OWNERS),
        count=len(names),
        accuracy=_accuracy(report),
        exposure=lost,
        unit="owner" if report["promise"]["unit"] == "client" else "record",
        band=band,
        judgement=judgement,
        reason=reason,
        tried=_tried(report),
        missing=grouped(check for check in checks if check["status"] == "missing"),
        failed=grouped(check for check in checks if check["status"] == "fail"),
        steps=next_steps(report),
    )


def band_of(epsilon: float) -> Band:
    """Return how large an epsilon is, in [0, infinity]; the limits are those of `SOURCES`."""
    if epsilon == float("inf"):
        return "none"
    return "small" if epsilon <= 1.0 else "middle" if epsilon <= 10.0 else "large"


def _purpose(report: dict[str, Any]) -> str:
    """Return what the plan says of the task; a plan names no use of the model."""
    facts = {fact["pointer"]: fact["value"] for fact in report["plan"]}
    task = str(facts["/task/name"]).replace("-", " ").capitalize()
    shape = " by ".join(str(length) for length in facts["/task/input_shape"])
    return f"{task}: one of {facts['/task/classes']} classes, from {shape} values."


def _accuracy(report: dict[str, Any]) -> list[str]:
    trained = [e for e in report["rounds"] if e["purpose"] == "train" and not e["void"]]
    facts = {fact["pointer"]: fact["value"] for fact in report["deployment"] or []}
    estimates = [e for e in report["rounds"] if e["estimate"] is not None]
    found = []
    if trained and trained[-1]["accuracy"] is not None:
        found.append(f"{_percent(trained[-1]['accuracy'])} on public data")
    if isinstance(facts.get("/accuracy_after"), float):
        found.append(f"{_percent(facts['/accuracy_after'])} on public data as packaged")
    if estimates:
        last = estimates[-1]
        share, error = last["estimate"]["accuracy"], last["estimate"]["standard_error"]
        figure = f"{_percent(share)} ± {_percent(error)}"
        found.append(f"{figure} on owners' held-out records, after round {last['round']}")
    return found


def _tried(report: dict[str, Any]) -> str:
    attacks = [] if report["laboratory"] is None else report["laboratory"]["membership"]
    rates: dict[bool, list[float]] = {True: [], False: []}
    for attack in attacks:
        rates[attack["model"] == "without protection"].append(attack["tpr_at_1_percent"]["value"])
    if not rates[False]:
        return ""
    control = f", and {_percent(max(rates[True]))} without protection" if rates[True] else ""
    return f"The attacks tried here found {_percent(max(rates[False]))}{control}."


def _percent(share: float) -> str:
    return f"{100 * share:.1f}\u00a0%"


def percent_at_most(share: float) -> str:
    """Return a bound in percent, rounded up and never to less than it is."""
    percent = 100 * share
    return "100\u00a0%" if percent > 99.9 else f"{math.ceil(percent * 10) / 10:.1f}\u00a0%"
