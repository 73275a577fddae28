"""Real processes and the world around them: nohup, Ctrl-C, a full output, a reader that has gone."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import tomli_w
from commands import command_line
from real_federation import MARK, PASSPHRASE, RealFederation, plan_fields, wait_until

from audit.collecting.owner import find_run
from client.owner import open_owner
from protocol.errors import HomeBusy, OutputLost
from server.home import ADDRESSES, IDENTITY, MEMBERS
from server.listeners.sockets import free_port
from server.runs import open_run, run_named

ROUNDS = 60


def secret(folder: Path, passphrase: bytes = PASSPHRASE) -> Path:
    """Write a passphrase file as an editor of another system would."""
    file = folder / "passphrase"
    file.touch(0o600)
    file.write_bytes(b"\xef\xbb\xbf" + passphrase + b"\r\n")
    return file


class Command:
    """A command of fedseal as a process, whose output goes to a file."""

    def __init__(
        self, real: RealFederation, log: Path, *arguments: object, ignored: tuple[int, ...]
    ) -> None:
        def as_started_by() -> None:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)

        self._log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fedseal", *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {MARK: real.mark, "COLUMNS": "40", "NO_COLOR": "1"},
                preexec_fn=as_started_by,
            )

    def said(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        wait_until(lambda: condition() or self.process.poll() is not None, 100, lambda: what + self.said())
        assert self.process.poll() is None, self.said()

    def end(self, *numbers: int) -> int:
        """Send signals and return the exit status."""
        try:
            for number in numbers:
                self.process.send_signal(number)
            return self.process.wait(60)
        finally:
            self.process.kill()
            self.process.wait()


def test_nohup_server_and_client_survive_a_hangup(real: RealFederation, tmp_path: Path) -> None:
    """Exit 0 is that of SIGTERM; the hangup and the ignored Ctrl-C before it would have ended them."""
    home, port = tmp_path / "server", free_port()
    shutil.copytree(real.home / IDENTITY, home / IDENTITY)
    (home / MEMBERS).mkdir()
    key = ("--passphrase-file", secret(tmp_path))
    ignored = (signal.SIGHUP, signal.SIGINT)
    server = Command(
        *(real, tmp_path / "server.log", "server", "--home", home, "--port", port, *key), ignored=ignored
    )
    owner = real.owner("owner-4").folder
    client = Command(
        *(real, tmp_path / "client.log", "client", "--home", owner, "--server", f"127.0.0.1:{port}", *key),
        ignored=ignored,
    )
    try:
        server.wait_for((home / ADDRESSES).exists, "the coordinator is ready")
        client.wait_for(lambda: "trying again" in client.said(), "the node tries to connect")
    finally:
        statuses = [one.end(signal.SIGHUP, signal.SIGINT, signal.SIGTERM) for one in (client, server)]
    assert statuses == [0, 0], client.said() + server.said()


def test_ctrl_c_says_that_the_run_goes_on_and_how_to_follow_and_stop_it(
    real: RealFederation,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And one name is good for every command, at the coordinator and at an owner."""
    plan = tmp_path / "plan.toml"
    fields = plan_fields(run={"rounds": ROUNDS}, privacy={"target_epsilon": 0.2})
    plan.write_bytes(b"\xef\xbb\xbf" + tomli_w.dumps(fields).replace("\n", "\r\n").encode())
    file = secret(tmp_path)
    operator = ("--operator-passphrase-file", file)
    keys = ("--passphrase-file", file, *operator)
    run = Command(
        *(real, tmp_path / "run.log", "run", plan, "--home", real.home, *keys), ignored=(signal.SIGHUP,)
    )
    run.wait_for(lambda: f"1/{ROUNDS}" in run.said(), "a first round")
    status, said = run.end(signal.SIGHUP, signal.SIGINT), run.said()
    assert status == 130, said
    assert "goes on at the coordinator" in said
    assert "Traceback" not in said
    name = said.partition("run folder: ")[2].split()[0].rpartition("/")[2]
    for command in (f"fedseal run --resume {name} --home {real.home}", f"stop {name} --home {real.home}"):
        assert command in said, "whole at 40 columns"
    with closing(open_run(real.home, name)) as store:
        known = store.finished_rounds()
        wait_until(lambda: store.finished_rounds() > known, 60, "the run goes on")
        identifier = str(store.get("run"))
    digits = name[-8:]
    assert identifier.startswith(digits)
    for one in (name, name[:-2], identifier, identifier[:12], digits):
        assert run_named(real.home, one) == name
    with closing(open_owner(real.owner("owner-1").folder, PASSPHRASE)) as owner:
        for one in (name, identifier, identifier[:12], digits):
            assert find_run(owner, one)[0] == identifier
    cli = command_line(monkeypatch, capsys, {"COLUMNS": "40"})
    assert digits in cli("ledger", "show", "--home", real.owner("owner-1").folder).out
    assert name in cli("runs", "--home", real.home, *operator).out
    stopped = cli("stop", digits, "--home", real.home, *operator)
    assert stopped.out.split() == [f"{name}:", "paused"], stopped


def answer(*arguments: object, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fedseal", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"COLUMNS": "40", "NO_COLOR": "1"} | settings,
    )


def test_a_busy_home_is_said_before_a_passphrase_is_called_wrong(
    real: RealFederation, tmp_path: Path
) -> None:
    wrong = ("--passphrase-file", secret(tmp_path, b"not the passphrase"))
    for verb in (
        ("server", "--home", real.home, "--port", free_port(), *wrong),
        ("client", "--home", real.owner("owner-1").folder, "--server", "127.0.0.1:1", "--once", *wrong),
    ):
        done = answer(*verb)
        assert (done.returncode, done.stderr[:10]) == (HomeBusy.exit_code, HomeBusy.code), done


def test_output_that_nobody_takes(real: RealFederation) -> None:
    """A full output is a coded error, a reader that has gone ends a command quietly, and so does none."""
    command = f"{sys.executable} -m fedseal log show --home {real.home}"
    shell = partial(subprocess.run, shell=True, capture_output=True, text=True, timeout=100)
    full = shell(f"{command} > /dev/full")
    assert (full.returncode, full.stderr[:9]) == (OutputLost.exit_code, OutputLost.code)
    assert "Traceback" not in full.stderr
    for quiet in (f"{command} | head -1", f"{command} >&-", f"{command} --json | head -c 10"):
        assert shell(quiet).stderr == ""


def test_output_in_another_encoding_keeps_the_verdict() -> None:
    done = answer("doctor", "--port", free_port(), PYTHONIOENCODING="latin-1")
    assert "Traceback" not in done.stderr
    assert "OpenSSL" in done.stdout
