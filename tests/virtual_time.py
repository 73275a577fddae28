"""A clock for the coordinator that passes only when it waits, so that deadlines cost a test no time."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

_STEP_S = 1e-4


class VirtualTime:
    """Takes the place of the module `time`: every look at the clock is a tenth of a millisecond."""

    def __init__(self) -> None:
        self._now = 1_000.0

    def monotonic(self) -> float:
        self._now += _STEP_S
        return self._now

    def time(self) -> float:
        return self.monotonic()

    def sleep(self, seconds: float) -> None:
        self._now += max(0.0, seconds)


@contextmanager
def virtual_time() -> Iterator[VirtualTime]:
    """Let all loaded modules of the coordinator use one virtual clock inside the block."""
    clock = VirtualTime()
    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith("server.") and getattr(module, "time", None) is time:
                patch.setattr(module, "time", clock)
        yield clock
