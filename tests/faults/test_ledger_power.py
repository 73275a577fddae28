"""Cut a ledger off at every write it makes, by a kill or a loss of power: nothing is ever under-counted.

The oracle knows only which operations were begun and which had returned. A recovered ledger must hold
exactly the returned ones, or these and the one that was under way.
"""

from __future__ import annotations

import ast
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from recorder import Disk, Event, Recorder, recording
from test_ledger_crash import PLAN, POLICY, ROUNDS, RUN

import client.ledger
from client.ledger import Ledger
from client.ledger_files import HeadCopy
from protocol.accounting import epsilon_after
from protocol.errors import LedgerCorrupt, LedgerRollback

OTHER = "22" * 32
LONG_POINTS = 20_000

Operation = tuple[str, str, int]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where syncs cost nothing; what they would do is what the recorder sees."""
    memory = Path("/dev/shm")
    made = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else tmp_path))
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="module", autouse=True)
def _prices() -> None:
    for rounds in range(ROUNDS + 1):
        epsilon_after(PLAN, rounds)


@dataclass
class Oracle:
    """The operations that returned, and the one that is under way."""

    returned: list[Operation] = field(default_factory=list)
    begun: Operation | None = None

    def take(self, mark: tuple[str, Operation]) -> None:
        event, operation = mark
        if event == "begun":
            self.begun = operation
        else:
            self.returned, self.begun = [*self.returned, operation], None

    def charged(self, run: str) -> int:
        """Count the attempts whose data may have been read and that nobody has begun to refund."""
        operations = [*self.returned, *([self.begun] if self.begun and self.begun[0] == "void" else [])]
        reserved = {attempt for kind, name, attempt in operations if (kind, name) == ("reserve", run)}
        refunded = {attempt for kind, name, attempt in operations if (kind, name) == ("void", run)}
        return len(reserved - refunded)


def place(folder: Path) -> tuple[Path, Path]:
    return folder / "ledger" / "ledger.db", folder / "identity" / "ledger.head"


def put(folder: Path, files: dict[str, bytes]) -> None:
    """Make a home that holds exactly these files."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        target = place(folder)[1 if name.endswith(".head") else 0].with_name(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def recovered(folder: Path) -> tuple[list[Operation], dict[str, float | None]]:
    """Open what a crash left; returns its operations and what each run is said to have cost."""
    ledger = Ledger.open(place(folder)[0], POLICY, place(folder)[1])
    try:
        bodies = [record.body for record in ledger.records()][1:]
        operations = [(body["kind"], body["run"], body.get("attempt", 0)) for body in bodies]
        runs = [run for kind, run, _ in operations if kind == "open_run"]
        return operations, {run: ledger.spent(run).epsilon for run in runs}
    finally:
        ledger.close()


def check(folder: Path, files: dict[str, bytes], oracle: Oracle) -> None:
    put(folder, files)
    check_recovery(*recovered(folder), oracle)


def check_recovery(operations: list[Operation], epsilons: dict[str, float | None], oracle: Oracle) -> None:
    allowed = [oracle.returned, [*oracle.returned, *([oracle.begun] if oracle.begun else [])]]
    assert operations in allowed
    for run, epsilon in epsilons.items():
        assert epsilon >= epsilon_after(PLAN, oracle.charged(run))


def work(
    folder: Path,
    choice: random.Random,
    count: int,
    history: list[Operation],
    recorder: Recorder | None = None,
) -> Recorder:
    """Carry out random operations, as two handles of two processes would, and record every write."""
    recorder = recorder or Recorder()
    with recording(recorder):
        ledgers = [Ledger.open(place(folder)[0], POLICY, place(folder)[1])]
        for _ in range(count):
            if choice.random() < 0.15:
                ledgers.pop(choice.randrange(len(ledgers))).close()
            if not ledgers or choice.random() < 0.1:
                ledgers.append(Ledger.open(place(folder)[0], POLICY, place(folder)[1]))
            operation = _next(choice, history)
            recorder.mark(("begun", operation))
            _carry_out(choice.choice(ledgers), operation)
            recorder.mark(("returned", operation))
            history.append(operation)
        for ledger in ledgers:
            ledger.close()
    return recorder


def _next(choice: random.Random, history: list[Operation]) -> Operation:
    run = choice.choice((RUN, OTHER))
    if ("open_run", run, 0) not in history:
        return ("open_run", run, 0)
    settled = {(name, attempt) for kind, name, attempt in history if kind in ("commit", "void")}
    attempts = [attempt for kind, name, attempt in history if (kind, name) == ("reserve", run)]
    open_attempts = [attempt for attempt in attempts if (run, attempt) not in settled]
    full = len(attempts) >= ROUNDS
    if full and not open_attempts:
        return _next(choice, history)
    if open_attempts and (full or choice.random() < 0.5):
        return (choice.choice(("commit", "commit", "void")), run, choice.choice(open_attempts))
    return ("reserve", run, max(attempts, default=0) + 1)


def _carry_out(ledger: Ledger, operation: Operation) -> None:
    kind, run, attempt = operation
    if kind == "open_run":
        ledger.open_run(run, PLAN)
    else:
        getattr(ledger, kind)(run, attempt)


