"""Every decoder that meets bytes of a peer, fed with mutated inputs in processes of bounded resources."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import FedsealError

ROOT = Path(__file__).parents[2]
SHORT = {"wire": 15_000, "seal": 4_700, "apps": 350}
LONG = {"wire": 90_000, "seal": 25_000, "apps": 6_000}
WALL_S = {"short": 280, "long": 3_000}
MEMORY_GROWTH_KB = 700 * 1024
"""Imports and seeds included; decoding itself is held to 512 MiB by the kernel."""


def fuzzed(group: str, count: int, seed: int, folder: Path, wall_s: float) -> dict[str, Any]:
    """Run a worker; a process that dies is a failure that names the input."""
    progress = folder / f"{group}.progress"
    command = [sys.executable, "-m", "tests.fuzz.worker", group, str(count), str(seed), str(progress)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests" / "attacks")}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, timeout=wall_s, check=False, text=True
    )
    if done.returncode != 0:
        (number,) = struct.unpack("<Q", progress.read_bytes())
        how = signal.Signals(-done.returncode).name if done.returncode < 0 else str(done.returncode)
        pytest.fail(f"{group}, seed {seed}, input {number}: ended by {how}\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout))


def check(group: str, count: int, seed: int, folder: Path, wall_s: float) -> None:
    summary = fuzzed(group, count, seed, folder, wall_s)
    print(json.dumps(summary))
    assert summary["faults"] == []
    assert summary["inputs"] == count
    assert summary["peak_growth_kb"] < MEMORY_GROWTH_KB
    for target, outcomes in summary["outcomes"].items():
        assert outcomes.keys() - {"accepted"}, (
            f"nothing was refused by {target}: its mutations are too weak"
        )
        assert FedsealError.code not in outcomes, f"{target} met an error that nobody foresaw"


@pytest.mark.parametrize("group", SHORT)
def test_no_decoder_crashes_hangs_or_takes_what_was_changed(group: str, tmp_path: Path) -> None:
    check(group, SHORT[group], 20_260_101, tmp_path, WALL_S["short"])


@pytest.mark.long
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("group", LONG)
def test_no_decoder_crashes_hangs_or_takes_what_was_changed_a_hundred_thousand_times(
    group: str, tmp_path: Path
) -> None:
    check(group, LONG[group], 7, tmp_path, WALL_S["long"])


@pytest.mark.parametrize(("fault", "found"), [("crash", "crash"), ("silent", "silent accept")])
def test_the_fuzzer_finds_planted_faults(fault: str, found: str, tmp_path: Path) -> None:
    """The same loop over decoders that are broken on purpose."""
    from tests.fuzz.target import Target, require
    from tests.fuzz.worker import Fuzzer

    def feed(number: int) -> None:
        if number % 7 == 0 and fault == "crash":
            raise KeyError(number)
        require(number % 7 != 0 or fault != "silent", "taken")

    fuzzer = Fuzzer([Target("planted", 1, lambda rng: rng.randrange(100), feed)], 1, tmp_path / "progress")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.fuzz.worker._bound_memory", lambda: None)
        fuzzer.run(100)
    assert fuzzer.outcomes["planted"][found] == len(fuzzer.faults) > 0


@pytest.mark.parametrize("body", ["while True: pass", "bytearray(2**31)", "import os; os.abort()"])
def test_an_input_that_hangs_or_takes_all_memory_ends_its_process_or_fails(
    body: str, tmp_path: Path
) -> None:
    """What holds decoders in check: processor time, memory, and the exit status of their process."""
    program = (
        "import signal, sys\nfrom tests.fuzz import worker\n"
        "signal.signal(signal.SIGPROF, signal.SIG_DFL)\nworker._bound_memory()\n"
        f"signal.setitimer(signal.ITIMER_PROF, 0.3)\n{body}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=60, check=False, text=True
    )
    assert done.returncode in (-signal.SIGPROF, -signal.SIGABRT, 1)
    assert done.returncode < 0 or "MemoryError" in done.stderr
