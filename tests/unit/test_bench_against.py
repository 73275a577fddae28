"""A benchmark beside an earlier file: what counts as worse, and what cannot be compared."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from protocol.errors import BenchmarkFailed, BenchmarkWorse
from scenarios import bench
from scenarios.bench import BenchmarkName
from scenarios.bench_against import compare, read_earlier
from scenarios.bench_arms import Settings

ROOT = Path(__file__).parents[2]
RECORDS = sorted((ROOT / "bench" / "records").glob("*.json"))


def arm(label: str, seconds: float | None, size: float = 4.0) -> dict[str, Any]:
    summary = {"s": None if seconds is None else {"median": seconds}, "bytes": {"median": size}}
    return {"key": label, "label": label, "summary": summary, "ratio": {}}


def report(own: float = 1.0, plain: float | None = 0.2, peer: float = 20.0) -> dict[str, Any]:
    """Return a report with three arms and one metric that is not compared."""
    metrics = [
        {"key": "s", "label": "a round", "compared": True},
        {"key": "bytes", "label": "bytes", "compared": False},
    ]
    run = {
        "settings": {"parameters": 1000, "clients": 3},
        "metrics": metrics,
        "arms": [arm("fedseal", own), arm("plain", plain), arm("peer", peer)],
    }
    return {
        "benchmark": "round",
        "machine": {"cpu_model": "A", "cores": 2},
        "versions": {"python": "3.11.7", "fedseal": "0.1.0"},
        "runs": [run],
    }


def test_a_machine_that_is_slower_in_everything_is_no_worse() -> None:
    comparison = compare(report(), report(own=3.0, plain=0.6, peer=60.0))
    assert (comparison.worse, comparison.compared, comparison.notes) == ((), 2, ())


def test_what_grew_by_more_than_a_fifth_beside_the_others_is_worse() -> None:
    assert compare(report(), report(own=1.19)).worse == ()
    assert compare(report(), report(own=0.2)).worse == (), "better"
    assert compare(report(), report(own=2.4, peer=48.0)).worse == (
        "1,000 parameters, 3 clients: fedseal to plain, a round: 5 became 12",
    )
    assert len(compare(report(), report(own=1.21)).worse) == 2


def test_others_that_became_slower_are_not_our_fault() -> None:
    assert compare(report(), report(peer=2000.0)).worse == ()


def test_what_stands_in_one_file_only_is_said() -> None:
    later = report(plain=None)
    later["machine"]["cpu_model"] = "B"
    later["versions"] = {"python": "3.11.7", "fedseal": "0.2.0", "numpy": "2"}
    other = copy.deepcopy(later["runs"][0]) | {"settings": {"parameters": 9, "clients": 3}}
    later["runs"].append(other)
    assert set(compare(report(), later).notes) == {
        "cpu_model: A in the earlier file, B now",
        "fedseal: 0.1.0 in the earlier file, 0.2.0 now",
        "numpy: unknown in the earlier file, 2 now",
        "1,000 parameters, 3 clients: fedseal to plain: some or all ratios only in the earlier file",
        "9 parameters, 3 clients: only in the new file",
    }


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"benchmark": "round"}', '{"benchmark": "round", "runs": [{}]}', "\udcff"]
)
def test_what_is_no_report_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "earlier.json"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(BenchmarkFailed, match="not one of fedseal bench"):
        read_earlier(file, "round")
    with pytest.raises(BenchmarkFailed, match="not one of fedseal bench"):
        read_earlier(tmp_path / "missing.json", "round")


def measured(
    monkeypatch: pytest.MonkeyPatch, folder: Path, earlier: dict[str, Any], later: dict[str, Any]
) -> str:
    """Run a benchmark whose measurement is known, against an earlier file; returns what was printed."""
    (folder / "earlier.json").write_text(json.dumps(earlier), encoding="utf-8")
    monkeypatch.setattr(bench, "_prepared", lambda *_: ([], lambda _runs: {}))
    monkeypatch.setattr(bench, "make_report", lambda *_: later | {"targets": {}})
    monkeypatch.setattr(bench, "legend", lambda _report: [])
    console, file = Console(file=io.StringIO(), width=120), folder / "later.json"
    try:
        settings = Settings([1000], [3], 5)
        bench.run_benchmark(console, BenchmarkName.ROUND, settings, file, against=folder / "earlier.json")
    finally:
        if earlier["benchmark"] == "round":
            assert json.loads(file.read_text(encoding="utf-8"))["benchmark"] == "round"
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_a_release_script_is_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "none of 2 ratios is worse" in measured(monkeypatch, tmp_path, report(), report(own=1.1))
    with pytest.raises(BenchmarkWorse, match="2 of 2 ratios") as caught:
        measured(monkeypatch, tmp_path, report(), report(own=2.4))
    assert caught.value.exit_code == 1


def test_nothing_is_measured_for_a_file_of_another_benchmark(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(BenchmarkFailed, match="of the benchmark seal, not of round"):
        measured(monkeypatch, tmp_path, report() | {"benchmark": "seal"}, report())
    assert not (tmp_path / "later.json").exists()


def test_files_of_other_sizes_are_no_pass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    later = report()
    later["runs"][0]["settings"] = {"parameters": 5, "clients": 3}
    with pytest.raises(BenchmarkFailed, match="no ratio in common"):
        measured(monkeypatch, tmp_path, report(), later)


def test_kept_records_can_be_compared_with() -> None:
    assert RECORDS
    for file in RECORDS:
        name = file.stem.rsplit("-", 1)[-1]
        kept = read_earlier(file, name)
        comparison = compare(kept, kept)
        assert (comparison.worse, comparison.notes) == ((), ())
        assert comparison.compared or name == "audit", "an audit has nothing to be compared with"
        assert set(kept["machine"]) == {"cpu_model", "cores", "system"}
        assert "/" not in json.dumps(kept["machine"]) + json.dumps(kept["versions"])
