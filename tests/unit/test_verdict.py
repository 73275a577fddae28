"""The verdict follows from the checks, the checks from the report, and each promise can be broken."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit.checks.verdict import EXIT_CODES, SIMULATED, checks, exit_code, recompute, verdict
from audit.report import build_report
from tests.unit.audit_evidence import NOW, evidence
from tests.unit.audit_experiments import findings, lab

MISSING = {
    "mechanism-conformance", "lower-bounds", "membership-inference", "gradient-inversion", "marker-scan",
    "ciphertext-reuse", "owner-code", "key-custody", "owner-ledgers",
}  # fmt: skip


def check(status: str, title: str = "A", gap: str = "why") -> dict[str, str]:
    return {"id": "a", "title": title, "status": status, "evidence": "", "gap": gap}


@lru_cache(maxsize=1)
def _report() -> dict[str, Any]:
    return build_report(evidence(), NOW, None, lab(), findings())


@pytest.fixture
def report() -> dict[str, Any]:
    return copy.deepcopy(_report())


def status_of(report: dict[str, Any], identifier: str) -> str:
    return next(item["status"] for item in checks(report) if item["id"] == identifier)


def test_pass_needs_every_check_to_pass() -> None:
    assert verdict([check("pass"), check("pass")]) == {"status": "PASS", "reasons": []}


def test_missing_evidence_is_inconclusive_with_the_reason() -> None:
    found = verdict([check("pass"), check("missing", "Noise is right", "Not tested.")])
    assert found == {"status": "INCONCLUSIVE", "reasons": ["Noise is right: Not tested."]}


def test_a_failure_outweighs_what_is_missing_and_comes_first() -> None:
    found = verdict([check("missing", "B"), check("fail", "C")])
    assert found == {"status": "FAIL", "reasons": ["C: why", "B: why"]}


def test_nothing_checked_is_not_a_pass() -> None:
    assert verdict([])["status"] == "INCONCLUSIVE"


def test_an_unknown_status_fails() -> None:
    assert verdict([check("passed")])["status"] == "FAIL"
    assert exit_code("Pass") == 1


def test_exit_codes() -> None:
    assert EXIT_CODES == {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 2}


@given(st.lists(st.sampled_from(["pass", "fail", "missing"])), st.sampled_from(["pass", "fail", "missing"]))
def test_one_more_check_never_makes_the_verdict_better(statuses: list[str], more: str) -> None:
    rank = {"PASS": 0, "INCONCLUSIVE": 1, "FAIL": 2}
    before = verdict([check(status) for status in statuses])["status"]
    after = verdict([check(status) for status in [*statuses, more]])["status"]
    assert not statuses or rank[after] >= rank[before]


def test_a_run_without_experiments_is_inconclusive_and_says_what_to_run() -> None:
    report = build_report(evidence(), NOW)
    assert {item["id"] for item in report["checks"] if item["status"] == "missing"} == MISSING
    assert {item["status"] for item in report["checks"]} == {"pass", "missing"}
    assert report["verdict"]["status"] == "INCONCLUSIVE"
    assert all("fedseal audit" in reason for reason in report["verdict"]["reasons"])


def test_a_clean_run_with_experiments_passes(report: dict[str, Any]) -> None:
    assert {item["status"] for item in report["checks"]} == {"pass"}
    assert report["verdict"] == {"status": "PASS", "reasons": []}


def test_a_simulation_says_so_first_and_needs_no_network() -> None:
    report = build_report(evidence(kind="simulation"), NOW, None, lab())
    assert report["verdict"] == {"status": "PASS", "reasons": [SIMULATED]}
    assert {item["id"] for item in report["checks"] if item["status"] == "not applicable"} == {
        "tls", "certificates", "no-server-key", "owner-code", "key-custody", "owner-ledgers",
    }  # fmt: skip
    bare = build_report(evidence(kind="simulation"), NOW)["verdict"]
    assert (bare["status"], bare["reasons"][0]) == ("INCONCLUSIVE", SIMULATED)


def test_what_does_not_apply_counts_for_nothing() -> None:
    assert verdict([check("not applicable")])["status"] == "INCONCLUSIVE"
    assert verdict([check("not applicable"), check("pass")])["status"] == "PASS"


def test_recompute_ignores_what_the_report_says_of_itself(report: dict[str, Any]) -> None:
    report["verdict"] = {"status": "PASS", "reasons": []}
    report["checks"] = [check("pass")]
    report["laboratory"] = None
    assert recompute(report)["status"] == "INCONCLUSIVE"


def test_every_check_is_told_apart_and_speaks(report: dict[str, Any]) -> None:
    identifiers = [item["id"] for item in report["checks"]]
    assert len(set(identifiers)) == len(identifiers)
    assert all(item["title"] and item["evidence"] for item in report["checks"])


BROKEN: list[tuple[str, list[Any], Any]] = [
    ("noise-on", ["promise", "noise"], "none"),
    ("budget-kept", ["claims", 0, "spent", "epsilon"], 2.01),
    ("budget-kept", ["claims", 0, "stated", "epsilon"], 2.01),
    ("budget-kept", ["claims", 1, "spent", "epsilon"], "inf"),
    ("budget-kept", ["claims", 1, "spent", "delta"], 1e-3),
    ("budget-kept", ["claims", 1, "promise_matches_plan"], False),
    ("statements-agree", ["claims", 0, "statement"], "invalid"),
    ("statements-agree", ["claims", 0, "certificate_matches"], False),
    ("statements-agree", ["claims", 0, "disagreements"], ["epsilon"]),
    ("ledger-forward", ["claims", 2, "ledger_went_back"], True),
    ("no-server-key", ["server", "has_secret_key"], True),
    ("received-content", ["transcript", 0, "content"], "unclassified"),
    ("received-content", ["transcript", 0, "content"], "global model"),
    ("received-content", ["transcript", 0, "content"], "ciphertext frames"),
    ("received-content", ["transcript", 0, "content"], "opened sums"),
    ("received-content", ["transcript", 4, "max_bytes"], 5000),
    ("cohort-size", ["rounds", 1, "contributors"], ["a" * 64, "a" * 64, "a" * 64]),
    ("openings-agree", ["rounds", 7, "agreeing_openings"], 1),
    ("model-countersigned", ["claims", 3, "model_signed"], False),
    ("encryption-strength", ["encryption", "security_level_bits"], 127),
    ("encryption-strength", ["encryption", "exact"], False),
    ("update-size", ["encryption", "frame_bytes"], 32962),
    ("update-size", ["encryption", "values_per_frame"], 7184),
    ("tls", ["tls", "version"], "TLSv1.2"),
    ("tls", ["tls", "client_certificate_required"], False),
    ("certificates", ["certificates", 1, "not_before"], "2026-03-02T08:31:00Z"),
    ("certificates", ["certificates", 1, "not_after"], "2026-03-02T08:31:00Z"),
    ("certificates", ["claims", 0, "certificate_covers_run"], False),
    ("certificates", ["subject", "finished_at"], "2026-03-02T08:29:00Z"),
    ("plan-binding", ["subject", "plan_hash"], "0" * 64),
    ("plan-binding", ["subject", "initial_model_hash"], "0" * 64),
    ("run-complete", ["subject", "state"], "failed"),
    ("run-complete", ["subject", "rounds_finished"], 9),
]


@pytest.mark.parametrize(("identifier", "place", "value"), BROKEN)
def test_a_broken_promise_fails_its_check(
    report: dict[str, Any], identifier: str, place: list[Any], value: Any
) -> None:
    target = report
    for step in place[:-1]:
        target = target[step]
    target[place[-1]] = value
    assert status_of(report, identifier) == "fail"
    assert recompute(report)["status"] == "FAIL"


LACKING: list[tuple[str, list[Any], Any]] = [
    ("statements-agree", ["claims", 0, "statement"], "missing"),
    ("run-complete", ["subject", "state"], "paused"),
    ("received-content", ["transcript"], []),
    ("certificates", ["certificates"], []),
    ("openings-agree", ["rounds"], []),
    ("cohort-size", ["rounds"], []),
    ("budget-kept", ["claims"], []),
    ("statements-agree", ["claims"], []),
    ("model-countersigned", ["claims"], []),
]


@pytest.mark.parametrize(("identifier", "place", "value"), LACKING)
def test_lacking_evidence_is_missing_and_never_a_pass(
    report: dict[str, Any], identifier: str, place: list[Any], value: Any
) -> None:
    target = report
    for step in place[:-1]:
        target = target[step]
    target[place[-1]] = value
    assert status_of(report, identifier) == "missing"


def test_a_void_attempt_needs_no_signatures(report: dict[str, Any]) -> None:
    assert [entry["agreeing_openings"] for entry in report["rounds"] if entry["void"]] == [0]
    assert status_of(report, "openings-agree") == "pass"


def test_a_sum_of_fewer_than_three_says_so(report: dict[str, Any]) -> None:
    report["promise"]["cohort_minimum"] = 2
    gap = next(item["gap"] for item in checks(report) if item["id"] == "cohort-size")
    assert "each can work out the other's update" in gap
