"""`fedseal seal plan` as a user meets it, and the warning of a plan with the compatibility scheme."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from real_federation import plan_fields
from test_privacy_verbs import fedseal_says, write_plan

from protocol.plan import Plan
from tasks.resolve import resolve

__all__ = ["fedseal_says"]

OWNERS, FRAME_BYTES, VALUES = 3, 28_736, 8_184
Q, T = 72_057_594_037_641_217, 140_737_488_273_409


def test_seal_plan_prints_bytes_bits_proof_errors_time_and_security(
    tmp_path: Path, fedseal_says: Any
) -> None:
    status, out, _ = fedseal_says("seal", "plan", write_plan(tmp_path), "--parameters", 1_000_000)
    assert status == 0
    for words in (
        "exact16, BFV, 256-bit security class",
        "1000000 parameters in 123 frames",
        "packed without gaps, 3.51 bytes per value",
        "3.535 bytes per parameter (float32: 4)",
        "20.92 bits per value",
        "64.5 < 256.0 for 3 owners",
        "11863272 < 11863283",
        "from rounding",
        "from privacy noise",
        "CPU seconds per round, measured now",
    ):
        assert words in " ".join(out.split()), words


def test_seal_plan_writes_figures_that_follow_from_the_plan_by_hand(
    tmp_path: Path, fedseal_says: Any
) -> None:
    status, out, _ = fedseal_says("seal", "plan", write_plan(tmp_path), "--json")
    facts = json.loads(out)
    plan = resolve(Plan.from_fields(plan_fields()))
    radix = math.isqrt(T)
    levels = (radix - 1) // (4 * OWNERS)
    assert status == 0
    assert (facts["parameters"], facts["frames"], facts["upload_bytes"]) == (650, 1, FRAME_BYTES)
    assert facts["upload_bytes_per_parameter"] == FRAME_BYTES / 650
    assert facts["frame_bytes_per_value"] == FRAME_BYTES / VALUES
    assert facts["bits_per_value"] == pytest.approx(math.log2(2 * levels))
    assert facts["capacity"] == {
        "noise": OWNERS * 21.5,
        "noise_limit": pytest.approx(Q / (2 * T)),
        "twice_largest_sum": 4 * OWNERS * levels,
        "field": radix,
    }
    sigma = plan.privacy.noise_multiplier
    assert sigma is not None
    step_noise = sigma * plan.privacy.max_grad_norm * 0.5 / 200
    rounding, noise = facts["rounding"]["rounding_rms"], facts["rounding"]["privacy_noise_rms"]
    assert noise == pytest.approx(step_noise * math.sqrt(2 / OWNERS))
    assert rounding == pytest.approx(plan.update_range / levels / math.sqrt(6 * OWNERS))
    assert 0 < rounding < noise / 1000
    assert facts["security_bits"] == 256
    assert 0 < facts["cpu_seconds"] < 10


def test_a_plan_with_ckks_warns_that_decryptions_can_leak_the_key(
    tmp_path: Path, fedseal_says: Any
) -> None:
    def warnings(preset: str) -> str:
        file = write_plan(tmp_path, encryption={"preset": preset})
        status, out, err = fedseal_says("plan", "check", file)
        assert status == 0, err
        return " ".join((out + err).split())

    warned = warnings("ckks")
    assert "encryption.preset = 'ckks': its decryptions can leak the key" in warned
    assert "rounded, not exact" in warned
    assert "leak the key" not in warnings("exact16")
