"""The accountant against independent figures, and calibration against the accountant."""

import logging
import math

import pytest
from scipy.optimize import brentq
from scipy.special import log_ndtr
from scipy.stats import norm

from protocol import accounting, privacy_loss
from protocol.accounting import (
    calibrate,
    epsilon_after,
    epsilon_of_steps,
    mechanism,
    noise_for,
    require_target,
    worst_epsilon_after,
)
from protocol.errors import AccountantRefused, NoiseTooSmall, PlanInvalid
from protocol.plan import Plan
from protocol.privacy_loss import lower_bound_of_steps, rdp_epsilon

KNOWN = [
    (0.01, 1.0, 1000, 1.828),
    (1 / 24, 1.0, 24, 1.790),
    (1 / 24, 1.0, 1200, 9.851),
    (1 / 24, 2.167, 1200, 2.998),
    (1 / 24, 0.814, 1200, 15.215),
    (0.01, 1.0, 10_000, 6.188),
    (1.0, 6.0, 100, 8.004),
]
"""Sample rate, noise, steps, and epsilon at delta 1e-5 by dp-accounting 0.6.0 on a grid of 1e-4."""


MOST_COMPOSITIONS = 8
"""Schedules that a search for the noise composes at most; each takes up to a tenth of a second."""


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
            "cohort": {"minimum": 4, "maximum": 11},
            "training": {"local_steps": local_steps, "learning_rate": 0.5},
            "privacy": {name: value for name, value in fields.items() if value is not None},
        }
    )


def exact_gaussian_epsilon(noise_multiplier: float, steps: int, delta: float) -> float:
    """Balle & Wang 2018, theorem 8: the exact curve of the Gaussian mechanism without sampling."""
    mu = math.sqrt(steps) / noise_multiplier

    def excess(epsilon: float) -> float:
        first = norm.cdf(mu / 2 - epsilon / mu)
        return float(first - math.exp(epsilon + log_ndtr(-mu / 2 - epsilon / mu)) - delta)

    return float(brentq(excess, 0.0, 100.0))


@pytest.mark.parametrize(("noise_multiplier", "steps"), [(1.0, 1), (4.0, 10), (5.0, 40)])
def test_unsampled_gaussian_agrees_with_the_closed_form(noise_multiplier: float, steps: int) -> None:
    exact = exact_gaussian_epsilon(noise_multiplier, steps, 1e-5)
    bound = epsilon_of_steps(1.0, noise_multiplier, steps, 1e-5)
    assert exact <= bound <= exact + 1e-4


@pytest.mark.parametrize(("rate", "noise", "steps", "known"), KNOWN)
def test_known_values(rate: float, noise: float, steps: int, known: float) -> None:
    bound = epsilon_of_steps(rate, noise, steps, 1e-5)
    assert known - 0.001 <= bound <= known + 0.01
    assert lower_bound_of_steps(rate, noise, steps, 1e-5) <= bound <= rdp_epsilon(rate, noise, steps, 1e-5)


def test_the_grid_follows_a_small_rate() -> None:
    """A fixed grid of 1e-3 overstates this schedule by a fifth."""
    schedule = (0.001, 1.762, 100_000, 1e-6)
    finest = epsilon_of_steps(*schedule, discretization=3e-5)
    assert finest <= epsilon_of_steps(*schedule) <= finest + 0.003
    assert epsilon_of_steps(*schedule, discretization=1e-3) > 1.2 * finest


@pytest.mark.parametrize("delta", [1e-10, 1e-11, 1e-12, 1e-13, 1e-14])
@pytest.mark.parametrize(("noise", "steps"), [(3.0, 10), (30.0, 1000), (100.0, 10_000)])
def test_floating_point_never_takes_the_bound_below_the_truth(
    noise: float, steps: int, delta: float
) -> None:
    """A rate just below 1 is composed on the grid, though its exact curve is that of rate 1."""
    exact = exact_gaussian_epsilon(noise, steps, delta)
    assert epsilon_of_steps(1 - 1e-12, noise, steps, delta) >= exact - 1e-6


def test_a_delta_that_floating_point_cannot_resolve_has_no_bound() -> None:
    assert epsilon_of_steps(0.1, 50.0, 1000, 1e-13) == math.inf
    assert epsilon_of_steps(1.0, 50.0, 1000, 1e-16) == math.inf


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
    assert worst_epsilon_after(plan, 3) is None
    require_target(plan)
    with pytest.raises(PlanInvalid):
        calibrate(plan)


def test_unresolved_plan_is_refused() -> None:
    with pytest.raises(PlanInvalid, match="noise_multiplier"):
        epsilon_after(make_plan(), 1)


def test_negative_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        epsilon_after(make_plan(noise_multiplier=1.0), -1)
    with pytest.raises(ValueError, match="negative"):
        worst_epsilon_after(make_plan(noise_multiplier=1.0), -1)


