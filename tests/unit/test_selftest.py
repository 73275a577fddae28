"""Every planted fault is caught by the test that is there for it, and correct runs raise no alarm."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
from typer.testing import CliRunner

import audit.laboratory.selftest
from audit.laboratory.faults import FAULTS, Fault
from audit.laboratory.selftest import DEFAULT_RUNS, correct_run, plant, self_test, small_plan
from fedseal import app

NO_FAULT = Fault("nothing", "signatures", "forged-signature", nullcontext)


def test_there_are_many_different_faults() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 14


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_fault_is_caught_by_its_own_test(fault: Fault) -> None:
    caught = plant(fault, small_plan())
    assert caught.caught
    assert fault.test in caught.by


def test_a_correct_run_raises_no_alarm_after_all_that_was_planted() -> None:
    assert correct_run(small_plan(), export=False) == []


def test_what_nobody_notices_is_missed() -> None:
    assert not plant(NO_FAULT, small_plan()).caught


@pytest.mark.parametrize(("faults", "status"), [(FAULTS[15:16], 0), ((NO_FAULT,), 1)])
def test_the_verb_tells_whether_all_faults_were_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faults: tuple[Fault, ...], status: int
) -> None:
    monkeypatch.setattr(audit.laboratory.selftest, "FAULTS", faults)
    file = tmp_path / "selftest.json"
    result = CliRunner().invoke(app, ["audit", "selftest", "--runs", "0", "--json", str(file)])
    assert result.exit_code == status
    assert faults[0].name in result.output
    fields = json.loads(file.read_text())
    assert (fields["faults_planted"], fields["faults_caught"]) == (1, 1 - status)
    assert fields["false_alarms"] == fields["runs"] == 0


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_200_correct_runs_raise_no_alarm() -> None:
    found = self_test(DEFAULT_RUNS, lambda _: None)
    assert found.passed
    assert found.runs == 200
