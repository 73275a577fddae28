"""Large models in parts, end to end; training is replaced by constants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client import contribution
from scenarios.bench_round import plan_for, shards
from scenarios.simulate import federate
from tasks.resolve import resolve

OWNERS = 3


def one_round(parameters: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Carry one round of a synthetic model out, in this process, and return what is recorded of it."""
    fields = plan_for(parameters, OWNERS, 1).fields()
    plan = resolve(type(plan_for(1000, OWNERS, 1)).from_fields(fields))
    # training is not what is tested, and DP-SGD on 50M parameters takes minutes
    values = iter([0.001, 0.002, 0.003])
    monkeypatch.setattr(contribution, "local_update", lambda *a: np.full(a[2].size, next(values)))
    simulation = federate(plan, shards(OWNERS), folder)
    try:
        simulation.run()
        (facts,) = simulation.store.rounds()
        before, after = (simulation.store.read_checkpoint(number).weights for number in (0, 1))
        grid = plan.update_range / 2**15
        np.testing.assert_allclose(after - before, 0.002, atol=grid)
        return facts | {"parameters": before.size}
    finally:
        simulation.close()


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_fifty_million_parameters_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = one_round(50_000_000, tmp_path, monkeypatch)
    assert facts["parameters"] == pytest.approx(50_000_000, rel=0.01)
    assert facts["upload_bytes"] / facts["parameters"] < 3.6
    assert not (tmp_path / "run" / "frames").exists()


def test_several_parts_of_true_size_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2.5 million parameters: two parts to seal, four to open, two of sums."""
    facts = one_round(2_500_000, tmp_path, monkeypatch)
    assert facts["upload_bytes"] > 8 * 1024 * 1024
    assert facts["download_bytes"] > 3 * 8 * 1024 * 1024
