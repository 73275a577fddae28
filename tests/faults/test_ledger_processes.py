"""Many processes and threads, runs and servers, one dataset: the caps hold, whoever is killed meanwhile."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_ledger_crash import PLAN, POLICY, ROUNDS
from test_ledger_power import folder, place

from client.ledger import Ledger
from client.policy import Policy
from protocol.accounting import epsilon_after
from protocol.errors import BudgetExhausted, LedgerConflict

__all__ = ["folder"]

PROCESSES, THREADS = 4, 2
RUNS = [f"{number:064x}" for number in range(PROCESSES * THREADS)]


@pytest.fixture(scope="module", autouse=True)
def _prices() -> None:
    for rounds in range(ROUNDS + 1):
        epsilon_after(PLAN, rounds)


def price(rounds: int) -> float:
    epsilon = epsilon_after(PLAN, rounds)
    assert epsilon is not None
    return epsilon


def capped(epsilon_total: float) -> Policy:
    budget = POLICY.budget.model_copy(
        update={"epsilon_total": epsilon_total, "epsilon_per_run": epsilon_total}
    )
    return POLICY.model_copy(update={"budget": budget})


class Crowd:
    """Forked children that carry out `work`, and the words that they tell through one pipe."""

    def __init__(self, work: Callable[[int, Callable[[str], None]], None]) -> None:
        self.told: list[str] = []
        self.children: list[int] = []
        reader, writer = os.pipe()
        for number in range(PROCESSES):
            child = os.fork()
            if child == 0:
                os.close(reader)
                try:
                    work(number, lambda word: os.write(writer, f"{word}\n".encode()))
                    os._exit(0)
                finally:
                    os._exit(99)
            self.children.append(child)
        os.close(writer)
        self._listener = threading.Thread(target=self._listen, args=(reader,))
        self._listener.start()

    def _listen(self, reader: int) -> None:
        with os.fdopen(reader) as pipe:
            self.told.extend(pipe.read().split())

    def wait(self) -> list[int]:
        """Wait for the end of all; returns how each ended, as `os.waitstatus_to_exitcode` does."""
        ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in self.children]
        self._listener.join()
        return ends


def spend(folder: Path, policy: Policy, run: str, tell: Callable[[str], None]) -> None:
    """Spend from one run until a cap says no; tells of each round before its data would be read."""
    ledger = Ledger.open(place(folder)[0], policy, place(folder)[1])
    try:
        for attempt in range(1, ROUNDS + 1):
            ledger.reserve(run, attempt)
            tell(run)
            if attempt % 3 == 0:
                ledger.commit(run, attempt)
    except BudgetExhausted:
        tell("exhausted")
    finally:
        ledger.close()


def in_threads(folder: Path, policy: Policy) -> Callable[[int, Callable[[str], None]], None]:
    def work(number: int, tell: Callable[[str], None]) -> None:
        runs = RUNS[number * THREADS : (number + 1) * THREADS]
        threads = [threading.Thread(target=spend, args=(folder, policy, run, tell)) for run in runs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return work


def begin(folder: Path) -> None:
    ledger = Ledger.open(place(folder)[0], POLICY, place(folder)[1])
    for run in RUNS:
        ledger.open_run(run, PLAN)
    ledger.close()


def test_processes_and_threads_together_stay_below_the_total(folder: Path) -> None:
    begin(folder)
    total = price(ROUNDS) * 0.9  # no run alone can end before a cap says no
    crowd = Crowd(in_threads(folder, capped(total)))
    assert crowd.wait() == [0] * PROCESSES
    counts = Counter(crowd.told)
    assert counts.pop("exhausted") == len(RUNS)
    spent = sum(price(rounds) for rounds in counts.values())
    assert total - price(1) < spent <= total * (1 + 1e-9)
    ledger = Ledger.open(place(folder)[0], POLICY, place(folder)[1])
    assert ledger.totals().epsilon == pytest.approx(spent)
    assert {run: ledger.spent(run).epsilon for run in counts} == {
        run: price(rounds) for run, rounds in counts.items()
    }
    ledger.close()


def test_processes_that_are_killed_at_any_time_leave_the_caps_whole(folder: Path) -> None:
    begin(folder)
    total, moments = len(RUNS) * price(4), random.Random(21)
    told_before = Counter[str]()
    for _ in range(6):
        crowd = Crowd(at_random(folder, capped(total)))
        for child in crowd.children:
            time.sleep(moments.uniform(0.0, 0.03))
            os.kill(child, signal.SIGKILL)
        crowd.wait()
        ledger = Ledger.open(place(folder)[0], POLICY, place(folder)[1])
        told_before.update(crowd.told)
        assert ledger.totals().epsilon <= total * (1 + 1e-9)
        for run, rounds in told_before.items():
            assert ledger.spent(run).sealed + ledger.spent(run).reserved >= rounds
        ledger.close()
    assert told_before


def at_random(folder: Path, policy: Policy) -> Callable[[int, Callable[[str], None]], None]:
    """Spend from runs at random, beside all other processes, until a cap says no."""

    def work(number: int, tell: Callable[[str], None]) -> None:
        ledger = Ledger.open(place(folder)[0], policy, place(folder)[1])
        choice = random.Random(number)
        while True:
            run = choice.choice(RUNS)
            spent = ledger.spent(run)
            try:
                ledger.reserve(run, spent.sealed + spent.reserved + spent.void + 1)
            except LedgerConflict:
                continue  # another process took the number first
            except BudgetExhausted:
                return
            tell(run)

    return work


def test_two_servers_that_open_runs_at_once_are_both_counted(folder: Path) -> None:
    policy = capped(price(PLAN.paid_rounds) * 1.5)

    def work(number: int, tell: Callable[[str], None]) -> None:
        ledger = Ledger.open(place(folder)[0], policy, place(folder)[1])
        try:
            ledger.open_run(RUNS[number], PLAN)
            for attempt in range(1, PLAN.paid_rounds + 1):
                ledger.reserve(RUNS[number], attempt)
                tell(RUNS[number])
        except BudgetExhausted:
            tell("exhausted")
        ledger.close()

    crowd = Crowd(work)
    assert crowd.wait() == [0] * PROCESSES
    counts = Counter(word for word in crowd.told if word != "exhausted")
    assert sum(price(rounds) for rounds in counts.values()) <= policy.budget.epsilon_total * (1 + 1e-9)


def test_a_record_that_is_appended_to_the_data_resets_nothing(folder: Path) -> None:
    """The budget belongs to the dataset's name; the data file's content never enters into it."""
    data = folder / POLICY.data_file
    np.savez(data, x=np.zeros((3, 2)))
    begin(folder)
    ledger = Ledger.open(place(folder)[0], POLICY, place(folder)[1])
    ledger.reserve(RUNS[0], 1)
    before = ledger.totals()
    ledger.close()
    np.savez(data, x=np.zeros((4, 2)))
    again = Ledger.open(place(folder)[0], POLICY, place(folder)[1])
    assert again.totals() == before
    again.close()


def test_a_second_handle_does_not_lose_the_locks_of_the_first(folder: Path) -> None:
    """Closing any descriptor of a file drops the process's POSIX locks on it; the log must survive that."""
    begin(folder)
    reader, writer = os.pipe()

    def work(number: int, tell: Callable[[str], None]) -> None:
        # forked before the handles below are opened, because SQLite's own state must not cross a fork
        os.read(reader, 1)
        Ledger.open(place(folder)[0], POLICY, place(folder)[1]).close()

    crowd = Crowd(work)
    first, second = (Ledger.open(place(folder)[0], POLICY, place(folder)[1]) for _ in range(2))
    os.write(writer, b"." * PROCESSES)
    assert crowd.wait() == [0] * PROCESSES
    first.reserve(RUNS[0], 1)
    second.reserve(RUNS[1], 1)
    assert place(folder)[0].with_name("ledger.db-wal").exists()
    for ledger in (first, second):
        ledger.close()
    last = Ledger.open(place(folder)[0], POLICY, place(folder)[1])
    assert last.spent(RUNS[0]).reserved == last.spent(RUNS[1]).reserved == 1
    last.close()
    os.close(reader)
    os.close(writer)
