"""Experiments are judged with their controls; what an owner found counts when the owner signed it."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from jsonschema import ValidationError

from audit.checks.contradictions import promised_rate, refuse_contradictions
from audit.checks.verdict import checks, verdict
from audit.evidence.experiments import REQUIRED_TESTS
from audit.report import build_report, sign_report, verify_report, write_report
from audit.statistics.roc import ceiling
from protocol.errors import ReportInvalid
from tests import independent_verifier
from tests.unit.audit_evidence import NOW, OWNERS, evidence, sha
from tests.unit.audit_experiments import findings, lab, mechanism_fields
from tests.unit.json_changes import put
from tests.unit.test_audit import stored

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
Change = Callable[[dict[str, Any]], Any]


@lru_cache(maxsize=2)
def _report(noise: str = "local") -> dict[str, Any]:
    return build_report(evidence(noise), NOW, KEY, lab(noise, 8, 5), findings(noise))


@pytest.fixture
def report() -> dict[str, Any]:
    return copy.deepcopy(_report())


def status_of(report: dict[str, Any], identifier: str) -> str:
    return next(item["status"] for item in checks(report) if item["id"] == identifier)


def at(*place: Any, value: Any) -> Change:
    def change(report: dict[str, Any]) -> None:
        target: Any = report
        for step in place[:-1]:
            target = target[step]
        target[place[-1]] = value

    return change


def of(section: str, chosen: dict[str, Any], **values: Any) -> Change:
    """Change the entries of a list of the laboratory that have the chosen fields."""

    def change(report: dict[str, Any]) -> None:
        entries = report["laboratory"]["mechanism"].get(section) or report["laboratory"][section]
        picked = [entry for entry in entries if chosen.items() <= entry.items()]
        assert picked
        for entry in picked:
            entry |= values

    return change


def rate(value: float, low: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": 1.0}


def without(section: str, **chosen: Any) -> Change:
    def change(report: dict[str, Any]) -> None:
        place = (
            report["laboratory"]["mechanism"]
            if section in ("conformance", "bounds")
            else report["laboratory"]
        )
        kept = [entry for entry in place[section] if not chosen.items() <= entry.items()]
        assert len(kept) < len(place[section])
        place[section] = kept

    return change


def named_twice(contributors: list[str]) -> None:
    """Put one owner's name in another's place; the signed number of contributors stays the same."""
    contributors[0] = contributors[1]


def bounds_of_an_owner(
    report: dict[str, Any], run: str | None = None, plan_hash: str | None = None
) -> None:
    """Move the laboratory's bounds into findings of an owner that are about something else."""
    mechanism = report["laboratory"]["mechanism"]
    body = report["findings"][0]["body"]
    body["mechanism"]["bounds"], mechanism["bounds"] = mechanism["bounds"], []
    body["run"] = run or body["run"]
    body["mechanism"]["plan_hash"] = plan_hash or body["mechanism"]["plan_hash"]


def only_memory(custody: list[dict[str, Any]]) -> None:
    custody[:] = [key for key in custody if key["place"] == "memory"]


def only_owners(certificates: list[dict[str, Any]]) -> None:
    certificates[:] = [one for one in certificates if one["role"] != "server"]


OWN = ("findings", 0, "body")
PLANNED, CONTROL = {"model": "as planned"}, {"model": "without protection"}
UPDATE, SUM = {"observer": "update"}, {"observer": "opened sum"}

