"""What must hold for every schedule: more steps or less noise never cost less."""

from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.accounting import DISCRETIZATION, epsilon_of_steps

RATES = st.sampled_from([0.01, 0.1, 0.5, 1.0])
NOISE = st.floats(0.8, 20.0)
STEPS = st.integers(1, 60)
DELTA = st.sampled_from([1e-8, 1e-5, 1e-3])
QUICK = settings(max_examples=25, deadline=None)


def slack(steps: int) -> float:
    """Discretization may lift each step's loss by a part of one grid cell."""
    return DISCRETIZATION * (1 + steps) / 2


@QUICK
@given(RATES, NOISE, STEPS, STEPS, DELTA)
def test_more_steps_never_cost_less(rate: float, noise: float, a: int, b: int, delta: float) -> None:
    fewer, more = sorted((a, b))
    lower = epsilon_of_steps(rate, noise, fewer, delta)
    assert 0.0 <= lower <= epsilon_of_steps(rate, noise, more, delta) + 1e-9


@QUICK
@given(RATES, NOISE, st.floats(1.01, 3.0), STEPS, DELTA)
def test_more_noise_never_costs_more(
    rate: float, noise: float, factor: float, steps: int, delta: float
) -> None:
    louder = epsilon_of_steps(rate, noise * factor, steps, delta)
    assert louder <= epsilon_of_steps(rate, noise, steps, delta) + slack(steps)


@QUICK
@given(RATES, NOISE, STEPS, DELTA)
def test_a_smaller_delta_never_costs_less(rate: float, noise: float, steps: int, delta: float) -> None:
    assert epsilon_of_steps(rate, noise, steps, delta / 10) >= epsilon_of_steps(rate, noise, steps, delta)


@QUICK
@given(RATES, NOISE, STEPS, STEPS, DELTA)
def test_composition_is_never_worse_than_the_sum(
    rate: float, noise: float, a: int, b: int, delta: float
) -> None:
    """Basic composition: (e1, d) and (e2, d) give at most (e1 + e2, 2 d)."""
    together = epsilon_of_steps(rate, noise, a + b, 2 * delta)
    apart = epsilon_of_steps(rate, noise, a, delta) + epsilon_of_steps(rate, noise, b, delta)
    assert together <= apart + slack(a + b)


@QUICK
@given(NOISE, STEPS, DELTA)
def test_sampling_never_costs_more_than_no_sampling(noise: float, steps: int, delta: float) -> None:
    sampled = epsilon_of_steps(0.1, noise, steps, delta)
    assert sampled <= epsilon_of_steps(1.0, noise, steps, delta) + slack(steps)
