"""Gradient inversion: can an attacker rebuild a record from an owner's update?

* analytic: in a first layer with biases, a weight's gradient over the bias' is the input (Phong et al.
  2018); it needs one record in the step;
* optimization: search for the input whose gradient is the observed one (Zhu, Liu & Han 2019, 'Deep Leakage
  from Gradients'; the label is read off first, Zhao et al. 2020), by Adam and then
  L-BFGS, one record in the step;
* imprint: the model itself is made for the attack (Fowl et al. 2022, 'Robbing the Fed'), so that whole
  batches come back. Owners refuse such a model: they build the plan's model from their own code and
  compare its hash when they join, and follow signed openings from there. It is shown because that check
  is not the only protection.

Each is made on the update without protection (the control), on the update as the plan orders it, and on
what the coordinator receives.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from audit.evidence.experiments import Depth, InversionAttack
from audit.laboratory import observations
from audit.laboratory.pictures import (
    brightness,
    deviations,
    is_recognizable,
    picture_shape,
    png,
    psnr_db,
    ssim,
)
from deploy.gate import synthetic_inputs
from protocol.plan import Plan
from tasks.images import Examples, ImageClassification
from tasks.registry import Task, task_for

Floats = NDArray[np.float64]
Attack = Literal["analytic", "optimization", "imprint"]
Observed = Literal["plain update", "private update", "received by the coordinator"]
Progress = Callable[[str], None]
Rebuild = Callable[[Floats], Floats]
"""Makes of an observed gradient, (n_params,), candidates for the records in it, (m, d)."""

_VICTIM_SEED = 4
_BINS = 256
_BATCHES: dict[Depth, tuple[int, ...]] = {"quick": (16,), "full": (16, 64)}
_STARTS: dict[Depth, int] = {"quick": 2, "full": 8}
_LEADING_STEPS, _STEP_SIZE = 600, 0.1
_ITERATIONS = 200
_EXACT = 1e-8
"""Distance of gradients below which another start would find the same record."""


@dataclass(frozen=True)
class ImprintTask(ImageClassification):
    """The plan's task with a model made to write single records into its gradient.

    The first layer's neurons all measure the brightness of a record, each with another threshold. What two
    neighbours' gradients differ in is the sum over the records between their thresholds, often a single
    one, and the ratio to the bias' gradient is that record.

    Attributes:
        thresholds: Ascending brightness values, one for each neuron.
    """

    thresholds: tuple[float, ...] = ()

    def build_model(self, plan: Plan) -> nn.Module:
        """Return the malicious model."""
        width = int(np.prod(self.form.shape))
        neurons = len(self.thresholds)
        # without the usual first weights, which would be drawn from the global generator
        first = nn.Linear(width, neurons, device="meta").to_empty(device="cpu")
        last = nn.Linear(neurons, plan.task.classes, device="meta").to_empty(device="cpu")
        with torch.no_grad():
            # small outputs, so that no record's loss is flat; clipping then leaves the largest signal
            first.weight.fill_(1.0 / (width * neurons))
            first.bias.copy_(-torch.tensor(self.thresholds) / neurons)
            # all neurons must weigh alike, and no class' weight may be the mean of all: its error is zero
            last.weight.copy_(torch.arange(1.0, plan.task.classes + 1).sqrt()[:, None].expand(-1, neurons))
            last.bias.zero_()
        return nn.Sequential(nn.Flatten(), first, nn.ReLU(), last)


def attack_gradients(
    plan: Plan, public: Examples, depth: Depth, progress: Progress
) -> list[InversionAttack]:
    """Try to rebuild public records from one step's update, as three observers hold it.

    Nothing of an owner is used, and no owner's budget is spent.

    Args:
        plan: Resolved.
        public: Public records, preprocessed by the plan's task; some of them are the victims.
        depth: `full` tries more starts and a larger batch.
        progress: Called with one line of text before each stage.

    Returns:
        Each attack on each observation; none if there are no records. The analytic attack is missing if
        the model does not start with a linear layer with biases. Pictures are empty where the model's
        inputs are none.

    Raises:
        ModelUnsafe, NoiseSeeded, SamplerReplaced, TrainingFailed: The plan cannot be trained.
        EncryptionUnavailable: The installed library cannot encrypt as the plan orders.
    """
    if len(public) == 0:
        progress("inversion: left out, it needs public records")
        return []
    order = np.random.default_rng(_VICTIM_SEED).permutation(len(public))
    task, model = task_for(plan), task_for(plan).build_model(plan)
    single = _rows(public, order[:1])
    found: list[InversionAttack] = []
    if starts_linear(model):
        progress("inversion: analytic, one record")
        found += _on_all(plan, task, "analytic", single, lambda g: row_ratios(model, g))
    progress("inversion: by optimization, one record")
    starts = synthetic_inputs(plan, _STARTS[depth])
    found += _on_all(plan, task, "optimization", single, lambda g: matched(task, model, g, starts))
    for batch in _BATCHES[depth]:
        progress(f"inversion: malicious model, {batch} records")
        victims, known = order[:batch], order[batch:] if len(order) > batch else order
        malicious = imprint_task(plan, _rows(public, known).x)
        found += _on_all(
            plan, malicious, "imprint", _rows(public, victims), malicious_rows(plan, malicious)
        )
    return found


def starts_linear(model: nn.Module) -> bool:
    """Tell whether the layer that takes the inputs is linear with biases."""
    for layer in model.modules():
        if list(layer.parameters(recurse=False)):
            return isinstance(layer, nn.Linear) and layer.bias is not None
    return False


def row_ratios(model: nn.Module, gradient: Floats) -> Floats:
    """Return the input that the first layer's gradients give away, shape (1, d).

    Args:
        model: Its first layer is linear with biases; gives shapes.
        gradient: Of all parameters, shape (n_params,).
    """
    weight, bias = _split(model, gradient)[:2]
    loudest = int(np.argmax(np.abs(bias)))
    return _ratio(weight[loudest : loudest + 1], bias[loudest : loudest + 1])


def matched(task: Task, model: nn.Module, gradient: Floats, starts: NDArray[np.float32]) -> Floats:
    """Return the input whose gradient is nearest to the observed one, shape (1, d).

    Args:
        task: Gives the loss.
        model: The attacked model, with its weights; not changed.
        gradient: Of all parameters, shape (n_params,).
        starts: Where the searches start, shape (k, ...).
    """
    copied = _double(model)
    parts = [torch.from_numpy(part) for part in _split(model, gradient)]
    # the error of the last layer's bias is negative for the true label alone
    label = parts[-1].argmin().reshape(1)
    best = (float("inf"), starts[:1].astype(np.float64))
    for start in starts:
        x = torch.from_numpy(start.astype(np.float64))[None].requires_grad_()
        distance = _search(task, copied, parts, x, label)
        if distance < best[0]:
            best = (distance, x.detach().numpy().copy())
        if best[0] < _EXACT:
            break
    return best[1].reshape(1, -1)


def imprint_task(plan: Plan, known: NDArray[np.float32], bins: int = _BINS) -> ImprintTask:
    """Return the malicious task, its thresholds at the quantiles of records that the attacker knows.

    Args:
        plan: Gives the true task.
        known: Records like the victims', shape (n, ...).
        bins: Neurons.
    """
    light = known.reshape(len(known), -1).astype(np.float64).mean(axis=1)
    thresholds = np.quantile(light, np.linspace(0.0, 1.0, bins))
    thresholds[0] = min(thresholds[0], light.min()) - 1.0
    return ImprintTask(plan.task, plan.model.name, tuple(float(value) for value in thresholds))


def malicious_rows(plan: Plan, task: ImprintTask) -> Rebuild:
    """Return how to read records off the malicious model's gradient, one candidate for each neuron."""
    model = task.build_model(plan)

    def rebuild(gradient: Floats) -> Floats:
        weight, bias = _split(model, gradient)[:2]
        between = np.diff(weight, axis=0, append=0.0), np.diff(bias, append=0.0)
        return _ratio(*between)

    return rebuild


