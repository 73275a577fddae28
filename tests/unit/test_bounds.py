"""Lower bounds on epsilon: known answers, validity over many correct mechanisms, and what they see."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr, ndtri
from scipy.stats import beta

from audit.statistics.bounds import (
    Guesses,
    Schedule,
    clopper_pearson_upper,
    epsilon_of_mu,
    errors_at,
    exact_refuted,
    exact_threshold_bound,
    fewest_misses,
    gaussian_one_run_epsilon,
    gaussian_refuted,
    gaussian_threshold_bound,
    guess_halves,
    one_run_bound,
    one_run_epsilon,
    one_run_p_value,
    privacy_profile,
)
from protocol.privacy_loss import epsilon_of_steps

DELTA = 1e-5
QUANTILES = np.linspace(0.02, 0.98, 25)


@pytest.mark.parametrize(
    ("seen", "expected"),
    [(Guesses(1000, 200, 190), 2.3936), (Guesses(2000, 300, 300), 4.5476)],
)
def test_one_run_known_answers(seen: Guesses, expected: float) -> None:
    """Pinned against the auditor of jax-privacy, which was written by others."""
    assert one_run_epsilon(seen, DELTA) == pytest.approx(expected, abs=1e-3)


def test_one_run_gaussian_known_answer() -> None:
    assert gaussian_one_run_epsilon(Guesses(1000, 200, 190), DELTA) == pytest.approx(3.915, abs=3e-3)


def test_guessing_at_random_shows_nothing() -> None:
    seen = Guesses(1000, 200, 100)
    assert one_run_epsilon(seen, DELTA) == gaussian_one_run_epsilon(seen, DELTA) == 0.0
    assert one_run_p_value(Guesses(10, 5, 0), 1.0, DELTA) == 1.0


def test_delta_makes_a_bound_smaller_and_more_guesses_a_larger_one() -> None:
    assert one_run_epsilon(Guesses(1000, 200, 190), 0.0) > one_run_epsilon(Guesses(1000, 200, 190), 1e-4)
    bounds = [one_run_epsilon(Guesses(4000, count, count), DELTA) for count in (50, 100, 400)]
    assert bounds == sorted(bounds)


@given(st.integers(2, 60), st.integers(0, 60), st.floats(0.05, 5.0))
@settings(max_examples=60, deadline=None)
def test_p_values_fall_with_right_guesses_and_rise_with_epsilon(r: int, v: int, epsilon: float) -> None:
    seen, better = Guesses(100, r, min(v, r - 1)), Guesses(100, r, min(v, r - 1) + 1)
    p = one_run_p_value(seen, epsilon, DELTA)
    assert 0.0 <= one_run_p_value(better, epsilon, DELTA) <= p + 1e-12
    assert p <= one_run_p_value(seen, epsilon + 0.5, DELTA) + 1e-12
    # what refutes a large loss refutes every smaller one
    assert gaussian_refuted(seen, epsilon / 2) or not gaussian_refuted(seen, epsilon)


@given(st.integers(1, 2000), st.data())
@settings(max_examples=60, deadline=None)
def test_clopper_pearson_is_the_quantile_of_a_beta_distribution(trials: int, data: st.DataObject) -> None:
    events = data.draw(st.integers(0, trials))
    bound = float(clopper_pearson_upper(np.array([events]), trials, 0.01)[0])
    expected = 1.0 if events == trials else float(beta.ppf(0.99, events + 1, trials - events))
    assert bound == pytest.approx(expected, abs=1e-9)


def test_the_exact_trade_off_curve_of_one_gaussian_step_is_the_gaussian_one() -> None:
    alarms = np.array([0.001, 0.01, 0.1, 0.5, 0.9])
    for mu in (0.5, 1.0, 2.0):
        curve = fewest_misses(alarms, privacy_profile(Schedule(1.0, 1), 1 / mu))
        gaussian = ndtr(-ndtri(alarms) - mu)
        assert np.all(curve <= gaussian + 1e-9), "a curve above the true one would make bounds invalid"
        assert curve == pytest.approx(gaussian, abs=3e-3)


def _scores(mu: float, canaries: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    included = rng.random(canaries) < 0.5
    return rng.normal(0.0, 1.0, canaries) + mu * included, included


def test_no_bound_of_200_correct_mechanisms_exceeds_the_truth() -> None:
    rng, schedule, mu = np.random.default_rng(0), Schedule(1.0, 1), 1.0
    thresholds = np.quantile(rng.normal(0.0, 1.0, 4000) + mu * (np.arange(4000) % 2), QUANTILES)
    truth = epsilon_of_steps(1.0, 1 / mu, 1, DELTA)
    for _ in range(200):
        scores, included = _scores(mu, 300, rng)
        errors = errors_at(scores, included, thresholds)
        found = [
            one_run_bound(scores, included, lambda seen, level: one_run_epsilon(seen, DELTA, level)),
            one_run_bound(
                scores, included, lambda seen, level: gaussian_one_run_epsilon(seen, DELTA, level)
            ),
            gaussian_threshold_bound(errors, DELTA),
        ]
        assert max(bound.epsilon for bound in found) <= truth
        assert not exact_refuted(errors, schedule, 1 / mu)


def test_the_exact_bound_agrees_with_the_gaussian_one_where_the_curve_is_gaussian() -> None:
    rng, mu = np.random.default_rng(1), 1.5
    scores, included = _scores(mu, 4000, rng)
    errors = errors_at(scores, included, np.quantile(rng.normal(mu / 2, 1.3, 4000), QUANTILES))
    gaussian, exact = (
        gaussian_threshold_bound(errors, DELTA),
        exact_threshold_bound(errors, Schedule(1.0, 1), DELTA),
    )
    truth = epsilon_of_mu(mu, DELTA)
    assert 0.6 * truth < gaussian.epsilon < truth
    assert exact.epsilon == pytest.approx(gaussian.epsilon, rel=0.03)
    assert exact.guesses == gaussian.guesses == 4000
    assert 0.7 < exact.correct / 4000 < 0.85


def test_a_wholly_visible_canary_gives_large_but_finite_bounds() -> None:
    included = np.arange(1000) % 2 == 0
    scores, thresholds = included.astype(np.float64), np.linspace(-0.5, 1.5, 25)
    errors = errors_at(scores, included, thresholds)
    for bound in (
        one_run_bound(scores, included, lambda seen, level: one_run_epsilon(seen, DELTA, level)),
        gaussian_threshold_bound(errors, DELTA),
        exact_threshold_bound(errors, Schedule(0.1, 100), DELTA),
    ):
        assert 4.0 < bound.epsilon < math.inf
        assert bound.correct == bound.guesses


def test_the_number_of_guesses_is_fixed_before_the_scores_are_seen() -> None:
    assert guess_halves(1000) == [12, 25, 50, 100, 200, 400]
    assert guess_halves(4) == [1]