def test_a_client_pays_once_per_round_whatever_its_local_steps_and_its_sampling() -> None:
    fields = {"unit": "client", "max_update_norm": 0.5, "noise_multiplier": 4.0}
    epsilons = {
        epsilon_after(make_plan(10, steps, sample_rate=rate, **fields), 10)
        for steps, rate in [(1, 0.1), (8, 0.1), (8, 1.0), (500, 0.001)]
    }
    assert epsilons == {epsilon_of_steps(1.0, 4.0, 10, 1e-5)}


def test_a_client_and_an_example_are_priced_differently() -> None:
    example = make_plan(10, 8, noise_multiplier=4.0)
    client = make_plan(10, 8, noise_multiplier=4.0, unit="client", max_update_norm=1.0)
    assert epsilon_after(example, 10) != epsilon_after(client, 10)


def test_local_noise_needs_nobody() -> None:
    plan = make_plan(noise_multiplier=1.0)
    assert worst_epsilon_after(plan, 5) == epsilon_after(plan, 5)


def test_distributed_noise_is_priced_with_and_without_the_others() -> None:
    plan = make_plan(20, 1, noise="distributed", tolerated_colluders=1, noise_multiplier=2.0)
    priced = mechanism(plan)
    assert priced is not None
    assert priced.worst_noise_multiplier == pytest.approx(2.0 / math.sqrt(11 - 1 - 1))
    assert priced.delta < plan.privacy.delta
    assert epsilon_after(plan, 20) == epsilon_of_steps(0.1, 2.0, 20, priced.delta)
    worst = worst_epsilon_after(plan, 20)
    assert worst is not None
    assert worst > 2 * (epsilon_after(plan, 20) or math.inf)


@pytest.mark.parametrize(
    ("name", "reason"), [("gdp", "no bound"), ("rdp", "cross-check"), ("prv", "cross-check"), (7, "'pld'")]
)
def test_only_one_accountant_can_be_named(name: object, reason: str) -> None:
    with pytest.raises(AccountantRefused, match=reason):
        make_plan(accountant=name)
    assert make_plan(accountant="pld").privacy.accountant == "pld"


def test_the_root_logger_is_left_alone() -> None:
    """absl gives it a handler at its first warning, and Renyi accounting warns for some schedules."""
    root = logging.getLogger()
    handlers, root.handlers[:] = list(root.handlers), []
    try:
        assert rdp_epsilon(0.5, 3.0, 1, 1e-15) > 0
        assert root.handlers == []
    finally:
        root.handlers[:] = handlers


@pytest.mark.parametrize(
    ("sample_rate", "rounds", "local_steps", "target"),
    [(1 / 24, 50, 24, 3.0), (0.1, 10, 8, 8.0), (1.0, 40, 1, 8.0), (0.2, 10, 8, 0.1), (0.01, 10, 100, 1.0)],
)
def test_calibrated_noise_passes_and_less_does_not(
    sample_rate: float, rounds: int, local_steps: int, target: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"sample_rate": sample_rate, "target_epsilon": target}
    asked: list[float] = []

    def counted(rate: float, noise_multiplier: float, steps: int, delta: float) -> float:
        asked.append(noise_multiplier)
        return epsilon_of_steps(rate, noise_multiplier, steps, delta)

    monkeypatch.setattr(accounting, "epsilon_of_steps", counted)
    noise_multiplier = calibrate(make_plan(rounds, local_steps, **fields))
    assert len(set(asked)) <= MOST_COMPOSITIONS
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
    assert noise_for(1.0, 1, 1e-5, 1e-3) < 1e6
    with pytest.raises(PlanInvalid, match="target_epsilon"):
        calibrate(make_plan(rounds=100_000, sample_rate=1.0, target_epsilon=1e-3, delta=1e-10))


@pytest.mark.parametrize(
    ("sample_rate", "noise_multiplier", "rounds", "local_steps"),
    [(1.0, 0.05, 10, 8), (1e-6, 0.01, 1, 1), (1.0, 0.2, 100_000, 100_000), (1.0, 1e6, 100_000, 100_000)],
)
def test_a_hostile_schedule_is_refused_without_work(
    sample_rate: float,
    noise_multiplier: float,
    rounds: int,
    local_steps: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = make_plan(
        rounds,
        local_steps,
        noise_multiplier=noise_multiplier,
        sample_rate=sample_rate,
        target_epsilon=100.0,
    )

    def composed(*_: object) -> None:
        raise AssertionError("a distribution was built")

    monkeypatch.setattr(privacy_loss, "step_distribution", composed)
    with pytest.raises(NoiseTooSmall):
        require_target(plan)


def test_the_limits_are_far_above_any_budget() -> None:
    assert epsilon_of_steps(1.0, 1.0, 1000, 1e-5) > 500.0
    assert epsilon_of_steps(0.1, 0.3, 4, 1e-5) < math.inf


@pytest.mark.parametrize("rate", [1e-300, 1e-9, 0.5, 1.0])
def test_more_noise_than_anybody_needs_is_priced(rate: float) -> None:
    assert 0.0 <= epsilon_of_steps(rate, 1e300, 100, 1e-5) < 1e-3
