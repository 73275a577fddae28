"""Gradient engines behind one interface, and the choice between them.

An engine is used only after it has shown, on public examples and weights, that its clipped sum is the
one that follows from each example's own backward pass: a layer that is computed otherwise than it looks
(used twice, used by its weight alone, overwritten) stops the training instead of spoiling it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from client.bookkeeping import BookKeeping, Loss, Untreatable, clip_factors
from client.hooks import Hooks
from client.padding import rows_for
from protocol.errors import LayerUnsupported

_LOG = logging.getLogger("fedseal.client")

Choice = Literal["auto", "book-keeping", "hooks"]
Probe = tuple[Tensor, Tensor]
"""Public examples and targets of the shapes and types that the model takes, at least two."""

BATCH_VALUES = 2**25
"""Most values held at once for a batch (128 MiB of float32), but for `ROWS` examples."""

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)

TOLERANCE = 1e-3
"""Largest relative difference from the separate backward passes; rounding gives about 1e-6."""


class GradientEngine(Protocol):
    """Gives the sum of the clipped gradients of a batch."""

    name: str
    parameters: list[nn.Parameter]
    values_per_example: int
    rows: int

    def clipped_sums(self, x: Tensor, y: Tensor, max_grad_norm: float) -> list[Tensor]:
        """Return for each trained parameter the sum of the examples' clipped gradients."""

    def plain_sums(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """Return for each trained parameter the sum of the examples' gradients, not clipped."""


Sums = Callable[[Tensor, Tensor], list[Tensor]]
"""Gives for a piece of a batch one gradient sum for each trained parameter."""


def engine_for(
    model: nn.Module, loss: Loss, choice: Choice, probe: Probe, batch: float = 0.0
) -> GradientEngine:
    """Return the engine that treats a model, and say in the log which one it is.

    Args:
        model: In training mode; its forward pass takes the examples as first dimension. Its weights are
            changed for the check and put back.
        loss: Gives from the model's output and the targets one loss for each example, shape (n,).
        choice: `auto` prefers book-keeping, which costs least.
        probe: Public examples to check the engine on; never private ones.
        batch: Public number of examples to expect in a batch, for the number of rows of its pieces.

    Raises:
        LayerUnsupported: No chosen engine gives the right sum; the detail names the layer.
    """
    kinds: dict[str, Callable[[nn.Module, Loss], GradientEngine]] = {
        BookKeeping.name: BookKeeping,
        Hooks.name: Hooks,
    }
    reasons = []
    with _public_weights(model):
        expected = _separate_sums(model, loss, probe)
        for name in kinds if choice == "auto" else (choice,):
            try:
                engine = kinds[name](model, loss)
                _require_agreement(engine, probe, *expected)
                engine.rows = rows_for(batch, BATCH_VALUES / engine.values_per_example)
            except Untreatable as error:
                reasons.append(f"{name}: {error}")
            except Exception as error:
                # what torch and Opacus say of a model that they cannot treat has no form of its own
                reasons.append(f"{name}: stopped with {type(error).__name__}")
            else:
                _LOG.info("gradient engine: %s%s", name, f" ({'; '.join(reasons)})" if reasons else "")
                return engine
    raise LayerUnsupported("; ".join(reasons))


def batch_sums(engine: GradientEngine, sums_of: Sums, x: Tensor, y: Tensor) -> list[Tensor]:
    """Return the sums of a batch of any size, also of an empty one, in pieces that fit in memory.

    A piece that fails is tried in halves, down to single examples, and only those that fail by themselves
    count as zero: were it the whole batch, one example could take all others with it. There are fewer than
    two tries for each example.

    Args:
        engine: Of the model that is trained.
        sums_of: Gives the sums of one piece, for example the engine's clipped ones.
        x: Examples, shape (n, ...), n >= 0.
        y: Targets, shape (n, ...).

    Returns:
        One tensor for each of the engine's parameters, finite unless the total of finite pieces is not.

    Guarantee: if one example changes what `sums_of` returns by at most some L2 norm over all tensors
    together, and either fails by itself or lets nobody fail, it changes the result by at most that norm,
    up to the rounding of the sum.
    """
    totals = [torch.zeros_like(parameter, requires_grad=False) for parameter in engine.parameters]
    waiting = [slice(start, start + engine.rows) for start in range(0, len(x), engine.rows)][::-1]
    left_out = False
    while waiting:
        piece = waiting.pop()
        sums = _finite(sums_of, x[piece], y[piece])
        if sums is not None:
            totals = [a + b for a, b in zip(totals, sums, strict=True)]
        elif (count := len(x[piece])) > 1:
            middle = piece.start + count // 2
            waiting += [slice(middle, piece.start + count), slice(piece.start, middle)]
        else:
            left_out = True
    if left_out:
        # the owner's own log only: an owner must be able to see that examples of its own are lost
        _LOG.warning("examples whose gradients could not be computed were left out of a training step")
    return totals


def _finite(sums_of: Sums, x: Tensor, y: Tensor) -> list[Tensor] | None:
    """Return the sums of a piece, or None if they cannot be computed or are not finite."""
    try:
        sums = sums_of(x, y)
    except Exception:  # what went wrong may depend on data, and is told to nobody
        return None
    return sums if all(math.isfinite(float(total.double().sum())) for total in sums) else None


@contextmanager
def _public_weights(model: nn.Module) -> Iterator[None]:
    """Give the model fixed weights of ordinary size, because weights of zero hide what a layer does.

    Dropout rests meanwhile: it would differ between a batch and the same examples one by one.
    """
    saved = [parameter.detach().clone() for parameter in model.parameters()]
    random_layers = [module for module in model.modules() if isinstance(module, DROPOUTS)]
    spread_weights(model)
    for layer in random_layers:
        layer.eval()
    try:
        yield
    finally:
        for layer in random_layers:
            layer.train()
        with torch.no_grad():
            for parameter, values in zip(model.parameters(), saved, strict=True):
                parameter.copy_(values)


def spread_weights(model: nn.Module) -> None:
    """Set public weights for probes: uniform, of the size that keeps a layer's output at its input's."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = math.prod(parameter.shape[1:])
            if parameter.dim() > 1:
                bound = math.sqrt(3 / max(1, fan_in))
                parameter.uniform_(-bound, bound, generator=generator)
            else:
                parameter.uniform_(0.2, 1.0, generator=generator)


def _separate_sums(model: nn.Module, loss: Loss, probe: Probe) -> tuple[list[Tensor], float]:
    """Return the clipped sum from one backward pass for each example, and a norm that clips half."""
    x, y = probe
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = [
        torch.autograd.grad(loss(model(x[i : i + 1]), y[i : i + 1]).sum(), parameters)
        for i in range(len(x))
    ]
    norms = torch.stack([_norm(gradient) for gradient in gradients])
    bound = float(norms.median())
    factors = clip_factors(norms, bound)
    sums = [sum(f * g[i] for f, g in zip(factors, gradients, strict=True)) for i in range(len(parameters))]
    return [torch.as_tensor(total) for total in sums], bound


def _require_agreement(engine: GradientEngine, probe: Probe, expected: list[Tensor], bound: float) -> None:
    sums = engine.clipped_sums(*probe, bound)
    difference = float(_norm([a - b for a, b in zip(sums, expected, strict=True)]))
    if not difference <= TOLERANCE * float(_norm(expected)):
        raise Untreatable("its sum is not that of the examples' own gradients")


def _norm(parts: Sequence[Tensor]) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(part) for part in parts]))
    return norm
