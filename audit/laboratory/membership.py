"""Membership inference: can an attacker tell from a model whether a record trained it?

Three attacks, from the weakest to the strongest:

* loss threshold: a record that the model is sure of was a member (Yeom et al. 2018);
* RMIA: how much surer the model is than other models, compared with people who were never members
  (Zarifzadeh et al. 2024, 'Low-Cost High-Power Membership Inference Attacks', with references that hold
  the record and references that do not);
* LiRA: likelihood ratio of the model's confidence among models with and without the record (Carlini et
  al. 2022, 'Membership Inference Attacks From First Principles', the online attack, one variance for all
  records because the models are few).

Each model in turn is the target and the others are the attacker's shadow models, except the one that has
exactly the other records: it would give the target's members away. Shadows of a private model are trained
by the same code as the target. That is the strongest choice, because their confidences then have the
target's own distribution. Where that costs too much, the unprotected models serve as shadows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from audit.evidence.experiments import FEWEST_OUTSIDERS, Depth, MembershipAttack
from audit.laboratory.shadows import (
    FEWEST_MODELS,
    SMALLEST_PUBLIC,
    Answers,
    Flags,
    Floats,
    Logits,
    Pool,
    affordable,
    answers_of,
    joined,
    make_pool,
    membership_coins,
    train_as_planned,
    train_plain,
)
from audit.statistics.roc import area, ceiling, curve, true_positive_rate
from deploy.build import compress
from deploy.gate import synthetic_inputs
from deploy.measure import open_session, run_session
from protocol.errors import CompressionRefused
from protocol.plan import Plan
from tasks.images import Examples
from tasks.registry import Task, task_for

Attack = Literal["LiRA", "RMIA", "loss threshold"]
Attacked = Literal["without protection", "as planned", "exported"]
Progress = Callable[[str], None]

_PRIVATE_SEED = 3
_FEWEST_TARGETS = 2
_SMALLEST_VARIANCE = 1e-12
_TIE_BREAK = 1e-6


@dataclass(frozen=True)
class _Effort:
    """How much one depth of audit tries.

    Budgets are CPU seconds of training. What unprotected models cost is estimated from above: a larger
    stack costs less for each model, and training ends early.
    """

    plain_models: int
    private_models: int
    exported_models: int
    plain_budget_s: float
    private_budget_s: float


_EFFORTS: dict[Depth, _Effort] = {
    "quick": _Effort(
        plain_models=32, private_models=20, exported_models=2, plain_budget_s=24.0, private_budget_s=8.0
    ),
    "full": _Effort(
        plain_models=64, private_models=64, exported_models=8, plain_budget_s=180.0, private_budget_s=60.0
    ),
}


@dataclass(frozen=True)
class Targets:
    """Attacked models beside the attacker's shadow models.

    Attributes:
        answers: Of the targets.
        members: Which record trained which target, shape (targets, n).
        shadows: Answers of all shadow models.
        shadow_members: Which record trained which of them.
        left_out: For each target the shadow models that the attacker must not use.
    """

    answers: Answers
    members: Flags
    shadows: Answers
    shadow_members: Flags
    left_out: Sequence[tuple[int, ...]]

    def first(self, count: int, answers: Answers) -> Targets:
        """Return the first targets with other answers: what became of the same models."""
        return Targets(
            answers, self.members[:count], self.shadows, self.shadow_members, self.left_out[:count]
        )


def attack_membership(
    plan: Plan, public: Examples, depth: Depth, progress: Progress
) -> list[MembershipAttack]:
    """Attack models without protection, models trained as a plan says, and exported ones.

    Nothing of an owner is used, and no owner's budget is spent. Privacy here is that of the plan's noise
    around public records; the models are thrown away.

    Args:
        plan: Resolved.
        public: Public records, preprocessed by the plan's task. The first of `POOL_RECORDS` become
            members and outsiders, the rest is known to the attacker and to nobody's model.
        depth: `quick` takes about 13 s of CPU time on 8 x 8 digits, `full` about 40 s.
        progress: Called with one line of text before each stage.

    Returns:
        Each attack on each model and group; none if there are fewer than `SMALLEST_PUBLIC` records. The
        exported model is missing if the plan's compression is refused: there is no package then.

    Raises:
        ModelUnsafe, NoiseSeeded, SamplerReplaced, TrainingFailed: The plan cannot be trained.
    """
    if len(public) < SMALLEST_PUBLIC:
        progress(f"membership: left out, it needs {SMALLEST_PUBLIC} public records")
        return []
    task, pool, effort = task_for(plan), make_pool(public, plan.task.classes), _EFFORTS[depth]
    plain, coins = train_plain(task, plan, pool, effort.plain_models, effort.plain_budget_s, progress)
    evidence = _evidence("without protection", plan, pool, _each_in_turn(plain, coins))
    models, targets = _trained_as_planned(task, plan, pool, effort, (plain, coins), progress)
    evidence += _evidence("as planned", plan, pool, targets)
    exports = max(effort.exported_models, _enough(targets.members))
    exported = _exported(plan, pool, models[:exports], progress)
    if exported is not None:
        count = len(exported.records)
        evidence += _evidence("exported", plan, pool, targets.first(count, exported))
    return evidence


def _enough(members: Flags) -> int:
    """Return of how many targets the outsiders are enough to judge an attack; all of them if none are."""
    outsiders = np.cumsum(np.count_nonzero(~members, axis=1))
    return min(int(np.searchsorted(outsiders, FEWEST_OUTSIDERS)) + 1, len(members))


def likelihood_ratios(target: Floats, shadows: Floats, members: Flags) -> Floats:
    """Return LiRA's score of each record: the log likelihood ratio of being a member.

    Args:
        target: Confidences of the attacked model, shape (n,).
        shadows: Confidences of the shadow models, shape (k, n), k >= 4.
        members: Which record trained which shadow model, shape (k, n); each record is in at least one
            and out of at least one.
    """
    inside, within = _fitted(shadows, members)
    outside, without = _fitted(shadows, ~members)
    return (
        (target - outside) ** 2 / (2 * without)
        - (target - inside) ** 2 / (2 * within)
        + 0.5 * math.log(without / within)
    )


def relative_confidences(
    target: Floats, target_population: Floats, shadows: Floats, shadow_population: Floats
) -> Floats:
    """Return RMIA's score: the share of the population that the record beats in relative likelihood.

    A record's relative likelihood is its probability under the attacked model over its mean probability
    under the shadow models, half of which have seen it. Equal shares are ordered by it.

    Args:
        target: Confidences of the attacked model in the records, shape (n,).
        target_population: In the population, shape (m,).
        shadows: Of the shadow models in the records, shape (k, n).
        shadow_population: In the population, shape (k, m).
    """
    ratios = _probabilities(target) / _probabilities(shadows).mean(axis=0)
    population = _probabilities(target_population) / _probabilities(shadow_population).mean(axis=0)
    beaten = np.searchsorted(np.sort(population), ratios, side="right") / len(population)
    scores: Floats = beaten + _TIE_BREAK * ratios / (1 + ratios)
    return scores


def promised_ceiling(plan: Plan, false_positive_rate: float) -> float | None:
    """Return the largest true positive rate that the plan's promise allows; None if it promises nothing.

    A promise about a whole owner covers each of its records at twice the epsilon: with the record, or
    without it, the owner is within one step of contributing nothing.
    """
    epsilon, delta = plan.privacy.target_epsilon, plan.privacy.delta
    if epsilon is None:
        return None
    if plan.privacy.unit == "client":
        epsilon, delta = 2 * epsilon, delta * (1 + math.exp(min(epsilon, 700.0)))
    return ceiling(epsilon, min(delta, 1.0), false_positive_rate)


def scores(targets: Targets) -> dict[Attack, Floats]:
    """Return every attack's score of each record for each target, shape (targets, n)."""
    results: dict[Attack, list[Floats]] = {"LiRA": [], "RMIA": [], "loss threshold": []}
    for number, left_out in enumerate(targets.left_out):
        kept = [model for model in range(len(targets.shadow_members)) if model not in left_out]
        shadows, members = targets.shadows.of(kept), targets.shadow_members[kept]
        records, population = targets.answers.records[number], targets.answers.population[number]
        results["LiRA"].append(likelihood_ratios(records, shadows.records, members))
        results["RMIA"].append(
            relative_confidences(records, population, shadows.records, shadows.population)
        )
        results["loss threshold"].append(-np.logaddexp(0.0, -records))
    return {attack: np.stack(rows) for attack, rows in results.items()}


