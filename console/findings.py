"""What the doctor's checks find, and how it is shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, ParamSpec

from rich.console import Console
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
        _print_lines(console, findings)
    return all(finding.status != "fail" for finding in findings)


def _print_lines(console: Console, findings: Sequence[Finding]) -> None:
    """Print a line per finding, unbroken, because commands and paths in it are there to be copied."""
    width = max((len(finding.name) for finding in findings), default=0)
    for finding in findings:
        mark, plain_mark, colour = _MARKS[finding.status]
        # Text, because a path with brackets would be taken for markup.
        sign = plain_mark if console.options.ascii_only else mark
        line = Text.assemble(" ", sign.ljust(2), " ", finding.name.ljust(width), "  ", finding.detail)
        line.stylize(colour, 1, 3)
        console.print(line, soft_wrap=True)
        if finding.remedy and finding.status != "ok":
            console.print(Text(f"{' ' * (width + 6)}do: {finding.remedy}", style="bold"), soft_wrap=True)
