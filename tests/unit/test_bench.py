"""The benchmarks: in turn, complete, checked against numpy, and clear about a peer that cannot be used.

Times are never asserted. The one test that needs it finds nvflare[HE]==2.9.0 by FEDSEAL_PEER_PYTHON.
"""

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from rich.console import Console

from crypto.presets import packing_for
from protocol.errors import BenchmarkFailed, CapacityExceeded, FedsealError, OpeningRefused
from scenarios import bench_seal, seal_rounds
from scenarios.bench import BenchmarkName, legend, run_benchmark, run_job, table
from scenarios.bench_arms import MIN_REPETITIONS, Figures, Settings, Size
from scenarios.bench_seal_targets import evaluate_seal
from tests.unit.test_bench_targets import TARGET_KEYS

ROOT = Path(__file__).parents[2]
PEER_SCRIPT = ROOT / "scenarios" / "peers" / "nvflare_seal.py"
PARAMETERS, CLIENTS, MANY = 10_000, 2, 6
OURS = ("exact16", "unmasked", "compact")

FIGURE = {"type": ["number", "null"]}
SUMMARY = {
    "type": ["object", "null"],
    "required": ["median", "min", "max"],
    "additionalProperties": {"type": "number"},
}
ARM = {
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
}
LOADS = {"type": "array", "items": {"type": "number"}, "minItems": 3}
SESSION = {
    "type": "object",
    "required": ["begun", "repetitions", "load_average_start", "load_average_end"],
    "properties": {"load_average_start": LOADS, "load_average_end": LOADS},
}
RUN = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "settings": {"type": "object", "required": ["parameters", "clients", "repetitions"]},
        "sum_checked": {"type": "boolean"},
        "load_average_start": LOADS,
        "load_average_end": LOADS,
        "sessions": {"type": "array", "minItems": 1, "items": SESSION},
        "references": {"type": "object", "additionalProperties": {"type": "number"}},
        "metrics": {"type": "array", "minItems": 10, "items": {"required": ["key", "label"]}},
        "order": {"type": "array", "items": {"type": "string"}},
        "notes": {"type": "array", "items": {"type": "string"}},
        "arms": {"type": "array", "items": ARM},
    },
}
RUN["required"] = list(RUN["properties"])  # type: ignore[call-overload]
TARGET = {
    "type": "object",
    "required": ["value", "target", "met", "from", "reason"],
    "properties": {
        "value": {"type": ["number", "boolean", "null"]},
        "target": {"type": ["number", "boolean"]},
        "met": {"type": ["boolean", "null"]},
        "from": {"type": ["string", "null"]},
        "reason": {"type": ["string", "null"]},
    },
}
SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["benchmark", "date", "machine", "versions", "settings", "runs", "targets"],
    "properties": {
        "benchmark": {"const": "seal"},
        "date": {"pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00$"},
        "machine": {
            "type": "object",
            "required": ["cpu_model", "cores", "system"],
            "properties": {
                "cpu_model": {"type": "string", "minLength": 1},
                "cores": {"type": "integer", "minimum": 1},
            },
        },
        "versions": {"type": "object", "required": ["python", "numpy", "tenseal", "flwr"]},
        "settings": {"type": "object", "required": ["parameters", "clients", "repetitions"]},
        "runs": {"type": "array", "items": RUN, "minItems": 1},
        "targets": {"type": "object", "required": TARGET_KEYS, "additionalProperties": TARGET},
    },
}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param([CLIENTS], id="two clients"),
        pytest.param([CLIENTS, MANY], id="more than are timed", marks=pytest.mark.long),
    ],
)
def report(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("bench") / "bench-seal.json"
    settings = Settings([PARAMETERS], request.param)
    run_benchmark(Console(file=io.StringIO()), BenchmarkName.SEAL, settings, file)
    value: dict[str, Any] = json.loads(file.read_text())
    return value


@pytest.fixture
def run(report: dict[str, Any]) -> Any:
    return report["runs"][-1]


def arm_of(report: Mapping[str, Any], key: str) -> Any:
    return next(arm for arm in report["arms"] if arm["key"] == key)


def median(report: Mapping[str, Any], key: str, metric: str) -> float:
    return float(arm_of(report, key)["summary"][metric]["median"])


# --- the benchmark seal ------------------------------------------------------------------------------


def test_the_report_fits_its_schema(report: dict[str, Any]) -> None:
    jsonschema.validate(report, SCHEMA)
    clients = [run["settings"]["clients"] for run in report["runs"]]
    assert clients in ([CLIENTS], [CLIENTS, MANY])
    assert report["settings"] == {"parameters": [PARAMETERS], "clients": clients, "repetitions": 5}
    assert {run["settings"]["parameters"] for run in report["runs"]} == {PARAMETERS}


def test_a_run_holds_every_measurement(run: dict[str, Any]) -> None:
    keys = [metric["key"] for metric in run["metrics"]]
    for arm in run["arms"]:
        assert list(arm["samples"]) == list(arm["summary"]) == keys
        for metric in run["metrics"]:
            expected = 1 if metric["rehearsed"] else run["settings"]["repetitions"]
            assert len(arm["samples"][metric["key"]]) == expected


def test_all_arms_that_need_no_peer_are_measured_in_turn(run: dict[str, Any]) -> None:
    assert run["order"] == ["exact16", "unmasked", "compact", "tenseal", "secagg"] * MIN_REPETITIONS
    assert not any(arm["peer"] for arm in run["arms"])


@pytest.mark.parametrize("key", OURS)
def test_our_sums_are_exact_and_the_mean_is_within_a_grid_step(run: dict[str, Any], key: str) -> None:
    preset = "compact" if key == "compact" else "exact16"
    step = seal_rounds.UPDATE_RANGE / packing_for(preset, run["settings"]["clients"]).half_levels
    assert run["sum_checked"]
    assert arm_of(run, key)["samples"]["wrong_integer_sums"] == [0]
    assert 0 < arm_of(run, key)["summary"]["max_abs_error"]["max"] < step


def test_the_peers_sum_the_same_updates(run: dict[str, Any]) -> None:
    assert arm_of(run, "tenseal")["summary"]["max_abs_error"]["max"] < 1e-5
    assert arm_of(run, "secagg")["summary"]["max_abs_error"]["max"] < 1e-6
    assert arm_of(run, "secagg")["samples"]["wrong_integer_sums"] == [0]
    assert arm_of(run, "tenseal")["summary"]["wrong_integer_sums"] is None


def test_bytes_are_those_of_the_wire(run: dict[str, Any]) -> None:
    clients = run["settings"]["clients"]
    for key in OURS:
        packing = packing_for("compact" if key == "compact" else "exact16", clients)
        upload = packing.frames_for(PARAMETERS) * packing.frame_bytes / PARAMETERS
        assert median(run, key, "upload_bytes_per_parameter") == pytest.approx(upload)
        assert median(run, key, "opening_bytes_per_parameter") == pytest.approx(clients * upload)
        assert median(run, key, "download_bytes_per_parameter") == 4.0
    assert 8.0 < median(run, "secagg", "upload_bytes_per_parameter") < 8.1
    assert median(run, "tenseal", "upload_bytes_per_parameter") > 50.0
    assert arm_of(run, "secagg")["summary"]["opener_cpu_s"] is None


def test_the_tables_show_every_arm_and_every_ratio(report: dict[str, Any], run: dict[str, Any]) -> None:
    console = Console(width=200, file=io.StringIO())
    with console.capture() as capture:
        console.print(table("seal", run))
    text = capture.get()
    for arm in run["arms"]:
        assert arm["label"] in text
        ratio = arm["ratio"]["upload_bytes_per_parameter"]
        assert f"{ratio:.2f}x" in text or f"{ratio:.1f}x" in text
    lines = "\n".join(legend(report))
    assert "server sees the sum in clear" in lines
    assert "downloads all uploads" in lines
    assert "without masks, for comparison with systems that have none" in lines
    assert lines.count("downloads all uploads") == 1


def test_a_cohort_that_no_preset_holds_is_refused_before_anything_starts(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    with pytest.raises(CapacityExceeded):
        run_benchmark(Console(), BenchmarkName.SEAL, Settings([10], [2, 300]), file)
    assert not file.exists()


def test_only_the_arm_that_says_so_is_without_masks() -> None:
    update = np.linspace(-1, 1, 50, dtype=np.float32)
    for key in OURS:
        parties = seal_rounds.ROUNDS[key](3)
        parties.add(0, parties.seal(0, update))
        if key == "unmasked":
            np.testing.assert_allclose(parties.open(()).mean, update, atol=1e-3)
        else:
            with pytest.raises(OpeningRefused):
                parties.open(())


@pytest.mark.parametrize("arm", sorted(seal_rounds.ROUNDS))
def test_all_seal_once_then_only_those_that_are_timed(arm: str, tmp_path: Path) -> None:
    """Kept uploads and fresh ones open to one sum; who is not timed costs a repetition nothing."""
    job = bench_seal.build(Size(50, 10), None, tmp_path)
    sealed: list[int] = []
    added: list[int] = []

    class Counted:
        def __init__(self, clients: int) -> None:
            self._inner = seal_rounds.ROUNDS[arm](clients)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

        def seal(self, index: int, update: Any) -> list[bytes]:
            sealed.append(index)
            return self._inner.seal(index, update)

        def add(self, index: int, upload: list[bytes]) -> None:
            added.append(index)
            self._inner.add(index, upload)

    player = bench_seal.Player(Counted)
    for rehearsal in (True, False, False):
        figures = player.measure({**job.request, "rehearsal": rehearsal})
        assert (job.judge()["max_abs_error"] or 0.0) < 0.01
        assert figures["wrong_integer_sums"] == (0.0 if rehearsal and arm != "tenseal" else None)
        assert len(sealed) == (10 if rehearsal and arm != "tenseal" else bench_seal.SEALED)
        assert sorted(added) == list(range(10))
        sealed.clear()
        added.clear()


@pytest.mark.long
def test_a_sum_that_is_too_large_to_check_is_not_claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bench_seal.sum_is_checked(Size(10_000_000, 8))
    assert not bench_seal.sum_is_checked(Size(10_000_000, 64))
    monkeypatch.setattr(bench_seal, "MOST_VALUES", 1000)
    result = run_job(bench_seal.build(Size(101, 10), None, tmp_path), 5)
    jsonschema.validate(result, RUN)
    assert result["sum_checked"] is False
    assert bench_seal.UNCHECKED in result["notes"]
    for arm in result["arms"]:
        for metric in ("max_abs_error", "wrong_integer_sums", "opener_cpu_s", "peak_rss_mib"):
            assert arm["summary"][metric] is None
        assert arm["summary"]["client_cpu_s"]["median"] > 0
    assert evaluate_seal([result])["sum_exact"]["value"] is None


# --- the judge ---------------------------------------------------------------------------------------


def test_a_mean_is_judged_by_this_process_and_never_twice(tmp_path: Path) -> None:
    mean = bench_seal.write_updates(tmp_path / "updates", 100, 7)
    stored = np.fromfile(tmp_path / "updates", dtype="<f4").reshape(4, 100)[[0, 1, 2, 3, 0, 1, 2]]
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
    job = bench_seal.build(Size(50, 2), None, tmp_path)

    class Forgetful:
        def __init__(self, clients: int) -> None:
            self._inner = seal_rounds.ROUNDS[arm](clients)
            self._added = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

        def add(self, index: int, upload: list[bytes]) -> None:
            self._added += 1
            if self._added == 1:
                self._inner.add(index, upload)

    try:
        bench_seal.Player(Forgetful).measure(job.request)
    except FedsealError:
        return
    assert (job.judge()["max_abs_error"] or 0.0) > 0.01


# --- peers -------------------------------------------------------------------------------------------


@pytest.mark.skipif("FEDSEAL_PEER_PYTHON" not in os.environ, reason="FEDSEAL_PEER_PYTHON is not set")
def test_nvflares_own_classes_are_measured_in_turn(tmp_path: Path) -> None:
    peer_python = Path(os.environ["FEDSEAL_PEER_PYTHON"])
    result = run_job(bench_seal.build(Size(PARAMETERS, MANY), peer_python, tmp_path), 5)
    jsonschema.validate(result, RUN)
    assert result["order"][:6] == ["exact16", "unmasked", "compact", "tenseal", "nvflare", "secagg"]
    peer = arm_of(result, "nvflare")
    assert peer["peer"]
    assert peer["versions"]["nvflare"] == "2.9.0"
    assert peer["summary"]["max_abs_error"]["max"] < 1e-5
    figures: Figures = {key: (value or {}).get("median") for key, value in peer["summary"].items()}
    assert (figures["upload_bytes_per_parameter"] or 0.0) > 50.0
