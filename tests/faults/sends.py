"""Steps of a node at which a part of its sealed update is on the wire."""

from __future__ import annotations

from typing import Any

import httpcore._backends.sync as wire
import httpx
from steps import Fault, Setter, at

FRAMES_BYTES = 10_000
"""Less than one frame, more than any other request of a small run."""


def _sealed(setter: Setter, fault: Fault) -> dict[str, bool]:
    """Return a note that says whether the second attempt's update was sealed, and nothing since."""
    from client.store import StateStore

    note = {"sealed": False}

    def look(_store: Any, saved: Any, **_options: Any) -> bool:
        note["sealed"] = "2" in saved.sealed and "2" not in saved.opened
        return False

    at(StateStore, "save", look)(setter, fault)
    return note


def half_sent(setter: Setter, fault: Fault) -> None:
    """Die when half of the frames have left this machine."""
    note, original = _sealed(setter, fault), wire.SyncStream.write

    def write(stream: Any, buffer: bytes, timeout: float | None = None) -> None:
        if note["sealed"] and len(buffer) > FRAMES_BYTES:
            original(stream, buffer[: len(buffer) // 2], timeout)
            fault.strike()
            original(stream, buffer[len(buffer) // 2 :], timeout)
            return
        original(stream, buffer, timeout)

    setter.setattr(wire.SyncStream, "write", write)


def sent(setter: Setter, fault: Fault) -> None:
    """Die when the coordinator's machine has taken all frames."""
    note, original = _sealed(setter, fault), httpx.Client.send

    def send(client: Any, request: Any, **options: Any) -> Any:
        response = original(client, request, **options)
        if note["sealed"] and len(request.content) > FRAMES_BYTES:
            fault.strike()
        return response

    setter.setattr(httpx.Client, "send", send)
