"""The demo ends in an answer: PASS with owners' findings and experiments, or what it was not asked for."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w
from real_federation import plan_fields
from rich.console import Console

from audit.report import build_report, verify_report
from console.verdicts import show_steps, show_verdict
from server.release import PUBLIC, read_public_key
from tests.unit.audit_evidence import NOW
from tests.unit.audit_gallery import run_of


def demo(folder: Path, *options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fedseal", "demo", "--out", str(folder / "out"), *map(str, options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=900, check=False
    )


def plan_file(folder: Path, **sections: dict[str, object]) -> Path:
    file = folder / "plan.toml"
    file.write_text(tomli_w.dumps(plan_fields(**sections)), encoding="utf-8")
    return file


@pytest.mark.long
def test_the_demo_ends_in_a_pass_that_its_report_bears_out(tmp_path: Path) -> None:
    done = demo(tmp_path, "--plan", plan_file(tmp_path))
    out = tmp_path / "out"
    assert done.returncode == 0, done.stdout + done.stderr
    assert "● PASS: there is evidence that every promise was kept" in done.stdout
    assert done.stdout.rstrip().endswith(f"report: {out / 'result' / 'report.html'}")
    report = verify_report(out / "result" / "report.json", read_public_key(out / "server" / PUBLIC))
    assert report["verdict"] == {"status": "PASS", "reasons": []}
    assert sum(finding["valid"] for finding in report["findings"]) == 3
    assert report["laboratory"]["depth"] == "quick"
    assert '<div class="verdict-head PASS signed">' in (out / "result" / "report.html").read_text("utf-8")
    assert json.loads((out / "summary.json").read_text("utf-8"))["audit"]["verdict"] == "PASS"


@pytest.mark.long
def test_a_demo_without_audit_of_more_rounds_than_a_chart_has_dots(tmp_path: Path) -> None:
    rounds = {"name": "long", "rounds": 25}
    done = demo(tmp_path, "--no-audit", "--plan", plan_file(tmp_path, run=rounds))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "● INCONCLUSIVE: nothing was found wrong, but evidence is missing" in done.stdout
    assert "--no-audit" in done.stdout
    page = (tmp_path / "out" / "result" / "report.html").read_text("utf-8")
    run = json.loads((tmp_path / "out" / "result" / "report.json").read_text("utf-8"))["subject"]["run"]
    commands = re.findall(r"fedseal audit owner --home HOME --run (\w+) --out (owner-[123]).json", page)
    assert commands == [(run[:16], f"owner-{number}") for number in (1, 2, 3)]


@pytest.mark.parametrize(
    ("verdict", "made", "status"),
    [("PASS", True, 0), ("FAIL", True, 1), ("INCONCLUSIVE", True, 2), ("INCONCLUSIVE", False, 0)],
)
def test_the_end_says_verdict_size_of_epsilon_and_report(verdict: str, made: bool, status: int) -> None:
    console = Console(record=True, width=200)
    audit = {"verdict": verdict, "reasons": ["Because."], "report": "/out/report.html", "made": made}
    summary = {"audit": audit, "owners": [{"epsilon": 0.5}, {"epsilon": 7.6}]}
    assert show_verdict(console, summary) == status
    text = console.export_text()
    assert f"● {verdict}: " in text
    assert "epsilon: not small. An epsilon between 1 and 10" in text
    assert "report: /out/report.html" in text
    assert ("Because." in text) == made
    summary["owners"] = [{"epsilon": None}]
    show_verdict(console, summary)
    assert "epsilon: no limit." in console.export_text()


def test_what_is_left_to_do_is_printed_as_commands_on_one_line_each() -> None:
    console = Console(record=True, width=40)
    show_steps(console, build_report(run_of(), NOW))
    lines = [line.strip() for line in console.export_text().splitlines()]
    assert sum(line.startswith("fedseal audit owner --home HOME --run ") for line in lines) == 4
    assert sum(line.endswith("--owner hospital-004.json") for line in lines) == 1
