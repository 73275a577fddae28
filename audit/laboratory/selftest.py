"""The audit audited: planted faults must be noticed, and correct runs must raise no alarm.

Both use the checks that an audit of a plan uses, on a small plan of its own, with made-up records alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from audit.evidence.experiments import ConformanceTest
from audit.laboratory.conformance import training_tests
from audit.laboratory.faults import FAULTS, Fault, Layer
from audit.laboratory.lower_bounds import Size, exceeding_bounds
from audit.laboratory.protections import export_test, ledger_tests, sealing_tests, signature_tests
from audit.laboratory.record_tests import Sample
from protocol.errors import FedsealError
from protocol.plan import Plan
from tasks.resolve import resolve

SAMPLE = Sample(width=4096, canaries=400, rounds=10)
BOUNDS = Size(canaries=400, rounds=8, steps=16)
DEFAULT_RUNS = 200


@dataclass(frozen=True)
class Caught:
    """What happened when one fault was planted.

    Attributes:
        fault: Its name.
        expected: The test that is there for it.
        by: Tests that failed, or the error code with which the code itself refused to go on.
    """

    fault: str
    expected: str
    by: list[str]

    @property
    def caught(self) -> bool:
        """Whether the test that is there for it failed, or the code refused to go on."""
        return self.expected in self.by or any(name.startswith("FS-") for name in self.by)


@dataclass(frozen=True)
class SelfTest:
    """Result of a self-test.

    Attributes:
        faults: One entry for each planted fault.
        runs: Correct runs.
        alarms: For each correct run with an alarm, the tests and bounds that gave it.
        seconds: CPU seconds.
    """

    faults: list[Caught]
    runs: int
    alarms: list[list[str]]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every fault was caught and no correct run raised an alarm."""
        return all(fault.caught for fault in self.faults) and not self.alarms

    def fields(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {
            "faults": [{**asdict(fault), "caught": fault.caught} for fault in self.faults],
            "faults_planted": len(self.faults),
            "faults_caught": sum(fault.caught for fault in self.faults),
            "runs": self.runs,
            "false_alarms": len(self.alarms),
            "alarms": self.alarms,
            "passed": self.passed,
            "cpu_seconds": self.seconds,
        }


def small_plan() -> Plan:
    """Return the resolved plan that self-tests run: three owners, two steps in each of eight rounds.

    Its model has 38,410 parameters: more than a block of noise, and more than the canaries' layer.
    """
    return resolve(
        Plan.from_fields(
            {
                "run": {"name": "selftest", "rounds": 8, "paid_spares": 0},
                "task": {"name": "image-classification", "input_shape": [8, 8], "classes": 10},
                "model": {"name": "mlp", "hidden": [512]},
                "cohort": {"minimum": 3, "maximum": 3},
                "training": {"local_steps": 2, "learning_rate": 0.5},
                "privacy": {
                    "target_epsilon": 2.0,
                    "delta": 1e-5,
                    "sample_rate": 0.2,
                    "expected_batch_size": 50.0,
                },
            }
        )
    )


def self_test(runs: int, progress: Callable[[str], None]) -> SelfTest:
    """Plant all faults, one by one, and make correct runs.

    Args:
        runs: Correct runs; 0 for none.
        progress: Told in one line what comes next.
    """
    started, plan = time.process_time(), small_plan()
    faults = []
    for number, fault in enumerate(FAULTS, start=1):
        progress(f"fault {number} of {len(FAULTS)}: {fault.name}")
        faults.append(plant(fault, plan))
    alarms: list[list[str]] = []
    for number in range(1, runs + 1):
        progress(f"correct run {number} of {runs}, {len(alarms)} with an alarm")
        if found := correct_run(plan, export=number == 1):
            alarms.append(found)
    return SelfTest(faults, runs, alarms, time.process_time() - started)


def plant(fault: Fault, plan: Plan) -> Caught:
    """Plant one fault, run the tests of its layer, and say what noticed it."""
    with fault.plant():
        try:
            by = failed(tests_of(fault.layer, plan))
        except FedsealError as error:
            by = [error.code]
    return Caught(fault.name, fault.test, by)


def correct_run(plan: Plan, *, export: bool) -> list[str]:
    """Return the alarms that tests and bounds raise although nothing is wrong.

    Args:
        plan: A resolved plan.
        export: Whether the test of the export, which has no chance in it, is made too.
    """
    layers: list[Layer] = ["training", "sealing", "signatures", "ledger"]
    if export:
        layers.append("export")
    alarms = [name for layer in layers for name in failed(tests_of(layer, plan))]
    return alarms + exceeding_bounds(plan, BOUNDS)


def tests_of(layer: Layer, plan: Plan) -> list[ConformanceTest]:
    """Run the tests of one layer."""
    if layer == "training":
        return training_tests(plan, SAMPLE)
    if layer == "sealing":
        return list(sealing_tests(plan))
    if layer == "signatures":
        return list(signature_tests())
    return list(ledger_tests(plan)) if layer == "ledger" else [export_test(plan)]


def failed(tests: list[ConformanceTest]) -> list[str]:
    """Return the names of the tests that failed."""
    return [test.test for test in tests if test.p_value < test.threshold]
