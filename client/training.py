"""One round of local training: a fixed number of DP-SGD steps (Abadi et al. 2016), built on Opacus.

What differs from Opacus' own engine, and why: the coins and the noise come from a stream that nobody
can repeat, with a fresh key in every step; the sampling rate and the divisor are the plan's public
constants, because numbers made from the owner's record count would disclose it and break the
guarantee; and an example with a gradient that is not finite counts as zero instead of stopping.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from client.noise import SecureStream
from protocol.errors import FedsealError, ModelUnsafe, TrainingFailed
from protocol.plan import Plan
from tasks.images import Examples, flatten, unflatten
from tasks.registry import Task


@contextmanager
def _root_logger_kept() -> Iterator[None]:
    """Undo what importing Opacus does to the root logger: it installs a handler for every package."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


with _root_logger_kept():
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer
    from opacus.validators import ModuleValidator

_LOG = logging.getLogger("fedseal.client")

MICRO_BATCH_VALUES = 2**24
"""Most per-example gradient values held at once (64 MiB); larger batches are added up piece by piece."""


class SecureDPOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus ships no types
    """Opacus' optimizer with secure noise, a public divisor, and no exception for bad examples.

    Guarantee: one example changes the sum of a step by at most `max_grad_norm` in L2, whatever its
    values; the noise has the deviation `noise_multiplier * max_grad_norm` in each coordinate.

    Args:
        optimizer: The optimizer that applies the noisy gradient.
        stream: Source of this step's noise; replace it before every step.
        noise_multiplier: Noise deviation over `max_grad_norm`; 0 for none.
        max_grad_norm: L2 clipping norm of one example; infinity for none.
        divisor: Public number that the noisy sum is divided by.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        stream: SecureStream,
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
        self.stream = stream
        self.divisor = divisor

    def clip_and_accumulate(self) -> None:
        """Zero the examples whose gradient norm is not finite, then clip and add up as Opacus does."""
        samples = self.grad_samples
        norms = torch.stack([gradient.flatten(start_dim=1).norm(dim=1) for gradient in samples])
        bad = ~torch.isfinite(norms.norm(dim=0))
        if bool(bad.any()):
            for gradient in samples:
                gradient[bad] = 0.0
        super().clip_and_accumulate()

    def step_with_noise_only(self) -> None:
        """Take a step as if no example had been sampled, whatever the last backward pass left behind."""
        for parameter in self.params:
            parameter.grad_sample = None
            parameter.summed_grad = torch.zeros_like(parameter)
        self.add_noise()
        self.original_optimizer.step()
        self.zero_grad()

    def add_noise(self) -> None:
        """Add the noise and divide, both in float64, and round to the parameters' type once."""
        deviation = self.noise_multiplier * self.max_grad_norm if self.noise_multiplier else 0.0
        for parameter in self.params:
            total = parameter.summed_grad.double()
            if deviation:
                noise = torch.from_numpy(self.stream.gaussian(total.numel()))
                total = total + deviation * noise.view_as(total)
            parameter.grad = (total / self.divisor).to(parameter.dtype)


def local_update(
    task: Task, plan: Plan, model_vector: NDArray[np.float64], examples: Examples
) -> NDArray[np.float64]:
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
        ModelMismatch: The vector does not fit the model.
        TrainingFailed: Anything else; the cause may depend on data and is not told.
    """
    try:
        return _train(task, plan, model_vector, examples)
    except FedsealError:
        raise
    except Exception:
        raise TrainingFailed from None


def require_safe(model: nn.Module, width: int) -> None:
    """Check that clipping one example's gradient bounds that example's influence.

    Args:
        model: Takes float32 (n, width).
        width: Number of values of one example.

    Raises:
        ModelUnsafe: Opacus has no per-example gradient for a layer, there are buffers, or changing one
            example changes another one's output.
    """
    problems = ModuleValidator.validate(model, strict=False)
    if problems or any(True for _ in model.buffers()):
        raise ModelUnsafe("a layer is not supported, or keeps statistics of its inputs")
    # Fixed weights, because a probe with weights of zero would see no mixing at all.
    probe = copy.deepcopy(model)
    rows = torch.linspace(-1.0, 1.0, 4 * width).reshape(4, width)
    changed = rows.clone()
    changed[0] = 3.0
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.copy_(0.1 * torch.arange(parameter.numel()).sin().view_as(parameter))
        difference = (probe(rows) - probe(changed))[1:].abs().max()
    if not float(difference) <= 1e-6:
        raise ModelUnsafe("the output for one example depends on other examples")


def _train(
    task: Task, plan: Plan, model_vector: NDArray[np.float64], examples: Examples
) -> NDArray[np.float64]:
    model = task.build_model(plan)
    unflatten(model, model_vector)
    require_safe(model, examples.x.shape[1])
    start = flatten(model).astype(np.float64)
    private = plan.privacy.noise == "local"
    if private and plan.privacy.noise_multiplier is None:
        raise TrainingFailed("the plan is not resolved")
    sampled = GradSampleModule(model, loss_reduction="sum")
    optimizer = SecureDPOptimizer(
        torch.optim.SGD(model.parameters(), lr=plan.training.learning_rate),
        SecureStream(),
        noise_multiplier=plan.privacy.noise_multiplier or 0.0,
        max_grad_norm=plan.privacy.max_grad_norm if private else math.inf,
        divisor=plan.privacy.expected_batch_size,
    )
    for _ in range(plan.training.local_steps):
        optimizer.stream = SecureStream()
        chosen = optimizer.stream.coins(len(examples), plan.privacy.sample_rate)
        try:
            _step(task, sampled, optimizer, examples.x[chosen], examples.y[chosen])
        except Exception:  # a step that fails sends its noise, so that nobody learns that it failed
            # the owner's own log only: an owner must be able to see that its steps fail
            _LOG.warning("a training step failed and sent its noise alone")
            _forget(sampled)
            optimizer.step_with_noise_only()
    return flatten(model).astype(np.float64) - start


def _forget(model: nn.Module) -> None:
    """Drop what Opacus' hooks keep of a forward pass that never reached its backward pass."""
    for module in model.modules():
        for name in ("activations", "max_batch_len"):
            if hasattr(module, name):
                delattr(module, name)


def _step(task: Task, model: Any, optimizer: SecureDPOptimizer, x: NDArray[Any], y: NDArray[Any]) -> None:
    """Apply one step to a sampled batch of any size, also to an empty one, in pieces that fit in memory."""
    parameters = sum(parameter.numel() for parameter in optimizer.params)
    size = max(1, MICRO_BATCH_VALUES // parameters)
    starts = range(0, max(1, len(x)), size)
    for start in starts:
        rows = torch.from_numpy(x[start : start + size])
        # Inputs that require a gradient keep PyTorch from warning about Opacus' backward hooks.
        logits = model(rows.requires_grad_())
        losses = task.loss(logits, torch.from_numpy(y[start : start + size]))
        torch.autograd.backward(losses.sum())
        optimizer.signal_skip_step(do_skip=start != starts[-1])
        optimizer.step()
        optimizer.zero_grad()
