"""The next steps before a report can be relied on; a pure function of the report's sections."""

from __future__ import annotations

import re
from dataclasses import dataclass

from audit.checks.check import Report
from audit.checks.experiments import REMEDY as MAKE_EXPERIMENTS
from audit.checks.owners import silent
from audit.words import some

MOST_LISTED = 12
"""Most owners that get a command each; of more, one command stands for all."""

RUN_DIGITS = 16
"""First digits of a run's identifier, by which the coordinator and the owners know it."""

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True)
class Step:
    """One step of one or several parties.

    Attributes:
        who: The parties in plain words.
        what: What for.
        commands: Lines for a shell. Capitals stand for folders that only the party knows: HOME is its
            home, DIR a new folder for the report.
    """

    who: str
    what: str
    commands: tuple[str, ...] = ()


def next_steps(report: Report) -> list[Step]:
    """Return what is left to do, in order; nothing but a check if the report can be relied on.

    Args:
        report: With its `checks` and `verdict`.
    """
    if report["subject"]["kind"] == "simulation":
        return _of_simulation(report)
    steps = [*_paused(report), *_failed(report), *_evidence(report), *_unobtainable(report)]
    if report["verdict"]["status"] == "PASS":
        steps.append(_last_check(report))
    return steps


def file_names(owners: list[str]) -> list[str]:
    """Return a different file name for the findings of each owner, safe in a shell.

    Owners give them their names; if one of these could mean something to a shell, all are numbered.
    """
    plain = all(_FILE_NAME.fullmatch(name) for name in owners) and len(set(owners)) == len(owners)
    listed = owners if plain else [f"owner-{number}" for number in range(1, len(owners) + 1)]
    return [f"{name}.json" for name in listed]


def _of_simulation(report: Report) -> list[Step]:
    if report["laboratory"] is None:
        command = "fedseal audit run PLAN --out DIR"
        return [Step("The auditor", "Make the experiments.", (command,))]
    what = "Audit the real run when it has ended. This page is about the plan and the code alone."
    return [Step("The person who signs", what)]


def _run(report: Report) -> str:
    return str(report["subject"]["run"])[:RUN_DIGITS]


def _paused(report: Report) -> list[Step]:
    if report["subject"]["state"] != "paused":
        return []
    command = f"fedseal run --home HOME --resume {_run(report)} --out DIR"
    return [Step("The coordinator", "Finish the run; it is paused and can go on.", (command,))]


def _failed(report: Report) -> list[Step]:
    titles = [check["title"] for check in report["checks"] if check["status"] == "fail"]
    if not titles:
        return []
    return [Step("The person who signs", "Do not sign. Find out first why a check failed.")]


def _evidence(report: Report) -> list[Step]:
    """Return the steps that supply evidence: owners' findings, and the experiments with all of them."""
    owners = sorted(claim["owner"] for claim in report["claims"])
    lacking = silent(report)
    made = report["laboratory"] is not None
    if not owners or (made and not lacking):
        return []
    steps = []
    if lacking:
        files = dict(zip(owners, file_names(owners), strict=True))
        named = [files[name] for name in lacking] if len(lacking) <= MOST_LISTED else ["OWNER.json"]
        commands = [f"fedseal audit owner --home HOME --run {_run(report)} --out {file}" for file in named]
        what = "Test the code installed there, look at keys and ledger, and send the signed file to the "
        what += "coordinator. No record is read and no budget is spent."
        steps.append(Step(_each(lacking), what, tuple(commands)))
    what = "Make the experiments, and write this report again with what the owners signed."
    return [*steps, Step("The coordinator", what, (_audit(report, owners),))]


def _each(owners: list[str]) -> str:
    return f"{'Each of' if len(owners) > 1 else 'The owner'} {some(owners, MOST_LISTED)}"


def _audit(report: Report, owners: list[str]) -> str:
    files = [f"--owner {file}" for file in file_names(owners)]
    if len(owners) > MOST_LISTED:
        files = ["$(printf -- '--owner %s ' FINDINGS/*.json)"]
    measured = any(entry["accuracy"] is not None for entry in report["rounds"])
    public = [] if measured else ["--public FILE"]
    return " ".join([f"fedseal audit run {_run(report)} --home HOME --out DIR", *public, *files])


def _unobtainable(report: Report) -> list[Step]:
    """Name what stays missing although everything was tried that there is a command for."""
    if report["laboratory"] is None or silent(report) or report["subject"]["state"] != "finished":
        return []
    titles = [
        check["title"]
        for check in report["checks"]
        if check["status"] == "missing" and check["gap"] != MAKE_EXPERIMENTS
    ]
    if not titles:
        return []
    return [Step("The person who signs", f"Weigh what no command supplies: {'; '.join(titles)}.")]


def _last_check(report: Report) -> Step:
    if report["signature"] is None:
        return Step("The person who signs", "Ask for a signed report; this one can be from anyone.")
    command = "fedseal audit verify report.json --key release.pub"
    what = "Check this report on your own machine, with the coordinator's key from a source you trust."
    return Step("The person who signs", what, (command,))
