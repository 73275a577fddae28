"""A plan's privacy in plain words and in this plan's own numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from protocol.accounting import Mechanism, epsilon_of_steps, mechanism
from protocol.claims import EXPERIMENTAL, UNITS, adjacency, assumption
from protocol.evaluation import evaluation_delta, evaluation_epsilon, planned_epsilon, promised_loss
from protocol.exposure import advantage_of_steps, detection_of_steps, epsilon_of_group
from protocol.plan import Plan

UNPROTECTED: Final = "privacy.noise = 'none': this run protects NO record and NO client"

_PRIORS = (0.01, 0.1, 0.5)
_GROUPS = (2, 5, 10)
_FALSE_ALARMS = (0.001, 0.01)


@dataclass(frozen=True)
class Passage:
    """A heading, what stands below it, and whether it is a warning."""

    heading: str
    paragraphs: list[str]
    alarm: bool = False


def explain(plan: Plan) -> list[Passage]:
    """Return what the privacy of a resolved plan means, for people who do not know the terms.

    Raises:
        PlanInvalid: The plan has noise but its multipliers are not filled in.
    """
    priced = mechanism(plan)
    if priced is None:
        return _without_noise()
    passages = [
        _unit(plan),
        _epsilon(plan, priced),
        _delta(plan),
        _conclusions(plan),
        _several(plan, priced),
    ]
    # Whoever must rely on others shall read it before any number is explained.
    place = 0 if plan.privacy.noise == "distributed" else len(passages)
    passages.insert(place, _trust(plan, priced))
    if plan.evaluation is not None:
        passages.append(_evaluation(plan))
    return [_promise(plan), *passages, _limits(plan)]


def amount(epsilon: float) -> str:
    """Return an epsilon for a person; infinity is no bound at all."""
    return f"{epsilon:.4g}" if math.isfinite(epsilon) else "without bound"


def _without_noise() -> list[Passage]:
    return [
        Passage(
            UNPROTECTED,
            [
                "There is no epsilon, no delta and no unit, because nothing is hidden by noise. Whoever "
                "sees the model or the sums may find out that a record was used, and may even recover it.",
                "Masks and encryption still keep one owner's update from the coordinator, but what they "
                "deliver, the sum, and what is made of it, the model, give away what they contain.",
                "To get a guarantee, set privacy.noise = 'local' and privacy.target_epsilon in the plan.",
            ],
            alarm=True,
        )
    ]


def _promise(plan: Plan) -> Passage:
    privacy, run = plan.privacy, plan.run
    total, (_, delta) = planned_epsilon(plan), promised_loss(plan)
    parts = ", training and evaluation together" if plan.evaluation is not None else ""
    return Passage(
        "The promise",
        [
            f"epsilon {amount(math.inf if total is None else total)} at delta {delta:g} for one "
            f"{privacy.unit}: {UNITS[privacy.unit]}. It covers the whole run of {run.rounds} rounds and "
            f"{run.paid_spares} paid spare{parts}. Adjacency: {adjacency(plan)}. Noise: {privacy.noise}.",
        ],
    )


def _unit(plan: Plan) -> Passage:
    if plan.privacy.unit == "client":
        return Passage(
            "What is compared: one client, zero-out",
            [
                "Take this run, and the same run in which one owner's contribution is replaced by zeros in "
                "every round. Epsilon and delta bound how well anybody who sees all models and sums can "
                "tell the two apart: whether the owner's data, all its records together, had influence.",
                "The number is about one client and about nothing else. It must not be compared with an "
                "epsilon for one example: the same number for a client protects far more. That the owner "
                "is a member and takes part is not hidden.",
            ],
        )
    return Passage(
        "What is compared: one example, add/remove",
        [
            "Take this run, and the same run with one record of one owner left out, or with one more. "
            "Epsilon and delta bound how well anybody who sees all models and sums can tell the two apart: "
            "whether that record was used, and so what it says.",
            "The number is about one example and about nothing else. It is not a promise for all records "
            "of an owner together (that would be the unit 'client'), nor for a person with many records. "
            "That an owner takes part is not hidden.",
        ],
    )


def _epsilon(plan: Plan, priced: Mechanism) -> Passage:
    epsilon, client = priced.epsilon(plan.paid_rounds), plan.privacy.unit == "client"
    schedule = (priced.sample_rate, priced.noise_multiplier, plan.paid_rounds * priced.steps)
    one, was_in = ("client", "had influence") if client else ("example", "was used")
    odds = ", ".join(f"{_percent(prior)} becomes at most {_posterior(prior, epsilon)}" for prior in _PRIORS)
    right = (1.0 + advantage_of_steps(*schedule)) / 2.0
    first, second = (
        (_percent(alarms), _percent(detection_of_steps(*schedule, alarms))) for alarms in _FALSE_ALARMS
    )
    without, with_it = ("had none", "had") if client else ("were not used", "were")
    found = (
        f"If it may wrongly name {first[0]} of the {one}s that {without}, it finds at most {first[1]} of "
        f"those that {with_it}; if {second[0]}, at most {second[1]}"
    )
    assumed = ", as long as the assumption above holds" if plan.privacy.noise == "distributed" else ""
    part = " of training" if plan.evaluation is not None else ""
    return Passage(
        f"What epsilon {amount(epsilon)}{part} means",
        [
            f"It bounds how much the run can shift anybody's odds that this {one} {was_in}: by at most a "
            f"factor of e^{amount(epsilon)}{_factor(epsilon)}, up or down, whatever they knew before. A "
            f"suspicion of {odds}.",
            f"That is the worst thinkable result. Over all results, an attacker who knows everything but "
            f"whether this {one} {was_in}, with even odds, is right in at most {_percent(right)} of cases "
            f"(a coin: {_percent(0.5)}). {found}. These figures come from the whole curve of this "
            f"training, and no attack on its results can beat them{assumed}.",
        ],
    )


def _delta(plan: Plan) -> Passage:
    delta = plan.privacy.delta
    many = "records of an owner" if plan.privacy.unit == "example" else "owners"
    return Passage(
        f"What delta {delta:g} means",
        [
            f"With this probability, about one in {_thousands(1 / delta)}, the factor above may not hold. "
            f"It is chosen so small that it does not matter: well below one over the number of {many}. "
            f"This delta is fit for up to about {_thousands(0.1 / delta)}; with more, choose a smaller.",
        ],
    )


def _conclusions(plan: Plan) -> Passage:
    if plan.privacy.unit == "example":
        one, used = "a record", "a given record was used, or what it holds"
    else:
        one, used = "an owner", "a given owner's data had influence, or what they hold"
    return Passage(
        "What a reader can and cannot conclude",
        [
            f"Can: what is true of many. If the model shows that a finding goes with an illness, it shows "
            f"it for everybody, also for {one} that never took part. That is learning, and no harm that "
            f"leaving out {one} would have prevented.",
            f"Cannot, beyond the odds above: whether {used} that others do not. What else a reader knows, "
            f"now or later, does not weaken this, and neither does anything done with the model.",
        ],
    )


def _several(plan: Plan, priced: Mechanism) -> Passage:
    steps = plan.paid_rounds * priced.steps
    schedule = (priced.sample_rate, priced.noise_multiplier, steps, priced.delta)
    groups = ", ".join(f"k = {k}: epsilon {amount(epsilon_of_group(*schedule, k))}" for k in _GROUPS)
    # Owners add local noise each for itself; a sum with distributed noise holds both records at once.
    apart = (
        epsilon_of_steps(priced.sample_rate, priced.noise_multiplier, 2 * steps, priced.delta)
        if plan.privacy.noise == "local"
        else epsilon_of_group(*schedule, 2)
    )
    if plan.privacy.unit == "client":
        heading, group = "More than one client", "a group of k owners, one company's hospitals say"
        person, remedy = "a person with records at two owners", "one membership for all of them"
    else:
        heading, group = (
            "More than one example",
            "a group of k records of one owner, one person's visits say",
        )
        person, remedy = "a person with one record at each of two owners", "one record per person"
    return Passage(
        heading,
        [
            f"The promise is for one. For {group}, all in or all out, it is weaker. {groups}. The epsilon "
            f"of a group soon says little; then fewer rounds, more noise, or {remedy} is the remedy.",
            f"For {person} it is epsilon {amount(apart)}, since each of the two is exposed. All at delta "
            f"{priced.delta:g}.",
        ],
    )


def _trust(plan: Plan, priced: Mechanism) -> Passage:
    if plan.privacy.noise == "local":
        return Passage(
            "Whom you must trust: nobody else",
            [
                assumption(plan) + " It holds against every reader: the public, the other owners, the "
                "coordinator, and one who breaks the encryption. Encryption hides more than that, but "
                "this promise does not need it.",
            ],
        )
    colluders, most = plan.privacy.tolerated_colluders, plan.cohort.maximum
    worst = amount(priced.worst_epsilon(plan.paid_rounds))
    promised = amount(priced.epsilon(plan.paid_rounds))
    return Passage(
        f"{EXPERIMENTAL}: whom you must trust",
        [
            f"Each owner adds only a share of the noise; the sum has enough of it. {assumption(plan)}",
            f"Epsilon {promised} therefore holds for those who see sums, and only as long as no more than "
            f"{colluders} of the other owners tell what they added, all add what they should, and the "
            "masks and the encryption hold.",
            f"If all other owners collude, or the masks fail, one owner is protected by its own share "
            f"alone, the smallest with {most} owners in the list: epsilon {worst}. Owners cap this number "
            "too (budget.epsilon_worst).",
        ],
        alarm=True,
    )


def _evaluation(plan: Plan) -> Passage:
    count, delta = plan.paid_evaluations, evaluation_delta(plan)
    epsilon = evaluation_epsilon(plan, count)
    share = 0.0 if plan.evaluation is None else plan.evaluation.holdout_share
    return Passage(
        "Evaluation",
        [
            f"Up to {count} times, owners count right and wrong answers on the {_percent(share)} of their "
            f"records that are never trained on, add noise to the counts, and send them encrypted. For "
            f"one example this costs epsilon {amount(math.inf if epsilon is None else epsilon)} at delta "
            f"{delta:g} in all. It is added to the cost of training, which is more than needed: a record "
            "is either trained on or counted, never both.",
        ],
    )


def _limits(plan: Plan) -> Passage:
    return Passage(
        "What is not in these numbers",
        [
            f"Other runs: every run on the same data costs again. An owner's ledger adds them up, and its "
            f"policy caps the sum; for one {plan.privacy.unit} the losses of all runs count together.",
            "Side channels: how long training takes, who is a member, who was absent. Floating-point noise "
            "is not exactly Gaussian. docs/privacy.md says what is done about each.",
        ],
    )


def _posterior(prior: float, epsilon: float) -> str:
    left = (1.0 - prior) / (prior * math.exp(min(epsilon, 700.0)) + 1.0 - prior)
    return _percent(1.0 - left) if left >= 1e-9 else "certainty"


def _factor(epsilon: float) -> str:
    return f" = {_thousands(math.exp(epsilon))}" if epsilon < 25.0 else ""


def _percent(share: float) -> str:
    """Return a share in percent with as many digits as keep it from reading 0 or 100."""
    percent, left = 100.0 * share, 100.0 * (1.0 - share)
    if left <= 0.0:
        number = "100"
    elif left < 1.0:
        number = f"{100.0 - float(f'{left:.1g}'):.12g}"
    else:
        number = f"{percent:.2g}" if percent < 10 else f"{percent:.3g}"
    return f"{number} percent"


def _thousands(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
