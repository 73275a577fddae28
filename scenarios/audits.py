"""Whole audits: of a plan by a simulated federation, and of a run that has ended."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np

from audit.collecting.collect import collect
from audit.evidence.experiments import Depth, LabEvidence
from audit.evidence.run import RunEvidence
from audit.laboratory.programme import Observed, run_laboratory
from protocol.errors import AuditUnfounded
from protocol.plan import Plan
from scenarios.marked_run import MarkedResult, run_marked, shortened
from server.store import RunStore
from tasks.images import Examples
from tasks.partition import DIGITS_RANGE, DIGITS_SHAPE, digits
from tasks.registry import task_for

Progress = Callable[[str], None]

SIMULATION_S: Final[dict[Depth, float]] = {"quick": 30.0, "full": 240.0}
"""Longest simulated run; a longer one is paused, and the report says so."""

SEARCHED_ROUNDS: Final = 2
"""Rounds of the simulated run in which markers are searched for, where the audited run was a real one."""


def audit_plan(
    plan: Plan, public: Examples, depth: Depth, progress: Progress
) -> tuple[RunEvidence, LabEvidence]:
    """Audit a plan: run it with simulated owners and made-up records, and attack what it protects.

    Args:
        plan: Resolved.
        public: Public examples, preprocessed by the plan's task; they stand for records in the attacks.
        depth: How much is tried.
        progress: Called with a line of text at each step.

    Returns:
        Evidence of the simulated run, which says that it is one, and of the experiments.

    Raises:
        FedsealError: The plan cannot be run, or the installed code refuses it.
    """
    since = time.monotonic()
    result = _simulated(plan, SIMULATION_S[depth], progress)
    observed = Observed(result.scans, *result.ciphertexts, since)
    return result.evidence, run_laboratory(plan, public, depth, progress, observed)


def audit_finished(
    store: RunStore, home: Path, public: Examples, depth: Depth, progress: Progress
) -> tuple[RunEvidence, LabEvidence]:
    """Audit a run that has ended: its evidence, and experiments with its plan; see `audit_plan`.

    Nothing of the run's owners is used but what the coordinator has on record.

    Args:
        store: The run.
        home: The coordinator's home.
        public: As in `audit_plan`.
        depth: How much is tried.
        progress: Called with a line of text at each step.

    Raises:
        ReportInvalid: The run has not ended.
        FedsealError: As in `audit_plan`.
    """
    since = time.monotonic()
    evidence = collect(store, home, store.get("deployment"))
    plan = store.plan()
    result = _simulated(shortened(plan, SEARCHED_ROUNDS), SIMULATION_S[depth], progress)
    observed = Observed(result.scans, *store.ciphertexts(), since)
    return evidence, run_laboratory(plan, public, depth, progress, observed)


def bundled_examples(plan: Plan) -> Examples:
    """Return all bundled digits as public examples of a plan.

    Raises:
        AuditUnfounded: They are not of the plan's task.
    """
    task = task_for(plan)
    described = tuple(plan.task.input_shape), tuple(plan.task.value_range), plan.task.classes
    if described != (DIGITS_SHAPE, DIGITS_RANGE, 10):
        raise AuditUnfounded("the attacks need public examples of this task: --public FILE")
    shards, public = digits(seed=0, owners=1)
    x, y = (np.concatenate([one, other]) for one, other in zip(public, shards[0], strict=True))
    return task.check(x, y)


def _simulated(plan: Plan, limit_s: float, progress: Progress) -> MarkedResult:
    with tempfile.TemporaryDirectory(prefix="fedseal-audit-") as folder:
        result = run_marked(plan, Path(folder), limit_s, progress)
    if result.left_out:
        progress(f"not searched: {result.left_out}")
    return result
