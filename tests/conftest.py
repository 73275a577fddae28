"""What all tests share: keys that are derived once, and a table of the kill tests at the end."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import cycle
from typing import Any

import pytest

from crypto import vault

SALTS = 12
TABLE = ("who is killed", "at step", "owners of each finished round", "void attempts", "seconds")


@pytest.fixture(autouse=True, scope="session")
def keys_derived_once() -> Iterator[None]:
    """Derive the key of a passphrase and a salt once: tests make homes and open them in the same process.

    It is the same key, a tenth of a second earlier; other processes derive it themselves. Salts are
    taken from a few in turn, so that homes which have a passphrase in common need few keys.
    """
    salts = cycle([vault.new_salt() for _ in range(SALTS)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vault, "new_salt", lambda: next(salts))
        patch.setattr(vault, "_scrypt", lru_cache(maxsize=4096)(vault._scrypt))
        yield


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
