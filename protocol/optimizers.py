"""Server optimizers as pure functions of float64 vectors.

The coordinator and every owner run the same code on the same opened sums, so that each owner knows that
the next round's model is the one that follows and not one made for it. Only element-wise operations are
used; they are the same to the bit on every IEEE 754 machine.
Source: Reddi et al. 2021, "Adaptive Federated Optimization", algorithm 2.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from protocol.errors import EncodingInvalid, ModelRanAway
from protocol.sections import ServerOptimizerSection

Vector = NDArray[np.float64]

LARGEST_WEIGHT: Final = 10_000.0
"""Largest magnitude of one weight of a global model; a run whose model goes beyond it ends.

Trained networks have weights of at most some hundreds. float32 keeps seven digits, so that up to this bound
a gradient is clipped within a thousandth of its norm; with weights of 1e7 an example was seen to exceed the
clipping norm five times, by rounding alone.
"""


@dataclass(frozen=True)
class GlobalModel:
    """The global model and the optimizer's memory, all float64 (n,); no vector is changed in place."""

    weights: Vector
    first_moment: Vector
    second_moment: Vector

    @classmethod
    def initial(cls, weights: Vector) -> GlobalModel:
        """Start from round 0's weights with an empty memory."""
        return cls(weights, np.zeros_like(weights), np.zeros_like(weights))

    def sha256(self) -> str:
        """Return the model hash: over weights and memory, little-endian float64."""
        return self._sha256

    @cached_property
    def _sha256(self) -> str:
        state = hashlib.sha256(b"fedseal/model/1\0")
        for part in (self.weights, self.first_moment, self.second_moment):
            state.update(np.ascontiguousarray(part, dtype="<f8").data.cast("B"))
        return state.hexdigest()

    def to_bytes(self) -> bytes:
        """Return the vectors one after the other, little-endian float64; an empty memory is left out."""
        memory = (self.first_moment, self.second_moment)
        parts = (self.weights, *memory) if any(part.any() for part in memory) else (self.weights,)
        return b"".join(part.astype("<f8").tobytes() for part in parts)

    @classmethod
    def from_bytes(cls, data: bytes, parameters: int) -> GlobalModel:
        """Inverse of `to_bytes` for a model of so many parameters.

        Raises:
            EncodingInvalid: The bytes have another length, or hold a value that is not finite.
        """
        size = 8 * parameters
        if len(data) not in (size, 3 * size):
            raise EncodingInvalid(f"a model of {parameters} parameters has {size} or {3 * size} bytes")
        values = np.frombuffer(data, dtype="<f8").astype(np.float64).reshape(-1, parameters)
        if not np.isfinite(values).all():
            raise EncodingInvalid("a model has a value that is not finite")
        return cls.initial(values[0]) if len(values) == 1 else cls(*values)


def apply_update(model: GlobalModel, mean: Vector, optimizer: ServerOptimizerSection) -> GlobalModel:
    """Return the next global model.

    Args:
        model: The current model.
        mean: float64 (n,), the mean of the owners' updates.
        optimizer: Section of the plan; public constants only.

    Raises:
        ModelRanAway: The next model is beyond `LARGEST_WEIGHT`, or not finite.
    """
    with np.errstate(all="ignore"):
        following = _following(model, mean, optimizer)
    require_bounded(following)
    return following


def require_bounded(model: GlobalModel) -> None:
    """Check that a model's weights are within `LARGEST_WEIGHT`, and that all of it is finite.

    The coordinator checks each round's model before the round counts, and each owner before it trains.

    Raises:
        ModelRanAway: They are not.
    """
    # written so that a NaN, which compares with nothing, is refused
    if not bool(np.all(np.abs(model.weights) <= LARGEST_WEIGHT)):
        raise ModelRanAway
    if not (np.isfinite(model.first_moment).all() and np.isfinite(model.second_moment).all()):
        raise ModelRanAway("the optimizer's memory is not finite")


def _following(model: GlobalModel, mean: Vector, optimizer: ServerOptimizerSection) -> GlobalModel:
    rate, beta = optimizer.learning_rate, optimizer.momentum
    if optimizer.name == "fedavg":
        weights = rate * mean
        weights += model.weights
        return GlobalModel(weights, model.first_moment, model.second_moment)
    if optimizer.name == "fedavgm":
        first = beta * model.first_moment + mean
        return GlobalModel(model.weights + rate * first, first, model.second_moment)
    first = beta * model.first_moment + (1.0 - beta) * mean
    second = _second_moment(model.second_moment, mean * mean, optimizer)
    step = rate * first / (np.sqrt(second) + optimizer.epsilon)
    return GlobalModel(model.weights + step, first, second)


def _second_moment(old: Vector, square: Vector, optimizer: ServerOptimizerSection) -> Vector:
    beta = optimizer.second_moment
    if optimizer.name == "fedadam":
        return beta * old + (1.0 - beta) * square
    return old - (1.0 - beta) * square * np.sign(old - square)
