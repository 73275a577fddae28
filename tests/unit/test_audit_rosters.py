"""Whose openings a report counts, of which sessions, and how long an owner's certificate must hold."""

from __future__ import annotations

import base64
from datetime import timedelta
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from audit.evidence.run import RunEvidence
from audit.report import build_report
from crypto.signing import sign
from protocol.messages import Statement
from tests.unit.audit_evidence import NOW, OWNERS, credentials, evidence_fields, opening_body, sha


def openings_after(change: Any) -> int:
    fields = evidence_fields()
    change(fields["rounds"][0])
    return int(build_report(RunEvidence.from_fields(fields), NOW)["rounds"][0]["agreeing_openings"])


def _opening(signer: str, **changes: Any) -> dict[str, Any]:
    body = opening_body(1, 1, 4).model_copy(update=changes)
    return sign(credentials()[1][signer].signing_key, body).model_dump(mode="json")


def test_openings_are_counted_once_and_only_when_they_agree() -> None:
    assert openings_after(lambda entry: entry.update(accuracy=None)) == 3
    assert openings_after(lambda entry: entry.update(openings=[])) == 0
    assert openings_after(lambda entry: entry.update(openings=entry["openings"][:1] * 3)) == 1
    assert openings_after(lambda entry: entry.update(sums_hash=sha("another sum"))) == 0
    assert openings_after(lambda entry: entry["contributors"].pop()) == 0
    for field in ("session", "headers_hash", "list_hash", "model_hash", "sums_hash"):
        strange = _opening(OWNERS[2], **{field: sha("other")})
        assert openings_after(lambda entry, odd=strange: entry["openings"].__setitem__(2, odd)) == 2


def openings_of_an_earlier_session(*named_by: str) -> int:
    """Count a first round's openings that are of an earlier session, which some owners' statements name."""
    fields, keys = evidence_fields(), credentials()[1]
    fields["rounds"][0]["openings"] = [_opening(name, session=sha("earlier")) for name in OWNERS[:3]]
    for owner in fields["owners"]:
        if owner["name"] in named_by:
            body = Statement.from_fields(owner["statement"]["body"])
            body = body.model_copy(update={"sessions": [sha("earlier"), sha("session")]})
            owner["statement"] = sign(keys[owner["name"]].signing_key, body).model_dump(mode="json")
    return int(build_report(RunEvidence.from_fields(fields), NOW)["rounds"][0]["agreeing_openings"])


def test_an_earlier_roster_counts_where_statements_of_a_quorum_name_its_session() -> None:
    """One owner's word would let openings of any other run count, or none of the earlier roster's."""
    assert openings_of_an_earlier_session() == 0
    assert openings_of_an_earlier_session(OWNERS[0]) == 0
    assert openings_of_an_earlier_session(*OWNERS[:2]) == 3
    assert openings_of_an_earlier_session(*OWNERS) == 3


def test_a_run_that_has_not_ended_counts_the_openings_of_all_its_rosters_and_does_not_pass() -> None:
    fields = evidence_fields()
    fields["rounds"][0]["openings"] = [_opening(name, session=sha("earlier")) for name in OWNERS[:3]]
    fields |= {"state": "paused", "session": None}
    for owner in fields["owners"]:
        owner["statement"] = None
    report = build_report(RunEvidence.from_fields(fields), NOW)
    assert report["rounds"][0]["agreeing_openings"] == 3
    found = {check["id"]: check["status"] for check in report["checks"]}
    assert (found["openings-agree"], found["statements-agree"]) == ("pass", "missing")
    assert report["verdict"]["status"] == "INCONCLUSIVE"


def test_a_stranger_or_a_forged_signature_does_not_count() -> None:
    stranger = sign(Ed25519PrivateKey.generate(), opening_body(1, 1, 4)).model_dump(mode="json")
    forged = _opening(OWNERS[2])
    forged["signature"] = base64.b64encode(bytes(64)).decode()
    for bad in (stranger, forged):
        assert openings_after(lambda entry, odd=bad: entry["openings"].__setitem__(2, odd)) == 2


def test_a_certificate_that_ended_during_the_run_is_seen() -> None:
    fields = evidence_fields()
    fields["finished_at"] = (NOW + timedelta(days=400)).isoformat()
    for owner in fields["owners"][1:]:
        owner["present_until"] = fields["finished_at"]
    report = build_report(RunEvidence.from_fields(fields), NOW)
    # the first one left while it was valid
    covered = [claim["certificate_covers_run"] for claim in report["claims"]]
    assert covered == [True, False, False, False]


def test_a_certificate_that_began_before_its_owner_came_covers_the_run() -> None:
    fields = evidence_fields()
    fields["started_at"] = (NOW - timedelta(days=400)).isoformat()
    report = build_report(RunEvidence.from_fields(fields), NOW)
    assert {claim["certificate_covers_run"] for claim in report["claims"]} == {True}
    fields["owners"][0]["present_from"] = fields["started_at"]
    report = build_report(RunEvidence.from_fields(fields), NOW)
    assert sum(claim["certificate_covers_run"] for claim in report["claims"]) == 3
