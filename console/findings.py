"""What the doctor's checks find, and how it is shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, ParamSpec

from rich.console import Console
from rich.table import Table
from rich.text import Text

from protocol.errors import FedsealError

P = ParamSpec("P")
Status = Literal["ok", "warn", "fail"]

INSTALL = "In the checkout, run: pip install -c constraints.txt -e ."
"""Remedy where a package is missing or has another version."""

_MARKS: dict[Status, tuple[str, str, str]] = {
    "ok": ("✓", "ok", "green"),
    "warn": ("!", "!", "yellow"),
    "fail": ("✗", "x", "red"),
}


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        name: What was looked at.
        status: ``ok``, ``warn`` (works today) or ``fail`` (a run would stop).
        detail: What is so; names files of the home. Of their content it tells an owner how many rows its
            data has, and nothing else.
        remedy: What to do; empty if nothing.
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""


def guarded(
    name: str, check: Callable[P, Finding | list[Finding]], *args: P.args, **kwargs: P.kwargs
) -> list[Finding]:
    """Run a check; an error in it becomes a failure of that name and never leaves."""
    try:
        found = check(*args, **kwargs)
        return [found] if isinstance(found, Finding) else found
    except FedsealError as error:
        return [Finding(name, "fail", f"{error.code} {error.what} {error.detail}".rstrip(), error.remedy)]
    except ImportError as error:
        return [Finding(name, "fail", f"{type(error).__name__}: {error.name or 'a package'}", INSTALL)]
    except OSError as error:
        remedy = "Check that the file is there and that this user may read it."
        return [Finding(name, "fail", f"{type(error).__name__}: {error.strerror}", remedy)]
    except Exception as error:
        # Whatever it is, the other checks are still worth their findings.
        return [Finding(name, "fail", f"unexpected {type(error).__name__}", "Report this as a fault.")]


def show_findings(console: Console, findings: Sequence[Finding], *, as_json: bool) -> bool:
    """Print findings as a table, or as a JSON list, and return whether none of them is a failure."""
    if as_json:
        text = json.dumps([asdict(finding) for finding in findings], indent=2, sort_keys=True)
        console.out(text, highlight=False)
    else:
        console.print(_table(findings, ascii_only=console.options.ascii_only))
    return all(finding.status != "fail" for finding in findings)


def _table(findings: Sequence[Finding], *, ascii_only: bool) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        mark, plain_mark, colour = _MARKS[finding.status]
        # Text, because a path with brackets would be taken for markup.
        sign = Text(plain_mark if ascii_only else mark, style=colour)
        table.add_row(sign, Text(finding.name), Text(finding.detail))
        if finding.remedy and finding.status != "ok":
            table.add_row("", "", Text(f"do: {finding.remedy}", style="bold"))
    return table
