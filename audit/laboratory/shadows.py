"""Models whose training records are known, for membership inference: who was in, and what they answer.

All records are public. A tenth of them gets a wrong label on purpose: a model can only know such a label
by heart, so that these are the records that training exposes most.

Every record is in exactly half of the models: the second half of the models has the records that the
first half lacks. Coins and unprotected training use public seeds; there is nothing to hide in them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from client.contribution import contribute, with_share
from protocol.optimizers import GlobalModel, apply_update
from protocol.plan import Plan
from tasks.images import Examples, unflatten
from tasks.registry import Task

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Logits = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Gives the logits (n, classes) of preprocessed rows (n, ...)."""

POOL_RECORDS = 1000
POPULATION_RECORDS = 400
SMALLEST_PUBLIC = 100
POOL_SHARE = 0.7
MISLABELLED_SHARE = 0.1
FEWEST_MODELS = 8

_POOL_SEED, _PLAIN_SEED = 1, 2
_BATCH = 100
_STEP_SIZES = (0.03, 0.01)
_TRIAL_STEPS = 40
_MOST_STEPS = 600
_LOOK_EVERY = 25
_LEARNED_BY_HEART = 0.995


@dataclass(frozen=True)
class Pool:
    """Public records in their roles.

    Attributes:
        records: May be members; some labels are wrong on purpose.
        mislabelled: Which ones, shape (n,).
        population: Never a member of any model.
    """

    records: Examples
    mislabelled: Flags
    population: Examples


@dataclass(frozen=True)
class Answers:
    """How sure models are of the given labels: log(p / (1 - p)), p the probability of the label.

    Attributes:
        records: Of the pool's records, shape (models, n).
        population: Of the population, shape (models, m).
    """

    records: Floats
    population: Floats

    def of(self, models: list[int]) -> Answers:
        """Return the answers of these models alone."""
        return Answers(self.records[models], self.population[models])


def make_pool(public: Examples, classes: int) -> Pool:
    """Deal public records into a pool and a population, and put wrong labels on a tenth of the pool.

    Args:
        public: At least `SMALLEST_PUBLIC` records.
        classes: Number of classes, >= 2.
    """
    rng = np.random.default_rng(_POOL_SEED)
    order = rng.permutation(len(public))
    size = min(POOL_RECORDS, int(POOL_SHARE * len(public)))
    chosen, rest = order[:size], order[size : size + POPULATION_RECORDS]
    mislabelled = np.arange(size) < round(MISLABELLED_SHARE * size)
    labels = public.y[chosen].copy()
    labels[mislabelled] = (labels[mislabelled] + rng.integers(1, classes, mislabelled.sum())) % classes
    records = Examples(public.x[chosen], labels)
    return Pool(records, mislabelled, Examples(public.x[rest], public.y[rest]))


