"""What owners signed of a run, and how a report judges it."""

from __future__ import annotations

from typing import Any

import pytest

from audit.evidence.run import RunEvidence
from audit.report import build_report
from crypto.signing import sign
from protocol.accounting import epsilon_after
from tests.unit.audit_evidence import (
    NOW,
    OWNERS,
    credentials,
    evidence_fields,
    plan,
    sha,
    statement_body,
)


def claim_with(statement: Any, **owner_changes: Any) -> dict[str, Any]:
    """The first owner's claim after its statement was replaced."""
    fields = evidence_fields()
    fields["owners"][0] |= {"statement": statement} | owner_changes
    return dict(build_report(RunEvidence.from_fields(fields), NOW)["claims"][0])


def signed_statement(signer: str = OWNERS[0], **changes: Any) -> dict[str, Any]:
    body = statement_body(plan(), 8, OWNERS[0], **changes)
    return sign(credentials()[1][signer].signing_key, body).model_dump(mode="json")


def test_a_true_statement_agrees() -> None:
    claim = claim_with(signed_statement())
    assert (claim["statement"], claim["disagreements"], claim["model_signed"]) == ("valid", [], True)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"epsilon": 1.9}, "epsilon"),
        ({"epsilon": None}, "epsilon"),
        ({"epsilon": 2.5}, "epsilon"),
        ({"delta": 1e-6}, "delta"),
        ({"session": sha("other")}, "session"),
        ({"plan_hash": sha("other")}, "plan_hash"),
        ({"sealed_attempts": 7}, "sealed_attempts"),
        ({"sealed_attempts": 2**50}, "sealed_attempts"),
    ],
)
def test_a_statement_that_says_otherwise_is_named(changes: dict[str, Any], field: str) -> None:
    assert field in claim_with(signed_statement(**changes))["disagreements"]


def test_an_owner_that_says_it_lost_more_is_believed() -> None:
    # Its sealed update was lost on the way: the coordinator saw seven attempts, the owner paid for eight.
    claim = claim_with(signed_statement(), sealed_attempts=7)
    assert (claim["sealed_attempts"], claim["disagreements"]) == (8, [])
    assert claim["spent"]["epsilon"] == epsilon_after(plan(), 8)


def test_an_attempt_that_a_crash_interrupted_counts_as_spent() -> None:
    crashed = signed_statement(sealed_attempts=7, epsilon=epsilon_after(plan(), 8))
    assert claim_with(crashed, sealed_attempts=7)["disagreements"] == []


def test_a_statement_of_another_key_is_invalid() -> None:
    claim = claim_with(signed_statement(signer=OWNERS[1]))
    assert (claim["statement"], claim["stated"], claim["model_signed"]) == ("invalid", None, False)


def test_a_foreign_certificate_does_not_match() -> None:
    other = evidence_fields()["owners"][1]["signing_certificate"]
    for certificate in (other, b"", b"not a certificate"):
        claim = claim_with(signed_statement(), signing_certificate=certificate)
        assert (claim["certificate_matches"], claim["statement"]) == (False, "invalid")


def test_another_final_model_is_not_signed() -> None:
    assert claim_with(signed_statement(model_hash=sha("other")))["model_signed"] is False


@pytest.mark.parametrize(
    "last", [{"sequence": 6, "head": sha("older")}, {"sequence": 7, "head": sha("rewritten")}]
)
def test_a_ledger_that_went_back_is_seen(last: dict[str, Any]) -> None:
    assert claim_with(None, ledger_last=last)["ledger_went_back"] is True


def test_a_statement_must_name_its_own_session_last() -> None:
    assert claim_with(signed_statement(sessions=[]))["disagreements"] == ["session"]
    assert claim_with(signed_statement(sessions=[sha("session"), sha("b")]))["disagreements"] == ["session"]
