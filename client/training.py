"""One round of local training: a fixed number of DP-SGD steps (Abadi et al. 2016), built on Opacus.

What differs from Opacus' own engine, and why: the coins and the noise come from a stream that nobody
can repeat, with a fresh key in every step; the sampling rate and the divisor are the plan's public
constants, because numbers made from the owner's record count would disclose it and break the
guarantee; and an example whose gradient is not finite, or cannot be computed, counts as zero by itself
instead of stopping the step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client.gradients import GradientEngine, Sums, batch_sums, engine_for
from client.hooks import DPOptimizer
from client.noise import SecureStream
from client.safety import probe_for, require_own, require_safe, require_secret_randomness
from protocol.errors import FedsealError, TrainingFailed
from protocol.plan import Plan
from tasks.images import Examples, flatten, unflatten
from tasks.registry import Task

_LOG = logging.getLogger("fedseal.client")

Floats = NDArray[np.float64]


class SecureDPOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus ships no types
    """Opacus' optimizer with secure noise and a public divisor, for the sums of either gradient engine.

    Guarantee: if one example changes the sums by at most `max_grad_norm` in L2, a step is a Gaussian
    mechanism with the deviation `noise_multiplier * max_grad_norm` in each coordinate.

    Args:
        optimizer: Applies the noisy gradient.
        noise_multiplier: Noise deviation over `max_grad_norm`; 0 for none.
        max_grad_norm: L2 clipping norm of one example; infinity for none.
        divisor: Public number that the noisy sum is divided by.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        divisor: float,
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=None,
            loss_reduction="sum",
        )
        self.divisor = divisor
        self._noise: Floats = np.zeros(0)

    def step_on(self, sums: Sequence[Tensor], stream: SecureStream) -> None:
        """Take one step on clipped sums with this stream's noise.

        Args:
            sums: One tensor for each trained parameter.
            stream: Fresh for this step.

        Raises:
            NoiseSeeded: The stream is not the project's own.
        """
        if self.noise_multiplier:
            size = sum(parameter.numel() for parameter in self.params)
            self._noise = require_own(stream).gaussian(size)
        for parameter, total in zip(self.params, sums, strict=True):
            parameter.summed_grad = total
        self.add_noise()
        self.original_optimizer.step()
        self.zero_grad(set_to_none=True)

    def add_noise(self) -> None:
        """Add the noise and divide, both in float64, and round to the parameters' type once."""
        start = 0
        for parameter in self.params:
            total = parameter.summed_grad.double()
            if self.noise_multiplier:
                noise = torch.from_numpy(self._noise[start : start + total.numel()]).view_as(total)
                total = total.add_(noise, alpha=self.noise_multiplier * self.max_grad_norm)
                start += total.numel()
            parameter.grad = total.div_(self.divisor).to(parameter.dtype)


def local_update(task: Task, plan: Plan, model_vector: Floats, examples: Examples) -> Floats:
    """Train for one round and return how the model changed.

    Args:
        task: Gives the model and the loss.
        plan: Gives every constant of training; its noise multiplier is filled in.
        model_vector: This round's model, shape (n_params,).
        examples: The owner's data; may be empty, the update then is pure noise.

    Returns:
        Trained minus given model, float64, shape (n_params,). A value that overflowed is not finite; the
        caller must not tell.

    Guarantee: with `privacy.noise = "local"` the update is the output of `local_steps` composed
    Poisson-subsampled Gaussian mechanisms, which `protocol.accounting` prices. The caller must have
    reserved the attempt in the ledger. With `"none"` there is no clipping, no noise, no guarantee.

    Raises:
        ModelUnsafe: The model mixes examples or has layers without per-example gradients.
        NoiseSeeded, SamplerReplaced: Noise or batches do not come from the project's own stream.
        ModelMismatch: The vector does not fit the model.
        TrainingFailed: Anything else; the cause may depend on data and is not told.
    """
    if plan.privacy.noise == "none":
        return plain_update(task, plan, model_vector, examples)
    if plan.privacy.noise != "local" or plan.privacy.noise_multiplier is None:
        raise TrainingFailed("the plan is not resolved, or its noise is not local")
    noise = plan.privacy.noise_multiplier
    return _guarded(lambda: _train(_prepared(task, plan, model_vector, examples), plan, examples, noise))


def plain_update(task: Task, plan: Plan, model_vector: Floats, examples: Examples) -> Floats:
    """Train with plain SGD on Poisson batches: neither clipped nor noised, divided by the public divisor.

    It has no privacy by itself: a caller clips the whole update and adds noise for the unit `client`.

    Args:
        task: Gives the model and the loss.
        plan: Gives steps, step size, sample rate and divisor.
        model_vector: This round's model, shape (n_params,).
        examples: The owner's data; may be empty.

    Returns:
        Trained minus given model, float64, shape (n_params,). An example whose gradient is not finite, or
        cannot be computed, counts as zero.

    Raises:
        ModelUnsafe, NoiseSeeded, SamplerReplaced, ModelMismatch, TrainingFailed: As `local_update`.
    """
    return _guarded(lambda: _train(_prepared(task, plan, model_vector, examples), plan, examples, 0.0))


