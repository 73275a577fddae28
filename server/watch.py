"""Watching a run from outside the process that carries it out."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

from protocol.errors import ModelRanAway, RunFailed, RunInterrupted, RunPaused, ServerUnavailable
from server.runs import note_interruption
from server.store import RunStore

BEGIN_S: Final = 60.0
"""How long a coordinator may take until it begins a run, in seconds."""

_POLL_S: Final = 0.1
Listener = Callable[[str, dict[str, Any]], None]


def follow(
    store: RunStore,
    listen: Listener,
    after: int = 0,
    coordinator_ended: Callable[[], bool] = lambda: False,
    begin_s: float = BEGIN_S,
) -> None:
    """Pass a run's events on until it has ended, however it ends.

    Args:
        store: The run.
        listen: Called with kind and facts of each event.
        after: Last event that is not of interest any more.
        coordinator_ended: Tells whether the coordinator's process has ended, where somebody knows.
        begin_s: How long the coordinator may take until it begins, in seconds.

    Raises:
        RunPaused: It waits for owners, or was stopped; it can be resumed.
        RunInterrupted: The process that carried it out is gone; it can be resumed.
        RunFailed: It ended before its last round for good.
        ModelRanAway: It ended so because its model is not finite or too large.
        ServerUnavailable: The coordinator did not begin it within `begin_s`.
    """
    deadline = time.monotonic() + begin_s
    while True:
        # the state is read before the events, so that none of an ended run is missed
        state, ended = store.get("state"), coordinator_ended()
        for identifier, _moment, kind, facts in store.events(after):
            after = identifier
            listen(kind, facts)
        if state == "finished":
            return
        if state in ("failed", "paused"):
            _raise_end(state, store.get("problem") or {})
        if ended:
            raise RunInterrupted
        if state == "running":
            note_interruption(store)
        elif time.monotonic() > deadline:
            raise ServerUnavailable(f"the coordinator did not begin the run in {begin_s:.0f} s")
        time.sleep(_POLL_S)


def _raise_end(state: str, problem: dict[str, Any]) -> None:
    detail = str(problem.get("detail") or problem.get("code"))
    if problem.get("code") == RunInterrupted.code:
        raise RunInterrupted
    if problem.get("code") == ModelRanAway.code:
        raise ModelRanAway
    raise RunPaused(detail) if state == "paused" else RunFailed(detail)


def last_event(store: RunStore) -> int:
    """Return the number of the newest event, 0 before the first."""
    return max((identifier for identifier, *_ in store.events()), default=0)
