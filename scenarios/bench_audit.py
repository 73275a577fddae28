"""The benchmark `audit`: how long an audit takes, how near its bounds come, what it notices and what not.

How long an audit takes is wall-clock time, because it runs a federation in processes of its own; other
times are CPU times of one thread. There is no peer beside it: no other system has such an audit. As a
module it is the arm: ``python -m scenarios.bench_audit``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from audit.evidence.experiments import Depth, LabEvidence
from audit.laboratory.canaries import watch_examples
from audit.laboratory.lower_bounds import bound_by, channels, claim_for
from audit.laboratory.selftest import DEFAULT_RUNS, self_test
from protocol.plan import Plan
from scenarios.audits import audit_plan, bundled_examples
from scenarios.bench_arms import Arm, Figures, Job, Metric
from scenarios.bench_targets import Entry, Run, Target, evaluate, median_of
from scenarios.bench_worker import peak_rss_mib, serve_arm
from tasks.resolve import resolve

CANARIES: Final = 4000
TIGHT: Final = {"sample_rate": 0.1, "steps": 100, "delta": 1e-5}
"""Schedule of the bounds' tightness: one step a round, so that an update shows every step."""

LAB_PLAN: Final = Path(__file__).parent / "plans" / "digits.toml"
ARM: Final = "fedseal"

METRICS: Final = (
    Metric("quick_s", "quick audit, wall s", ".1f", rehearsed=True),
    Metric("full_s", "full audit, wall s", ".1f", rehearsed=True),
    *(
        Metric(f"tightness.eps{epsilon}", f"bound over claim, epsilon {epsilon}", ".3f")
        for epsilon in (4, 8)
    ),
    Metric("tightness_s", "both bounds, CPU s", ".1f"),
    Metric("false_alarms", f"alarms of {DEFAULT_RUNS} correct runs", ".0f", rehearsed=True),
    Metric("faults_planted", "planted faults", ".0f", rehearsed=True),
    Metric("faults_caught", "caught faults", ".0f", rehearsed=True),
    Metric("selftest_s", "self-test, CPU s", ".1f", rehearsed=True),
    Metric("mia.control_tpr1", "members found at 1 % false, unprotected", ".3f", rehearsed=True),
    Metric("mia.private_tpr1", "members found at 1 % false, as planned", ".3f", rehearsed=True),
    Metric("inversion.plain_db", "rebuilt from a plain update, dB", ".1f", rehearsed=True),
    Metric("inversion.private_db", "rebuilt from a private update, dB", ".1f", rehearsed=True),
    Metric("peak_rss_mib", "peak memory, MiB", ".0f"),
)

NOTES: Final = (
    f"Bounds are at 95 %, of {CANARIES:,} canaries, by thresholds against the plan's own trade-off curve.",
    "Audits are of the digits plan, with everything that `fedseal audit run` does but write the report.",
)


def build() -> Job:
    """Say what to measure."""
    arm = Arm(
        ARM, "fedseal", "audit of the code that runs", (sys.executable, "-m", "scenarios.bench_audit")
    )
    return Job(
        settings={},
        arms=[arm],
        metrics=METRICS,
        request={},
        judge=dict,
        facts={"canaries": CANARIES, "tight": dict(TIGHT), "correct_runs": DEFAULT_RUNS},
        references={},
        notes=NOTES,
    )


def evaluate_audit(runs: Sequence[Run]) -> dict[str, Entry]:
    """Return all targets of the benchmark."""
    return evaluate(TARGETS, runs)


# --- arm ---------------------------------------------------------------------------------------------


def measure(request: Mapping[str, Any]) -> Figures:
    """Return one figure of each metric; the long ones in the rehearsal alone."""
    start = time.process_time()
    figures: Figures = {f"tightness.eps{epsilon}": tightness(float(epsilon)) for epsilon in (4, 8)}
    figures["tightness_s"] = time.process_time() - start
    if request.get("rehearsal"):
        figures |= _self_test_figures() | _laboratory_figures()
    return figures | {"peak_rss_mib": peak_rss_mib()}


def tightness(epsilon: float, canaries: int = CANARIES) -> float:
    """Return the best bound by thresholds on the loss of an update, over what is claimed.

    Args:
        epsilon: Target of the plan.
        canaries: Made-up examples.
    """
    plan = tight_plan(epsilon)
    rounds = plan.paid_rounds
    seen = watch_examples(plan, canaries, rounds)
    channel, values = next(iter(channels(plan, seen, rounds)))
    claim = claim_for(plan, channel)
    if claim is None:
        return 0.0
    scores, thresholds = channel.scores(values), channel.thresholds()
    found = bound_by("Clopper-Pearson, PLD", scores, seen.included, thresholds, claim, claim.delta)
    return found.epsilon / claim.epsilon


