"""What an owner's data file holds, on the owner's own screen."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text

from protocol.plan import Plan
from tasks.rows import RowCounts

WITHOUT_PLAN = "with --plan FILE, rows outside the plan's range and classes are counted too"


def read_counts(file: Path, plan: Plan | None) -> RowCounts:
    """Read an owner's data file as its node does, and count its rows.

    Args:
        file: The `.npz` file.
        plan: Says which rows a run uses; without it only rows that fit no plan are left out.

    Raises:
        DataUnavailable: The file cannot be opened.
        DataInvalid: It cannot be read, or its form is not the plan's.
        PlanInvalid: The plan's task or model is unknown.
    """
    if plan is None:
        from tasks.arrays import read_arrays
        from tasks.rows import fitting_rows

        return fitting_rows(*read_arrays(file), None).counts
    from tasks.registry import task_for

    return task_for(plan).fitting(file).counts


def shortage(counts: RowCounts, plan: Plan | None) -> str | None:
    """Return what is wrong with the number of usable rows; None if they suffice."""
    if counts.kept == 0:
        return "no row can be used"
    if plan is None or counts.kept >= plan.privacy.expected_batch_size:
        return None
    return (
        f"{counts.kept} usable rows are fewer than the plan's expected batch of "
        f"{plan.privacy.expected_batch_size:g}: a round would cost budget for almost nothing but noise"
    )


def show_counts(console: Console, counts: RowCounts, plan: Plan | None) -> None:
    """Print the counts, for the owner alone, and a warning where the usable rows are too few."""
    console.print(Text(f"your data, for your eyes only: {counts.words()}"), soft_wrap=True)
    if plan is None:
        console.print(Text(f"({WITHOUT_PLAN})"), soft_wrap=True)
    warning = shortage(counts, plan)
    if warning is not None:
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)
