"""The benchmarks: in turn, complete, checked against numpy, and clear about a peer that cannot be used.

Times are never asserted. The one test that needs it finds nvflare[HE]==2.9.0 by FEDSEAL_PEER_PYTHON.
"""

import ast
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from rich.console import Console

from crypto.presets import packing_for
from protocol.errors import BenchmarkFailed, CapacityExceeded, FedsealError, PeerUnusable
from scenarios import bench_seal, seal_rounds
from scenarios.bench import BenchmarkName, legend, run_benchmark, run_job, summarize, table
from scenarios.bench_arms import MIN_REPETITIONS, Arm, ArmProcess, Figures, Job, Metric, Settings

ROOT = Path(__file__).parents[2]
PEER_SCRIPT = ROOT / "scenarios" / "peers" / "nvflare_seal.py"
PARAMETERS, CLIENTS = 10_000, 2

FIGURE = {"type": ["number", "null"]}
SUMMARY = {
    "type": ["object", "null"],
    "required": ["median", "min", "max"],
    "additionalProperties": {"type": "number"},
}
SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": [
        "benchmark",
        "date",
        "machine",
        "versions",
        "settings",
        "references",
        "metrics",
        "order",
        "arms",
        "notes",
    ],
    "properties": {
        "benchmark": {"const": "seal"},
        "date": {"pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00$"},
        "machine": {
            "type": "object",
            "required": ["cpu_model", "cores", "system", "load_average_start", "load_average_end"],
            "properties": {
                "cpu_model": {"type": "string", "minLength": 1},
                "cores": {"type": "integer", "minimum": 1},
                "load_average_start": {"type": "array", "items": {"type": "number"}, "minItems": 3},
            },
        },
        "versions": {"type": "object", "required": ["python", "numpy", "tenseal", "flwr"]},
        "settings": {"type": "object", "required": ["parameters", "clients", "repetitions"]},
        "references": {"type": "object", "additionalProperties": {"type": "number"}},
        "metrics": {"type": "array", "minItems": 10, "items": {"required": ["key", "label"]}},
        "order": {"type": "array", "items": {"type": "string"}},
        "notes": {"type": "array", "items": {"type": "string"}},
        "arms": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["key", "label", "description", "peer", "versions", "idle_rss_mib"],
                "properties": {
                    "key": {"type": "string"},
                    "label": {"type": "string"},
                    "description": {"type": "string"},
                    "peer": {"type": "boolean"},
                    "versions": {"type": "object", "required": ["python", "numpy"]},
                    "idle_rss_mib": {"type": "number", "exclusiveMinimum": 0},
                    "samples": {"additionalProperties": {"type": "array", "items": FIGURE}},
                    "summary": {"additionalProperties": SUMMARY},
                    "ratio": {"additionalProperties": FIGURE},
                },
            },
        },
    },
}

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
        references={},
        notes=["a note"],
    )


def speaking(code: str, peer: bool = True) -> Arm:
    return Arm("x", "the peer", "a program", (sys.executable, "-c", code), peer)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("bench") / "bench-seal.json"
    settings = Settings(PARAMETERS, CLIENTS)
    run_benchmark(Console(file=io.StringIO()), BenchmarkName.SEAL, settings, file)
    value: dict[str, Any] = json.loads(file.read_text())
    return value


def arm_of(report: Mapping[str, Any], key: str) -> Any:
    return next(arm for arm in report["arms"] if arm["key"] == key)


def median(report: Mapping[str, Any], key: str, metric: str) -> float:
    return float(arm_of(report, key)["summary"][metric]["median"])


# --- the benchmark seal ------------------------------------------------------------------------------


def test_the_report_fits_its_schema(report: dict[str, Any]) -> None:
    jsonschema.validate(report, SCHEMA)
    keys = [metric["key"] for metric in report["metrics"]]
    for arm in report["arms"]:
        assert list(arm["samples"]) == list(arm["summary"]) == keys
        for metric in report["metrics"]:
            expected = 1 if metric["rehearsed"] else report["settings"]["repetitions"]
            assert len(arm["samples"][metric["key"]]) == expected
    assert report["settings"] == {"parameters": PARAMETERS, "clients": CLIENTS, "repetitions": 5}


