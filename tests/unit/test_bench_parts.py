"""An interrupted benchmark goes on where it was, with the same programs and settings or not at all."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from protocol.errors import BenchmarkFailed
from scenarios import bench_parts, bench_seal
from scenarios.bench import BenchmarkName, interruption, legend, make_report, run_benchmark, run_job
from scenarios.bench_arms import Job, Settings, Size
from scenarios.bench_parts import Parts
from tests.test_architecture import FILES
from tests.unit.test_bench_harness import fake_job

SAME = {"settings": [1], "versions": {"python": "3"}}


def logged(folder: Path) -> list[str]:
    return [line.split()[0] for line in (folder / "log").read_text().splitlines()]


def test_a_failed_measurement_goes_on_with_whole_repetitions(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    # the rehearsal is answer 0: b ends in its third repetition, when a has measured its own
    with pytest.raises(BenchmarkFailed, match="b: the program ended"):
        run_job(fake_job(tmp_path, {"b": 3}), 5, part=Parts(file, SAME, resume=False).run(0))
    (tmp_path / "log").unlink()
    result = run_job(fake_job(tmp_path), 5, part=Parts(file, SAME, resume=True).run(0))
    assert logged(tmp_path) == ["a*", "b*", "c*", *(["a", "b", "c"] * 3)]
    assert result["order"] == ["a", "b", "c"] * 5
    assert [session["repetitions"] for session in result["sessions"]] == [2, 3]
    assert result["arms"][0]["samples"]["cost"] == [2.0, 4.0, 2.0, 4.0, 6.0]
    assert "2 from 20" in interruption(result)
    lines = legend(make_report("seal", Settings(), [result], {}))
    assert sum(line == interruption(result) for line in lines) == 1


def test_a_run_that_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    first = run_job(fake_job(tmp_path), 5, part=Parts(file, SAME, resume=False).run(0))
    (tmp_path / "log").unlink()
    parts = Parts(file, SAME, resume=True)
    assert run_job(fake_job(tmp_path), 5, part=parts.run(0)) == first
    assert not (tmp_path / "log").exists()
    run_job(fake_job(tmp_path), 5, part=parts.run(1))
    assert logged(tmp_path) == ["a*", "b*", "c*", *(["a", "b", "c"] * 5)]
    parts.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


@pytest.mark.parametrize(
    ("same", "resume", "reason"),
    [
        (SAME, False, "go on with it by --resume"),
        ({**SAME, "settings": [2]}, True, "another settings"),
        ({**SAME, "versions": {"python": "4"}}, True, "another versions"),
    ],
)
def test_what_does_not_fit_together_is_refused_and_kept(
    tmp_path: Path, same: dict[str, Any], resume: bool, reason: str
) -> None:
    file = tmp_path / "bench.json"
    run_job(fake_job(tmp_path), 5, part=Parts(file, SAME, resume=False).run(0))
    part = tmp_path / "bench.json.part"
    before = part.read_bytes()
    with pytest.raises(BenchmarkFailed, match=reason):
        Parts(file, same, resume=resume)
    assert part.read_bytes() == before


def test_the_code_is_every_source_file_of_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    read = set[Path]()
    content = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.add(path) or content(path))  # type: ignore[func-returns-value]
    bench_parts._code()
    assert read == {path.resolve() for path in FILES.values()}


def test_figures_of_other_code_are_not_mixed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "bench.json"
    run_job(fake_job(tmp_path), 5, part=Parts(file, SAME, resume=False).run(0))
    monkeypatch.setattr("scenarios.bench_parts._code", lambda: "0" * 64)
    with pytest.raises(BenchmarkFailed, match="another code"):
        Parts(file, SAME, resume=True)


@pytest.mark.parametrize("content", ["", "[]", '{"same": {}}', '{"same": {}, "runs": [{"x": 1}]}', "\0"])
def test_a_damaged_part_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "bench.json.part").write_text(content)
    with pytest.raises(BenchmarkFailed, match="cannot be read"):
        Parts(tmp_path / "bench.json", SAME, resume=True)


def test_the_command_keeps_what_it_measured_until_the_result_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, shown = tmp_path / "bench.json", io.StringIO()

    def interrupted(size: Size, *_: Any) -> Job:
        if size.clients == 3:
            raise KeyboardInterrupt
        return fake_job(tmp_path)

    settings = Settings(clients=[2, 3], leave_out=["c"])
    monkeypatch.setattr(bench_seal, "build", interrupted)
    monkeypatch.setattr("scenarios.bench_seal_targets.evaluate_seal", lambda _runs: {})
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(Console(file=shown), BenchmarkName.SEAL, settings, file)
    assert "--resume" in shown.getvalue()
    assert not file.exists()
    (tmp_path / "log").unlink()
    monkeypatch.setattr(bench_seal, "build", lambda *_: fake_job(tmp_path))
    with pytest.raises(BenchmarkFailed, match="another settings"):
        run_benchmark(Console(file=shown), BenchmarkName.SEAL, Settings(clients=[2, 3]), file, resume=True)
    run_benchmark(Console(file=shown), BenchmarkName.SEAL, settings, file, resume=True)
    assert logged(tmp_path) == ["a*", "b*", *(["a", "b"] * 5)]
    assert len(json.loads(file.read_text())["runs"]) == 2
    assert "Left out on request: c." in shown.getvalue()
    # what is shown in a file or pipe says how far it is, too
    labels = [arm.label for arm in fake_job(tmp_path).arms]
    assert f"rehearsal: {labels[0]}" in shown.getvalue()
    assert f"repetition 5 of 5: {labels[1]}" in shown.getvalue()
    assert not (tmp_path / "bench.json.part").exists()