BROKEN: list[tuple[str, Change]] = [
    ("mechanism-conformance", of("conformance", {"test": "noise-scale"}, p_value=1e-7)),
    ("lower-bounds", of("bounds", {"method": "Clopper-Pearson, Gaussian"} | UPDATE, epsilon=1.99)),
    ("mechanism-conformance", of("conformance", {"test": "clip"}, p_value=1e-8, threshold=1e-9)),
    ("mechanism-conformance", of("conformance", {"test": "clip"}, p_value=0.0, threshold=0.0)),
    ("lower-bounds", of("bounds", {"observer": "wire"}, epsilon=2.1)),
    (
        "lower-bounds",
        at(*OWN, "mechanism", "bounds", value=[mechanism_fields()["bounds"][0] | {"epsilon": 3.0}]),
    ),
    ("membership-inference", of("membership", PLANNED, tpr_at_1_percent=rate(0.2, 0.08))),
    ("membership-inference", of("membership", {"model": "exported"}, tpr_at_1_percent=rate(0.2, 0.08))),
    ("gradient-inversion", of("inversion", {"observed": "private update"}, rebuilt=1)),
    ("gradient-inversion", of("inversion", {"observed": "received by the coordinator"}, rebuilt=1)),
    ("marker-scan", of("markers", {"place": "logs"}, hits=1)),
    ("ciphertext-reuse", at("laboratory", "ciphertexts_repeated", value=1)),
    ("owner-code", at(*OWN, "mechanism", "code_hash", value=sha("other code"))),
    ("owner-code", at("laboratory", "mechanism", "code_hash", value=sha("other code"))),
    ("owner-code", at(*OWN, "mechanism", "conformance", 0, "p_value", value=0.0)),
    ("owner-code", at("findings", 0, "valid", value=False)),
    ("key-custody", at(*OWN, "custody", 0, "mode", value="0640")),
    ("key-custody", at(*OWN, "custody", 0, "mode", value="0604")),
    ("key-custody", at(*OWN, "custody", 0, "encrypted_at_rest", value=False)),
    ("key-custody", at(*OWN, "custody", 0, "mode", value=None)),
    ("key-custody", at("keys", 3, "encrypted_at_rest", value=False)),
    ("owner-ledgers", at(*OWN, "ledger", "spent_epsilon", value=6.1)),
    ("owner-ledgers", at(*OWN, "ledger", "spent_epsilon", value=None)),
    ("owner-ledgers", at(*OWN, "ledger", "spent_delta", value=2e-4)),
    ("owner-ledgers", at(*OWN, "ledger", "this_run_epsilon", value=1.2)),
    ("owner-ledgers", at(*OWN, "ledger", "sequence", value=24)),
    ("owner-ledgers", at(*OWN, "ledger", "head", value=sha("another chain"))),
]

LACKING: list[tuple[str, Change]] = [
    ("mechanism-conformance", at("laboratory", value=None)),
    ("mechanism-conformance", without("conformance", test="noise-across-owners")),
    ("mechanism-conformance", of("conformance", {"test": "clip"}, threshold=0.0)),
    ("mechanism-conformance", of("conformance", {"test": "clip"}, threshold=1e-9)),
    ("mechanism-conformance", of("conformance", {"test": "clip"}, samples=0)),
    *(
        ("mechanism-conformance", without("conformance", test=test))
        for group in REQUIRED_TESTS.values()
        for test in group
    ),
    ("mechanism-conformance", at("laboratory", "mechanism", "plan_hash", value=sha("other plan"))),
    ("lower-bounds", at("laboratory", "mechanism", "bounds", value=[])),
    ("lower-bounds", of("bounds", UPDATE, control=1.9)),
    ("lower-bounds", of("bounds", SUM, control=None)),
    ("lower-bounds", of("bounds", SUM, detectable=None)),
    ("lower-bounds", of("bounds", {"observer": "exported model"}, confidence=0.8)),
    ("lower-bounds", of("bounds", {"observer": "exported model"}, claimed=None)),
    ("lower-bounds", of("bounds", {"observer": "exported model"}, delta=1e-3)),
    ("lower-bounds", of("bounds", {"observer": "exported model"}, canaries=10)),
    ("lower-bounds", without("bounds", observer="exported model")),
    ("lower-bounds", without("bounds", observer="wire")),
    ("lower-bounds", lambda report: bounds_of_an_owner(report, run=sha("another run"))),
    ("lower-bounds", lambda report: bounds_of_an_owner(report, plan_hash=sha("another plan"))),
    ("membership-inference", at("laboratory", "membership", value=[])),
    ("membership-inference", of("membership", CONTROL, tpr_at_1_percent=rate(0.02, 0.009))),
    ("membership-inference", of("membership", CONTROL, tpr_at_1_percent=rate(0.02, 0.011))),
    ("membership-inference", without("membership", model="without protection")),
    ("membership-inference", of("membership", {"model": "exported"}, ceiling_at_1_percent=None)),
    ("membership-inference", without("membership", attack="LiRA")),
    ("membership-inference", without("membership", attack="RMIA", group="most exposed records")),
    ("membership-inference", of("membership", PLANNED, members=99)),
    ("membership-inference", of("membership", PLANNED, outsiders=367)),
    ("gradient-inversion", of("inversion", {"observed": "plain update"}, rebuilt=0)),
    ("gradient-inversion", without("inversion", observed="private update")),
    ("gradient-inversion", without("inversion", observed="received by the coordinator")),
    ("gradient-inversion", without("inversion", attack="imprint", observed="private update")),
    ("gradient-inversion", without("inversion", attack="optimization")),
    ("marker-scan", without("markers", place="coordinator memory")),
    ("marker-scan", of("markers", {"place": "reports"}, markers=0)),
    ("marker-scan", of("markers", {"place": "disk"}, control_hits=0)),
    ("marker-scan", of("markers", {"place": "wire"}, control_hits=None)),
    ("marker-scan", of("markers", {"place": "disk"}, control_hits=None)),
    ("marker-scan", of("markers", {"place": "coordinator memory"}, searched_bytes=0)),
    ("ciphertext-reuse", at("laboratory", "ciphertexts", value=0)),
    ("ciphertext-reuse", at("laboratory", "ciphertexts", value=29)),
    ("owner-code", at("findings", value=[])),
    ("owner-code", at(*OWN, "run", value=sha("another run"))),
    ("owner-code", at(*OWN, "mechanism", "conformance", value=[])),
    ("key-custody", at(*OWN, "custody", value=[])),
    ("key-custody", lambda report: only_memory(report["findings"][0]["body"]["custody"])),
    ("key-custody", at("keys", value=[])),
    ("certificates", lambda report: only_owners(report["certificates"])),
    ("owner-ledgers", at(*OWN, "ledger", value=None)),
]