def _on_all(
    plan: Plan, task: Task, attack: Attack, victims: Examples, rebuild: Rebuild
) -> Iterator[InversionAttack]:
    """Make one attack on what each of the three observers holds."""
    weights = task.initial_weights(plan)
    plain = observations.plain(task, plan, weights, victims)
    held: dict[Observed, Floats] = {
        "plain update": plain,
        "private update": observations.private(task, plan, weights, victims),
        "received by the coordinator": observations.received(plan, plain),
    }
    for observed, update in held.items():
        yield _judged(plan, attack, observed, victims, rebuild(-update))


def _judged(
    plan: Plan, attack: Attack, observed: Observed, victims: Examples, candidates: Floats
) -> InversionAttack:
    """Compare each victim with the candidate that is most like it."""
    shape = picture_shape(plan)
    scale = deviations if shape is None else brightness
    best: list[tuple[float, Floats, Floats]] = []
    for row in victims.x.reshape(len(victims), -1).astype(np.float64):
        original, scaled = scale(row, row), scale(candidates, row)
        ratios = psnr_db(scaled, original)
        nearest = int(np.argmax(ratios))
        best.append((float(ratios[nearest]), original, scaled[nearest]))
    psnr, original, rebuilt = max(best, key=lambda each: each[0])
    return InversionAttack(
        attack=attack,
        observed=observed,
        batch=len(victims),
        rebuilt=sum(is_recognizable(ratio, truth) for ratio, truth, _ in best),
        psnr_db=psnr,
        ssim=None if shape is None else ssim(rebuilt.reshape(shape), original.reshape(shape)),
        original_png="" if shape is None else png(original.reshape(shape)),
        rebuilt_png="" if shape is None else png(rebuilt.reshape(shape)),
    )


