"""A federation of real processes on 127.0.0.1 that the tests start, watch, and never leave behind."""

from __future__ import annotations

import os
import secrets
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from tcp_proxy import TcpProxy, proxy_to

from client.ledger import Ledger
from client.owner import IDENTITY, LEDGER, POLICY
from client.policy import Policy
from protocol.environment import FLOWER_ENVIRONMENT
from protocol.plan import Plan
from scenarios.demo import start_federation, start_owner, wait_for_coordinator
from scenarios.federation import Federation, OwnerHome, PolicySettings, make_federation
from scenarios.processes import Processes
from server.listeners.sockets import free_port
from server.store import RunStore
from server.submit import prepare_run, submit
from tasks.partition import digits, write_examples

__all__ = ["PASSPHRASE", "RealFederation", "federation_of", "listening_addresses", "living", "wait_until"]

PASSPHRASE = b"7c1f-only-the-tests-know-this-passphrase"
MARK = "FEDSEAL_TEST_MARK"
RUN_S, STOP_S = 150.0, 30.0
_POLL_S = 0.05
_ENDED = ("finished", "paused", "failed")


def plan_fields(**sections: dict[str, Any]) -> dict[str, Any]:
    """Return a small plan, 650 parameters in one frame and two rounds, with some fields replaced."""
    fields: dict[str, dict[str, Any]] = {
        "run": {"name": "small", "rounds": 2},
        "task": {
            "name": "image-classification",
            "input_shape": [8, 8],
            "value_range": [0.0, 16.0],
            "classes": 10,
        },
        "model": {"name": "linear"},
        "cohort": {"minimum": 3, "maximum": 3},
        "training": {"local_steps": 2, "learning_rate": 0.5},
        "privacy": {
            "target_epsilon": 2.0,
            "delta": 1e-6,
            "sample_rate": 0.5,
            "expected_batch_size": 200.0,
        },
        "encryption": {"preset": "exact16", "quorum": 2},
        "compression": {"prune_ratio": 0.0, "max_accuracy_drop": 1.0},
    }
    for name, changes in sections.items():
        fields[name] = fields.get(name, {}) | changes
    return fields


def small_plan(**sections: dict[str, Any]) -> Plan:
    """Return the plan of `plan_fields`."""
    return Plan.from_fields(plan_fields(**sections))


def wait_until(condition: Callable[[], Any], timeout_s: float, what: str | Callable[[], str]) -> Any:
    """Return the first true value of a condition; a test fails if there is none in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(_POLL_S)
    pytest.fail(f"not within {timeout_s:g} s: {what if isinstance(what, str) else what()}")


def living(mark: str) -> dict[int, list[str]]:
    """Return pid and command line of every process that inherited a mark in its environment."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = command_line(int(folder.name))
        except OSError:
            continue
    return found


def command_line(pid: int) -> list[str]:
    """Return the arguments that a process was started with, as every user of the machine sees them."""
    return (Path("/proc") / str(pid) / "cmdline").read_bytes().decode().split("\0")[:-1]


