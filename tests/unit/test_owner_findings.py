"""What an owner signs for an audit, and what of it a coordinator accepts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from real_federation import small_plan

from audit.collecting.collect import collect
from audit.collecting.owner import find_run, ledger_table, owner_findings, read_findings, write_findings
from audit.evidence.experiments import MechanismEvidence, OwnerFindings
from audit.evidence.findings import sign_findings
from audit.evidence.run import RunEvidence
from client.owner import Owner
from crypto.signing import sign_bytes
from protocol.encoding import encode
from protocol.errors import FindingsRefused, NameUnknown
from protocol.messages import Signed
from protocol.plan import Plan
from scenarios.simulate import federate
from tasks.partition import digits
from tasks.resolve import resolve
from tests.unit.audit_evidence import sha


def mechanism(plan: Plan) -> MechanismEvidence:
    return MechanismEvidence(
        plan_hash=plan.sha256(),
        code_hash=sha("code"),
        depth="quick",
        made_at="2026-03-02T08:30:00+00:00",
        conformance=[],
        bounds=[],
    )


@dataclass
class Ran:
    """A finished simulated run."""

    plan: Plan
    evidence: RunEvidence
    owners: list[Owner]
    homes: list[Path]

    def findings(self, index: int = 0, **changes: Any) -> OwnerFindings:
        run = self.evidence.run
        found = owner_findings(self.homes[index], self.owners[index], mechanism(self.plan), run)
        return OwnerFindings.from_fields(found.fields() | changes)

    def written(self, folder: Path, index: int = 0, **changes: Any) -> Path:
        file = folder / f"owner-{index + 1}.findings"
        write_findings(self.owners[index], self.findings(index, **changes), file)
        return file


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("findings") / "federation"
    shards, _ = digits(seed=0, owners=3)
    plan = resolve(small_plan())
    simulation = federate(plan, shards, folder)
    simulation.run()
    evidence = collect(simulation.store, folder / "server", None, kind="simulation")
    owners = list(simulation.owners.values())
    yield Ran(plan, evidence, owners, [folder / "owners" / owner.name for owner in owners])
    simulation.close()


def test_findings_of_all_owners_are_accepted(ran: Ran, tmp_path: Path) -> None:
    files = [ran.written(tmp_path, index) for index in range(3)]
    accepted = read_findings(files, ran.evidence)
    assert [signed.signer for signed in accepted] == sorted(
        owner.fingerprint for owner in ran.evidence.owners
    )


def test_the_ledger_table_says_what_the_ledger_says(ran: Ran) -> None:
    table, totals = ledger_table(ran.owners[0], ran.evidence.run), ran.owners[0].ledger.totals()
    assert table.this_run_epsilon == table.spent_epsilon == totals.epsilon > 0
    assert table.cap_epsilon == ran.owners[0].policy.budget.epsilon_total
    assert (table.sequence, table.head) == tuple(ran.owners[0].ledger.head().model_dump().values())
    assert table.runs == 1


def test_keys_of_a_run_are_not_in_the_state_database(ran: Ran) -> None:
    """The run's keys are opened with the passphrase and looked for; the look itself is tried here."""
    state = next(key for key in ran.findings().custody if "state database" in key.what)
    assert state.encrypted_at_rest
    key = ran.owners[0].store.find(ran.evidence.run)
    assert key is not None
    secrets = [one for one in (key.bfv_key, *key.chain_keys.values()) if one is not None]
    if secrets:
        leak = ran.homes[0] / "state.db-leak"
        leak.write_bytes(b"-" + secrets[0])
        state = next(key for key in ran.findings().custody if "state database" in key.what)
        leak.unlink()
        assert not state.encrypted_at_rest


def test_nothing_private_is_in_the_file(ran: Ran, tmp_path: Path) -> None:
    content = ran.written(tmp_path).read_bytes()
    owner = ran.owners[0]
    for private in (
        owner.policy.dataset,
        owner.policy.data_file,
        str(ran.homes[0]),
        *owner.policy.peers.pinned,
    ):
        assert private.encode() not in content
    assert owner.credentials.signing_key.private_bytes_raw().hex().encode() not in content


