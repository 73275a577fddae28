"""Small file systems that really fill, or really forbid: a code that fits, nothing lost, and on it goes."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Cli, command_line
from real_federation import PASSPHRASE, small_plan
from test_ledger_crash import PLAN, POLICY, RUN

from client.app import make_app
from client.ledger import Ledger
from client.owner import Owner, open_owner
from client.spending import Totals
from crypto.auditlog import AuditLog
from crypto.trust import load_trust
from protocol.errors import AccessDenied, DiskFailed, DiskFull, StorageBusy
from protocol.optimizers import GlobalModel
from protocol.plan import Plan
from protocol.storage import read_written
from scenarios.federation import Federation, make_federation
from scenarios.grid import LocalGrid
from server.app import run_plan
from server.home import IDENTITY
from server.store import RunStore
from tasks.partition import digits
from tasks.resolve import resolve

SIZE_MIB = 8
ROOM = (0, 1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
"""What is left of the disk, in pages of 4 KiB, so that it fills at another step each time."""


class SmallDisk:
    """A file system of a few megabytes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / "filler"

    def fill(self, pages_left: int = 0) -> None:
        """Take all room but some pages."""
        with self._filler.open("wb", buffering=0) as file:
            with suppress(OSError):
                while file.write(bytes(4096)):
                    pass
            os.ftruncate(file.fileno(), max(0, os.fstat(file.fileno()).st_size - 4096 * pages_left))

    def free(self) -> None:
        self._filler.unlink()

    def remount(self, how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small file system")
    options = ["-t", "tmpfs", "-o", f"size={SIZE_MIB}m", "fedseal-test", str(folder)]
    mounted = subprocess.run(["mount", *options], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield SmallDisk(folder)
    if subprocess.run(["umount", str(folder)], capture_output=True).returncode:
        # something still has a file open there; the mount goes with the last of them
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    return command_line(monkeypatch, capsys, {"COLUMNS": "200"})


def opened(folder: Path) -> Ledger:
    return Ledger.open(folder / "ledger" / "ledger.db", POLICY, folder / "identity" / "ledger.head")


def test_a_ledger_on_a_full_disk_refuses_and_goes_on_when_there_is_space(disk: SmallDisk) -> None:
    """Wherever the write fails: what was recorded is there, nothing is called damaged, and none is lost."""
    ledger = opened(disk.folder)
    ledger.open_run(RUN, PLAN)
    attempt, refused = 0, 0
    for pages in ROOM:
        known = ledger.records()
        disk.fill(pages)
        for _ in range(2):
            attempt += 1
            with suppress(DiskFull):
                refused += 1
                ledger.reserve(RUN, attempt)
                ledger.void(RUN, attempt)
                refused -= 1
            assert ledger.records()[: len(known)] == known
        disk.free()
        again = opened(disk.folder)
        assert again.records()[: len(known)] == known
        again.close()
    assert refused >= 5
    assert "restore no backup" in DiskFull.remedy
    ledger.reserve(RUN, attempt + 1)
    ledger.close()


def test_a_ledger_that_cannot_even_be_opened_on_a_full_disk_is_not_called_damaged(disk: SmallDisk) -> None:
    opened(disk.folder).close()
    for pages in (0, 1, 4):
        disk.fill(pages)
        with suppress(DiskFull):
            opened(disk.folder).close()
        disk.free()
    disk.fill()
    with pytest.raises(DiskFull):
        opened(disk.folder / "another")
    disk.free()
    opened(disk.folder / "another").close()


def test_a_disk_that_became_read_only_is_access_denied(disk: SmallDisk) -> None:
    ledger = opened(disk.folder)
    ledger.open_run(RUN, PLAN)
    disk.remount("rw")
    known = ledger.records()
    ledger.close()
    disk.remount("ro")
    with pytest.raises(AccessDenied), closing(opened(disk.folder)) as again:
        again.reserve(RUN, 1)
    disk.remount("rw")
    with closing(opened(disk.folder)) as again:
        assert again.records() == known
        again.reserve(RUN, 1)


def test_a_database_that_stays_locked_is_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protocol.storage.BUSY_TIMEOUT_S", 0.1)
    ledger, store = opened(tmp_path), RunStore(tmp_path / "run")
    for path, write in (
        (tmp_path / "ledger" / "ledger.db", lambda: ledger.open_run(RUN, PLAN)),
        (tmp_path / "run" / "run.db", lambda: store.set("state", "running")),
    ):
        holder = sqlite3.connect(path, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageBusy):
            write()
        holder.execute("ROLLBACK")
        holder.close()
        write()
    ledger.close()
    store.close()


def test_a_disk_that_fails_is_said_to_fail() -> None:
    """The kernel answers EIO to whoever reads a process's memory where there is none."""
    with pytest.raises(DiskFailed):
        read_written(Path("/proc/self/mem"), DiskFull)


def test_a_coordinator_on_a_full_disk_keeps_what_it_had(disk: SmallDisk) -> None:
    store = RunStore(disk.folder / "runs" / "small", AuditLog(disk.folder / "log"))
    model = GlobalModel.initial(np.arange(40_000, dtype=np.float64))
    store.set("plan_hash", "a" * 64)
    store.write_checkpoint(1, model)
    store.event("joined", owners=1)
    events, acts = list(store.events()), AuditLog(disk.folder / "log").acts()
    disk.fill()
    for write in (
        lambda: store.write_checkpoint(2, model),
        lambda: store.set("large", "x" * 300_000),
        lambda: AuditLog(disk.folder / "log").append("coordinator", "server.start", x=["y" * 9000]),
        lambda: RunStore(disk.folder / "runs" / "another"),
    ):
        with pytest.raises(DiskFull):
            write()
    assert list(store.events()) == events
    assert AuditLog(disk.folder / "log").acts() == acts
    assert np.array_equal(store.read_checkpoint(1).weights, model.weights)
    disk.free()
    store.write_checkpoint(2, model)
    store.event("session", owners=1)
    assert len(AuditLog(disk.folder / "log").acts()) == len(acts) + 1
    store.close()


def test_commands_on_a_full_disk(disk: SmallDisk, cli: Cli, tmp_path: Path) -> None:
    passphrase = tmp_path / "passphrase"
    passphrase.touch(0o600)
    passphrase.write_bytes(PASSPHRASE)
    key, pki = ("--passphrase-file", passphrase), disk.folder / "pki"
    assert cli("pki", "init", "--pki", pki, *key).status == 0
    before = (pki / "issued.jsonl").read_bytes()
    disk.fill()
    for verb in (
        ("pki", "init", "--pki", disk.folder / "other", *key),
        ("pki", "revoke", "--pki", pki, *key),
        ("pki", "request", "owner", "--name", "a", "--identity", disk.folder / "a" / "identity", *key),
        ("data", "digits", "--out", disk.folder / "digits"),
    ):
        outcome = cli(*verb)
        assert (outcome.code, outcome.status) == (DiskFull.code, DiskFull.exit_code), (verb, outcome)
        assert "Traceback" not in outcome.err
    assert (pki / "issued.jsonl").read_bytes() == before
    disk.free()
    assert cli("pki", "revoke", "--pki", pki, *key).status == 0


def test_a_process_on_a_full_disk(disk: SmallDisk) -> None:
    disk.fill()
    command = [sys.executable, "-m", "fedseal", "data", "digits", "--out", str(disk.folder / "digits")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == DiskFull.exit_code
    assert done.stderr.startswith(DiskFull.code)
    assert "Traceback" not in done.stderr


def fixed(owner: Owner, _context: object) -> Owner:
    return owner


class Owners:
    """Four nodes in this process, the first of which has its home on a disk of its own."""

    def __init__(self, federation: Federation, small: Path) -> None:
        homes = [one.folder for one in federation.owners]
        homes[0] = Path(shutil.move(homes[0], small))
        self.home = homes[0]
        self.opened = [open_owner(home, PASSPHRASE) for home in homes]
        self._trust = load_trust(federation.server_home / IDENTITY)

    def run(self, plan: Plan, folder: Path) -> RunStore:
        """Carry a plan out; the store says what came of it."""
        apps = {100 + n: make_app(partial(fixed, one)) for n, one in enumerate(self.opened)}
        grid, store = LocalGrid(apps, 0), RunStore(folder)
        store.set("plan", plan.fields())
        store.set("plan_hash", plan.sha256())
        try:
            run_plan(grid, store, self._trust)
        finally:
            grid.close()
        return store

    def spent(self) -> Totals:
        return self.opened[0].ledger.totals()

    def close(self) -> None:
        for one in self.opened:
            one.close()


def test_a_node_whose_disk_is_full_refuses_with_a_code_and_works_again(
    disk: SmallDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others go on without it, its ledger stays as it was, and the next run has it again."""
    torch.set_num_threads(1)
    monkeypatch.setattr("server.cohort.session.SETTLE_S", 0.3)
    monkeypatch.setattr("scenarios.federation._passphrase", lambda: PASSPHRASE)
    shards, _public = digits(seed=0, owners=4)
    federation = make_federation(tmp_path / "federation", [(x[:60], y[:60]) for x, y in shards])
    plan = resolve(
        small_plan(
            run={"rounds": 1},
            cohort={"minimum": 3, "maximum": 4},
            privacy={"expected_batch_size": 30.0},
            deadlines={"join_s": 20.0, "pause_s": 2.0},
        )
    )
    owners = Owners(federation, disk.folder / "home")
    spent, records = owners.spent(), owners.opened[0].ledger.records()
    disk.fill()
    store = owners.run(plan, tmp_path / "first")
    mine = owners.opened[0].fingerprint
    assert store.get("state") == "finished"
    assert len(store.rounds()[0]["contributors"]) == 3
    assert {one["code"] for one in store.refusals()} == {DiskFull.code}
    store.close()
    disk.free()
    assert owners.spent() == spent
    assert owners.opened[0].ledger.records()[: len(records)] == records
    store = owners.run(plan, tmp_path / "second")
    assert mine in store.rounds()[0]["contributors"]
    store.close()
    owners.close()
    reopened = open_owner(owners.home, PASSPHRASE)
    assert (reopened.ledger.totals().epsilon or 0.0) > 0.0
    reopened.close()