@pytest.mark.parametrize(("identifier", "change"), BROKEN)
def test_what_an_experiment_found_fails_its_check(
    report: dict[str, Any], identifier: str, change: Change
) -> None:
    change(report)
    assert status_of(report, identifier) == "fail"
    agree(report)


@pytest.mark.parametrize(("identifier", "change"), LACKING)
def test_an_experiment_without_control_or_part_is_missing(
    report: dict[str, Any], identifier: str, change: Change
) -> None:
    change(report)
    assert status_of(report, identifier) == "missing"
    agree(report)


def test_a_bound_below_its_claim_is_no_fault_even_if_its_control_fails(report: dict[str, Any]) -> None:
    of("bounds", {"method": "one run"} | UPDATE, control=0.1)(report)
    assert status_of(report, "lower-bounds") == "pass"


def test_a_point_estimate_above_the_ceiling_is_no_verdict(report: dict[str, Any]) -> None:
    of("membership", PLANNED, tpr_at_1_percent=rate(0.09, 0.05))(report)
    assert status_of(report, "membership-inference") == "pass"


CONTRADICTIONS: list[Change] = [
    at("rounds", 8, "round", value=7),
    at("rounds", 8, "round", value=9),
    at("rounds", 8, "attempt", value=8),
    lambda report: named_twice(report["rounds"][0]["contributors"]),
    of("bounds", SUM, epsilon=2.1, claimed=50.0, control=60.0),
    of("bounds", UPDATE, claimed=50.0, control=60.0),
    of("bounds", {"observer": "exported model"}, claimed=2.1),
    of("membership", PLANNED, tpr_at_1_percent=rate(0.2, 0.08), ceiling_at_1_percent=0.9997),
    of("membership", {"model": "exported"}, ceiling_at_1_percent=0.08),
]


@pytest.mark.parametrize("change", CONTRADICTIONS)
def test_a_limit_that_is_not_the_plans_and_a_round_told_twice_are_refused(
    report: dict[str, Any], tmp_path: Path, change: Change
) -> None:
    refuse_contradictions(report)
    change(report)
    with pytest.raises(ReportInvalid, match=r"twice|more than the plan promises"):
        refuse_contradictions(report)
    with pytest.raises(ReportInvalid):
        verify_report(stored(sign_report(report, KEY), tmp_path))


def test_the_promised_rate_is_the_ceiling_of_the_promise(report: dict[str, Any]) -> None:
    delta = report["promise"]["delta"]
    assert promised_rate(report) == pytest.approx(ceiling(2.0, delta, 0.01))
    report["promise"]["unit"] = "client"
    assert promised_rate(report) == pytest.approx(ceiling(4.0, delta * (1 + math.exp(2.0)), 0.01))
    report["promise"]["epsilon"] = "inf"
    assert promised_rate(report) == 1.0