@contextmanager
def marked(mark: str) -> Iterator[None]:
    """Let processes that are started in the block inherit a mark, and Flower's switches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MARK, mark)
        for name, value in FLOWER_ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


@dataclass
class RealFederation:
    """A running federation.

    Attributes:
        made: Homes and passphrases.
        processes: The running processes.
        port: The coordinator's fleet port.
        public_file: Public test examples.
        mark: What every process of this federation has in its environment.
        proxy: What stands between the nodes and the coordinator, if anything does.
    """

    made: Federation
    processes: Processes
    port: int
    public_file: Path
    mark: str
    proxy: TcpProxy | None = None
    stores: list[RunStore] = field(default_factory=list)

    @property
    def home(self) -> Path:
        """The coordinator's home."""
        return self.made.server_home

    def owner(self, name: str) -> OwnerHome:
        """Return one owner's home."""
        return next(owner for owner in self.made.owners if owner.name == name)

    def start_owner(self, name: str) -> int:
        """Start an owner's node again; returns its pid."""
        with marked(self.mark):
            port = self.port if self.proxy is None else self.proxy.port
            return start_owner(self.processes, self.owner(name), port)

    def submit(self, plan: Plan) -> RunStore:
        """Start a run and return its store."""
        store = prepare_run(self.home, plan, self.public_file)
        self.stores.append(store)
        with warnings.catch_warnings():
            # Flower builds its bundle with a name that a library below it deprecates.
            warnings.simplefilter("ignore", DeprecationWarning)
            submit(self.home, store, self.made.link())
        return store

    def run(self, plan: Plan) -> RunStore:
        """Run a plan to its end, whatever that is."""
        store = self.submit(plan)
        self.wait_for_end(store)
        return store

    def wait_for_end(self, store: RunStore, timeout_s: float = RUN_S) -> str:
        """Return the state in which a run ended."""
        return str(
            wait_until(
                lambda: store.get("state") if store.get("state") in _ENDED else None,
                timeout_s,
                f"the end of a run; logs: {self.logs()}",
            )
        )

    def log(self, name: str) -> str:
        """Return what a process wrote so far."""
        return (self.made.folder / "logs" / f"{name}.log").read_text(encoding="utf-8")

    def logs(self) -> str:
        """Return the ends of all logs, for the message of a failed test."""
        names = [file.stem for file in sorted((self.made.folder / "logs").glob("*.log"))]
        return "\n".join(f"--- {name}\n{self.log(name)[-1500:]}" for name in names)

    @contextmanager
    def ledger(self, name: str) -> Iterator[Ledger]:
        """Open an owner's ledger, as the owner itself would beside its running node."""
        home = self.owner(name).folder
        policy = Policy.from_toml((home / POLICY).read_text(encoding="utf-8"))
        ledger = Ledger.open(home / LEDGER / "ledger.db", policy, home / IDENTITY / "ledger.head")
        try:
            yield ledger
        finally:
            ledger.close()

    def living(self) -> dict[int, list[str]]:
        """Return pid and command line of all processes of this federation."""
        return living(self.mark)


def made_federation(folder: Path, owners: int, more: int = 0) -> Federation:
    """Make homes for owners, and for more with the same rows; the tests' passphrase seals every key."""
    splits, public = digits(seed=0, owners=owners)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scenarios.federation._passphrase", lambda: PASSPHRASE)
        made = make_federation(folder, [*splits, *splits[:more]], PolicySettings())
    write_examples(folder / "public.npz", *public)
    return made


@contextmanager
def federation_of(
    made: Federation, owners: Iterable[OwnerHome] | None = None, *, proxied: bool = False
) -> Iterator[RealFederation]:
    """Run a coordinator and nodes of some owners (of all, unless told), and stop them after the block.

    Args:
        made: Homes and passphrases.
        owners: Whose nodes to start.
        proxied: Let the nodes reach the coordinator through a proxy that tests can disturb.
    """
    mark = secrets.token_hex(8)
    running = made if owners is None else _with_owners(made, owners)
    try:
        with ExitStack() as stack:
            processes = stack.enter_context(Processes(made.folder / "logs"))
            port = free_port()
            proxy = stack.enter_context(proxy_to(port)) if proxied else None
            with marked(mark):
                start_federation(processes, _with_owners(made, []), port)
                for owner in running.owners:
                    start_owner(processes, owner, port if proxy is None else proxy.port)
                wait_for_coordinator(processes, made.server_home)
            real = RealFederation(made, processes, port, made.folder / "public.npz", mark, proxy)
            try:
                yield real
            finally:
                for store in real.stores:
                    store.close()
    finally:
        wait_until(lambda: not living(mark), STOP_S, lambda: f"the end of all processes: {living(mark)}")


def _with_owners(made: Federation, owners: Iterable[OwnerHome]) -> Federation:
    return replace(made, owners=tuple(owners))


def listening_addresses(pids: set[int]) -> set[tuple[str, str]]:
    """Return (address, port) in the kernel's hex of every TCP listener of these processes."""
    owned = set()
    for pid in pids:
        for link in (Path("/proc") / str(pid) / "fd").iterdir():
            try:
                target = str(link.readlink())
            except OSError:
                continue
            if target.startswith("socket:["):
                owned.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in (Path("/proc/net") / table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in owned:
                address, port = fields[1].split(":")
                found.add((address, port))
    return found
