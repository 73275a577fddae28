"""What must hold for every schedule: more steps or less noise never cost less, and no two accountants
that are right contradict each other."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.accounting import epsilon_of_steps
from protocol.exposure import advantage_of_steps, detection_of_steps, epsilon_of_group
from protocol.privacy_loss import grid_for, lower_bound_of_steps, rdp_epsilon

RATES = st.sampled_from([0.01, 0.1, 0.5, 0.9])
ALL_RATES = st.sampled_from([0.01, 0.1, 0.5, 0.9, 1.0])
NOISE = st.floats(0.8, 20.0)
STEPS = st.integers(1, 60)
DELTA = st.sampled_from([1e-8, 1e-5, 1e-3])
QUICK = settings(max_examples=15, deadline=None)
SLOW = settings(max_examples=6, deadline=None)
ROUND_OFF = 1e-6
GRID = 1.003
"""The closed form at rate 1 has no grid, so that a bound at a lower rate may be this much above it."""


@QUICK
@given(ALL_RATES, NOISE, STEPS, STEPS, DELTA)
def test_more_steps_never_cost_less(rate: float, noise: float, a: int, b: int, delta: float) -> None:
    fewer, more = sorted((a, b))
    lower = epsilon_of_steps(rate, noise, fewer, delta)
    assert 0.0 <= lower <= epsilon_of_steps(rate, noise, more, delta) + ROUND_OFF


@QUICK
@given(ALL_RATES, NOISE, st.floats(1.01, 3.0), STEPS, DELTA)
def test_more_noise_never_costs_more(
    rate: float, noise: float, factor: float, steps: int, delta: float
) -> None:
    louder = epsilon_of_steps(rate, noise * factor, steps, delta)
    assert louder <= epsilon_of_steps(rate, noise, steps, delta) + ROUND_OFF


@QUICK
@given(RATES, ALL_RATES, NOISE, STEPS, DELTA)
def test_a_higher_rate_never_costs_less(a: float, b: float, noise: float, steps: int, delta: float) -> None:
    lower, higher = sorted((a, b))
    bound = epsilon_of_steps(higher, noise, steps, delta)
    assert epsilon_of_steps(lower, noise, steps, delta) <= bound * GRID + ROUND_OFF


@QUICK
@given(ALL_RATES, NOISE, STEPS, DELTA)
def test_a_smaller_delta_never_costs_less(rate: float, noise: float, steps: int, delta: float) -> None:
    assert epsilon_of_steps(rate, noise, steps, delta / 10) >= epsilon_of_steps(rate, noise, steps, delta)


@QUICK
@given(ALL_RATES, NOISE, STEPS, STEPS, DELTA, DELTA)
def test_parts_added_up_never_cost_less_than_the_whole(
    rate: float, noise: float, a: int, b: int, first: float, second: float
) -> None:
    """Basic composition: (e1, d1) and (e2, d2) give at most (e1 + e2, d1 + d2)."""
    apart = epsilon_of_steps(rate, noise, a, first) + epsilon_of_steps(rate, noise, b, second)
    assert lower_bound_of_steps(rate, noise, a + b, first + second) <= apart
    assert epsilon_of_steps(rate, noise, a + b, first + second) <= apart * GRID + ROUND_OFF


@SLOW
@given(ALL_RATES, NOISE, STEPS, DELTA)
def test_the_bounds_are_in_order(rate: float, noise: float, steps: int, delta: float) -> None:
    bound = epsilon_of_steps(rate, noise, steps, delta)
    assert lower_bound_of_steps(rate, noise, steps, delta) <= bound
    assert bound <= rdp_epsilon(rate, noise, steps, delta) * GRID + ROUND_OFF


@SLOW
@given(ALL_RATES, st.floats(2.0, 20.0), STEPS, DELTA, st.integers(2, 4))
def test_a_larger_group_never_costs_less(
    rate: float, noise: float, steps: int, delta: float, members: int
) -> None:
    smaller = epsilon_of_group(rate, noise, steps, delta, members - 1)
    group = epsilon_of_group(rate, noise, steps, delta, members)
    assert smaller <= group * GRID + ROUND_OFF
    assert epsilon_of_steps(rate, noise, steps, delta) <= group * GRID + ROUND_OFF


@SLOW
@given(ALL_RATES, st.floats(2.0, 20.0), STEPS, st.integers(2, 4))
def test_a_group_never_costs_more_than_what_follows_from_one(
    rate: float, noise: float, steps: int, members: int
) -> None:
    """Dwork & Roth 2014, theorem 2.2 with Vadhan 2017, lemma 2.2: (k e, k exp((k - 1) e) d)."""
    single = epsilon_of_steps(rate, noise, steps, 1e-8)
    inflated = members * math.exp((members - 1) * single) * 1e-8
    if inflated < 0.5:
        group = epsilon_of_group(rate, noise, steps, inflated, members)
        assert group <= members * single * GRID + ROUND_OFF


@QUICK
@given(ALL_RATES, NOISE, STEPS, st.sampled_from([0.01, 0.1]))
def test_the_advantage_is_delta_where_epsilon_is_nothing(
    rate: float, noise: float, steps: int, room: float
) -> None:
    advantage = advantage_of_steps(rate, noise, steps)
    assert 0.0 <= advantage <= 1.0
    if advantage < 0.9:
        assert epsilon_of_steps(rate, noise, steps, advantage * (1 + room) + 1e-9) <= ROUND_OFF
        assert epsilon_of_steps(rate, noise, steps, advantage * (1 - room)) > 0.0


@given(st.floats(1e-9, 1.0), st.floats(0.1, 1e6), st.floats(1.0, 10.0))
def test_the_grid_grows_with_the_rate_and_shrinks_with_noise(
    rate: float, noise: float, factor: float
) -> None:
    grid = grid_for(rate, noise)
    assert grid_for(rate, noise * factor) <= grid <= grid_for(min(1.0, rate * factor), noise)
    assert 1e-6 <= grid <= 5e-3


@QUICK
@given(ALL_RATES, NOISE, STEPS, st.sampled_from([0.001, 0.05, 0.5]))
def test_no_pair_of_epsilon_and_delta_allows_more_than_the_best_attack(
    rate: float, noise: float, steps: int, false_alarms: float
) -> None:
    found = detection_of_steps(rate, noise, steps, false_alarms)
    assert false_alarms <= found <= 1.0
    assert found <= false_alarms + advantage_of_steps(rate, noise, steps) + ROUND_OFF
    for delta in (1e-6, 1e-3, 0.05):
        allowed = math.exp(min(epsilon_of_steps(rate, noise, steps, delta), 700.0)) * false_alarms + delta
        assert found <= allowed * 1.05 + ROUND_OFF