def _search(task: Task, model: nn.Module, observed: list[Tensor], x: Tensor, label: Tensor) -> float:
    """Move `x` until its gradient is the observed one, and return the distance that is left.

    The distance is relative and a mean over the parameters, because the small gradients of a deep model's
    first layers say the most about its input. Adam leads past the kinks of pooling, at which L-BFGS stops.
    """
    parameters = list(model.parameters())
    sizes = [float((seen**2).sum()) or 1.0 for seen in observed]

    def distance() -> Tensor:
        gradients = torch.autograd.grad(task.loss(model(x), label).sum(), parameters, create_graph=True)
        triples = zip(gradients, observed, sizes, strict=True)
        return torch.stack([((made - seen) ** 2).sum() / size for made, seen, size in triples]).mean()

    def closure() -> float:
        left = distance()
        (x.grad,) = torch.autograd.grad(left, [x])
        return float(left.detach())

    leading = torch.optim.Adam([x], lr=_STEP_SIZE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(leading, _LEADING_STEPS)
    for _ in range(_LEADING_STEPS):
        closure()
        leading.step()
        schedule.step()
    final: torch.optim.Optimizer = torch.optim.LBFGS(
        [x], max_iter=_ITERATIONS, tolerance_grad=0.0, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )
    final.step(closure)
    return closure()


def _ratio(weight: Floats, bias: Floats) -> Floats:
    """Return weight gradients over bias gradients, row by row; zeros where there is no bias gradient."""
    present = bias != 0.0
    return np.where(present[:, None], weight, 0.0) / np.where(present, bias, 1.0)[:, None]


def _split(model: nn.Module, gradient: Floats) -> list[Floats]:
    shapes = [parameter.shape for parameter in model.parameters()]
    ends = np.cumsum([shape.numel() for shape in shapes])[:-1]
    return [part.reshape(shape) for part, shape in zip(np.split(gradient, ends), shapes, strict=True)]


def _double(model: nn.Module) -> nn.Module:
    """Return a copy in float64, whose gradients tell more digits apart."""
    return copy.deepcopy(model).double()


def _rows(examples: Examples, chosen: NDArray[np.int64]) -> Examples:
    return Examples(examples.x[chosen], examples.y[chosen])
