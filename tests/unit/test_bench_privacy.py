"""The benchmark `privacy`: every arm does the work of its row, and the targets follow from the rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from scenarios import bench_privacy
from scenarios.bench import BenchmarkName, run_benchmark
from scenarios.bench_arms import Settings
from scenarios.bench_models import BENCH_MODELS, BenchModel
from scenarios.bench_privacy import LABELS, METRICS, STEPPERS, TARGETS, PrivacyArm, evaluate_privacy

quiet_opacus = pytest.mark.filterwarnings(
    "ignore:Full backward hook is firing:UserWarning",
    "ignore:Optimal order is the largest alpha:UserWarning",
)


def _loss(logits: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, y, reduction="none")


TINY = BenchModel(
    "tiny",
    lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)),
    lambda: (torch.randn(8, 5), torch.randint(3, (8,))),
    _loss,
)


@quiet_opacus
@pytest.mark.parametrize("name", [name for name in STEPPERS if name != "plain"])
def test_the_private_arms_take_the_same_step(name: str) -> None:
    """Same weights, same batch, clipping that bites: the step is the mean of the clipped gradients."""
    torch.manual_seed(1)
    reference, (x, y) = TINY.build(), TINY.batch()
    model = TINY.build()
    model.load_state_dict(reference.state_dict())
    clipped = [torch.zeros_like(parameter) for parameter in reference.parameters()]
    for row in range(len(x)):
        loss = 40.0 * _loss(reference(x[row : row + 1]), y[row : row + 1]).sum()
        gradients = torch.autograd.grad(loss, list(reference.parameters()))
        norm = torch.sqrt(sum((g * g).sum() for g in gradients))
        assert norm > bench_privacy.MAX_GRAD_NORM
        clipped = [total + g / norm for total, g in zip(clipped, gradients, strict=True)]
    steep = BenchModel(TINY.name, TINY.build, TINY.batch, lambda logits, y: 40.0 * _loss(logits, y))
    STEPPERS[name](model, steep)(x, y)
    for before, after, total in zip(reference.parameters(), model.parameters(), clipped, strict=True):
        moved = (before - after).detach() / 0.01
        expected = total if name in ("opacus", "ghost") else total / len(x)
        assert torch.allclose(moved, expected, atol=2e-4), name


@quiet_opacus
def test_an_arm_has_a_figure_for_each_row_that_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_privacy, "BENCH_MODELS", (TINY,))
    figures = PrivacyArm("book-keeping").measure({"rehearsal": True})
    assert set(figures) == {"step.tiny", *(m.key for m in METRICS if not m.key.startswith("step."))}
    assert all(value is not None and value >= 0 for value in figures.values())
    plain = PrivacyArm("plain").measure({})
    assert plain["calibrate_s"] is None
    assert plain["noise_s"] is not None


@quiet_opacus
def test_a_peer_that_cannot_do_a_model_has_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_privacy, "BENCH_MODELS", (TINY,))

    def refuse(_model: nn.Module, _bench: BenchModel) -> bench_privacy.Step:
        def step(_x: Tensor, _y: Tensor) -> None:
            raise RuntimeError("no such layer")

        return step

    monkeypatch.setattr(bench_privacy, "STEPPERS", {"opacus": refuse, "book-keeping": refuse})
    assert PrivacyArm("opacus").measure({})["step.tiny"] is None
    with pytest.raises(RuntimeError):
        PrivacyArm("book-keeping").measure({})


def _run(medians: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    arms = [
        {
            "key": key,
            "summary": {
                metric.key: {"median": medians[key][metric.key]} if metric.key in medians[key] else None
                for metric in METRICS
            },
        }
        for key in LABELS
    ]
    return {"settings": {"repetitions": 5}, "arms": arms}


def test_the_targets_follow_from_the_rows() -> None:
    steps = {f"step.{model.name}": 2.0 for model in BENCH_MODELS}
    medians: dict[str, dict[str, float]] = {key: dict(steps) for key in LABELS}
    medians["plain"] = dict.fromkeys(steps, 1.0) | {"noise_s": 1.0}
    medians["book-keeping"] = dict.fromkeys(steps, 1.5) | {
        "noise_s": 3.0,
        "calibrate_s": 0.1,
        "epsilon_error": 0.001,
    }
    entries = evaluate_privacy([_run(medians)])
    assert list(entries) == [target.key for target in TARGETS]
    assert entries["step_ratio.cnn57k.book-keeping"]["value"] == pytest.approx(1.5)
    assert entries["step_ratio.cnn57k.opacus"]["met"] is None
    missed = {key for key, entry in entries.items() if entry["met"] is False}
    assert missed == {"noise_ratio"}
    assert entries["calibrate_s.opacus"]["value"] is None


@pytest.mark.long
def test_the_command_measures_everything(tmp_path: Path) -> None:
    file = tmp_path / "privacy.json"
    run_benchmark(Console(quiet=True), BenchmarkName.PRIVACY, Settings(), file)
    report = json.loads(file.read_text())
    assert report["targets"]["epsilon_error"]["met"] is True
    assert {arm["key"] for arm in report["runs"][0]["arms"]} == set(LABELS)
