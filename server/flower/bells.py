"""Waking tasks that wait for something by its name."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


class Bells:
    """Wakes who waits for something, in one event loop."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Event]] = {}

    def ring(self, name: str) -> None:
        """Wake everyone who waits for this name."""
        for event in self._waiting.get(name, ()):
            event.set()

    def ring_all(self) -> None:
        """Wake everyone who waits for anything."""
        for name in self._waiting:
            self.ring(name)

    @contextmanager
    def listening(self, name: str) -> Iterator[asyncio.Event]:
        """Yield an event that is set whenever the name is rung."""
        event = asyncio.Event()
        listeners = self._waiting.setdefault(name, set())
        listeners.add(event)
        try:
            yield event
        finally:
            listeners.discard(event)
            if not listeners:
                self._waiting.pop(name, None)
