"""A process ends with the one that it works for, by each of the two ways alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from real_federation import wait_until

from protocol.errors import ExecutorLost
from protocol.parents import Parent
from server.flower.programs import Executor, tied_command

CHILD = """
import os, sys, time
import protocol.parents as parents
if "{way}" == "pipe":
    parents._ask_for_signal = lambda: None
parents.end_with_parents(sys.argv[1])
print(os.getpid(), flush=True)
while True:
    time.sleep(60)
"""
PARENT = """
import os, subprocess, sys, time
from protocol.parents import Parent, inherited
parent = Parent()
descriptors = (parent.descriptor,) if "{way}" == "pipe" else ()
word = inherited(os.getpid(), descriptors)
subprocess.Popen([sys.executable, "-c", sys.argv[1], word], pass_fds=descriptors)
while True:
    time.sleep(60)
"""


def ended(pid: int) -> bool:
    """Tell whether a process has ended, be it reaped or not."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("way", ["signal", "pipe"])
def test_a_child_ends_with_a_parent_that_nobody_reaps(way: str) -> None:
    command = [sys.executable, "-c", PARENT.format(way=way), CHILD.format(way=way)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert not ended(child)
        os.kill(parent.pid, signal.SIGKILL)
        # the parent is not waited for: it stays a zombie meanwhile
        wait_until(lambda: ended(child), 20, "the end of the child")
        assert parent.returncode is None


def test_a_child_whose_parent_is_another_ends_at_once() -> None:
    """It ended before the signal was asked for."""
    word = f"{os.getppid()}"
    done = subprocess.run([sys.executable, "-c", CHILD.format(way="signal"), word], timeout=60)
    assert done.returncode == 7


def test_what_watches_a_pipe_ends_when_it_is_closed() -> None:
    parent = Parent()
    command = tied_command(["flower-superexec", "--help"], (parent.descriptor,))
    assert command[:4] == [sys.executable, "-P", "-m", "server.flower.programs"]
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD.format(way="pipe"), command[4]],
        pass_fds=(parent.descriptor,),
        stdout=subprocess.PIPE,
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline()
        parent.close()
        assert child.wait(20) == 7


def test_an_executor_that_ends_again_and_again_is_given_up(capfd: pytest.CaptureFixture[str]) -> None:
    executor = Executor()
    executor.start(["pygmentize", "-V"])

    def start_again() -> None:
        wait_until(lambda: executor.has_ended, 30, "the end of a program that only tells its version")
        executor.start_again()

    for _ in range(4):
        start_again()
    with pytest.raises(ExecutorLost, match="status 0"):
        start_again()
    executor.close()
    assert "Pygments" in capfd.readouterr().out


def test_what_a_demo_starts_ends_with_it(tmp_path: Path) -> None:
    """`Processes` starts the parties of a demo and of the benchmarks; the one that has them is killed."""
    code = """
import sys, time
from pathlib import Path
from scenarios.processes import Processes
sleep = ["-n", "1", "-r", "1", "import time; time.sleep(600)"]
processes = Processes(Path(sys.argv[1]))
print(processes.start("party", sleep, program=(sys.executable, "-m", "timeit")), flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        wait_until(
            lambda: b"protocol.parents" in Path(f"/proc/{child}/cmdline").read_bytes(), 20, "its start"
        )
        assert not ended(child)
        os.kill(parent.pid, signal.SIGKILL)
        wait_until(lambda: ended(child), 20, "the end of the child")
