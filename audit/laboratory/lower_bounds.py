"""Lower bounds on epsilon of a plan's mechanism, for each observer, with their controls and their power.

Each observer's scores come from canaries that the owners' own code trained on; what a score should look
like comes from the plan's constants. Thresholds are quantiles of simulated scores, fixed before any canary
is trained on. The same run with the noise off is the control.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from audit.evidence.experiments import Depth, LowerBound
from audit.laboratory.canaries import Seen, others_in_sum, watch_clients, watch_examples
from audit.laboratory.faults import scaled_noise
from audit.statistics.bounds import (
    SIGNIFICANCE,
    Bound,
    Schedule,
    errors_at,
    exact_threshold_bound,
    gaussian_one_run_epsilon,
    gaussian_threshold_bound,
    one_run_bound,
    one_run_epsilon,
)
from audit.statistics.channels import Channel, Claim, Method, finite
from audit.statistics.power import detectable
from protocol.accounting import Mechanism, mechanism
from protocol.plan import Plan
from protocol.privacy_loss import epsilon_of_steps

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

METHODS: tuple[Method, ...] = (
    "one run",
    "one run, f-DP",
    "Clopper-Pearson, Gaussian",
    "Clopper-Pearson, PLD",
)

_ASSUMPTIONS: dict[Method, str] = {
    "one run": "Nothing but fair coins of the canaries.",
    "one run, f-DP": "The trade-off curve of the mechanism is at least as good as some Gaussian one.",
    "Clopper-Pearson, Gaussian": "The trade-off curve is Gaussian; canaries are independent, by their own "
    "coordinates, coins and clipping.",
    "Clopper-Pearson, PLD": "The mechanism is the plan's schedule of subsampled Gaussian steps with an "
    "unknown amount of noise; canaries are independent, by their own coordinates, coins and clipping.",
}


@dataclass(frozen=True)
class Size:
    """How much is tried: canaries, and at most so many rounds, with at most so many steps in all."""

    canaries: int
    rounds: int
    steps: int

    def rounds_of(self, plan: Plan) -> int:
        """Return how many rounds of a plan are tried, at least one."""
        most = self.rounds
        if plan.privacy.unit == "example":
            most = min(most, self.steps // plan.training.local_steps)
        return max(1, min(plan.paid_rounds, most))


SIZES: dict[Depth, Size] = {"quick": Size(1000, 100, 400), "full": Size(4000, 400, 1200)}
CLIENT_SIZES: dict[Depth, Size] = {"quick": Size(300, 1, 1), "full": Size(2000, 2, 2)}


def lower_bounds(plan: Plan, depth: Depth, progress: Callable[[str], None]) -> list[LowerBound]:
    """Return all bounds of a plan: for each observer by each method, with controls.

    Without noise there is no claim to compare with, and only the bounds are returned.

    Args:
        plan: A resolved plan.
        depth: How many canaries and rounds.
        progress: Told in one line what is tried next.
    """
    clients = plan.privacy.unit == "client"
    size = (CLIENT_SIZES if clients else SIZES)[depth]
    return bounds_of_size(plan, size, progress)


def bounds_of_size(plan: Plan, size: Size, progress: Callable[[str], None]) -> list[LowerBound]:
    """Return what `lower_bounds` returns, for any number of canaries and rounds."""
    rounds = size.rounds_of(plan)
    watch = watch_clients if plan.privacy.unit == "client" else watch_examples
    progress(f"lower bounds: {size.canaries} canaries in {rounds} rounds")
    seen, control = watch(plan, size.canaries, rounds), None
    if plan.privacy.noise != "none":
        progress("lower bounds: the same with the noise off")
        with scaled_noise(0.0):
            control = watch(plan, size.canaries, rounds)
    progress("lower bounds: statistics")
    results = [
        bound
        for channel, values in channels(plan, seen, rounds)
        for bound in _bounds_of(plan, channel, seen, values, control)
    ]
    return [*results, wire_bound(plan, size.canaries)]


def exceeding_bounds(plan: Plan, size: Size) -> list[str]:
    """Return observer and method of each bound that is above its claim, without controls and power."""
    rounds = size.rounds_of(plan)
    watch = watch_clients if plan.privacy.unit == "client" else watch_examples
    seen, exceeding = watch(plan, size.canaries, rounds), []
    for channel, values in channels(plan, seen, rounds):
        claim = claim_for(plan, channel)
        if claim is None:
            continue
        scores, thresholds = channel.scores(values), channel.thresholds()
        for method in METHODS:
            found = bound_by(method, scores, seen.included, thresholds, claim, claim.delta)
            if found.epsilon > claim.epsilon:
                exceeding.append(f"{channel.observer}, {method}")
    return exceeding


def channels(plan: Plan, seen: Seen, rounds: int) -> Iterator[tuple[Channel, Floats]]:
    """Yield each observer's channel with what it saw in a run."""
    rate, steps, update, total = 1.0, 1, 0.0, 0.0
    if plan.privacy.unit == "example":
        rate, steps = plan.privacy.sample_rate, plan.training.local_steps
    owners = others_in_sum(plan) + 1
    if plan.privacy.noise != "none":
        update = plan.noise_deviation(plan.cohort.maximum) / plan.sensitivity
        total = plan.noise_deviation(plan.cohort.minimum) / plan.sensitivity * math.sqrt(owners)
    yield Channel("update", rate, steps, rounds, update), seen.updates
    yield Channel("opened sum", rate, steps, rounds, total), seen.sums
    if seen.final.size:
        scale = plan.update_scale * plan.sensitivity / owners
        yield (
            Channel("exported model", rate, steps, rounds, total, plan.server_optimizer, scale),
            seen.final,
        )


