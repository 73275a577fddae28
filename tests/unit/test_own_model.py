"""Tests on the plan's own model see what canaries in a layer of their own cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from torch import Tensor

import audit.statistics.correlations
import client.training
from audit.laboratory.faults import replaced
from audit.laboratory.own_model import own_model_tests, own_noise, pieces_test
from audit.laboratory.record_tests import Sample
from audit.laboratory.selftest import failed, small_plan
from audit.statistics.correlations import anywhere, repeats
from audit.statistics.judging import THRESHOLD
from client.noise import SecureStream
from protocol.plan import Plan

SAMPLE = Sample(width=1024, canaries=200, rounds=8)
PARAMETERS = 38_410


def alarms_with(make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> list[str]:
    """Return which tests of the own model fail while noise is drawn otherwise."""
    with (
        replaced(client.training, "require_secret_randomness", lambda _: lambda *_a: None),
        replaced(SecureStream, "gaussian", make),
    ):
        return failed(list(own_model_tests(small_plan(), SAMPLE)))


def test_the_self_tests_model_is_larger_than_a_block_and_than_the_canaries_layer() -> None:
    noise = own_noise(small_plan(), SAMPLE)
    assert noise.rows.shape == (16, PARAMETERS)
    assert noise.starts.tolist() == [0, 64 * 512, 65 * 512, 65 * 512 + 5120]


def test_noise_that_is_less_in_one_small_layer_is_seen() -> None:
    def make(gaussian: Callable[..., Any]) -> Callable[..., Any]:
        def fault(stream: SecureStream, n: int) -> Any:
            values = gaussian(stream, n)
            values[33_280:] *= 0.9
            return values

        return fault

    assert alarms_with(make) == ["noise-scale-own-model"]


def test_noise_that_begins_again_where_the_last_round_was_is_seen() -> None:
    """As a counter does that goes on by less than what was drawn."""
    source = np.random.default_rng(0).standard_normal(10**7)
    state = {"at": 0}

    def fault(_: SecureStream, n: int) -> Any:
        state["at"] += n - 5000
        return source[state["at"] : state["at"] + n]

    assert "noise-across-rounds-own-model" in alarms_with(lambda _: fault)


def test_noise_that_is_less_beside_records_is_seen() -> None:
    @contextmanager
    def without_records() -> Iterator[dict[str, int]]:
        state = {"records": 0}

        def preparing(prepared: Callable[..., Any]) -> Callable[..., Any]:
            def begin(task: Any, plan: Plan, vector: Any, examples: Any) -> Any:
                state["records"] = len(examples)
                return prepared(task, plan, vector, examples)

            return begin

        with replaced(client.training, "_prepared", preparing):
            yield state

    with without_records() as state:
        found = alarms_with(
            lambda draw: lambda stream, n: draw(stream, n) * (0.9 if state["records"] else 1)
        )
    assert "noise-scale-own-model" in found


@pytest.mark.parametrize("what", ["not clipped", "twice"])
def test_a_later_piece_that_is_treated_otherwise_is_seen(what: str) -> None:
    def make(honest: Callable[..., Any]) -> Callable[..., Any]:
        def fault(engine: Any, sums_of: Any, x: Tensor, y: Tensor) -> list[Tensor]:
            sums = honest(engine, sums_of, x, y)
            if len(x) <= engine.rows:
                return list(sums)
            if what == "twice":
                again = honest(engine, sums_of, x[engine.rows : engine.rows + 1], y[:1])
            else:
                again = honest(engine, engine.plain_sums, x[engine.rows :], y[engine.rows :])
            return [a + b for a, b in zip(sums, again, strict=True)]

        return fault

    assert pieces_test(small_plan()).p_value == 1.0
    with replaced(client.training, "batch_sums", make):
        assert pieces_test(small_plan()).p_value == 0.0


def test_correlations_at_every_shift_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    clean = rng.normal(size=(6, 4000))
    assert all(figures[3] > 1e-4 for figures in (repeats(clean), anywhere(clean)))
    late, moved = clean.copy(), clean.copy()
    late[:, 3900:] = late[:, :100]
    assert repeats(late)[3] < THRESHOLD
    moved[4, 17:] = moved[2, :-17]
    assert repeats(moved)[3] > 1e-4
    assert anywhere(moved)[3] < THRESHOLD
    # beyond the window, sums of neighbours show what comes again
    monkeypatch.setattr(audit.statistics.correlations, "WINDOW", 1000)
    assert repeats(clean)[3] > 1e-4
    far = clean.copy()
    far[:, 2501:] = far[:, :1499]
    assert repeats(far)[3] < THRESHOLD


def test_the_bound_on_few_products_is_no_smaller_than_their_probability() -> None:
    """Sums of few products have heavier tails than normal ones; alarms stay below their level even so."""
    rng = np.random.default_rng(0)
    p = [repeats(rng.normal(size=(1, 40)))[3] for _ in range(4000)]
    assert np.mean(np.array(p) < 0.05) < 0.05
