"""Every exit status of the command line, reached by a real process in a way that a user may meet."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w
from real_federation import (
    PASSPHRASE,
    RealFederation,
    made_federation,
    marked,
    plan_fields,
    small_plan,
    wait_until,
)

from protocol.errors import (
    EXIT_STATUSES,
    AddressUnavailable,
    DatasetMissing,
    EncryptionUnavailable,
    FedsealError,
    FlowerChanged,
    LogBroken,
    ModelRanAway,
    OutputLost,
    PackageInvalid,
    PlanInvalid,
    RunFailed,
    RunPaused,
    SecretUnavailable,
    ServerUnavailable,
)
from server.listeners.sockets import free_port
from server.submit import prepare_run

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "scenarios" / "plans" / "digits.toml"
OTHER_FLOWER = """
import importlib
del importlib.import_module("flwr.superlink.cli.flower_superlink")._parse_superlink_lifespan_config
"""
OTHER_SEAL = """
import tenseal.sealapi as seal
create = seal.CoeffModulus.Create
seal.CoeffModulus.Create = staticmethod(lambda degree, bits: create(degree, [one - 1 for one in bits]))
"""
FAULTY = """
import protocol.plan
def fail(*_arguments):
    raise RuntimeError("a fault of the program")
protocol.plan.Plan.from_toml = fail
"""

Ended = subprocess.CompletedProcess[str]


class Cli:
    """Runs commands in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"FEDSEAL_PASSPHRASE": PASSPHRASE.decode()}

    def __call__(self, *words: object, patch: str = "", **environment: str) -> Ended:
        """Run a command to its end; `patch` is executed at the start of its process."""
        if patch:
            (self.folder / "patch").mkdir(exist_ok=True)
            (self.folder / "patch" / "sitecustomize.py").write_text(patch)
            environment["PYTHONPATH"] = str(self.folder / "patch")
        return subprocess.run(
            [sys.executable, "-m", "fedseal", *map(str, words)],
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def plan(self, **sections: dict[str, object]) -> Path:
        file = self.folder / "plan.toml"
        file.write_text(tomli_w.dumps(plan_fields(**sections)))
        return file


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    return Cli(tmp_path)


Way = Callable[[Cli], Ended]


def changed_log(cli: Cli) -> Ended:
    authority = cli.folder / "pki"
    assert cli("pki", "init", "--pki", authority).returncode == 0
    log = authority / "log" / "acts.jsonl"
    log.write_bytes(log.read_bytes().replace(b"pki.init", b"pki.done"))
    return cli("log", "verify", "--home", authority)


def wrong_passphrase(cli: Cli) -> Ended:
    assert cli("pki", "init", "--pki", cli.folder / "pki").returncode == 0
    return cli("pki", "revoke", "--pki", cli.folder / "pki", FEDSEAL_PASSPHRASE="this is another one")


def missing_rows(cli: Cli) -> Ended:
    return cli("simulate", ROOT / "scenarios" / "fashion_cnn.toml", FEDSEAL_DATA=str(cli.folder))


def no_coordinator(cli: Cli) -> Ended:
    made = made_federation(cli.folder / "made", owners=3)
    return cli("runs", "--home", made.server_home)


def other_flower(cli: Cli) -> Ended:
    made = made_federation(cli.folder / "made", owners=3)
    return cli("server", "--home", made.server_home, "--port", free_port(), patch=OTHER_FLOWER)


def taken_port(cli: Cli) -> Ended:
    made = made_federation(cli.folder / "made", owners=3)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return cli("server", "--home", made.server_home, "--port", taken.getsockname()[1])


def full_output(cli: Cli) -> Ended:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "fedseal", "plan", "check", str(SHIPPED)]
        return subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)


