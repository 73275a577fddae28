"""How a report ends on the terminal: its verdict, what is left to do, and how large epsilon is."""

from __future__ import annotations

from math import inf
from typing import Any

from rich.console import Console
from rich.text import Text

_MEANINGS = {
    "PASS": "there is evidence that every promise was kept",
    "FAIL": "a promise was not kept, or the evidence contradicts itself",
    "INCONCLUSIVE": "nothing was found wrong, but evidence is missing",
}
_STYLES = {"PASS": "bold green", "FAIL": "bold red", "INCONCLUSIVE": "bold yellow"}


def show_verdict(console: Console, summary: dict[str, Any]) -> int:
    """Print the end of a demo, and return its exit status.

    Args:
        console: Where to print.
        summary: Of it, `owners` with what they lost, and of `audit` the fields `verdict`, `reasons`,
            `report`, and in `made` whether an audit was made. Without one, missing evidence is what was
            asked for, and the status is 0.
    """
    from audit.checks.verdict import exit_code
    from audit.pages.answer import JUDGEMENTS, band_of

    audit = summary["audit"]
    verdict = audit["verdict"]
    losses = [inf if owner["epsilon"] is None else owner["epsilon"] for owner in summary["owners"]]
    judgement, reason = JUDGEMENTS[band_of(max(losses, default=0.0))]
    console.print()
    console.print(Text(f"● {verdict}", style=_STYLES[verdict]), Text(f": {_MEANINGS[verdict]}"), sep="")
    if audit["made"]:
        for text in audit["reasons"]:
            console.print(Text(f"  {text}"))
    else:
        console.print("  no audit was made (--no-audit); the report says which commands supply evidence")
    console.print(Text(f"  epsilon: {judgement.lower()}. {reason}"))
    console.print(Text(f"  report: {audit['report']}"), soft_wrap=True)
    return exit_code(verdict) if audit["made"] else 0


def show_steps(console: Console, report: dict[str, Any]) -> None:
    """Print the next steps towards a PASS, with their commands.

    Args:
        console: Where to print; commands are never wrapped, so that they can be copied.
        report: One that was verified or just built.
    """
    from audit.checks.next_steps import next_steps

    if report["verdict"]["status"] == "PASS":
        return
    for step in next_steps(report):
        console.print(Text(f"  {step.who}: {step.what}", style="bold"))
        for line in step.commands:
            console.print(Text(f"    {line}"), soft_wrap=True)