def test_a_run_is_found_by_its_first_characters(ran: Ran) -> None:
    assert find_run(ran.owners[1], ran.evidence.run[:16]) == (ran.evidence.run, ran.plan)
    for name in ("", "zz", sha("another run")):
        with pytest.raises(NameUnknown, match=ran.evidence.run[:8]):
            find_run(ran.owners[1], name)


def test_every_changed_leaf_is_refused(ran: Ran, tmp_path: Path) -> None:
    file = ran.written(tmp_path)
    signed = Signed.from_bytes(file.read_bytes())
    body = signed.body
    changes = [
        body | {"owner": "owner-2"},
        body | {"custody": body["custody"][1:]},
        body | {"ledger": body["ledger"] | {"spent_epsilon": 0.0}},
        body | {"ledger": None},
        body | {"mechanism": body["mechanism"] | {"code_hash": sha("other code")}},
        body | {"more": 1},
    ]
    for changed in changes:
        file.write_bytes(signed.model_copy(update={"body": changed}).to_bytes())
        with pytest.raises(FindingsRefused, match="not what its signer signed"):
            read_findings([file], ran.evidence)


def test_strangers_are_refused(ran: Ran, tmp_path: Path) -> None:
    """A stranger's own signature, and a stranger that uses an owner's name."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    file, stranger = tmp_path / "stranger", Ed25519PrivateKey.generate()
    signed = sign_findings(stranger, ran.findings())
    file.write_bytes(signed.to_bytes())
    with pytest.raises(FindingsRefused, match="took no part"):
        read_findings([file], ran.evidence)
    posing = signed.model_copy(update={"signer": ran.owners[0].fingerprint})
    file.write_bytes(posing.to_bytes())
    with pytest.raises(FindingsRefused, match="not what its signer signed"):
        read_findings([file], ran.evidence)


def test_a_signature_of_another_kind_is_refused(ran: Ran, tmp_path: Path) -> None:
    owner, fields = ran.owners[0], ran.findings().fields()
    forged = sign_bytes(owner.credentials.signing_key, "statement", encode(fields))
    file = tmp_path / "file"
    for kind in ("statement", "owner-findings"):
        signed = Signed(kind=kind, body=fields, signer=owner.fingerprint, signature=forged)
        file.write_bytes(signed.to_bytes())
        with pytest.raises(FindingsRefused):
            read_findings([file], ran.evidence)


def test_another_run_another_plan_and_two_files_of_one_owner_are_refused(ran: Ran, tmp_path: Path) -> None:
    other = mechanism(ran.plan).fields() | {"plan_hash": sha("another plan")}
    for changes, reason in (
        ({"run": sha("another run")}, "another run"),
        ({"mechanism": other}, "another plan"),
    ):
        with pytest.raises(FindingsRefused, match=reason):
            read_findings([ran.written(tmp_path, 0, **changes)], ran.evidence)
    file = ran.written(tmp_path)
    with pytest.raises(FindingsRefused, match="twice"):
        read_findings([file, file], ran.evidence)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[" * 5000, b"\xff" * 100, json.dumps({"kind": "x"}).encode()]
)
def test_damaged_files_are_refused(ran: Ran, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)
    with pytest.raises(FindingsRefused):
        read_findings([file], ran.evidence)
    with pytest.raises(FindingsRefused):
        read_findings([tmp_path / "missing"], ran.evidence)


def test_findings_about_a_plan_alone_have_no_ledger_and_are_accepted(ran: Ran, tmp_path: Path) -> None:
    found = owner_findings(ran.homes[0], ran.owners[0], mechanism(ran.plan))
    assert (found.run, found.ledger) == (None, None)
    file = tmp_path / "file"
    write_findings(ran.owners[0], found, file)
    assert len(read_findings([file], ran.evidence)) == 1


def test_a_file_that_cannot_be_written_is_a_coded_error(ran: Ran, tmp_path: Path) -> None:
    with pytest.raises(FindingsRefused, match="cannot be written"):
        write_findings(ran.owners[0], ran.findings(), tmp_path / "no" / "folder")
