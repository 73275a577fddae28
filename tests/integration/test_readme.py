"""The commands of the README, run as they stand: only the port is a free one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from real_federation import wait_until

from server.listeners.sockets import free_port

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(sys.executable).parent


def blocks() -> list[list[str]]:
    """Return the lines of the README's shell blocks."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return [block.strip().splitlines() for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)]


class Terminals:
    """Terminals in one folder: commands that end, and commands that go on."""

    def __init__(self, folder: Path) -> None:
        (folder / "scenarios").symlink_to(ROOT / "scenarios")
        self._folder = folder
        self._port = str(free_port())
        self._environment = os.environ | {
            "FEDSEAL_PASSPHRASE": "a passphrase for the README only",
            "PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}",
        }
        self._running: list[subprocess.Popen[bytes]] = []

    def run(self, line: str) -> str:
        """Run a command to its end, which must be good, and return what it printed."""
        done = subprocess.run(
            line.replace("8443", self._port).split(),
            cwd=self._folder,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode in ((0, 2) if "audit verify" in line else (0,)), done.stdout + done.stderr
        return done.stdout

    def start(self, line: str) -> None:
        """Start a command that goes on."""
        with (self._folder / f"log-{len(self._running)}").open("wb") as log:
            arguments = line.replace("8443", self._port).split()
            self._running.append(
                subprocess.Popen(arguments, cwd=self._folder, env=self._environment, stdout=log, stderr=log)
            )

    def close(self) -> list[int]:
        """Stop what goes on; returns the exit statuses."""
        for process in self._running:
            process.terminate()
        return [process.wait(30) for process in self._running]


@pytest.fixture
def terminals(tmp_path: Path) -> Iterator[Terminals]:
    opened = Terminals(tmp_path)
    yield opened
    opened.close()


def test_a_newcomer_who_follows_the_readme_gets_a_verified_model(
    terminals: Terminals, tmp_path: Path
) -> None:
    *preparations, parties, run = blocks()
    for line in [line for block in preparations for line in block]:
        terminals.run(line)
    for line in parties:
        terminals.start(line)
    wait_until((tmp_path / "coordinator" / "addresses.json").exists, 90, "the coordinator is ready")
    submitted, ledger, explained, package, report, log = (terminals.run(line) for line in run)
    assert "12/12" in submitted
    assert "chain verified" in ledger
    assert "epsilon" in explained
    assert "verified: digits" in package
    assert "INCONCLUSIVE" in report
    assert "acts form one chain" in log
    assert terminals.close() == [0, 0, 0, 0]
