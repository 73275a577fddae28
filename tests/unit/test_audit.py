"""The report is built from evidence alone, judged again by whoever reads it, and no leaf can be changed."""

from __future__ import annotations

import copy
import importlib.metadata
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from audit.evidence.experiments import LabEvidence, OwnerFindings
from audit.evidence.findings import sign_findings
from audit.evidence.inventory import installed
from audit.evidence.run import OwnerEvidence, RunEvidence
from audit.facts import flatten, unflatten
from audit.report import build_report, sign_report, verify_report, write_page, write_report
from crypto.certificates import fingerprint
from protocol.accounting import epsilon_after
from protocol.errors import ReportInvalid
from tests.unit.audit_evidence import (
    NOW,
    OWNERS,
    evidence,
    evidence_fields,
    plan,
    sha,
)
from tests.unit.audit_experiments import findings, findings_fields, lab
from tests.unit.json_changes import changed, get, leaves, put

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
SCHEMA = json.loads(
    (Path(__file__).parents[2] / "audit" / "schema" / "report-2.json").read_text(encoding="utf-8")
)


@lru_cache(maxsize=1)
def _signed() -> dict[str, Any]:
    return build_report(evidence("local", 6), NOW, KEY)


@lru_cache(maxsize=1)
def _short() -> dict[str, Any]:
    """A signed report that has every kind of leaf, and few of each."""
    fields = evidence_fields("local", 5)
    fields |= {name: fields[name][:2] for name in ("transcript", "certificates", "keys")}
    fields["rounds"] = fields["rounds"][3:]
    found = lab("local", 5, 2).fields()
    mechanism = found["mechanism"] | {
        name: found["mechanism"][name][:1] for name in ("conformance", "bounds")
    }
    found |= {name: found[name][:2] for name in ("membership", "inversion", "markers")}
    experiments = LabEvidence.from_fields(found | {"mechanism": mechanism})
    signed = findings("local", 5, mechanism=mechanism)[:1]
    return build_report(RunEvidence.from_fields(fields), NOW, KEY, experiments, signed)


@pytest.fixture
def report() -> dict[str, Any]:
    return copy.deepcopy(_signed())


def stored(report: dict[str, Any], folder: Path) -> Path:
    path = folder / "report.json"
    path.write_text(json.dumps(report, indent=2, sort_keys=True) + "\n", encoding="ascii")
    return path


# --- the report --------------------------------------------------------------------------------------


def test_report_verifies_and_is_returned(report: dict[str, Any], tmp_path: Path) -> None:
    path, page = write_report(report, tmp_path / "audit")
    assert verify_report(path, KEY.public_key()) == report
    assert verify_report(path) == report
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert sorted(item.name for item in path.parent.iterdir()) == ["report.html", "report.json"]


def test_schema_is_closed_everywhere() -> None:
    Draft202012Validator.check_schema(SCHEMA)

    def objects(node: Any) -> Iterator[dict[str, Any]]:
        if isinstance(node, dict):
            if node.get("type") == "object":
                yield node
            for item in node.values():
                yield from objects(item)
        elif isinstance(node, list):
            for item in node:
                yield from objects(item)

    found = list(objects(SCHEMA))
    assert len(found) > 25
    assert all(item["additionalProperties"] is False for item in found)
    assert all(set(item["required"]) == set(item["properties"]) for item in found)


def test_spending_is_recomputed_from_the_plan(report: dict[str, Any]) -> None:
    losses = {claim["owner"]: claim["spent"]["epsilon"] for claim in report["claims"]}
    assert losses["clinic-nord"] == epsilon_after(plan("local", 6), 6)
    assert losses["lab-ost"] == epsilon_after(plan("local", 6), 4)
    assert losses["lab-ost"] < losses["clinic-nord"] <= 2.0
    curve = [point["epsilon"] for point in report["spending"]]
    assert curve == sorted(curve)
    assert curve[0] == 0.0


def test_a_long_run_has_a_short_curve() -> None:
    points = build_report(evidence("local", 40), NOW)["spending"]
    assert len(points) <= 13
    assert (points[0]["round"], points[-1]["round"]) == (0, 40)


def test_a_run_without_noise_fails_and_spells_infinity(tmp_path: Path) -> None:
    report = build_report(evidence("none"), NOW)
    assert report["verdict"]["status"] == "FAIL"
    assert {claim["spent"]["epsilon"] for claim in report["claims"]} == {"inf"}
    assert verify_report(write_report(report, tmp_path)[0]) == report
    json.dumps(report, allow_nan=False)