WAYS: dict[int, tuple[type[FedsealError] | None, Way]] = {
    0: (None, lambda cli: cli("pki", "init", "--pki", cli.folder / "pki")),
    1: (None, lambda cli: cli("plan", "check", SHIPPED, patch=FAULTY)),
    2: (PlanInvalid, lambda cli: cli("plan", "check", cli.plan(privacy={"delta": 5e-324}))),
    3: (LogBroken, changed_log),
    4: (EncryptionUnavailable, lambda cli: cli("plan", "check", SHIPPED, patch=OTHER_SEAL)),
    5: (SecretUnavailable, wrong_passphrase),
    6: (DatasetMissing, missing_rows),
    7: (ServerUnavailable, no_coordinator),
    8: (FlowerChanged, other_flower),
    9: (PackageInvalid, lambda cli: cli("package", "verify", cli.folder, "--key", SHIPPED)),
    10: (AddressUnavailable, taken_port),
    13: (OutputLost, full_output),
}
RUNS = {11, 12, 130, 141}
"""Statuses of runs and of signals, each with a test of its own."""


def test_every_status_of_the_table_is_walked() -> None:
    assert WAYS.keys() | RUNS == EXIT_STATUSES.keys()


LONG = {4, 6, 8, 9}
"""Ways to these import much before they end."""


@pytest.mark.parametrize(
    "status", [pytest.param(one, marks=[pytest.mark.long] if one in LONG else []) for one in WAYS]
)
def test_a_way_to_an_exit_status(cli: Cli, status: int) -> None:
    error, way = WAYS[status]
    ended = way(cli)
    assert ended.returncode == status, ended.stdout + ended.stderr
    if error is not None:
        assert error.exit_code == status
        assert error.code in ended.stderr
        assert "Traceback" not in ended.stderr


def test_a_run_with_too_few_owners_ends_with_11_and_a_report(real: RealFederation, cli: Cli) -> None:
    waits = {"join_s": 3.0, "pause_s": 1.0}
    plan = cli.plan(run={"name": "too-few"}, cohort={"minimum": 4, "maximum": 4}, deadlines=waits)
    out = cli.folder / "out"
    with marked(real.mark):
        ended = cli("run", plan, "--home", real.home, "--out", out)
    assert ended.returncode == 11, ended.stdout + ended.stderr
    assert RunPaused.code in ended.stderr
    assert "FS-RUN-07" not in ended.stdout + ended.stderr
    assert "to go on: fedseal run --resume too-few" in ended.stdout
    assert (out / "report.html").is_file()


@pytest.mark.parametrize("error", [RunFailed, pytest.param(ModelRanAway, marks=pytest.mark.long)])
def test_a_run_that_failed_for_good_ends_with_12(
    real: RealFederation, cli: Cli, error: type[FedsealError]
) -> None:
    store = prepare_run(real.home, small_plan(run={"name": "failed"}), None)
    store.set("problem", {"code": error.code, "detail": str(error())})
    store.set("state", "failed")
    store.close()
    ended = cli("run", "--resume", store.folder.name, "--home", real.home)
    assert ended.returncode == 12, ended.stdout + ended.stderr
    assert RunFailed.code in ended.stderr


def test_an_output_that_is_there_is_refused_before_anybody_joins(real: RealFederation, cli: Cli) -> None:
    (cli.folder / "too-late.fedseal").mkdir()
    before = {run["run"] for run in real.made.link().runs()}
    ended = cli("run", cli.plan(run={"name": "too-late"}), "--home", real.home, "--out", cli.folder)
    assert ended.returncode == 9, ended.stdout + ended.stderr
    assert "FS-PACKAGE-03" in ended.stderr
    assert {run["run"] for run in real.made.link().runs()} == before


def test_ctrl_c_ends_with_130(cli: Cli) -> None:
    command = [sys.executable, "-m", "fedseal", "simulate", str(ROOT / "scenarios" / "three_owners.toml")]
    with (cli.folder / "log").open("wb") as log:
        child = subprocess.Popen(command, env=cli.environment, stdout=log, stderr=log)
        try:
            wait_until(lambda: (cli.folder / "log").stat().st_size, 60, "its first words")
            child.send_signal(signal.SIGINT)
            assert child.wait(60) == 130, (cli.folder / "log").read_text()
        finally:
            child.kill()
            child.wait()