def tight_plan(epsilon: float) -> Plan:
    """Return a resolved plan of the schedule `TIGHT` on digits."""
    fields = {
        "run": {"name": "tightness", "rounds": TIGHT["steps"], "paid_spares": 0},
        "task": {"name": "image-classification", "input_shape": [8, 8], "classes": 10},
        "model": {"name": "linear"},
        "cohort": {"minimum": 3, "maximum": 3},
        "training": {"local_steps": 1, "learning_rate": 1.0},
        "privacy": {
            "target_epsilon": epsilon,
            "delta": TIGHT["delta"],
            "sample_rate": TIGHT["sample_rate"],
            "expected_batch_size": 48.0,
        },
    }
    return resolve(Plan.from_fields(fields))


def _self_test_figures() -> Figures:
    found = self_test(DEFAULT_RUNS, lambda _: None)
    return {
        "false_alarms": float(len(found.alarms)),
        "faults_planted": float(len(found.faults)),
        "faults_caught": float(sum(fault.caught for fault in found.faults)),
        "selftest_s": found.seconds,
    }


def _laboratory_figures() -> Figures:
    quick_s, _ = _laboratory("quick")
    full_s, lab = _laboratory("full")
    return {
        "quick_s": quick_s,
        "full_s": full_s,
        "mia.control_tpr1": _members(lab, "without protection"),
        "mia.private_tpr1": _members(lab, "as planned"),
        "inversion.plain_db": _rebuilt(lab, "plain update"),
        "inversion.private_db": _rebuilt(lab, "private update"),
    }


def _laboratory(depth: Depth) -> tuple[float, LabEvidence]:
    plan = resolve(Plan.from_toml(LAB_PLAN.read_text(encoding="utf-8")))
    start = time.monotonic()
    _, lab = audit_plan(plan, bundled_examples(plan), depth, lambda _: None)
    return time.monotonic() - start, lab


def _members(lab: LabEvidence, model: str) -> float | None:
    """Return the best attack's true positive rate at 1 % false ones, over all records."""
    rates = (
        attack.tpr_at_1_percent.value
        for attack in lab.membership
        if attack.model == model and attack.group == "all records"
    )
    return _largest(rates)


def _rebuilt(lab: LabEvidence, observed: str) -> float | None:
    """Return the best rebuilt record's ratio of peak signal to noise, in dB."""
    ratios = (
        attack.psnr_db
        for attack in lab.inversion
        if attack.observed == observed and attack.psnr_db is not None
    )
    return _largest(ratios)


def _largest(values: Iterable[float]) -> float | None:
    return max(values, default=None)


def _make() -> Callable[[Mapping[str, Any]], Figures]:
    torch.set_num_threads(1)
    return measure


# --- targets -----------------------------------------------------------------------------------------


def _missed(run: Run) -> float | None:
    planted, caught = (median_of(ARM, f"faults_{kind}")(run) for kind in ("planted", "caught"))
    return None if planted is None or caught is None else planted - caught


def _most(key: str, label: str, most: float | None) -> Target:
    return Target(key, label, most, median_of(ARM, key))


def _least(key: str, label: str, least: float) -> Target:
    return Target(key, label, None, median_of(ARM, key), least=least)


TARGETS: Final = (
    _most("quick_s", "seconds of a quick audit", 60.0),
    _most("full_s", "seconds of a full audit", 600.0),
    _least("tightness.eps4", "bound over claim at epsilon 4", 0.55),
    _least("tightness.eps8", "bound over claim at epsilon 8", 0.55),
    _most("false_alarms", f"alarms of {DEFAULT_RUNS} correct runs", 0.0),
    _least("faults_planted", "planted faults", 14.0),
    _least("faults_caught", "caught faults", 14.0),
    Target("faults_missed", "planted faults that nothing noticed", 0.0, _missed),
    _least("mia.control_tpr1", "members found without protection", 0.10),
    _most("mia.private_tpr1", "members found with the plan's noise", 0.03),
    _least("inversion.plain_db", "record rebuilt from a plain update, dB", 40.0),
    _most("inversion.private_db", "record rebuilt from a private update, dB", 12.0),
)

if __name__ == "__main__":
    serve_arm(_make, ("torch", "scipy", "dp-accounting"))