def _fitted(values: Floats, chosen: Flags) -> tuple[Floats, float]:
    """Return each record's mean over the chosen models, and the variance around it over all records."""
    counts = chosen.sum(axis=0)
    means = np.where(chosen, values, 0.0).sum(axis=0) / np.maximum(counts, 1)
    squares = np.where(chosen, (values - means) ** 2, 0.0).sum()
    freedom = max(1, int(counts.sum()) - int(np.count_nonzero(counts)))
    return means, max(float(squares) / freedom, _SMALLEST_VARIANCE)


def _probabilities(confidences: Floats) -> Floats:
    probabilities: Floats = np.exp(-np.logaddexp(0.0, -confidences))
    return np.maximum(probabilities, 1e-300)


def _each_in_turn(answers: Answers, coins: Flags) -> Targets:
    """Attack the first half of the models, each with all others as shadows but its complement.

    The second half has the same coins turned round; its attacks would be repetitions.
    """
    half = len(coins) // 2
    left_out = [(number, number + half) for number in range(half)]
    return Targets(answers.of(list(range(half))), coins[:half], answers, coins, left_out)


def _trained_as_planned(
    task: Task, plan: Plan, pool: Pool, effort: _Effort, plain: tuple[Answers, Flags], progress: Progress
) -> tuple[list[nn.Module], Targets]:
    coins = membership_coins(effort.private_models, len(pool.records), _PRIVATE_SEED)
    clock = time.process_time()
    models = [_on_members(task, plan, pool, coins[0])]
    seconds_each = time.process_time() - clock
    if FEWEST_MODELS * seconds_each > effort.private_budget_s:
        progress(f"membership: {_FEWEST_TARGETS} models as planned, against unprotected shadow models")
        models += [_on_members(task, plan, pool, coins[i]) for i in range(1, _FEWEST_TARGETS)]
        answers = joined([answers_of(_torch_logits(model), pool) for model in models])
        return models, Targets(answers, coins[: len(models)], *plain, [()] * len(models))
    count = affordable(seconds_each, effort.private_budget_s, effort.private_models)
    progress(f"membership: {count} models trained as planned, by the code that owners run")
    coins = np.concatenate([coins[: count // 2], ~coins[: count // 2]])
    models += [_on_members(task, plan, pool, coins[i]) for i in range(1, count)]
    answers = joined([answers_of(_torch_logits(model), pool) for model in models])
    return models, _each_in_turn(answers, coins)


def _on_members(task: Task, plan: Plan, pool: Pool, coins: Flags) -> nn.Module:
    return train_as_planned(task, plan, Examples(pool.records.x[coins], pool.records.y[coins]))


def _torch_logits(model: nn.Module) -> Logits:
    def answer(x: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.no_grad():
            logits: NDArray[np.float32] = model(torch.from_numpy(x)).numpy()
        return logits

    return answer


def _exported(plan: Plan, pool: Pool, models: Sequence[nn.Module], progress: Progress) -> Answers | None:
    """Return the answers of the models that packages would hold, or None if there would be none."""
    public, synthetic = (pool.population.x, pool.population.y), synthetic_inputs(plan)
    progress(f"membership: {len(models)} of them compressed and exported")
    answers = []
    for model in models:
        try:
            packed = compress(plan, model, public, synthetic, lambda _line: None)
        except CompressionRefused:
            progress("membership: no exported model, the plan's compression is refused")
            return None
        answers.append(answers_of(partial(run_session, open_session(packed.onnx_bytes)), pool))
    return joined(answers)


def _evidence(model: Attacked, plan: Plan, pool: Pool, targets: Targets) -> list[MembershipAttack]:
    groups: list[tuple[Literal["all records", "most exposed records"], Flags]] = [
        ("all records", np.ones_like(pool.mislabelled)),
        ("most exposed records", pool.mislabelled),
    ]
    promised = None if model == "without protection" else promised_ceiling(plan, 0.01)
    shadow_models = len(targets.shadow_members) - len(targets.left_out[0])
    found = []
    for attack, values in scores(targets).items():
        for group, chosen in groups:
            members = values[targets.members & chosen]
            outsiders = values[~targets.members & chosen]
            found.append(
                MembershipAttack(
                    attack=attack,
                    model=model,
                    group=group,
                    members=len(members),
                    outsiders=len(outsiders),
                    shadow_models=0 if attack == "loss threshold" else shadow_models,
                    auc=area(members, outsiders),
                    tpr_at_1_percent=true_positive_rate(members, outsiders, 0.01),
                    tpr_at_01_percent=true_positive_rate(members, outsiders, 0.001),
                    ceiling_at_1_percent=promised,
                    curve=curve(members, outsiders),
                )
            )
    return found