def test_a_run_that_hardly_began_has_a_report(tmp_path: Path) -> None:
    lists = ("rounds", "owners", "transcript", "refusals", "keys", "certificates")
    fields = evidence_fields() | {name: [] for name in lists}
    fields |= {"state": "failed", "session": None, "rounds_finished": 0, "attempts_used": 0}
    report = build_report(RunEvidence.from_fields(fields | {"deployment": None}), NOW)
    assert report["verdict"]["status"] == "FAIL"
    assert verify_report(write_report(report, tmp_path)[0]) == report


def test_experiments_and_findings_are_part_of_what_verifies(tmp_path: Path) -> None:
    report = build_report(evidence(), NOW, KEY, lab(), findings())
    assert report["verdict"] == {"status": "PASS", "reasons": []}
    assert [entry["valid"] for entry in report["findings"]] == [True] * 4
    assert verify_report(write_report(report, tmp_path)[0], KEY.public_key()) == report


def test_findings_of_a_stranger_or_altered_ones_are_not_valid() -> None:
    body = OwnerFindings.from_fields(findings_fields(OWNERS[0]))
    stranger = sign_findings(Ed25519PrivateKey.generate(), body)
    other = findings()[1]
    altered = other.model_copy(update={"body": other.body | {"run": sha("another run")}})
    renamed = findings()[2].model_copy(update={"kind": "statement"})
    report = build_report(evidence(), NOW, None, lab(), [findings()[0], stranger, altered])
    assert [entry["valid"] for entry in report["findings"]] == [True, False, False]
    assert report["verdict"]["status"] == "FAIL"
    with pytest.raises(ReportInvalid):
        build_report(evidence(), NOW, None, None, [renamed])


def test_a_page_can_be_made_again(tmp_path: Path) -> None:
    report = build_report(evidence(), NOW, None, lab(), findings())
    first = write_report(report, tmp_path)[1]
    write_page(report, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == first.read_text()


def test_the_bill_of_materials_lists_what_is_installed() -> None:
    found = {package.name.lower(): package for package in installed()}
    assert found["cryptography"].version == importlib.metadata.version("cryptography")
    assert found["pydantic"].licence == "MIT"
    assert len(found) == len(installed())


# --- every leaf --------------------------------------------------------------------------------------

SHARES = 4
share_of_places = pytest.mark.parametrize(
    "share", [0, *(pytest.param(number, marks=pytest.mark.long) for number in range(1, SHARES))]
)
"""One place in four is changed in `make test`, all of them in `make test-long`."""


@share_of_places
def test_every_changed_leaf_is_found(tmp_path: Path, share: int) -> None:
    report = _short()
    places = list(leaves(report))
    assert len(places) > 500
    for place in places[share::SHARES]:
        path = stored(put(report, place, changed(get(report, place))), tmp_path)
        with pytest.raises(ReportInvalid):
            verify_report(path, KEY.public_key())


@share_of_places
def test_every_changed_conclusion_is_found_even_when_signed_again(tmp_path: Path, share: int) -> None:
    report = _short()
    derived = ("promise", "claims", "spending", "checks", "verdict", "reproduce")
    places = [place for place in leaves(report) if place[0] in derived]
    places += [("rounds", i, "agreeing_openings") for i in range(len(report["rounds"]))]
    places += [("findings", 0, "valid")]
    places += [("subject", "plan_hash_recomputed"), ("subject", "initial_model_hash_planned")]
    for place in places[share::SHARES]:
        forged = sign_report(put(report, place, changed(get(report, place))), KEY)
        with pytest.raises(ReportInvalid):
            verify_report(stored(forged, tmp_path), KEY.public_key())


@pytest.mark.parametrize("key", ["statement", "openings"])
def test_a_signer_of_the_report_cannot_forge_owners_words(
    report: dict[str, Any], tmp_path: Path, key: str
) -> None:
    if key == "statement":
        report["owners"][0]["statement"]["body"]["epsilon"] = 0.5
    else:
        report["rounds"][0]["openings"][0]["body"]["sums_hash"] = sha("another sum")
    with pytest.raises(ReportInvalid, match="does not follow"):
        verify_report(stored(sign_report(report, KEY), tmp_path), KEY.public_key())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("security_level_bits", 128),
        ("scheme", "CKKS"),
        ("preset", "compact"),
        ("values_per_frame", 9000),
        ("frames", "seal"),
    ],
)
def test_another_encryption_than_the_plans_is_refused(field: str, value: Any) -> None:
    stated = evidence_fields()["encryption"] | {field: value}
    with pytest.raises(ReportInvalid, match="encryption"):
        build_report(evidence(encryption=stated), NOW, KEY)


def test_a_removed_check_is_found(report: dict[str, Any], tmp_path: Path) -> None:
    report["checks"] = [item for item in report["checks"] if item["status"] == "pass"]
    report["verdict"] = {"status": "PASS", "reasons": []}
    with pytest.raises(ReportInvalid):
        verify_report(stored(sign_report(report, KEY), tmp_path))


