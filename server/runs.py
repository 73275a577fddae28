"""The runs of a coordinator's home: opening one that is there, and noting how one ended."""

from __future__ import annotations

import logging
import os
import re
import sqlite3
import threading
import time
from contextlib import closing, suppress
from pathlib import Path

from crypto.auditlog import FOLDER, AuditLog
from protocol.errors import FedsealError, NameAmbiguous, NameUnknown, RunFailed, RunInterrupted
from protocol.storage import translated
from server.home import HOME_VARIABLE, RUNS, digits_of
from server.store import RunStore, now_text

_LOG = logging.getLogger("fedseal.server")
_POLL_S = 0.05


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


def note_interruption(store: RunStore) -> bool:
    """Record a run as paused that says it is running although no process carries it out any more.

    Returns:
        Whether it was.
    """
    claims = store.get("claims", 0)
    if store.get("state") != "running" or store.is_carried_out():
        return False
    with store.transaction():
        # since the look at the lock it may have ended, or gone on in another process
        if store.get("state") != "running" or store.get("claims", 0) != claims:
            return False
        record_end(store, RunInterrupted())
    return True


class BegunRuns:
    """The runs that a coordinator has begun and whose end it has not seen. Threads may share it.

    Args:
        home: The coordinator's home.
        log: Its log of acts.
    """

    def __init__(self, home: Path, log: AuditLog) -> None:
        self._folder = home / RUNS
        self._log = log
        self._lock = threading.Lock()
        # a coordinator that starts carries out none of the runs that are there
        self._names = {file.parent.name for file in self._folder.glob("*/run.db")}

    def begun(self, name: str) -> None:
        """Take note of a run that was handed to Flower."""
        with self._lock:
            self._names.add(name)

    def note_ends(self, *, lost: bool = False) -> list[int]:
        """Record the interruption of each run whose process is gone.

        Args:
            lost: Say so too of the runs that wait for a process, which none will get.

        Returns:
            Flower's ids of the runs that waited.
        """
        waited: list[int] = []
        with self._lock:
            for name in sorted(self._names):
                try:
                    ended = self._note_end(name, waited, lost=lost)
                except (FedsealError, OSError, sqlite3.Error):
                    _LOG.warning("the record of run %s cannot be read; it is left as it is", name)
                    ended = True
                if ended:
                    self._names.discard(name)
        return waited

    def note_all(self, wait_s: float) -> None:
        """Record the interruption of every run, whose processes are about to end.

        Args:
            wait_s: Longest wait for these processes.
        """
        deadline = time.monotonic() + wait_s
        self.note_ends(lost=True)
        while self._names and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            self.note_ends(lost=True)

    def _note_end(self, name: str, waited: list[int], *, lost: bool) -> bool:
        if not (self._folder / name / "run.db").is_file():
            return True
        store = RunStore(self._folder / name, self._log)
        try:
            note_interruption(store)
            number, waits = store.get("flower_run"), store.get("state") == "submitted"
            if waits and number is None:
                # prepared, and not handed to Flower yet
                return True
            if lost and waits and not store.is_carried_out():
                record_end(store, RunInterrupted())
                waited.append(int(number))
            return store.get("state") not in ("submitted", "running")
        finally:
            store.close()
