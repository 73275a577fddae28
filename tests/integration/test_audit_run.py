"""A whole audit: of a plan by a simulated federation, and of a real run with what its owners signed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_args

import pytest
import tomli_w
import torch
from real_federation import MARK, PASSPHRASE, RealFederation, living, plan_fields, small_plan, wait_until
from typer.testing import CliRunner

from audit.evidence.base import parse_time
from audit.evidence.experiments import Depth, LabEvidence, MechanismEvidence, Place
from audit.evidence.run import RunEvidence
from audit.report import build_report, verify_report, write_report
from fedseal import app
from protocol.errors import AuditUnfounded, FedsealError, FindingsRefused, HomeMissing, NameUnknown
from scenarios.marked_run import MarkedResult, run_marked, shortened
from server.release import PUBLIC, read_public_key
from server.store import RunStore
from tasks.resolve import resolve

ROOT = Path(__file__).parents[2]
STATUS = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 2}


def fedseal(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fedseal", *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def plan_file(folder: Path, **sections: dict[str, Any]) -> Path:
    file = folder / "plan.toml"
    file.write_text(tomli_w.dumps(plan_fields(**sections)), encoding="utf-8")
    return file


def refusal(*arguments: object) -> BaseException | None:
    return CliRunner().invoke(app, ["audit", *map(str, arguments)]).exception


# --- the simulated federation ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> MarkedResult:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("marked") / ("long-" * 20)
    folder.mkdir()
    return run_marked(resolve(small_plan()), folder, 120.0, lambda _text: None)


def test_no_marker_is_anywhere_and_the_control_finds_them(marked: MarkedResult) -> None:
    searched = {scan.place for scan in marked.scans}
    assert searched | ({"coordinator memory"} if marked.left_out else set()) == set(get_args(Place))
    for scan in marked.scans:
        assert scan.hits == 0, scan
        assert scan.control_hits, scan
        assert scan.markers > 30
        assert scan.searched_bytes > 1_000, scan


def test_what_was_quoted_is_found_completely(marked: MarkedResult) -> None:
    """Every marker can be found: the copies of logs and reports quote all of them."""
    for scan in marked.scans:
        if scan.place in ("logs", "reports"):
            assert scan.control_hits == scan.markers


def test_the_coordinators_own_process_held_no_key(marked: MarkedResult) -> None:
    """Owners and coordinator are apart, so that what its process loads is its own."""
    assert not marked.evidence.server_has_secret_key


def test_the_evidence_is_of_a_complete_simulation(marked: MarkedResult) -> None:
    evidence = marked.evidence
    assert (evidence.kind, evidence.state, evidence.rounds_finished) == ("simulation", "finished", 2)
    assert marked.ciphertexts == (2 * 3, 0), "one frame of each of three owners in each of two rounds"


@pytest.mark.long
def test_a_long_run_is_paused_in_time(tmp_path: Path) -> None:
    result = run_marked(resolve(small_plan()), tmp_path, 0.0, lambda _text: None)
    assert (result.evidence.state, result.evidence.rounds_finished) == ("paused", 0)


def test_a_plan_that_no_simulated_owner_accepts(tmp_path: Path) -> None:
    plan = resolve(small_plan(privacy={"noise": "none", "target_epsilon": None}))
    with pytest.raises(AuditUnfounded, match="FS-POLICY-"):
        run_marked(plan, tmp_path, 60.0, lambda _text: None)


@pytest.mark.long
def test_both_runs_of_a_plan_with_shared_noise_are_paid(tmp_path: Path) -> None:
    plan = resolve(
        small_plan(
            cohort={"minimum": 5, "maximum": 5},
            training={"local_steps": 1},
            privacy={"noise": "distributed", "tolerated_colluders": 1},
        )
    )
    result = run_marked(plan, tmp_path, 60.0, lambda _text: None)
    assert result.evidence.rounds_finished == plan.run.rounds


def test_a_shortened_plan_has_the_same_noise() -> None:
    plan = resolve(small_plan(run={"rounds": 9}))
    short = shortened(plan, 2)
    assert short.run.rounds == 2
    assert short.privacy == plan.privacy
    assert resolve(short) == short


def test_frames_that_came_before_are_counted(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "run")
    assert store.ciphertexts() == (0, 0)
    store.note_ciphertexts([b"a" * 32, b"b" * 32])
    store.note_ciphertexts([b"c" * 32])
    assert store.ciphertexts() == (3, 0)
    store.note_ciphertexts([b"a" * 32, b"a" * 32])
    assert store.ciphertexts() == (5, 2)
    store.close()


# --- refusals ----------------------------------------------------------------------------------------


def test_no_subject(tmp_path: Path) -> None:
    assert isinstance(refusal("run", tmp_path / "none", "--out", tmp_path), AuditUnfounded)
    home = tmp_path / "home"
    assert isinstance(refusal("run", "none", "--home", home, "--out", tmp_path), HomeMissing)
    home.mkdir()
    assert isinstance(refusal("run", "none", "--home", home, "--out", tmp_path), NameUnknown)


def test_a_plan_without_public_examples(tmp_path: Path) -> None:
    task = {"input_shape": [4, 4]}
    error = refusal("run", plan_file(tmp_path, task=task), "--out", tmp_path)
    assert isinstance(error, AuditUnfounded)
    assert "--public" in str(error)


def test_a_plan_takes_no_findings(tmp_path: Path) -> None:
    error = refusal("run", plan_file(tmp_path), "--out", tmp_path, "--owner", tmp_path / "file")
    assert isinstance(error, FindingsRefused)


def test_findings_need_one_subject_and_a_place(tmp_path: Path) -> None:
    for options in ([], ["--plan", plan_file(tmp_path), "--run", "ab"]):
        error = refusal("owner", "--home", tmp_path, "--out", tmp_path / "file", *options)
        assert isinstance(error, SystemExit)
        assert error.code == 2
    error = refusal("owner", "--home", tmp_path, "--out", tmp_path / "no" / "file", "--run", "ab")
    assert isinstance(error, FedsealError)
    assert isinstance(error, FindingsRefused)


# --- whole audits ------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_plan_is_audited_from_end_to_end(tmp_path: Path) -> None:
    out, home = tmp_path / "report", tmp_path / "coordinator"
    home.mkdir()
    secret = {"FEDSEAL_PASSPHRASE": PASSPHRASE.decode()}
    outcome = fedseal("audit", "run", plan_file(tmp_path), "--out", out, "--home", home, **secret)
    report = verify_report(out / "report.json", read_public_key(home / PUBLIC))
    assert report["verdict"]["status"] == "PASS", report["verdict"]
    assert outcome.returncode == STATUS["PASS"], outcome.stdout + outcome.stderr
    assert report["subject"]["kind"] == "simulation"
    lab = report["laboratory"]
    assert {scan["place"] for scan in lab["markers"]} == set(get_args(Place))
    assert all(scan["hits"] == 0 < scan["control_hits"] for scan in lab["markers"])
    assert (lab["ciphertexts"], lab["ciphertexts_repeated"]) == (6, 0)
    assert (out / "report.html").stat().st_size < 3_000_000
    assert fedseal("audit", "verify", out / "report.json").returncode == outcome.returncode


@pytest.mark.long
def test_an_interrupted_audit_leaves_nothing_behind(tmp_path: Path) -> None:
    mark = "interrupted-audit"
    with subprocess.Popen(
        [sys.executable, "-m", "fedseal", "audit", "run", plan_file(tmp_path), "--out", tmp_path / "out"],
        cwd=ROOT,
        env={**os.environ, MARK: mark},
        stdout=subprocess.PIPE,
        text=True,
        # a process that a shell starts in the background inherits that it ignores this signal
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if "encryption on" in line:
                break
        time.sleep(0.5)
        child.send_signal(signal.SIGINT)
        assert child.wait(30) == 130
    wait_until(lambda: not living(mark), 30, "the end of the laboratory's processes")
    assert not (tmp_path / "out").exists()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_real_run_is_audited_with_what_its_owners_signed(real: RealFederation, tmp_path: Path) -> None:
    store = real.run(small_plan())
    run, folder = str(store.get("run")), store.folder
    secret = {"FEDSEAL_PASSPHRASE": PASSPHRASE.decode()}
    files = []
    for owner in real.made.owners[:3]:
        files.append(tmp_path / f"{owner.name}.findings")
        made = fedseal(
            "audit", "owner", "--home", owner.folder, "--run", run[:16], "--out", files[-1], **secret
        )
        assert made.returncode == 0, made.stdout + made.stderr
        assert "0 failed" in made.stdout
    out, given = tmp_path / "report", [word for file in files for word in ("--owner", file)]
    outcome = fedseal("audit", "run", folder, "--out", out, *given, **secret)
    report = verify_report(out / "report.json")
    assert outcome.returncode == STATUS[report["verdict"]["status"]], outcome.stdout + outcome.stderr
    assert report["verdict"]["status"] == "PASS", report["verdict"]
    assert report["subject"]["kind"] == "deployment"
    assert len(report["findings"]) == 3
    assert all(finding["valid"] for finding in report["findings"])
    assert report["laboratory"]["ciphertexts"] == 6
    assert report["signature"] is not None

    altered = json.loads(files[0].read_bytes())
    altered["body"]["ledger"]["spent_epsilon"] = 0.001
    files[0].write_text(json.dumps(altered, sort_keys=True, separators=(",", ":")))
    refused = fedseal("audit", "run", folder, "--out", tmp_path / "other", *given, **secret)
    assert refused.returncode == FindingsRefused.exit_code
    assert FindingsRefused.code in refused.stderr
    assert not (tmp_path / "other").exists()


def test_a_report_of_a_simulation_verifies(marked: MarkedResult, tmp_path: Path) -> None:
    evidence: RunEvidence = marked.evidence
    depth: Depth = "quick"
    lab = LabEvidence(
        depth=depth,
        mechanism=MechanismEvidence(
            plan_hash=evidence.plan_hash,
            code_hash="0" * 64,
            depth=depth,
            made_at=evidence.finished_at,
            conformance=[],
            bounds=[],
        ),
        membership=[],
        inversion=[],
        markers=marked.scans,
        ciphertexts=marked.ciphertexts[0],
        ciphertexts_repeated=marked.ciphertexts[1],
        seconds=1.0,
    )
    report = build_report(evidence, parse_time(evidence.finished_at), lab=lab)
    file, _ = write_report(report, tmp_path)
    assert verify_report(file)["verdict"]["status"] == "INCONCLUSIVE", "nothing was tested or attacked"
