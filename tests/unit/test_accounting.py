"""The accountant against independent figures, and calibration against the accountant."""

import math
import time

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from protocol.accounting import calibrate, epsilon_after, epsilon_of_steps, require_target
from protocol.errors import NoiseTooSmall, PlanInvalid
from protocol.plan import Plan


def make_plan(rounds: int = 10, local_steps: int = 8, **privacy: object) -> Plan:
    fields = {
        "target_epsilon": 8.0,
        "delta": 1e-5,
        "sample_rate": 0.1,
        "expected_batch_size": 48.0,
    } | privacy
    return Plan.from_fields(
        {
            "run": {"name": "unit", "rounds": rounds, "paid_spares": 0, "spare_attempts": 7},
            "task": {"name": "image-classification", "input_shape": [8, 8], "classes": 10},
            "model": {"name": "linear"},
            "cohort": {"minimum": 3, "maximum": 8},
            "training": {"local_steps": local_steps, "learning_rate": 0.5},
            "privacy": {name: value for name, value in fields.items() if value is not None},
        }
    )


def exact_gaussian_epsilon(noise_multiplier: float, steps: int, delta: float) -> float:
    """Balle & Wang 2018, theorem 8: the exact curve of the Gaussian mechanism without sampling."""
    mu = math.sqrt(steps) / noise_multiplier

    def excess(epsilon: float) -> float:
        first = norm.cdf(mu / 2 - epsilon / mu)
        return float(first - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu) - delta)

    return float(brentq(excess, 0.0, 100.0))


@pytest.mark.parametrize(("noise_multiplier", "steps"), [(1.0, 1), (4.0, 10), (5.0, 40)])
def test_unsampled_gaussian_agrees_with_the_closed_form(noise_multiplier: float, steps: int) -> None:
    exact = exact_gaussian_epsilon(noise_multiplier, steps, 1e-5)
    bound = epsilon_of_steps(1.0, noise_multiplier, steps, 1e-5)
    assert exact <= bound <= exact + 0.01


def test_sampled_gaussian_agrees_with_a_finer_grid() -> None:
    coarse = epsilon_of_steps(0.01, 1.0, 1000, 1e-5)
    fine = epsilon_of_steps(0.01, 1.0, 1000, 1e-5, discretization=1e-4)
    assert fine <= coarse <= fine + 0.01
    assert fine == pytest.approx(1.828, abs=0.002)


def test_rounds_compose_over_the_whole_run_and_not_each_by_itself() -> None:
    plan = make_plan(noise_multiplier=1.0, rounds=50, local_steps=24, sample_rate=1 / 24)
    assert epsilon_after(plan, 0) == 0.0
    one, all_rounds = epsilon_after(plan, 1), epsilon_after(plan, 50)
    assert one == pytest.approx(1.8, abs=0.02)
    assert all_rounds == pytest.approx(9.85, abs=0.02)


def test_no_noise_has_no_epsilon() -> None:
    plan = make_plan(noise="none", target_epsilon=None)
    assert epsilon_after(plan, 0) is None
    assert epsilon_after(plan, 3) is None
    require_target(plan)
    with pytest.raises(PlanInvalid):
        calibrate(plan)


def test_unresolved_plan_is_refused() -> None:
    with pytest.raises(PlanInvalid, match="noise_multiplier"):
        epsilon_after(make_plan(), 1)


def test_negative_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        epsilon_after(make_plan(noise_multiplier=1.0), -1)


@pytest.mark.parametrize(
    ("sample_rate", "rounds", "local_steps", "target"),
    [(1 / 24, 50, 24, 3.0), (0.1, 10, 8, 8.0), (1.0, 40, 1, 8.0), (0.2, 10, 8, 0.1), (0.01, 10, 100, 1.0)],
)
def test_calibrated_noise_passes_and_less_does_not(
    sample_rate: float, rounds: int, local_steps: int, target: float
) -> None:
    fields = {"sample_rate": sample_rate, "target_epsilon": target}
    epsilon_of_steps(0.5, 1.0, 1, 1e-5)  # the import is not what is timed
    started = time.process_time()
    noise_multiplier = calibrate(make_plan(rounds, local_steps, **fields))
    assert time.process_time() - started < 2.0
    require_target(make_plan(rounds, local_steps, noise_multiplier=noise_multiplier, **fields))
    with pytest.raises(NoiseTooSmall):
        require_target(make_plan(rounds, local_steps, noise_multiplier=noise_multiplier * 0.998, **fields))


def test_calibration_does_not_pay_for_spare_attempts() -> None:
    known = 2.167  # 1200 steps at rate 1/24 to (3, 1e-5)
    plan = make_plan(50, 24, sample_rate=1 / 24, target_epsilon=3.0)
    assert plan.max_attempts > plan.run.rounds
    assert calibrate(plan) == pytest.approx(known, abs=0.002)


def test_calibration_ignores_a_multiplier_that_stands_in_the_plan() -> None:
    assert calibrate(make_plan(noise_multiplier=9.0)) == calibrate(make_plan())


def test_impossible_target_is_refused() -> None:
    with pytest.raises(PlanInvalid, match="target_epsilon"):
        calibrate(make_plan(rounds=100_000, sample_rate=1.0, target_epsilon=1e-3, delta=1e-10))


@pytest.mark.parametrize(
    ("sample_rate", "noise_multiplier", "rounds", "local_steps"),
    [(1.0, 0.05, 10, 8), (1e-9, 1e-300, 1, 1), (1.0, 0.2, 100_000, 100_000), (1.0, 1e6, 100_000, 100_000)],
)
def test_a_hostile_schedule_is_refused_without_work(
    sample_rate: float, noise_multiplier: float, rounds: int, local_steps: int
) -> None:
    plan = make_plan(
        rounds,
        local_steps,
        noise_multiplier=noise_multiplier,
        sample_rate=sample_rate,
        target_epsilon=100.0,
    )
    started = time.process_time()
    with pytest.raises(NoiseTooSmall):
        require_target(plan)
    assert time.process_time() - started < 0.1


def test_the_limits_are_far_above_any_budget() -> None:
    assert epsilon_of_steps(1.0, 1.0, 1000, 1e-5) > 500.0
    assert epsilon_of_steps(0.1, 0.3, 4, 1e-5) < math.inf
