"""The harness of the benchmarks: arms in turn, nothing left behind, and clear about what cannot be used."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from protocol.errors import BenchmarkFailed, FedsealError, PeerUnusable
from scenarios.bench import BenchmarkName, run_benchmark, run_job, summarize
from scenarios.bench_arms import Arm, ArmProcess, Job, Metric, Settings, Size, without

ROOT = Path(__file__).parents[2]
PEER_SCRIPT = ROOT / "scenarios" / "peers" / "nvflare_seal.py"

FAKE_ARM = """
import json, os, sys
key, log, fail_at = sys.argv[1], sys.argv[2], int(sys.argv[3])
print(json.dumps({"versions": {}, "idle_rss_mib": 1.0, "pid": os.getpid()}), flush=True)
for count, line in enumerate(sys.stdin):
    if count == fail_at:
        sys.exit(1)
    request = json.loads(line)
    with open(log, "a") as file:
        file.write(f"{key}{'*' if request.get('rehearsal') else ''} {os.getpid()}\\n")
    figures = {"cost": 2.0 * count, "none": None, "checked": 7.0 if request.get("rehearsal") else None}
    print(json.dumps({"figures": figures}), flush=True)
"""


def fake_job(folder: Path, fail_at: Mapping[str, int] | None = None) -> Job:
    def arm(key: str) -> Arm:
        fails = str((fail_at or {}).get(key, -1))
        return Arm(key, key, "a fake", (sys.executable, "-c", FAKE_ARM, key, str(folder / "log"), fails))

    return Job(
        settings={},
        arms=[arm("a"), arm("b"), arm("c")],
        metrics=[
            Metric("cost", "cost", ".1f"),
            Metric("none", "none", ".1f"),
            Metric("checked", "checked", ".0f", compared=False, rehearsed=True),
            Metric("judged", "judged", ".0f", compared=False),
        ],
        request={},
        judge=lambda: {"judged": 1.0},
        facts={"sum_checked": False},
        references={},
        notes=["a note"],
    )


def speaking(code: str, peer: bool = True) -> Arm:
    return Arm("x", "the peer", "a program", (sys.executable, "-c", code), peer)


# --- the harness -------------------------------------------------------------------------------------


def test_arms_are_measured_in_turn_after_one_rehearsal_each(tmp_path: Path) -> None:
    told: list[str] = []
    result = run_job(fake_job(tmp_path), 5, told.append)
    lines = (tmp_path / "log").read_text().split("\n")[:-1]
    assert [line.split()[0] for line in lines] == ["a*", "b*", "c*", *(["a", "b", "c"] * 5)]
    assert result["order"] == ["a", "b", "c"] * 5
    assert told[0] == "rehearsal: a"
    assert told[-1] == "repetition 5 of 5: c"


def test_samples_are_kept_and_summarized(tmp_path: Path) -> None:
    first = run_job(fake_job(tmp_path), 5)["arms"][0]
    assert first["samples"]["cost"] == [2.0, 4.0, 6.0, 8.0, 10.0]
    assert first["summary"]["cost"] == {"median": 6.0, "min": 2.0, "max": 10.0}
    assert first["samples"]["checked"] == [7.0]
    assert first["summary"]["none"] is None
    assert first["ratio"] == {"cost": 1.0, "none": None}
    assert first["summary"]["judged"]["median"] == 1.0
    assert summarize([]) is None


def test_arms_can_be_left_out_and_the_result_says_so(tmp_path: Path) -> None:
    result = run_job(without(fake_job(tmp_path), ["b"]), 5)
    assert result["order"] == ["a", "c"] * 5
    assert result["notes"] == ["a note", "Left out on request: b."]
    for keys in (["a"], ["d"], ["b", "d"]):
        with pytest.raises(BenchmarkFailed, match="--leave-out takes b or c here"):
            without(fake_job(tmp_path), keys)


def test_no_process_is_left(tmp_path: Path) -> None:
    run_job(fake_job(tmp_path), 5)
    with pytest.raises(BenchmarkFailed, match="b: the program ended"):
        run_job(fake_job(tmp_path, {"b": 2}), 5)
    pids = {int(line.split()[1]) for line in (tmp_path / "log").read_text().splitlines()}
    assert len(pids) == 6
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize(
    "settings",
    [
        {"parameters": [10, 0]},
        {"clients": [1]},
        {"repetitions": 4},
        {"peers": Path(), "peer_python": Path()},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(BenchmarkFailed):
        Settings(**settings)


def test_every_length_is_run_with_every_number_of_clients_and_none_twice() -> None:
    sizes = Settings([5, 7, 5], [2, 3]).sizes
    assert sizes == [Size(5, 2), Size(5, 3), Size(7, 2), Size(7, 3)]


def test_a_folder_of_peers_names_the_same_python(tmp_path: Path) -> None:
    python = tmp_path / "nvflare" / "bin" / "python"
    with pytest.raises(PeerUnusable, match="nvflare/bin/python"):
        Settings(peers=tmp_path)
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    assert Settings(peers=tmp_path).peer == python
    assert Settings(peer_python=python).peer == python
    assert Settings().peer is None


def test_a_file_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    for file in (tmp_path, tmp_path / "none" / "bench.json"):
        with pytest.raises(BenchmarkFailed, match="--json"):
            run_benchmark(Console(), BenchmarkName.SEAL, Settings(), file)


# --- peers -------------------------------------------------------------------------------------------

READY = 'print("{}", flush=True); input(); '


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("pass", "the program ended"),
        ("print('welcome')", "does not answer in JSON"),
        ("print('[]')", "does not answer in JSON"),
        ("import json; print(json.dumps({'error': 'wrong version'}))", "wrong version"),
        ("import time; time.sleep(60)", "no answer within"),
        (READY + "raise SystemExit(3)", "the program ended"),
        (READY + "print('{}')", "holds no figures"),
        (READY + 'print(\'{"figures": {"a": "fast"}}\')', "holds no figures"),
        (READY + 'print(\'{"figures": {"a": true}}\')', "holds no figures"),
        (READY + 'print(\'{"error": "MemoryError"}\')', "MemoryError"),
    ],
)
@pytest.mark.parametrize("kind", [PeerUnusable, BenchmarkFailed])
def test_a_program_that_misbehaves_ends_with_a_coded_error(
    code: str, reason: str, kind: type[FedsealError]
) -> None:
    arm = speaking(code, peer=kind is PeerUnusable)
    with pytest.raises(kind, match=reason), ArmProcess(arm, ready_s=2.0) as process:
        process.measure({})


def run_verb(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fedseal", "bench", "seal", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("make_peer", "reason"),
    [
        (lambda folder: folder / "missing", "cannot be started"),
        (lambda _: sys.executable, "has no nvflare"),
        (lambda folder: wrong_nvflare(folder), "needs nvflare 2.9.0"),
    ],
    ids=["missing", "without nvflare", "another nvflare"],
)
def test_an_unusable_peer_is_a_coded_error_before_anything_is_measured(
    make_peer: Callable[[Path], object], reason: str, tmp_path: Path
) -> None:
    file, peer = tmp_path / "bench-seal.json", str(make_peer(tmp_path))
    small = ("--parameters", "100", "--clients", "2")
    result = run_verb("--json", str(file), *small, "--peer-python", peer)
    assert result.returncode == PeerUnusable.exit_code
    assert "FS-BENCH-01" in result.stderr
    assert reason in " ".join(result.stderr.split())
    assert str(tmp_path) not in result.stderr
    assert not file.exists()


def wrong_nvflare(folder: Path) -> Path:
    """A Python that finds the metadata of another NVFLARE version."""
    metadata = folder / "fake" / "nvflare-2.8.0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: nvflare\nVersion: 2.8.0\n")
    first = "import runpy, sys; sys.path.insert(0, sys.argv[1])"
    start = f"{first}; runpy.run_path(sys.argv[2], run_name='__main__')"
    program = folder / "python"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{start}" "{folder}/fake" "$2"\n')
    program.chmod(0o700)
    return program


def test_too_few_repetitions_are_a_usage_error(tmp_path: Path) -> None:
    result = run_verb("--json", str(tmp_path / "bench.json"), "--repeat", "4")
    assert result.returncode == 2
    assert "--repeat" in result.stderr


def test_the_peers_script_stands_alone() -> None:
    house = {"protocol", "crypto", "tasks", "client", "server", "deploy", "audit", "scenarios", "console"}
    imported: set[str] = set()
    for node in ast.walk(ast.parse(PEER_SCRIPT.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert not imported & (house | {"fedseal"})
    assert imported <= sys.stdlib_module_names