# --- signature and spelling --------------------------------------------------------------------------


def test_another_signer_is_refused(report: dict[str, Any], tmp_path: Path) -> None:
    other = Ed25519PrivateKey.generate()
    path = stored(sign_report(report, other), tmp_path)
    assert verify_report(path)["signature"]["signer"] == fingerprint(other.public_key())
    with pytest.raises(ReportInvalid, match="somebody else"):
        verify_report(path, KEY.public_key())


def test_an_unsigned_report_is_refused_where_a_signer_is_expected(
    report: dict[str, Any], tmp_path: Path
) -> None:
    path = stored(report | {"signature": None}, tmp_path)
    assert verify_report(path)["signature"] is None
    with pytest.raises(ReportInvalid, match="not signed"):
        verify_report(path, KEY.public_key())


def test_only_one_spelling_is_read(report: dict[str, Any], tmp_path: Path) -> None:
    text = stored(report, tmp_path).read_text()
    twice = text.replace('"verdict": {', '"verdict": {"status": "PASS", "reasons": []},\n  "verdict": {')
    variants = [
        json.dumps(report),
        text + " ",
        twice,
        text.replace('"noise": "local"', '"noise": "lo\\u0063al"'),
        text.replace('"port": 9443', '"port": 9443.0'),
        text.replace('"port": 9443', '"port": NaN'),
        "[" * 100_000,
        "",
        "[]\n",
        "ü",
    ]
    for variant in variants:
        assert variant != text
        path = tmp_path / "variant.json"
        path.write_text(variant, encoding="utf-8")
        with pytest.raises(ReportInvalid):
            verify_report(path)


def test_impossible_counts_are_refused_before_they_cost_time(
    report: dict[str, Any], tmp_path: Path
) -> None:
    for place in [("owners", 0, "sealed_attempts"), ("subject", "rounds_finished")]:
        with pytest.raises(ReportInvalid, match="more attempts"):
            verify_report(stored(sign_report(put(report, place, 2**50), KEY), tmp_path))


# --- evidence ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"surprise": 1},
        {"state": "perhaps"},
        {"started_at": "2026-03-02T08:30:00"},
        {"started_at": "2026-03-02T08:30:00+02:00"},
        {"started_at": "yesterday"},
        {"model_hash": "abc"},
        {"server_has_secret_key": "no"},
        {"attempts_used": -1},
    ],
)
def test_evidence_of_another_form_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ReportInvalid):
        RunEvidence.from_fields(evidence_fields() | changes)


def test_evidence_has_no_infinity() -> None:
    fields = evidence_fields()
    fields["rounds"][0]["seconds"]["fit"] = float("inf")
    with pytest.raises(ReportInvalid):
        RunEvidence.from_fields(fields)


names = st.text(max_size=6)
scalars = st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=6)
trees = st.recursive(
    scalars | st.lists(scalars, max_size=3),
    lambda inner: st.dictionaries(names, inner, min_size=1, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(names, trees, max_size=4))
def test_facts_lead_back_to_the_value(value: dict[str, Any]) -> None:
    facts = flatten(value)
    assert unflatten(facts) == value
    assert facts == sorted(facts, key=lambda fact: fact["pointer"])
    assert all(fact["pointer"].startswith("/") for fact in facts)


def test_a_deployment_with_lists_of_records_keeps_its_facts() -> None:
    facts = flatten({"steps": [{"step": i} for i in range(12)]})
    assert flatten(unflatten(facts)) == facts


def test_facts_that_contradict_each_other_are_refused() -> None:
    for pointers in (["/a", "/a"], ["/a", "/a/b"], ["/a/b", "/a"]):
        with pytest.raises(ReportInvalid):
            unflatten([{"pointer": pointer, "value": 1} for pointer in pointers])


def test_an_owner_by_another_name_than_its_certificates_is_no_pass() -> None:
    """Names are what a reader goes by; the certificate says whose key signed."""
    lawful = evidence("local")
    first, *others = lawful.owners
    renamed = lawful.model_copy(
        update={"owners": [first.model_copy(update={"name": "mayo-clinic"}), *others]}
    )
    assert renamed.owners[0].public_key() is None
    report = build_report(renamed, NOW, KEY)
    assert report["verdict"]["status"] == "FAIL"


def test_a_name_that_acts_on_a_terminal_is_refused() -> None:
    owner = evidence("local").owners[0].fields()
    with pytest.raises(ReportInvalid, match="control character"):
        OwnerEvidence.from_fields(owner | {"name": "anna\x1b[2Jverified: PASS"})
