"""The runs of a coordinator's home: opening one that is there, and noting how one ended."""

from __future__ import annotations

import os
import re
from pathlib import Path

from crypto.auditlog import FOLDER, AuditLog
from protocol.errors import FedsealError, RunFailed, RunInterrupted
from server.home import HOME_VARIABLE, RUNS
from server.store import RunStore, now_text


def open_run(home: Path, run: str) -> RunStore:
    """Open the folder of an earlier run.

    Args:
        home: The coordinator's home.
        run: Name of the folder, or a path to it.

    Raises:
        RunFailed: There is no such run.
    """
    folder = home / RUNS / Path(run).name
    if not (folder / "run.db").is_file():
        raise RunFailed("there is no such run below this home; fedseal runs lists them")
    return RunStore(folder)


def open_run_folder(name: str) -> RunStore:
    """Open a run folder of this coordinator by its name.

    Raises:
        RunFailed: The name is not one of a folder below the coordinator's home.
    """
    home = os.environ.get(HOME_VARIABLE, "")
    if not home or not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,90}", name):
        raise RunFailed("the run's configuration names no run of this coordinator")
    folder = Path(home) / RUNS / name
    if not folder.is_dir():
        raise RunFailed("the run's configuration names no run of this coordinator")
    return RunStore(folder, AuditLog(Path(home) / FOLDER))


def record_end(store: RunStore, error: FedsealError) -> None:
    """Record that an error ended a run; going on after any other than a final one is safe."""
    state = "failed" if isinstance(error, RunFailed) else "paused"
    with store.transaction():
        store.set("state", state)
        store.set("problem", {"code": error.code, "detail": str(error), "text": error.explain()})
        store.set("finished_at", now_text())
        store.event("ended", state=state, code=error.code)


def note_interruption(store: RunStore) -> None:
    """Record a run as paused that says it is running although no process carries it out any more."""
    if store.get("state") == "running" and not store.is_carried_out():
        record_end(store, RunInterrupted())