def test_all_arms_that_need_no_peer_are_measured_in_turn(report: dict[str, Any]) -> None:
    assert report["order"] == ["exact16", "compact", "tenseal", "secagg"] * MIN_REPETITIONS
    assert not any(arm["peer"] for arm in report["arms"])


@pytest.mark.parametrize("preset", ["exact16", "compact"])
def test_our_sums_are_exact_and_the_mean_is_within_a_grid_step(report: dict[str, Any], preset: str) -> None:
    step = seal_rounds.UPDATE_RANGE / packing_for(preset, CLIENTS).half_levels
    assert arm_of(report, preset)["samples"]["wrong_integer_sums"] == [0]
    assert 0 < arm_of(report, preset)["summary"]["max_abs_error"]["max"] < step


def test_the_peers_sum_the_same_updates(report: dict[str, Any]) -> None:
    assert arm_of(report, "tenseal")["summary"]["max_abs_error"]["max"] < 1e-5
    assert arm_of(report, "secagg")["summary"]["max_abs_error"]["max"] < 1e-6
    assert arm_of(report, "secagg")["samples"]["wrong_integer_sums"] == [0]
    assert arm_of(report, "tenseal")["summary"]["wrong_integer_sums"] is None


def test_bytes_are_those_of_the_wire(report: dict[str, Any]) -> None:
    for preset in ("exact16", "compact"):
        packing = packing_for(preset, CLIENTS)
        upload = packing.frames_for(PARAMETERS) * packing.frame_bytes / PARAMETERS
        assert median(report, preset, "upload_bytes_per_parameter") == pytest.approx(upload)
        assert median(report, preset, "opening_bytes_per_parameter") == pytest.approx(CLIENTS * upload)
        assert median(report, preset, "download_bytes_per_parameter") == 4.0
    assert 8.0 < median(report, "secagg", "upload_bytes_per_parameter") < 8.1
    assert median(report, "tenseal", "upload_bytes_per_parameter") > 50.0
    assert arm_of(report, "secagg")["summary"]["opener_cpu_s"] is None


def test_the_table_shows_every_arm_and_every_ratio(report: dict[str, Any]) -> None:
    console = Console(width=200, file=io.StringIO())
    with console.capture() as capture:
        console.print(table(report))
    text = capture.get()
    for arm in report["arms"]:
        assert arm["label"] in text
        ratio = arm["ratio"]["upload_bytes_per_parameter"]
        assert f"{ratio:.2f}x" in text or f"{ratio:.1f}x" in text
    lines = "\n".join(legend(report))
    assert "server sees the sum in clear" in lines
    assert "downloads all uploads" in lines


