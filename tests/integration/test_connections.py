"""No process opens a connection other than to the coordinator: an audit hook watches a whole demo."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from real_federation import MARK, RUN_S, living, plan_fields, wait_until

from protocol.environment import FLOWER_ENVIRONMENT

ROLES = ("demo", "coordinator", "superexec", "serverapp", "owner-1", "owner-2", "owner-3")
HOOK = """
import json, os, sys

_file = os.open({target!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
_switches = {switches!r}
_seen = []
_watched = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr",
            "socket.getnameinfo", "socket.sendto", "socket.sendmsg")

def _write(event, detail):
    line = {{"pid": os.getpid(), "argv": sys.orig_argv, "event": event, "detail": detail}}
    os.write(_file, (json.dumps(line, default=repr) + "\\n").encode())

def _hook(event, arguments):
    if event in _watched:
        family = getattr(arguments[0], "family", None)
        kept = arguments if family is None else arguments[1:]
        _write(event, {{"family": None if family is None else int(family), "address": list(kept)}})
    elif event == "import" and arguments[0].partition(".")[0] == "flwr" and not _seen:
        # a module that is imported by its name shows itself by what it imports
        _seen.append(True)
        _write("flower", {{name: os.environ.get(name) for name in _switches}})

_write("start", None)
sys.addaudithook(_hook)
"""


@dataclass
class Watched:
    """What a whole demo did.

    Attributes:
        status: Its exit status.
        output: What it printed.
        out: Its folder.
        records: One dict per watched event: pid, argv, event, detail.
        environments: Environment of each process as the kernel shows it, by role.
        peers: Remote ends of all TCP connections that the kernel showed, as (address, port).
        survivors: Processes that were alive when it had ended.
    """

    status: int
    output: str
    out: Path
    records: list[dict[str, Any]]
    environments: dict[str, dict[str, str]] = field(default_factory=dict)
    peers: set[tuple[str, int]] = field(default_factory=set)
    survivors: dict[int, list[str]] = field(default_factory=dict)

    def of(self, event: str) -> list[dict[str, Any]]:
        """Return the records of one event."""
        return [record for record in self.records if record["event"] == event]

    def ports(self) -> set[int]:
        """Return the coordinator's two ports, as the run's store names them."""
        report = json.loads((self.out / "result" / "report.json").read_text(encoding="utf-8"))
        return set(_values_of(report, "port"))


def role_of(argv: list[str]) -> str:
    """Return which process of the federation has a command line."""
    words = [Path(argument).name for argument in argv]
    if "client" in words:
        return next(word for word in words if word.startswith("owner-"))
    named = {"server": "coordinator", "demo": "demo"}
    for word in words:
        if word in named:
            return named[word]
        if word in ("flower-superexec", "flwr-serverapp"):
            return word.split("-")[1]
    return " ".join(words[:3])


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """Run a demo of two rounds under the hook."""
    folder = tmp_path_factory.mktemp("watched")
    target, plan, out, mark = folder / "events", folder / "plan.toml", folder / "out", secrets.token_hex(8)
    (folder / "hook").mkdir()
    hook = HOOK.format(target=str(target), switches=tuple(FLOWER_ENVIRONMENT))
    (folder / "hook" / "sitecustomize.py").write_text(hook, encoding="utf-8")
    plan.write_text(tomli_w.dumps(plan_fields()), encoding="utf-8")
    paths = [str(folder / "hook"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {name: value for name, value in os.environ.items() if name not in FLOWER_ENVIRONMENT}
    environment |= {"PYTHONPATH": os.pathsep.join(paths), MARK: mark}
    command = [
        sys.executable,
        "-m",
        "fedseal",
        "demo",
        "--no-audit",
        "--plan",
        str(plan),
        "--out",
        str(out),
    ]
    with (folder / "output").open("wb") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    result = Watched(-1, "", out, [])
    try:
        wait_until(lambda: _look(child, mark, result), RUN_S, "the end of the demo")
        result.status = child.wait()
        result.survivors = living(mark)
    finally:
        child.terminate()
        child.wait()
    result.output = (folder / "output").read_text(encoding="utf-8")
    result.records = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    return result


def _look(child: subprocess.Popen[bytes], mark: str, result: Watched) -> bool:
    """Note what the kernel shows of the running processes; true once the demo has ended."""
    for pid, argv in living(mark).items():
        try:
            result.peers |= _peers(pid)
            variables = (Path("/proc") / str(pid) / "environ").read_bytes().decode().split("\0")[:-1]
        except OSError:
            continue
        if argv and variables:
            pairs = (variable.split("=", 1) for variable in variables)
            result.environments.setdefault(role_of(argv), dict(pairs))  # type: ignore[arg-type]
    return child.poll() is not None


def _peers(pid: int) -> set[tuple[str, int]]:
    """Return the remote ends of a process's TCP sockets; a listener has none."""
    folder, owned = Path("/proc") / str(pid), set()
    for link in (folder / "fd").iterdir():
        try:
            owned.add(str(link.readlink()).removeprefix("socket:[").removesuffix("]"))
        except OSError:
            continue
    peers = set()
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in (folder / "net" / table).read_text().splitlines()[1:]:
            fields = line.split()
            address, port = fields[2].split(":")
            if fields[9] in owned and int(port, 16):
                peers.add((address, int(port, 16)))
    return peers


def _values_of(value: Any, name: str) -> Iterator[int]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == name and isinstance(inner, int):
                yield inner
            yield from _values_of(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _values_of(inner, name)


def test_demo_runs_to_its_report(watched: Watched) -> None:
    assert watched.status == 0, watched.output
    summary = json.loads((watched.out / "summary.json").read_text(encoding="utf-8"))
    assert summary["rounds"] == 2
    assert summary["tls_version"] == "TLSv1.3"
    assert summary["audit"]["verdict"] == "INCONCLUSIVE"
    assert Path(summary["model"]["package"]).is_dir()
    assert Path(summary["audit"]["report"]).is_file()
    assert len(summary["owners"]) == 3
    assert all(0 < owner["epsilon"] <= 2.0 for owner in summary["owners"])


def test_hook_was_active_in_every_process(watched: Watched) -> None:
    assert set(ROLES) <= {role_of(record["argv"]) for record in watched.of("start")}
    talking = {role_of(record["argv"]) for record in watched.of("socket.connect")}
    assert set(ROLES) <= talking, "a process without any connection was not really watched"


def test_every_connection_goes_to_the_coordinator(watched: Watched) -> None:
    ports = watched.ports()
    assert len(ports) == 2
    seen = set()
    for record in watched.of("socket.connect"):
        if record["detail"]["family"] == 1:
            continue  # a socket of this machine, without any network
        host, port = record["detail"]["address"][0][:2]
        assert host == "127.0.0.1", record
        assert port in ports, record
        seen.add(port)
    assert seen == ports


def test_owners_reach_the_fleet_listener_alone(watched: Watched) -> None:
    used: dict[str, set[int]] = {}
    for record in watched.of("socket.connect"):
        if record["detail"]["family"] != 1:
            port = record["detail"]["address"][0][1]
            used.setdefault(role_of(record["argv"]), set()).add(port)
    fleet = used["owner-1"]
    assert len(fleet) == 1
    assert used["owner-2"] == used["owner-3"] == fleet
    assert fleet.isdisjoint(used["serverapp"] | used["superexec"])


def test_no_name_is_looked_up_and_no_datagram_sent(watched: Watched) -> None:
    for record in watched.of("socket.getaddrinfo"):
        assert record["detail"]["address"][0] in ("127.0.0.1", "localhost", "", None), record
    for event in ("gethostbyname", "gethostbyaddr", "getnameinfo", "sendto", "sendmsg"):
        assert watched.of(f"socket.{event}") == []


def test_kernel_shows_no_other_peer(watched: Watched) -> None:
    """The audit hook does not see sockets of compiled code; the kernel's tables do."""
    assert watched.peers, "the tables were read while the run was on"
    assert {address for address, _port in watched.peers} == {"0100007F"}


def test_switches_are_set_before_any_process_imports_flower(watched: Watched) -> None:
    imports = watched.of("flower")
    # the demo starts processes, and needs nothing of Flower itself
    assert set(ROLES) - {"demo"} <= {role_of(record["argv"]) for record in imports}
    for record in imports:
        assert record["detail"] == FLOWER_ENVIRONMENT, role_of(record["argv"])


def test_switches_stand_in_the_environment_of_every_started_process(watched: Watched) -> None:
    assert set(ROLES) <= set(watched.environments)
    for role in set(ROLES) - {"demo"}:
        shown = watched.environments[role]
        assert {name: shown.get(name) for name in FLOWER_ENVIRONMENT} == FLOWER_ENVIRONMENT


def test_no_secret_stands_in_any_environment_or_command_line(watched: Watched) -> None:
    for role, environment in watched.environments.items():
        assert not [name for name in environment if "PASSPHRASE" in name], role
    for record in watched.of("start"):
        files = [word for word in record["argv"] if word.startswith("/dev/fd/")]
        assert len(files) == (role_of(record["argv"]) in ("coordinator", "owner-1", "owner-2", "owner-3"))


def test_demo_leaves_no_process_behind(watched: Watched) -> None:
    assert watched.survivors == {}
