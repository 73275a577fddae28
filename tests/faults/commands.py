"""Commands that are run in this process, through the same `main` that the program starts with."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest

import fedseal

CODE = re.compile(r"FS-[A-Z]+-\d\d")
Cli = Callable[..., "Outcome"]


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit status, standard output, standard error."""

    status: int
    out: str
    err: str

    @property
    def code(self) -> str:
        """The code of the error that ended it, empty without one."""
        found = CODE.match(self.err)
        return "" if found is None else found[0]


def command_line(
    patch: pytest.MonkeyPatch, captured: pytest.CaptureFixture[str], environment: Mapping[str, str]
) -> Cli:
    """Return a function that runs a command; the signal handlers of the tests stay as they are."""
    patch.setattr(os, "environ", {**os.environ, "TERM": "dumb", "NO_COLOR": "1", **environment})

    def run(*arguments: object) -> Outcome:
        patch.setattr(sys, "argv", ["fedseal", *map(str, arguments)])
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
        try:
            fedseal.main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return Outcome(status, *captured.readouterr())

    return run
