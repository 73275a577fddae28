"""The commands with which a reader of a report repeats it; a pure function of the report's sections."""

from __future__ import annotations

from audit.checks.check import Report


def commands(report: Report) -> list[dict[str, str]]:
    """Return what can be repeated, in plain words, and the command for it.

    Args:
        report: The sections of a report; its `checks`, `verdict` and `signature` are not read.
    """
    depth = "" if report["laboratory"] is None else f" --{report['laboratory']['depth']}"
    subject = "PLAN" if report["subject"]["kind"] == "simulation" else "RUN"
    return [
        {"what": what, "command": command}
        for what, command in (
            (
                "Check this report: verify every signature, compute every figure and the verdict again",
                "fedseal audit verify report.json --key release.pub",
            ),
            ("Make this page again from the report", "fedseal audit render report.json --out report.html"),
            (
                "Repeat the experiments; random parts differ, the verdict must not",
                f"fedseal audit run {subject} --out DIR{depth}",
            ),
            (
                "Repeat an owner's part, at that owner",
                "fedseal audit owner --home HOME --run RUN --out FILE",
            ),
            (
                "Plant faults in the installed code and see that the audit finds each",
                "fedseal audit selftest",
            ),
            ("Compute what the plan costs, round by round", "fedseal privacy plan plan.toml"),
        )
    ]
