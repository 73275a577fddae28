"""Show a self-test of the audit: which planted fault was noticed by which test."""

from __future__ import annotations

import json
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from audit.laboratory.selftest import SelfTest, self_test
from protocol.errors import BenchmarkFailed


def run_self_test(console: Console, runs: int, file: Path | None) -> bool:
    """Plant all faults, make correct runs, print a table and write JSON; tell whether all went well.

    Args:
        console: Where the table goes.
        runs: Correct runs.
        file: For all results as JSON, or None.

    Raises:
        BenchmarkFailed: The file cannot be written.
    """
    if file is not None and not file.parent.is_dir():
        raise BenchmarkFailed("--json must name a file in a folder that exists")
    with console.status("planting faults") as status:
        found = self_test(runs, status.update)
    if file is not None:
        try:
            file.write_text(json.dumps(found.fields(), indent=2) + "\n", encoding="utf-8")
        except OSError:
            raise BenchmarkFailed("the file that --json names cannot be written") from None
    console.print(fault_table(found))
    caught = sum(fault.caught for fault in found.faults)
    console.print(f"{caught} of {len(found.faults)} planted faults were caught")
    console.print(f"{len(found.alarms)} of {found.runs} correct runs raised an alarm")
    for names in found.alarms:
        console.print(f"  alarm: {'; '.join(names)}", style="red", markup=False)
    return found.passed


def fault_table(found: SelfTest) -> Table:
    """Lay out one row per fault: what was planted, whether it was caught, and by what."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for title in ("planted fault", "", "noticed by"):
        table.add_column(title)
    for fault in found.faults:
        # the test that is there for it comes first
        names = sorted(fault.by, key=lambda name: name != fault.expected)
        verdict = "[green]caught[/green]" if fault.caught else "[red]missed[/red]"
        table.add_row(fault.fault, verdict, ", ".join(names) or "nothing")
    return table
