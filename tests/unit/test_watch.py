"""Following a run from outside, and what the terminal says of it."""

from __future__ import annotations

from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from console.progress import RunProgress
from crypto.auditlog import AuditLog
from protocol.errors import (
    NameUnknown,
    QuorumNotMet,
    RunBusy,
    RunFailed,
    RunInterrupted,
    RunPaused,
    ServerUnavailable,
)
from server.runs import BegunRuns, note_interruption, open_run
from server.store import RunStore
from server.watch import follow, last_event


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    opened = RunStore(tmp_path / "runs" / "one")
    yield opened
    opened.close()


def seen(store: RunStore, after: int = 0, **options: Any) -> list[str]:
    kinds: list[str] = []
    follow(store, lambda kind, _facts: kinds.append(kind), after, **options)
    return kinds


def test_all_events_of_a_finished_run_are_passed_on(store: RunStore) -> None:
    store.event("joined", owners=3)
    before = last_event(store)
    store.event("round", round=1)
    store.set("state", "finished")
    assert seen(store) == ["joined", "round"]
    assert seen(store, before) == ["round"]


@pytest.mark.parametrize(("state", "error"), [("paused", RunPaused), ("failed", RunFailed)])
def test_the_end_of_a_run_is_raised_with_its_cause(
    store: RunStore, state: str, error: type[Exception]
) -> None:
    cause = QuorumNotMet("2 owners are there, 3 are needed")
    store.set("state", state)
    store.set("problem", {"code": cause.code, "detail": str(cause)})
    with pytest.raises(error, match="2 owners are there, 3 are needed"):
        seen(store)


def test_a_run_whose_process_is_gone_does_not_hang(store: RunStore) -> None:
    store.set("state", "running")
    with pytest.raises(RunInterrupted):
        seen(store)
    assert store.get("state") == "paused"


def test_a_run_under_way_is_not_noted_as_interrupted(store: RunStore) -> None:
    carrier = RunStore(store.folder)
    carrier.claim()
    store.set("state", "running")
    note_interruption(store)
    assert store.get("state") == "running"
    with pytest.raises(RunInterrupted):
        seen(store, coordinator_ended=lambda: True)
    carrier.close()
    note_interruption(store)
    assert store.get("state") == "paused"


def test_a_run_that_never_begins_does_not_hang(store: RunStore) -> None:
    store.set("state", "submitted")
    with pytest.raises(ServerUnavailable, match="did not begin the run in 0 s"):
        seen(store, begin_s=0.2)


def test_one_process_at_a_time_claims_a_run(store: RunStore) -> None:
    store.claim()
    store.claim()
    other = RunStore(store.folder)
    assert other.is_carried_out()
    with pytest.raises(RunBusy):
        other.claim()
    store.close()
    assert not other.is_carried_out()
    other.claim(wait_s=1.0)
    other.close()


def test_what_a_transaction_wrote_is_there_wholly_or_not_at_all(store: RunStore) -> None:
    def interrupted() -> None:
        with store.transaction():
            store.set("session", "s")
            with store.transaction():
                store.put_owner("f", {"sealed": 1})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (store.get("session"), store.owners()) == (None, {})


@pytest.mark.parametrize("name", ["two", "one/../two", ""])
def test_a_run_that_is_not_there_is_refused(store: RunStore, tmp_path: Path, name: str) -> None:
    opened = open_run(tmp_path, str(store.folder))
    assert opened.folder == store.folder, "a path to the folder is as good as its name"
    opened.close()
    with pytest.raises(NameUnknown, match="there are: "):
        open_run(tmp_path, name)


def test_the_terminal_says_who_is_missing_and_why() -> None:
    console = Console(file=StringIO(), width=120)
    progress = RunProgress(console, rounds=2, protected=True)
    progress.show("absent", {"owner": "clinic", "reason": "no answer"})
    progress.show("waiting", {"owners": 2, "needed": 3})
    progress.show("returned", {"owner": "clinic", "how": "connected again"})
    progress.show("excluded", {"owner": "clinic", "reason": "made 2 sealed attempts void"})
    progress.show("objects", {"owner": "clinic"})
    progress.show("awaiting_list", {"seconds": 60.0})
    progress.show("resumed", {"rounds": 1, "owners": 3})
    progress.show("session", {"owners": 3, "members": [], "round": 1, "new": ["lab"]})
    progress.show("session", {"owners": 2, "members": [], "round": 2, "new": []})
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert [line.strip() for line in text.splitlines()] == [
        "clinic is left out until it returns: no answer",
        "waiting for owners: 2 are there, 3 are needed",
        "clinic is back: connected again",
        "clinic is left out of the run: made 2 sealed attempts void",
        "clinic refuses another's certificate, and is left out until there is news of it",
        "waiting up to 60 s for the newest revocation list (fedseal home crl)",
        "going on after round 1 with the same keys",
        "from round 2 on, 3 owners agreed on keys that the coordinator cannot use; new: lab",
        "from round 3 on, 2 owners agreed on keys that the coordinator cannot use",
    ]


def begun_runs(folder: Path) -> BegunRuns:
    return BegunRuns(folder, AuditLog(folder / "log"))


def test_a_coordinator_notes_which_runs_have_no_process(store: RunStore, tmp_path: Path) -> None:
    """Those that ran, and where no process can come any more those that wait for one."""
    waiting, prepared = RunStore(tmp_path / "runs" / "two"), RunStore(tmp_path / "runs" / "three")
    store.set("state", "running")
    for one in (waiting, prepared):
        one.set("state", "submitted")
    waiting.set("flower_run", 17)
    runs = begun_runs(tmp_path)
    assert runs.note_ends() == []
    assert [one.get("state") for one in (store, waiting, prepared)] == ["paused", "submitted", "submitted"]
    assert store.get("problem")["code"] == RunInterrupted.code
    assert runs.note_ends(lost=True) == [17]
    assert [one.get("state") for one in (waiting, prepared)] == ["paused", "submitted"]
    assert list(prepared.events()) == []
    waiting.close()
    prepared.close()


def test_a_run_that_is_carried_out_or_taken_up_again_is_left_alone(store: RunStore, tmp_path: Path) -> None:
    store.claim()
    store.set("state", "running")
    runs = begun_runs(tmp_path)
    runs.note_ends(lost=True)
    assert store.get("state") == "running"
    other = RunStore(store.folder)
    with pytest.MonkeyPatch.context() as patch:
        # another process takes the run up between the look at its lock and the note
        patch.setattr(other, "is_carried_out", lambda: other.set("claims", 9))
        assert not note_interruption(other)
    assert store.get("state") == "running"
    other.close()
    store.close()
    runs.note_ends()
    again = RunStore(tmp_path / "runs" / "one")
    assert again.get("state") == "paused"
    again.close()


def test_a_damaged_record_does_not_keep_a_coordinator_from_starting(tmp_path: Path) -> None:
    (tmp_path / "runs" / "bad").mkdir(parents=True)
    (tmp_path / "runs" / "bad" / "run.db").write_bytes(b"no database at all" * 100)
    assert begun_runs(tmp_path).note_ends(lost=True) == []
