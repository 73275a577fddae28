"""What is checked before any data is used: that clipping bounds an example, and that noise is secret.

The checks of a model run it on public examples. They find what depends on the model's structure; a model
that mixes examples only for particular values can pass them, so that tasks are installed code that an
owner trusts, never code that a coordinator sent.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binom
from torch import Tensor, nn

from client.bookkeeping import Loss
from client.gradients import Probe, spread_weights
from client.hooks import ModuleValidator
from client.noise import SecureStream
from protocol.errors import (
    ExamplesMixed,
    LayerUnsupported,
    ModelUnsafe,
    NoiseSeeded,
    ParameterUnused,
    SamplerReplaced,
    StatisticsKept,
    WeightsTied,
)

PROBE_ROWS = 4
FALSE_ALARM_RATE = 1e-12
"""Probability with which one check of the coins refuses a sound sampler, on each side."""

_STATISTICAL = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_COINS = 2**15
_SMALL_BATCHES, _SMALL_POPULATION = 24, 64


def probe_for(x: NDArray[Any], y: NDArray[Any]) -> Probe:
    """Return public examples of the form of these arrays: only their shapes and types are looked at.

    Args:
        x: Examples, shape (n, ...), floating or integer indices; n may be 0.
        y: Targets, shape (n, ...).

    Returns:
        Four different examples; indices are 0 and 1 alone, so that they are valid for every task.
    """
    shape = (PROBE_ROWS, *x.shape[1:])
    waves = torch.linspace(-1.0, 1.0, int(np.prod(shape)), dtype=torch.float64).mul(29.0).sin().view(shape)
    dtype = torch.from_numpy(np.empty(0, x.dtype)).dtype
    rows = waves.to(dtype) if dtype.is_floating_point else (waves > 0).to(dtype)
    targets = torch.zeros((PROBE_ROWS, *y.shape[1:]), dtype=torch.from_numpy(np.empty(0, y.dtype)).dtype)
    targets[1::2] = 1
    return rows, targets


def require_safe(model: nn.Module, loss: Loss, probe: Probe) -> None:
    """Check that clipping one example's gradient bounds that example's influence.

    Args:
        model: In training mode; it is not changed.
        loss: Gives from the model's output and the targets one loss for each example, shape (n,).
        probe: Public examples, see `probe_for`.

    Raises:
        StatisticsKept: There are buffers or a layer like BatchNorm.
        WeightsTied: One parameter stands at two places.
        LayerUnsupported: Opacus' validator knows that a layer cannot be treated.
        ExamplesMixed: Changing or removing one example changes another one's output or loss.
        ParameterUnused: A trained parameter has no part in the loss.
        ModelUnsafe: No parameter is trained.
    """
    _require_no_statistics(model)
    _require_own_weights(model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained:
        raise ModelUnsafe("no parameter is trained")
    if problems := ModuleValidator.validate(model, strict=False):
        raise LayerUnsupported(f"Opacus: {type(problems[0]).__name__}")
    copied = copy.deepcopy(model)
    spread_weights(copied)
    with torch.random.fork_rng(devices=[]):
        _require_rows_apart(copied, loss, probe)
        _require_all_used(copied, loss, probe)


def require_secret_randomness(make: Callable[[], SecureStream], sample_rate: float) -> None:
    """Check that noise and coins come from fresh secret keys, and that the coins are Poisson sampling.

    Seeds of the libraries' generators are set to the same values before each of two draws, and put back
    after. A sound stream is refused with a probability below 1e-11.

    Args:
        make: What training calls for the stream of a step.
        sample_rate: The plan's probability of one coin.

    Raises:
        NoiseSeeded: A stream is not `client.noise.SecureStream` itself, or repeats.
        SamplerReplaced: The coins repeat, do not have the probability, or give batches of one size.
    """
    draws = []
    for _ in range(2):
        with _fixed_seeds():
            stream = require_own(make())
            draws.append(
                (stream.gaussian(64), stream.coins(_COINS, 0.5), stream.coins(_COINS, sample_rate))
            )
    if np.any(draws[0][0] == draws[1][0]):
        raise NoiseSeeded("two streams gave the same noise")
    if np.array_equal(draws[0][1], draws[1][1]):
        raise SamplerReplaced("two batches are the same")
    for _, fair, biased in draws:
        _require_probability(fair, 0.5)
        _require_probability(biased, sample_rate)
    stream = require_own(make())
    sizes = {int(stream.coins(_SMALL_POPULATION, 0.5).sum()) for _ in range(_SMALL_BATCHES)}
    if len(sizes) == 1:
        raise SamplerReplaced("all batches have one size")


def require_own(stream: object) -> SecureStream:
    """Return the stream if it is the project's own, keyed by the operating system when it was made.

    Raises:
        NoiseSeeded: It is of another type or lacks what the constructor makes.
    """
    if type(stream) is not SecureStream or set(vars(stream)) != {"_encryptor"}:
        raise NoiseSeeded(f"a stream of the type {type(stream).__name__}")
    return stream


def _require_no_statistics(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, _STATISTICAL):
            raise StatisticsKept(f"layer {type(module).__name__}")
    for name, _ in model.named_buffers():
        raise StatisticsKept(f"buffer {name}")


def _require_own_weights(model: nn.Module) -> None:
    places: dict[int, tuple[str, str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False):
            place, before = (path, f"{path}.{name}".lstrip(".")), places.get(id(parameter))
            # Opacus' recurrent layers show the parameters of their cells under names of their own
            inside = before is not None and path.startswith(f"{before[0]}." if before[0] else "")
            if before is not None and not (inside and path != before[0]):
                raise WeightsTied(f"{before[1]} and {place[1]}")
            places[id(parameter)] = place


def _require_rows_apart(model: nn.Module, loss: Loss, probe: Probe) -> None:
    x, y = probe
    flipped = 1 - x if not x.is_floating_point() else 3.0 - x
    whole = _run(model, loss, x, y)
    for changed in range(len(x)):
        others = [row for row in range(len(x)) if row != changed]
        mixed = x.clone()
        mixed[changed] = flipped[changed]
        _require_equal(whole, _run(model, loss, mixed, y), others, others)
    model.eval()
    alone = list(range(1, len(x)))
    whole, fewer = _run(model, loss, x, y), _run(model, loss, x[1:], y[1:])
    _require_equal(whole, fewer, alone, list(range(len(alone))))
    model.train()


def _require_equal(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], rows: list[int], matching: list[int]
) -> None:
    for a, b in zip(first, second, strict=True):
        if len(a) <= max(rows) or len(b) <= max(matching):
            raise ExamplesMixed("the output does not have the examples as first dimension")
        kept, other = a[rows].double(), b[matching].double()
        if not float((kept - other).abs().max()) <= 1e-4 * (1.0 + float(kept.abs().max())):
            raise ExamplesMixed


def _run(model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    # Only for dropout, within a fork of the global generator; torch.manual_seed would seed absent devices
    # too, which it notes with a stack trace each time.
    torch.default_generator.manual_seed(0)
    with torch.no_grad():
        output = model(x)
        return output, loss(output, y)


def _require_all_used(model: nn.Module, loss: Loss, probe: Probe) -> None:
    x, y = probe
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    total = loss(model(x), y).sum()
    gradients = torch.autograd.grad(total, [parameter for _, parameter in named], allow_unused=True)
    for (name, _), gradient in zip(named, gradients, strict=True):
        if gradient is None:
            raise ParameterUnused(f"parameter {name}")


def _require_probability(coins: NDArray[np.bool_], probability: float) -> None:
    if coins.dtype != np.bool_ or coins.shape != (_COINS,):
        raise SamplerReplaced("coins of another form")
    lowest, highest = _plausible_successes(probability)
    if not lowest <= int(coins.sum()) <= highest:
        raise SamplerReplaced("coins of another probability")


@lru_cache(maxsize=16)
def _plausible_successes(probability: float) -> tuple[int, int]:
    """Return between which numbers the successes of `_COINS` coins lie, but for the false alarm rate."""
    coins = binom(_COINS, probability)
    return int(coins.ppf(FALSE_ALARM_RATE)), int(coins.isf(FALSE_ALARM_RATE))


@contextmanager
def _fixed_seeds() -> Iterator[None]:
    """Set the libraries' global generators to one state, and put back what they had."""
    saved = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)
    try:
        yield
    finally:
        random.setstate(saved[0])
        np.random.set_state(saved[1])
        torch.set_rng_state(saved[2])
