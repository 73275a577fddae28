"""The owner's part of an audit: made at the owner, signed by it, and the only thing that leaves it.

The mechanism that this owner has installed is tested with made-up examples. Its records are not read, and
no budget is spent. Its ledger and its key files are looked at; what leaves are sums, caps and access bits,
no name of a data set, no path, no secret.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from audit.collecting.custody import owner_custody
from audit.evidence.experiments import LedgerTable, MechanismEvidence, OwnerFindings
from audit.evidence.findings import sign_findings, verify_findings
from audit.evidence.run import RunEvidence
from client.owner import Owner
from crypto.vault import write_public
from protocol.encoding import MAX_BODY_BYTES
from protocol.errors import (
    EncodingInvalid,
    FindingsRefused,
    NameAmbiguous,
    NameUnknown,
    ReportInvalid,
    SignatureInvalid,
)
from protocol.messages import Signed
from protocol.plan import Plan
from server.home import digits_of


def find_run(owner: Owner, name: str) -> tuple[str, Plan]:
    """Return a run that this owner joined, and its plan.

    Args:
        owner: An open owner.
        name: The name of the run's folder at the coordinator, which ends with the first digits of the
            run's identifier; or the identifier, or its first digits, as `fedseal ledger show` prints them.

    Raises:
        NameUnknown: The ledger knows no such run; those that it knows are listed.
        NameAmbiguous: It knows several, which are listed.
    """
    bodies = [record.body for record in owner.ledger.records()]
    runs = [str(body["run"]) for body in bodies if body["kind"] == "open_run"]
    digits = digits_of(name) or name
    found = [owner.store.find(run) for run in runs if digits and run.startswith(digits)]
    matching = [state for state in found if state is not None]
    if len(matching) > 1 and digits != name:
        # the coordinator tried more than once to bring the owners together; the run is what came of it
        matching = [state for state in matching if state.session is not None] or matching
    if not matching:
        raise NameUnknown(f"no run {name}; the ledger has: {', '.join(run[:8] for run in runs) or 'none'}")
    if len(matching) > 1:
        raise NameAmbiguous(f"{name} fits {', '.join(state.run[:16] for state in matching)}")
    return matching[0].run, matching[0].parsed_plan()


def owner_findings(
    home: Path, owner: Owner, mechanism: MechanismEvidence, run: str | None = None
) -> OwnerFindings:
    """Put together what an owner found at its place. For that owner only.

    Args:
        home: The owner's home.
        owner: The same, opened.
        mechanism: Tests of the code that is installed here.
        run: The run that they speak about; None for a plan alone, without a ledger then.

    Raises:
        LedgerConflict: The ledger does not know the run.
    """
    return OwnerFindings(
        owner=owner.name,
        run=run,
        mechanism=mechanism,
        custody=owner_custody(home, owner),
        ledger=None if run is None else ledger_table(owner, run),
    )


def ledger_table(owner: Owner, run: str) -> LedgerTable:
    """Return what an owner's ledger says in sums.

    Args:
        owner: An open owner.
        run: The run whose cost is listed by itself.

    Raises:
        LedgerConflict: The ledger does not know the run.
    """
    records, totals, budget = owner.ledger.records(), owner.ledger.totals(), owner.policy.budget
    head = owner.ledger.head()
    return LedgerTable(
        dataset=records[0].hash,
        spent_epsilon=None if totals.unprotected else totals.epsilon,
        spent_delta=totals.delta,
        cap_epsilon=budget.epsilon_total,
        cap_delta=budget.delta_total,
        this_run_epsilon=owner.ledger.spent(run).epsilon,
        runs=sum(record.body["kind"] == "open_run" for record in records),
        sequence=head.sequence,
        head=head.head,
    )


def write_findings(owner: Owner, findings: OwnerFindings, file: Path) -> None:
    """Sign findings and write them to a file that may leave. For the owner of `owner` only.

    Raises:
        FindingsRefused: The file cannot be written.
    """
    signed = sign_findings(owner.credentials.signing_key, findings)
    try:
        write_public(file, signed.to_bytes())
    except OSError as error:
        raise FindingsRefused(f"the file cannot be written: {os.strerror(error.errno or 0)}") from None


def read_findings(files: Sequence[Path], evidence: RunEvidence) -> list[Signed]:
    """Read findings that owners sent, and accept none that is not of an owner of this run.

    Args:
        files: As `write_findings` wrote them.
        evidence: Of the run; holds the certificates of its owners.

    Returns:
        The findings as they were signed, in order of the signers.

    Raises:
        FindingsRefused: Damaged, altered, of a stranger, of another run or plan, or two of one owner.
    """
    keys = {owner.fingerprint: owner.public_key() for owner in evidence.owners}
    accepted: dict[str, Signed] = {}
    for file in files:
        signed = _parsed(file)
        key = keys.get(signed.signer)
        if key is None:
            raise FindingsRefused(f"{file.name}: its signer took no part in this run")
        try:
            found = verify_findings(signed, key)
        except (SignatureInvalid, ReportInvalid):
            raise FindingsRefused(f"{file.name}: it is not what its signer signed") from None
        if found.run not in (None, evidence.run):
            raise FindingsRefused(f"{file.name}: it is about another run")
        if found.mechanism.plan_hash != evidence.plan_hash:
            raise FindingsRefused(f"{file.name}: it is about another plan")
        if signed.signer in accepted:
            raise FindingsRefused(f"{file.name}: its signer is given twice")
        accepted[signed.signer] = signed
    return [accepted[signer] for signer in sorted(accepted)]


def _parsed(file: Path) -> Signed:
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_BODY_BYTES + 1)
        return Signed.from_bytes(data)
    except (OSError, EncodingInvalid):
        raise FindingsRefused(f"{file.name}: it cannot be read, or is damaged") from None