def claim_for(plan: Plan, channel: Channel) -> Claim | None:
    """Return what the audited rounds cost according to the accountant; None without noise.

    Whoever sees an update before encryption sees it without the others' noise shares.
    """
    priced = mechanism(plan)
    if priced is None:
        return None
    noise = priced.noise_multiplier if channel.observer != "update" else priced.worst_noise_multiplier
    schedule = Schedule(priced.sample_rate, channel.rounds * priced.steps)
    epsilon = epsilon_of_steps(schedule.rate, noise, schedule.steps, priced.delta)
    return Claim(epsilon, priced.delta, schedule, noise)


def wire_bound(plan: Plan, canaries: int) -> LowerBound:
    """Return the bound for whoever sees the wire: none, as long as frames are ciphertext."""
    priced: Mechanism | None = mechanism(plan)
    return LowerBound(
        method="one run",
        observer="wire",
        canaries=canaries,
        guesses=0,
        correct=0,
        epsilon=0.0,
        delta=plan.privacy.delta,
        confidence=1.0 - SIGNIFICANCE,
        claimed=None if priced is None else finite(priced.epsilon(plan.paid_rounds)),
        control=None,
        detectable=None,
        assumption="Frames are masked and encrypted under keys that the coordinator does not have, so that "
        "no score can be made of them; the tests of masks and frames look at that.",
    )


def _bounds_of(
    plan: Plan, channel: Channel, seen: Seen, values: Floats, control: Seen | None
) -> Iterator[LowerBound]:
    claim, thresholds = claim_for(plan, channel), channel.thresholds()
    delta = plan.privacy.delta if claim is None else claim.delta
    scores = channel.scores(values)
    off: tuple[Floats, Bools] | None = None
    if control is not None:
        matching = {c.observer: v for c, v in channels(plan, control, channel.rounds)}
        off = channel.scores(matching[channel.observer]), control.included
    for method in METHODS:
        if method == "Clopper-Pearson, PLD" and claim is None:
            continue
        found = bound_by(method, scores, seen.included, thresholds, claim, delta)
        controlled = None if off is None else bound_by(method, *off, thresholds, claim, delta).epsilon
        yield LowerBound(
            method=method,
            observer=channel.observer,
            canaries=len(scores),
            guesses=found.guesses,
            correct=found.correct,
            epsilon=found.epsilon,
            delta=delta,
            confidence=1.0 - SIGNIFICANCE,
            claimed=None if claim is None else finite(claim.epsilon),
            control=controlled,
            detectable=None
            if claim is None
            else detectable(method, channel, claim, thresholds, len(scores)),
            assumption=_ASSUMPTIONS[method],
        )


def bound_by(
    method: Method, scores: Floats, included: Bools, thresholds: Floats, claim: Claim | None, delta: float
) -> Bound:
    """Return the bound of one method from scores."""
    if method == "one run":
        return one_run_bound(scores, included, lambda seen, level: one_run_epsilon(seen, delta, level))
    if method == "one run, f-DP":
        return one_run_bound(
            scores, included, lambda seen, level: gaussian_one_run_epsilon(seen, delta, level)
        )
    errors = errors_at(scores, included, thresholds)
    if method == "Clopper-Pearson, Gaussian" or claim is None:
        return gaussian_threshold_bound(errors, delta)
    return exact_threshold_bound(errors, claim.schedule, delta)