@dataclass
class Campaign:
    """Generations of crash, recovery and further work, with the number of points that were checked."""

    folder: Path
    choice: random.Random
    points: int = 0

    def generation(
        self, files: dict[str, bytes], history: list[Operation], operations: int, losses: int
    ) -> tuple[dict[str, bytes], list[Operation]]:
        """Work on from the files, check each crash point, and return what one of them left.

        Args:
            files: What the last crash left.
            history: The operations that are in them.
            operations: How many more to carry out.
            losses: Different losses of power that are tried at each write.
        """
        home, trial = self.folder / "home", self.folder / "trial"
        put(home, files)
        recorder = work(home, self.choice, operations, list(history))
        disk, oracle = Disk(files), Oracle(list(history))
        left, number = (files, list(history)), self.choice.randrange(len(recorder.events))
        for position, event in enumerate(recorder.events):
            disk.play(event)
            if event.kind == "mark":
                oracle.take(event.mark)
                continue
            images = [disk.after_kill(), *(disk.after_power_loss(self.choice) for _ in range(losses))]
            for image in images:
                check(trial, image, oracle)
                self.points += 1
            if position <= number:
                put(trial, images[-1])
                left = images[-1], recovered(trial)[0]
        return left


def test_a_crash_at_every_write_keeps_what_had_returned(folder: Path) -> None:
    campaign = Campaign(folder, random.Random(3))
    files: dict[str, bytes] = {}
    history: list[Operation] = []
    while campaign.points < 1_000:
        files, history = campaign.generation(files, history, operations=14, losses=1)
    assert history


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_twenty_thousand_crashes_keep_what_had_returned(folder: Path) -> None:
    started = time.monotonic()
    campaign = Campaign(folder, random.Random(5))
    files: dict[str, bytes] = {}
    history: list[Operation] = []
    while campaign.points < LONG_POINTS:
        if len(history) > 100:
            files, history = {}, []
        files, history = campaign.generation(files, history, operations=24, losses=5)
    print(f"{campaign.points} crash points in {time.monotonic() - started:.0f} s")


def cut_points(folder: Path, size_of: Callable[[int], list[int]]) -> int:
    """Cut the last frame of one transaction at chosen bytes; returns how many cuts were checked."""
    recorder = work(folder / "home", random.Random(8), 8, [])
    last = max(
        position
        for position, event in enumerate(recorder.events)
        if event.kind == "write" and event.file.endswith("-wal")
    )
    disk, oracle = Disk(), Oracle()
    for event in recorder.events[: last + 1]:
        if event.kind == "mark":
            oracle.take(event.mark)
        else:
            disk.play(event)
    sizes = size_of(len(recorder.events[last].data))
    for size in sizes:
        check(folder / "trial", disk.cut(recorder.events[last].file, size), oracle)
    return len(sizes)


def test_a_last_frame_cut_at_any_sector_is_not_a_record(folder: Path) -> None:
    assert cut_points(folder, lambda size: list(range(0, size + 1, 512))) == 9


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_last_frame_cut_at_any_byte_is_not_a_record(folder: Path) -> None:
    assert cut_points(folder, lambda size: list(range(size + 1))) == 4097


class Killer(Recorder):
    """Kills its process at the n-th event, and tells the parent about marks before that."""

    def __init__(self, number: int, pipe: int) -> None:
        super().__init__()
        self._left, self._pipe = number, pipe

    def add(self, event: Event) -> None:
        if event.kind == "mark":
            os.write(self._pipe, repr(event.mark).encode() + b"\n")
            return
        self._left -= 1
        if self._left < 0:
            os.kill(os.getpid(), signal.SIGKILL)


def killed(folder: Path, number: int, seed: int, history: list[Operation]) -> Oracle:
    """Let a child process work on the home until its n-th file call; returns what it had told."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            work(folder, random.Random(seed), 1_000, history, Killer(number, writer))
        finally:
            os._exit(99)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        marks = [ast.literal_eval(line.decode()) for line in pipe.read().splitlines()]
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    oracle = Oracle(list(history))
    for mark in marks:
        oracle.take(mark)
    return oracle


def kill_again_and_again(folder: Path, kills: int) -> None:
    choice = random.Random(13)
    history: list[Operation] = []
    for _ in range(kills):
        if len(history) > 60:
            shutil.rmtree(folder / "home")
            history = []
        oracle = killed(folder / "home", choice.randrange(80), choice.randrange(10**6), history)
        operations, epsilons = recovered(folder / "home")
        check_recovery(operations, epsilons, oracle)
        history = operations


def test_processes_killed_at_a_file_call_keep_what_had_returned(folder: Path) -> None:
    kill_again_and_again(folder, 100)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_thousands_of_killed_processes_keep_what_had_returned(folder: Path) -> None:
    kill_again_and_again(folder, 3_000)


def unsynced_database(monkeypatch: pytest.MonkeyPatch) -> None:
    original = client.ledger.connect

    def connect(path: Path) -> object:
        connection = original(path)
        connection.execute("PRAGMA synchronous = OFF")
        return connection

    monkeypatch.setattr("client.ledger.connect", connect)


def unsynced_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(copy: HeadCopy, data: bytes) -> None:
        temporary = copy._path.with_name(copy._path.name + ".tmp")
        temporary.write_bytes(data)
        temporary.replace(copy._path)

    monkeypatch.setattr(HeadCopy, "_replace", replace)


@pytest.mark.parametrize("fault", [unsynced_database, unsynced_copy])
def test_a_ledger_with_a_planted_fault_is_caught(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None]
) -> None:
    fault(monkeypatch)
    campaign = Campaign(folder, random.Random(3))
    with pytest.raises((AssertionError, LedgerCorrupt, LedgerRollback)):
        campaign.generation({}, [], operations=40, losses=8)
