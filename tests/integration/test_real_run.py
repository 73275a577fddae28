"""Two runs of real processes over mutual TLS: what a user gets, and what the coordinator got to see."""

from __future__ import annotations

import base64
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from real_federation import PASSPHRASE, RealFederation, command_line, small_plan, wait_until

from audit.conclude import Conclusion, conclude
from audit.report import verify_report
from crypto.certificates import verify_signing_certificate
from crypto.signing import verify
from crypto.trust import load_trust
from deploy.measure import run_session
from deploy.package import load_session, verify_package
from protocol.accounting import epsilon_after
from protocol.messages import LedgerHead, Signed, Statement
from server.flower.objects import ON_DISK_BYTES
from server.release import PUBLIC, read_public_key, release_key
from server.store import RunStore
from tasks.registry import task_for

OWNERS = ("owner-1", "owner-2", "owner-3")
ALLOWED = {"ciphertext frames", "signed metadata", "opened sums", "error code"}


@pytest.fixture(scope="module")
def first(real: RealFederation) -> RunStore:
    return real.run(small_plan())


@pytest.fixture(scope="module")
def second(real: RealFederation, first: RunStore) -> RunStore:
    return real.run(small_plan(run={"name": "second"}, privacy={"target_epsilon": 1.5}))


@pytest.fixture(scope="module")
def concluded(
    real: RealFederation, first: RunStore, tmp_path_factory: pytest.TempPathFactory
) -> Conclusion:
    key = release_key(real.home, real.made.server_passphrase)
    return conclude(first, real.home, key, tmp_path_factory.mktemp("result"), lambda _text: None)


def test_run_finishes_every_round_with_every_owner(real: RealFederation, first: RunStore) -> None:
    assert first.get("state") == "finished", real.logs()
    finished = [facts for facts in first.attempts() if not facts["void"]]
    assert [facts["round"] for facts in finished] == [1, 2]
    assert all(len(facts["contributors"]) == 3 for facts in finished)
    assert all(len(facts["openings"]) >= 2 for facts in finished)
    assert first.refusals() == []


def test_every_ledger_shows_the_sealed_rounds_at_their_price(real: RealFederation, first: RunStore) -> None:
    plan = first.plan()
    expected = epsilon_after(plan, 2)
    assert expected is not None
    assert expected <= 2.0
    for name in OWNERS:
        with real.ledger(name) as ledger:
            spent = ledger.spent(first.get("run"))
        assert (spent.sealed, spent.void, spent.reserved) == (2, 0, 0)
        assert spent.epsilon == expected
        assert spent.delta == plan.privacy.delta


def test_statements_agree_with_ledgers_and_with_the_model(real: RealFederation, first: RunStore) -> None:
    statements = _statements(real, first)
    assert sorted(statements) == list(OWNERS)
    for name, statement in statements.items():
        assert statement.session == first.get("session")
        assert statement.plan_hash == first.plan().sha256()
        assert statement.model_hash == first.get("model_hash") == first.read_checkpoint(2).sha256()
        assert (statement.sealed_attempts, statement.void_attempts) == (2, 0)
        with real.ledger(name) as ledger:
            spent = ledger.spent(first.get("run"))
            known = {(record.sequence, record.hash) for record in ledger.records()}
        assert (statement.epsilon, statement.delta) == (spent.epsilon, spent.delta)
        assert (statement.ledger.sequence, statement.ledger.head) in known


def test_the_process_that_aggregates_never_loads_what_could_decrypt(first: RunStore) -> None:
    assert first.get("loaded_secret_modules") == []


def test_transcript_holds_nothing_but_what_the_design_allows(first: RunStore) -> None:
    transcript = first.transcript()
    assert {row["content"] for row in transcript} <= ALLOWED
    received = {(row["kind"], row["content"]) for row in transcript if row["direction"] == "received"}
    assert ("train.seal", "ciphertext frames") in received
    assert ("query.open", "opened sums") in received
    assert ("train.fit", "ciphertext frames") not in received
    blobs = {kind for kind, content in received if content != "signed metadata"}
    assert blobs == {"train.seal", "query.open"}


def test_listener_is_measured_as_tls_1_3_with_client_certificates(first: RunStore) -> None:
    facts = first.get("tls")
    assert facts["version"] == "TLSv1.3"
    assert facts["client_certificate_required"] is True
    assert facts["older_versions_refused"] is True


