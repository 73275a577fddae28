"""What all tests share: keys that are derived once, who runs what, and a table of the kill tests."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, lru_cache
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler.loadscope import LoadScopeScheduling

from crypto import vault

ROOT = Path(__file__).parents[1]
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


@cache
def federated(file: str) -> bool:
    """Tell whether tests of a file, by its path from the project's root, use the real federation."""
    return "real: RealFederation" in (ROOT / file).read_text(encoding="utf-8")


class FilesAndFederation(LoadScopeScheduling):  # type: ignore[misc]
    """Gives each file to one process, and all files with the real federation to the same one.

    To start its four processes takes longer than most of these tests.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::", 1)[0]
        return "federation" if federated(file) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FilesAndFederation:
    """Take the place of xdist's own choice."""
    return FilesAndFederation(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the largest share begin first."""
    items.sort(key=lambda item: not federated(item.nodeid.split("::", 1)[0]))


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
