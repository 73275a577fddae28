"""Verify an owner's ledger, and adopt one that lost records."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from console.options import ask_passphrase, require_home
from console.show import dump_json


def verify_ledger(console: Console, home: Path, passphrase_file: Path | None, *, as_json: bool) -> None:
    """Check chain, head copy and, with a passphrase, the heads that others returned; print what holds.

    Raises:
        LedgerCorrupt, LedgerRollback, LedgerOutrun, LedgerConflict: What does not hold.
    """
    from client.heads import require_held
    from client.owner import LEDGER, open_ledger, open_owner, read_policy
    from protocol.errors import LedgerRollback

    require_home(home, "owner")
    policy = read_policy(home)
    if not (home / LEDGER / "ledger.db").exists():
        raise LedgerRollback("there is no ledger in this home folder")
    if passphrase_file is not None:
        owner = open_owner(home, ask_passphrase(passphrase_file, "Passphrase of this owner"))
        try:
            require_held(owner)
        finally:
            owner.close()
    ledger = open_ledger(home, policy)
    try:
        head, records = ledger.head(), len(ledger.records())
    finally:
        ledger.close()
    if as_json:
        dump_json(
            {
                "dataset": policy.dataset,
                "records": records,
                "head": head.model_dump(mode="json"),
                "returned_heads_checked": passphrase_file is not None,
            }
        )
        return
    console.print(f"dataset {policy.dataset}: {records} records form one chain, the head copy is of it")
    if passphrase_file is not None:
        console.print("every own head that was returned is in it")
    console.print(f"head {head.sequence} {head.head}")


def adopt_ledger(
    console: Console, home: Path, passphrase_file: Path | None, epsilon: float, delta: float
) -> None:
    """Record the declared cost of lost records, and print what the dataset has cost now.

    Raises:
        LedgerConflict: Nothing is missing.
    """
    from client.heads import adopt

    require_home(home, "owner", free=True)
    totals = adopt(home, ask_passphrase(passphrase_file, "Passphrase of this owner"), epsilon, delta)
    console.print(
        f"adopted, every run is closed; the dataset has cost {totals.epsilon:.4f} epsilon and "
        f"{totals.delta:g} delta"
    )