def membership_coins(models: int, records: int, seed: int) -> Flags:
    """Say which record trains which model, bool (models, records); model i + models / 2 has the others.

    Args:
        models: Even.
        records: Number of records.
        seed: Public.
    """
    half = np.random.default_rng(seed).random((models // 2, records)) < 0.5
    return np.concatenate([half, ~half])


def confidences(logits: NDArray[np.floating], labels: NDArray[np.int64]) -> Floats:
    """Return log(p / (1 - p)) of each label's probability p, without rounding p near 0 and 1.

    Args:
        logits: Shape (..., n, classes).
        labels: Shape (n,).

    Returns:
        float64, shape (..., n); 0 where logits are not finite.
    """
    values = np.asarray(logits, dtype=np.float64)
    own = np.zeros(values.shape[-2:], dtype=np.bool_)
    own[np.arange(len(labels)), labels] = True
    with np.errstate(invalid="ignore", over="ignore"):
        others = np.where(own, -np.inf, values)
        largest = others.max(axis=-1, keepdims=True)
        rest = largest[..., 0] + np.log(np.exp(others - largest).sum(axis=-1))
        sure = np.where(own, values, 0.0).sum(axis=-1) - rest
    finite: Floats = np.nan_to_num(sure, nan=0.0, posinf=0.0, neginf=0.0)
    return finite


def answers_of(answer: Logits, pool: Pool) -> Answers:
    """Return the answers of one model."""
    records, population = pool.records, pool.population
    return Answers(
        confidences(answer(records.x), records.y)[None],
        confidences(answer(population.x), population.y)[None],
    )


def joined(answers: list[Answers]) -> Answers:
    """Return the answers of several models as one."""
    records = np.concatenate([each.records for each in answers])
    return Answers(records, np.concatenate([each.population for each in answers]))


def affordable(seconds_each: float, budget_s: float, most: int) -> int:
    """Return an even number of models whose training fits a budget, from `FEWEST_MODELS` to `most`."""
    fitting = int(budget_s / max(seconds_each, 1e-9))
    return max(FEWEST_MODELS, min(most, fitting) // 2 * 2)


class PlainModels:
    """Models without protection that are trained together: one stack of weights, one optimizer.

    They start at round 0's model, as all owners do, and learn their members by heart, by Adam.

    Args:
        task: Gives the model and the loss.
        plan: Gives round 0's model.
        pool: Where members come from.
        coins: Which record trains which model, shape (models, records).
        step_size: Adam's.
    """

    def __init__(self, task: Task, plan: Plan, pool: Pool, coins: Flags, step_size: float) -> None:
        self._pool, self._coins = pool, torch.from_numpy(coins)
        self._x, self._y = torch.from_numpy(pool.records.x), torch.from_numpy(pool.records.y)
        self._generator = torch.Generator().manual_seed(_PLAIN_SEED)
        model = task.build_model(plan)
        self._weights = {
            name: value.detach().repeat(len(coins), *[1] * value.dim()).view(len(coins), *value.shape)
            for name, value in model.named_parameters()
        }
        self._optimizer = torch.optim.Adam(list(self._weights.values()), lr=step_size)

        def outputs(weights: dict[str, Tensor], x: Tensor) -> Tensor:
            logits: Tensor = functional_call(model, weights, (x,))
            return logits

        def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return task.loss(outputs(weights, x), y).mean()

        self._gradients = vmap(grad(loss))
        self._outputs = vmap(outputs, in_dims=(0, None))

    def step(self) -> None:
        """Let every model take one step on a batch of its own members."""
        batches = torch.multinomial(self._coins.double(), _BATCH, True, generator=self._generator)
        gradients = self._gradients(self._weights, self._x[batches], self._y[batches])
        for name, weights in self._weights.items():
            weights.grad = gradients[name]
        self._optimizer.step()

    def train(self) -> float:
        """Train until the members are known by heart or the steps end; return how many are, in [0, 1]."""
        known = 0.0
        for number in range(1, _MOST_STEPS + 1):
            self.step()
            if number % _LOOK_EVERY == 0:
                known = self.known_by_heart()
            if known >= _LEARNED_BY_HEART:
                break
        return known

    def answers(self) -> Answers:
        """Return what the models answer now."""
        population = self._pool.population
        return Answers(
            confidences(self._logits(self._x), self._pool.records.y),
            confidences(self._logits(torch.from_numpy(population.x)), population.y),
        )

    def _logits(self, x: Tensor) -> NDArray[np.float32]:
        with torch.no_grad():
            logits: NDArray[np.float32] = self._outputs(self._weights, x).numpy()
        return logits

    def known_by_heart(self) -> float:
        """Return the share of the members whose given labels the models answer, in [0, 1]."""
        right = self._logits(self._x).argmax(axis=-1) == self._pool.records.y
        return float(right[self._coins.numpy()].mean())


def train_plain(
    task: Task, plan: Plan, pool: Pool, most: int, budget_s: float, progress: Callable[[str], None]
) -> tuple[Answers, Flags]:
    """Train as many unprotected models together as a budget of CPU seconds allows.

    A few steps of a few models tell what a model costs, and which step size learns more.

    Returns:
        Their answers, and which record trained which model.
    """
    records, trials = len(pool.records), []
    clock = time.process_time()
    for step_size in _STEP_SIZES:
        trial = PlainModels(
            task, plan, pool, membership_coins(FEWEST_MODELS, records, _PLAIN_SEED), step_size
        )
        for _ in range(_TRIAL_STEPS):
            trial.step()
        trials.append((trial.known_by_heart(), step_size))
    steps = FEWEST_MODELS * _TRIAL_STEPS * len(trials)
    seconds_each = (time.process_time() - clock) * _MOST_STEPS / steps
    count = affordable(seconds_each, budget_s, most)
    progress(f"membership: {count} models without protection, trained together")
    coins = membership_coins(count, records, _PLAIN_SEED)
    models = PlainModels(task, plan, pool, coins, max(trials)[1])
    known = models.train()
    progress(f"membership: they know {known:.1%} of their members' labels by heart")
    return models.answers(), coins


def train_as_planned(task: Task, plan: Plan, members: Examples) -> nn.Module:
    """Train one model by the code that owners run, over all rounds of the plan.

    With local noise all members belong to one owner, who alone contributes: nobody else's noise helps it.
    With distributed noise they are dealt to the smallest cohort, because the promise is about its sum.

    Args:
        task: Gives the model and the loss.
        plan: Resolved.
        members: Public records.
    """
    owners = plan.cohort.minimum if plan.privacy.noise == "distributed" else 1
    parts = [Examples(members.x[start::owners], members.y[start::owners]) for start in range(owners)]
    model = GlobalModel.initial(task.initial_weights(plan))
    for _ in range(plan.run.rounds):
        updates = (contribute(task, plan, model.weights, part) for part in parts)
        total = sum((with_share(plan, update, owners) for update in updates), np.zeros(1))
        model = apply_update(model, total / owners, plan.server_optimizer)
    network = task.build_model(plan).eval()
    unflatten(network, model.weights)
    return network