def test_the_schema_names_the_required_tests() -> None:
    groups = independent_verifier.TESTS
    assert {name: tuple(group["enum"]) for name, group in groups.items()} == REQUIRED_TESTS


def test_no_date_excuses_a_missing_test(report: dict[str, Any]) -> None:
    """When evidence was made is the word of its maker."""
    for name in REQUIRED_TESTS["own model"]:
        without("conformance", test=name)(report)
    at("laboratory", "mechanism", "made_at", value="2025-01-01T00:00:00+00:00")(report)
    assert status_of(report, "mechanism-conformance") == "missing"
    agree(report)


def test_an_experiment_counts_for_the_plans_that_can_make_it(report: dict[str, Any]) -> None:
    """Every record in every step, a unit of whole owners and CKKS leave out what then cannot be made."""
    report["promise"] |= {"sample_rate": 1.0, "unit": "client"}
    report["encryption"]["scheme"] = "CKKS"
    for test in ("batch-dispersion", "record-dispersion", "clip-own-model", "clip-in-pieces", "masked"):
        without("conformance", test=test)(report)
    without("bounds", observer="exported model")(report)
    assert status_of(report, "mechanism-conformance") == status_of(report, "lower-bounds") == "pass"
    agree(report)


def test_without_a_guarantee_nothing_is_claimed_and_the_run_fails() -> None:
    report = _report("none")
    found = {item["id"]: item["status"] for item in report["checks"]}
    assert found["lower-bounds"] == found["membership-inference"] == "not applicable"
    assert (found["noise-on"], report["verdict"]["status"]) == ("fail", "FAIL")
    agree(report)


# --- the independent verifier ------------------------------------------------------------------------


def agree(report: dict[str, Any]) -> None:
    """Compare every status with what the independent program finds in the same sections."""
    states = independent_verifier.run_checks(report) | independent_verifier.lab_checks(report)
    if report["subject"]["kind"] == "deployment":
        states |= independent_verifier.owner_checks(report)
    found = {
        name: "fail" if failed else "missing" if missing else "pass"
        for name, (failed, missing) in states.items()
    }
    assert found == {
        item["id"]: item["status"] for item in checks(report) if item["status"] != "not applicable"
    }


@pytest.mark.parametrize("kind", ["deployment", "simulation"])
def test_both_programs_agree_on_reports_of_every_kind(tmp_path: Path, kind: str) -> None:
    run = evidence(kind=kind)
    for experiments, found, expected in ((lab(), findings(), 0), (None, (), 2)):
        report = build_report(run, NOW, KEY, experiments, found)
        path = write_report(report, tmp_path)[0]
        assert independent_verifier.main(str(path)) == expected
    failing = lab(ciphertexts_repeated=3)
    path = write_report(build_report(run, NOW, None, failing, findings()), tmp_path)[0]
    assert independent_verifier.main(str(path)) == 1


def test_the_independent_program_is_short_and_stands_alone(tmp_path: Path) -> None:
    source = Path(independent_verifier.__file__)
    assert len(source.read_text().splitlines()) <= 150
    path = write_report(_report(), tmp_path)[0]
    command = [sys.executable, "-I", str(source), str(path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "PASS\n")


def test_the_independent_program_sees_a_wrong_verdict_and_a_wrong_signature(
    report: dict[str, Any], tmp_path: Path
) -> None:
    report["laboratory"]["ciphertexts_repeated"] = 1
    assert independent_verifier.main(str(stored(sign_report(report, KEY), tmp_path))) == 3
    path = stored(_report(), tmp_path)
    for spelling in ("NaN", "1e999", '0.31, "p_value": 0.31'):
        odd = path.read_text().replace('"p_value": 0.31', f'"p_value": {spelling}', 1)
        (tmp_path / "odd.json").write_text(odd)
        if spelling.startswith("0"):
            assert independent_verifier.main(str(tmp_path / "odd.json")) == 3
        else:
            with pytest.raises((ValueError, ValidationError)):
                independent_verifier.main(str(tmp_path / "odd.json"))
    other = put(_report(), ("generated_at",), "2026-03-03T08:30:00+00:00")
    assert independent_verifier.main(str(stored(other, tmp_path))) == 3
    kept = verdict(checks(_report()))
    assert kept["status"] == "PASS"
    assert len(OWNERS) == len(_report()["findings"])