def test_a_cohort_that_no_preset_holds_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(CapacityExceeded):
        bench_seal.build(Settings(10, 300), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_mean_is_judged_by_this_process_and_never_twice(tmp_path: Path) -> None:
    mean = bench_seal.write_updates(tmp_path / "updates", 100, 3)
    stored = np.fromfile(tmp_path / "updates", dtype="<f4").reshape(3, 100)
    np.testing.assert_allclose(stored.mean(axis=0, dtype=np.float64), mean, atol=1e-12)
    result = tmp_path / "mean"
    (mean + 0.5).tofile(result)
    assert bench_seal.judge(result, mean)["max_abs_error"] == pytest.approx(0.5)
    with pytest.raises(BenchmarkFailed, match="FS-BENCH-02"):
        bench_seal.judge(result, mean)


@pytest.mark.parametrize("wrong", [np.zeros(99), np.full(100, np.nan)], ids=["short", "nan"])
def test_a_mean_that_is_none_is_refused(tmp_path: Path, wrong: Any) -> None:
    wrong.tofile(tmp_path / "mean")
    with pytest.raises(BenchmarkFailed):
        bench_seal.judge(tmp_path / "mean", np.zeros(100))


@pytest.mark.parametrize("arm", sorted(seal_rounds.ROUNDS))
def test_a_sum_that_lost_a_client_does_not_pass(arm: str, tmp_path: Path) -> None:
    """What would be reported as exact if nobody compared."""
    updates, result = tmp_path / "updates", tmp_path / "mean"
    mean = bench_seal.write_updates(updates, 50, 2)
    request = {"updates": updates, "result": result, "parameters": 50, "clients": 2}

    class Forgetful:
        def __init__(self, clients: int, rehearsal: bool) -> None:
            self._inner = seal_rounds.ROUNDS[arm](clients, rehearsal)
            self._added = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

        def add(self, upload: list[bytes]) -> None:
            self._added += 1
            if self._added == 1:
                self._inner.add(upload)

    try:
        bench_seal.measure(Forgetful, request)
    except FedsealError:
        return
    assert (bench_seal.judge(result, mean)["max_abs_error"] or 0.0) > 0.01


# --- the harness -------------------------------------------------------------------------------------


def test_arms_are_measured_in_turn_after_one_rehearsal_each(tmp_path: Path) -> None:
    told: list[str] = []
    result = run_job("fake", fake_job(tmp_path), 5, told.append)
    lines = (tmp_path / "log").read_text().split("\n")[:-1]
    assert [line.split()[0] for line in lines] == ["a*", "b*", "c*", *(["a", "b", "c"] * 5)]
    assert result["order"] == ["a", "b", "c"] * 5
    assert told[0] == "rehearsal: a"
    assert told[-1] == "repetition 5 of 5: c"


def test_samples_are_kept_and_summarized(tmp_path: Path) -> None:
    first = run_job("fake", fake_job(tmp_path), 5)["arms"][0]
    assert first["samples"]["cost"] == [2.0, 4.0, 6.0, 8.0, 10.0]
    assert first["summary"]["cost"] == {"median": 6.0, "min": 2.0, "max": 10.0}
    assert first["samples"]["checked"] == [7.0]
    assert first["summary"]["none"] is None
    assert first["ratio"] == {"cost": 1.0, "none": None}
    assert first["summary"]["judged"]["median"] == 1.0
    assert summarize([]) is None


def test_no_process_is_left(tmp_path: Path) -> None:
    run_job("fake", fake_job(tmp_path), 5)
    with pytest.raises(BenchmarkFailed, match="b: the program ended"):
        run_job("fake", fake_job(tmp_path, {"b": 2}), 5)
    pids = {int(line.split()[1]) for line in (tmp_path / "log").read_text().splitlines()}
    assert len(pids) == 6
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize(
    "settings",
    [{"parameters": 0}, {"clients": 1}, {"repetitions": 4}],
    ids=lambda settings: next(iter(settings)),
)
def test_impossible_settings_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(BenchmarkFailed):
        Settings(**settings)  # type: ignore[arg-type]


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


@pytest.mark.skipif("FEDSEAL_PEER_PYTHON" not in os.environ, reason="FEDSEAL_PEER_PYTHON is not set")
def test_nvflares_own_classes_are_measured_in_turn(tmp_path: Path) -> None:
    settings = Settings(PARAMETERS, CLIENTS, peer_python=Path(os.environ["FEDSEAL_PEER_PYTHON"]))
    result = run_job("seal", bench_seal.build(settings, tmp_path), 5)
    jsonschema.validate(result, SCHEMA)
    assert result["order"][:5] == ["exact16", "compact", "tenseal", "nvflare", "secagg"]
    peer = arm_of(result, "nvflare")
    assert peer["peer"]
    assert peer["versions"]["nvflare"] == "2.9.0"
    assert peer["summary"]["max_abs_error"]["max"] < 1e-5
    figures: Figures = {key: (value or {}).get("median") for key, value in peer["summary"].items()}
    assert (figures["upload_bytes_per_parameter"] or 0.0) > 50.0
