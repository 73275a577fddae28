"""A node or coordinator started where one runs already, on its home or its port: it must end nothing."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from real_federation import PASSPHRASE, RealFederation

from crypto.locks import alone_in
from protocol.errors import AddressUnavailable, HomeBusy
from server.home import ADDRESSES, IDENTITY, MEMBERS
from server.listeners.sockets import free_port


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of fedseal to its end."""
    environment = os.environ | {"FEDSEAL_PASSPHRASE": PASSPHRASE.decode()}
    command = [sys.executable, "-m", "fedseal", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


def test_second_coordinator_changes_nothing(real: RealFederation) -> None:
    """On another port, too: it would take over the control socket, and write other addresses down."""
    log, addresses = real.home / "log" / "acts.jsonl", real.home / ADDRESSES
    before = log.read_bytes(), addresses.read_bytes()
    done = start("server", "--home", str(real.home), "--port", str(free_port()))
    assert done.returncode == HomeBusy.exit_code
    assert HomeBusy.code in done.stderr
    assert "Traceback" not in done.stderr
    assert (log.read_bytes(), addresses.read_bytes()) == before
    assert isinstance(real.made.link().runs(), list)


def test_taken_port_is_said_before_anything_is_written(real: RealFederation, tmp_path: Path) -> None:
    """A copy of the home would otherwise run beside it, and log a start that never was."""
    home = tmp_path / "home"
    shutil.copytree(real.home / IDENTITY, home / IDENTITY)
    (home / MEMBERS).mkdir()
    done = start("server", "--home", str(home), "--port", str(real.port))
    assert done.returncode == AddressUnavailable.exit_code
    assert AddressUnavailable.code in done.stderr
    assert "Traceback" not in done.stderr
    assert {file.name for file in home.iterdir()} == {IDENTITY, MEMBERS}
    assert isinstance(real.made.link().runs(), list)


def test_second_node_does_not_answer(real: RealFederation) -> None:
    owner = real.owner("owner-1")
    done = start("client", "--home", str(owner.folder), "--server", f"127.0.0.1:{real.port}", "--once")
    assert done.returncode == HomeBusy.exit_code
    assert HomeBusy.code in done.stderr
    assert "Traceback" not in done.stderr


class TestLock:
    def test_ends_with_the_block(self, tmp_path: Path) -> None:
        with alone_in(tmp_path), pytest.raises(HomeBusy), alone_in(tmp_path):
            pass
        with alone_in(tmp_path):
            pass
        assert not list(tmp_path.iterdir())

    def test_ends_with_a_killed_process(self, tmp_path: Path) -> None:
        code = (
            "import sys, time; from pathlib import Path; from crypto.locks import alone_in\n"
            "with alone_in(Path(sys.argv[1])): print('held', flush=True); time.sleep(100)"
        )
        command = [sys.executable, "-c", code, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(HomeBusy), alone_in(tmp_path):
                pass
            holder.kill()
        with alone_in(tmp_path):
            pass

    def test_a_missing_home_is_left_to_who_opens_it(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="opener") as caught, alone_in(tmp_path / "none"):
            raise ValueError("the opener's word")
        assert caught.value.__context__ is None, "the path would stand in a traceback"

    def test_a_folder_without_locks_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def no_locks(*_arguments: int) -> None:
            raise OSError(errno.ENOLCK, "no locks")

        monkeypatch.setattr("crypto.locks.fcntl.flock", no_locks)
        with pytest.raises(HomeBusy), alone_in(tmp_path):
            pass

    def test_what_is_no_folder_is_refused(self, tmp_path: Path) -> None:
        file = tmp_path / "home"
        file.touch()
        with pytest.raises(HomeBusy), alone_in(file):
            pass