def test_package_verifies_and_runs(real: RealFederation, first: RunStore, concluded: Conclusion) -> None:
    assert concluded.package is not None
    verified = verify_package(concluded.package, read_public_key(real.home / PUBLIC))
    public = task_for(first.plan()).read(real.public_file)
    logits = run_session(load_session(verified), public.x)
    assert logits.shape == (360, 10)
    accuracy = float(np.mean(logits.argmax(axis=1) == public.y))
    assert accuracy == verified.compression.accuracy_after
    assert verified.privacy.epsilon == epsilon_after(first.plan(), 2)


def test_report_verifies_and_is_inconclusive(real: RealFederation, concluded: Conclusion) -> None:
    report = verify_report(concluded.report_json, read_public_key(real.home / PUBLIC))
    assert report["verdict"]["status"] == "INCONCLUSIVE"
    assert report["verdict"]["reasons"]
    assert concluded.report_html.is_file()


def test_second_run_continues_every_ledger(real: RealFederation, first: RunStore, second: RunStore) -> None:
    assert second.get("state") == "finished", real.logs()
    assert [facts["reason"] for facts in second.attempts()] == [None, None], real.logs()
    costs = [epsilon_after(store.plan(), 2) or math.nan for store in (first, second)]
    runs = [first.get("run"), second.get("run")]
    before, after = _facts_by_name(first), _facts_by_name(second)
    for name in OWNERS:
        with real.ledger(name) as ledger:
            totals, records = ledger.totals(), ledger.records()
        opened = [record.body["run"] for record in records if record.body["kind"] == "open_run"]
        # other tests may have run something in the same federation
        assert [run for run in opened if run in runs] == runs
        with real.ledger(name) as ledger:
            spent = [ledger.spent(run).epsilon for run in opened]
            assert [ledger.spent(run).epsilon for run in runs] == costs
        assert totals.epsilon == pytest.approx(sum(spent), rel=1e-12)
        assert totals.delta == pytest.approx(1e-6 * len(opened), rel=1e-12)
        assert [record.sequence for record in records] == list(range(len(records)))
        end = LedgerHead.from_fields(before[name]["ledger_last"])
        start = LedgerHead.from_fields(after[name]["ledger_first"])
        assert start.sequence > end.sequence
        hashes = {record.sequence: record.hash for record in records}
        assert (hashes[end.sequence], hashes[start.sequence]) == (end.head, start.head)


def test_second_run_has_keys_of_its_own(first: RunStore, second: RunStore) -> None:
    assert first.get("run") != second.get("run")
    assert first.get("session") != second.get("session")


def test_no_passphrase_is_visible_or_written(real: RealFederation, second: RunStore) -> None:
    pids = real.living()
    assert len(pids) >= 5, "the coordinator, Flower's executor and three nodes"
    for pid in pids:
        assert all(PASSPHRASE.decode() not in argument for argument in command_line(pid))
        assert PASSPHRASE not in (Path("/proc") / str(pid) / "environ").read_bytes()
    for file in real.made.folder.rglob("*"):
        if file.is_file():
            assert PASSPHRASE not in file.read_bytes(), file.name


def test_logs_hold_no_traceback_and_no_path(real: RealFederation, second: RunStore) -> None:
    for name in ("coordinator", *OWNERS):
        log = real.log(name)
        assert "Traceback" not in log
        assert str(real.made.folder) not in log


def _facts_by_name(store: RunStore) -> dict[str, dict[str, Any]]:
    return {facts["name"]: facts for facts in store.owners().values()}


def _statements(real: RealFederation, store: RunStore) -> dict[str, Statement]:
    """Verify every statement from the federation's authority down."""
    trust = load_trust(real.home / "identity")
    statements = {}
    for name, facts in _facts_by_name(store).items():
        der = base64.b64decode(facts["certificate"])
        member = verify_signing_certificate(der, trust.authority, trust.revocations, datetime.now(UTC))
        assert member.name == name
        signed = Signed.from_fields(facts["statement"])
        statements[name] = verify(signed, member.public_key, Statement)
    return statements


def test_objects_that_go_through_files_reach_the_other_side(real: RealFederation, first: RunStore) -> None:
    """An update and a sum of 168,000 parameters are longer than what the coordinator holds in memory."""
    assert first.get("state") == "finished"
    wide = real.run(small_plan(run={"name": "wide"}, model={"name": "mlp", "hidden": [512, 256]}))
    assert wide.get("state") == "finished", real.logs()
    assert not any(facts["void"] for facts in wide.attempts()), real.logs()
    for facts in wide.rounds():
        assert min(facts["upload_bytes"], facts["download_bytes"]) > ON_DISK_BYTES
    folder = real.home / "flower" / "objects"
    wait_until(lambda: not any(folder.iterdir()), 30, "the removal of what was sent")