def clipped_sum(task: Task, plan: Plan, model_vector: Floats, examples: Examples) -> Floats:
    """Return the sum of the clipped gradients of one Poisson batch, without noise and without division.

    It has no privacy by itself: the caller must add the noise before anything of it is released.

    Args:
        task: Gives the model and the loss.
        plan: Gives the sample rate and the clipping norm.
        model_vector: This round's model, shape (n_params,).
        examples: The owner's data; may be empty.

    Returns:
        float64, shape (n_params,), zero for frozen parameters; a step along it makes the loss larger. An
        example whose gradient cannot be computed counts as zero.

    Guarantee: one example changes the sum by at most `max_grad_norm` in L2, up to the rounding of the sum.

    Raises:
        ModelUnsafe, NoiseSeeded, SamplerReplaced, ModelMismatch, TrainingFailed: As `local_update`.
    """

    def compute() -> Floats:
        model, engine = _prepared(task, plan, model_vector, examples)
        sums = _sampled_sums(engine, _clipped(engine, plan), plan, examples, SecureStream())
        by_parameter = dict(zip(engine.parameters, sums, strict=True))
        parts = [
            by_parameter.get(parameter, torch.zeros_like(parameter)) for parameter in model.parameters()
        ]
        return torch.cat([part.detach().double().flatten() for part in parts]).numpy()

    return _guarded(compute)


Prepared = tuple[nn.Module, GradientEngine]


def _guarded(compute: Callable[[], Floats]) -> Floats:
    try:
        return compute()
    except FedsealError:
        raise
    except Exception:
        raise TrainingFailed from None


def _prepared(task: Task, plan: Plan, model_vector: Floats, examples: Examples) -> Prepared:
    """Return the checked model with the given weights, and its engine; no value of data is used."""
    model = task.build_model(plan).train()
    unflatten(model, model_vector)
    probe = probe_for(examples.x, examples.y)
    require_safe(model, task.loss, probe)
    require_secret_randomness(SecureStream, plan.privacy.sample_rate)
    batch = plan.privacy.expected_batch_size
    return model, engine_for(model, task.loss, plan.training.gradient_engine, probe, batch)


def _train(prepared: Prepared, plan: Plan, examples: Examples, noise_multiplier: float) -> Floats:
    """Take the plan's steps; without noise there is no clipping either."""
    model, engine = prepared
    clips = noise_multiplier > 0
    optimizer = SecureDPOptimizer(
        torch.optim.SGD(engine.parameters, lr=plan.training.learning_rate),
        noise_multiplier=noise_multiplier,
        max_grad_norm=plan.privacy.max_grad_norm if clips else math.inf,
        divisor=plan.privacy.expected_batch_size,
    )
    sums_of = _clipped(engine, plan) if clips else _plain(engine)
    start = flatten(model).astype(np.float64)
    for _ in range(plan.training.local_steps):
        stream = SecureStream()
        optimizer.step_on(_sampled_sums(engine, sums_of, plan, examples, stream), stream)
    return flatten(model).astype(np.float64) - start


def _sampled_sums(
    engine: GradientEngine, sums_of: Sums, plan: Plan, examples: Examples, stream: SecureStream
) -> list[Tensor]:
    """Return the sums of one Poisson batch.

    Examples that fail are left out by `batch_sums`. What else can fail is the machine (no memory for the
    batch itself) or a total that is not finite, which clipped gradients do not add up to: then the sums are
    zeros, so that nobody learns of it.
    """
    chosen = require_own(stream).coins(len(examples), plan.privacy.sample_rate)
    try:
        sums = sums_of(torch.from_numpy(examples.x[chosen]), torch.from_numpy(examples.y[chosen]))
        finite = all(math.isfinite(float(total.double().sum())) for total in sums)
    except Exception:  # what went wrong may depend on data
        finite = False
    if finite:
        return sums
    # the owner's own log only: an owner must be able to see that its steps fail
    _LOG.warning("a training step failed and counts as one without examples")
    return [torch.zeros_like(parameter, requires_grad=False) for parameter in engine.parameters]


def _clipped(engine: GradientEngine, plan: Plan) -> Sums:
    bound = plan.privacy.max_grad_norm
    return lambda x, y: batch_sums(engine, lambda a, b: engine.clipped_sums(a, b, bound), x, y)


def _plain(engine: GradientEngine) -> Sums:
    return lambda x, y: batch_sums(engine, engine.plain_sums, x, y)
