"""What the tests print at the end: the outcomes of the kill tests, as a table."""

from __future__ import annotations

from typing import Any

TABLE = ("who is killed", "at step", "owners of each finished round", "void attempts", "seconds")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print one line per kill; the properties of a test also come from other processes."""
    rows = [
        value
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == "killed" and report.when == "call"
    ]
    if rows:
        terminalreporter.section("killed at every step, and what became of the run")
        for row in (TABLE, ("---",) * len(TABLE), *sorted(rows, key=lambda row: row[0])):
            terminalreporter.write_line(f"| {' | '.join(map(str, row))} |")
