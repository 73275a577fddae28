"""The runs of a coordinator's home: opening one that is there, and noting how one ended."""

from __future__ import annotations

import os
import re
from contextlib import closing, suppress
from pathlib import Path

from crypto.auditlog import FOLDER, AuditLog
from protocol.errors import FedsealError, NameAmbiguous, NameUnknown, RunFailed, RunInterrupted
from protocol.storage import translated
from server.home import HOME_VARIABLE, RUNS
from server.store import RunStore, digits_of, now_text


def run_named(home: Path, name: str) -> str:
    """Return the name of a run's folder.

    Args:
        home: The coordinator's home.
        name: The folder's name, a path to it, or the beginning of it; or the run's identifier, of which
            owners know the run, or the beginning of that. It must fit one run alone.

    Raises:
        NameUnknown: It fits none; those that exist are listed.
        NameAmbiguous: It fits several, which are listed.
    """
    wanted = Path(name).name
    with translated(str(home / RUNS)):
        names = sorted(file.parent.name for file in (home / RUNS).glob("*/run.db"))
    if wanted in names:
        return wanted
    found = [one for one in names if wanted and one.startswith(wanted)]
    found = found or [one for one in names if _is_identified(home / RUNS / one, wanted)]
    if len(found) == 1:
        return found[0]
    if found:
        raise NameAmbiguous(f"{wanted} is the beginning of {', '.join(found)}")
    raise NameUnknown(f"no run {wanted}; there are: {', '.join(names) or 'none'}")


def _is_identified(folder: Path, wanted: str) -> bool:
    """Tell whether a run has an identifier that begins with what is wanted."""
    if not re.fullmatch(r"[0-9a-f]{4,64}", wanted):
        return False
    digits = digits_of(folder.name)
    if digits and len(wanted) <= len(digits):
        return digits.startswith(wanted)
    # an earlier version's folder does not end with the identifier, and more digits are in the record alone
    with suppress(FedsealError), closing(RunStore.existing(folder)) as store:
        return str(store.get("run", "")).startswith(wanted)
    return False


def open_run(home: Path, run: str) -> RunStore:
    """Open the folder of an earlier run.

    Args:
        home: The coordinator's home.
        run: A name as `run_named` takes it.

    Raises:
        NameUnknown, NameAmbiguous: It is not the name of one run.
        FileDamaged: The run's record is damaged.
    """
    return RunStore.existing(home / RUNS / run_named(home, run))


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
    return RunStore.existing(folder, AuditLog(Path(home) / FOLDER))


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
