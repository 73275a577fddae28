"""Per-example gradient norms and weighted gradient sums of single layers (Bu et al. 2023, book-keeping).

A layer's gradient for one example is a function of the layer's input `a` and of the gradient `b` of the
loss with respect to its output. From the two follow, without another backward pass, the norm of each
example's gradient and the sum of the gradients with a weight for each example. The norm is found in one
of two ways, whichever needs less work: the example's gradient is *instantiated*, or its squared norm is
a sum over pairs of positions (the *ghost norm*, Goodfellow 2015, Li et al. 2022), as for a linear layer

    |sum_t b_t a_t^T|^2 = sum_{t,s} (a_t . a_s) (b_t . b_s).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

Sum = tuple[nn.Parameter, Tensor]
"""A parameter and a gradient of its shape."""

LARGEST_INPUT = 1e18
"""Norm of an input above which the rounding of a tiny weighted output gradient, which has few digits left,
could grow into something that matters; such an example counts as one whose gradient is not finite."""

_SMALL, _LARGE = 1e-9, 1e8
"""Lengths of an example's longest input or output gradient whose products of four fit into float32."""

_PIECE = 1024
"""Values of which a norm is computed in float32; more of them are added up in float64."""


@dataclass(frozen=True)
class Layer:
    """A layer and which of its two parameters are trained; a frozen one gets no gradient."""

    module: nn.Module
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def parameters(self) -> list[nn.Parameter]:
        """Return the trained ones, the weight first."""
        return [parameter for parameter in (self.weight, self.bias) if parameter is not None]


class Call(Protocol):
    """What one layer contributes for one batch."""

    def squared_norms(self) -> Tensor:
        """Return the squared L2 norm of each example's gradient of this layer, float64 (n,).

        It is never smaller than the true one by more than rounding, and infinite where it is not known.
        """

    def weighted_sums(self, weights: Tensor) -> list[Sum]:
        """Return for each trained parameter the sum of the examples' gradients times `weights` (n,)."""

    def held_values(self) -> int:
        """Return how many values are held for one example, to keep a batch within memory."""


Rule = Callable[[Layer, Tensor, Tensor], Call]


@dataclass(frozen=True)
class Instantiated:
    """Gradients that are there for each example: pairs of a parameter and a tensor (n, *shape)."""

    gradients: list[Sum]

    def squared_norms(self) -> Tensor:
        """Return the squared norms, from the gradients themselves."""
        return added_up([squared(gradient.flatten(1)) for _, gradient in self.gradients])

    def weighted_sums(self, weights: Tensor) -> list[Sum]:
        """Return one product of the weights with all gradients for each parameter."""
        return [
            (parameter, (weights @ gradient.flatten(1)).view_as(parameter))
            for parameter, gradient in self.gradients
        ]

    def held_values(self) -> int:
        """Return the number of gradient values."""
        return sum(parameter.numel() for parameter, _ in self.gradients)


@dataclass(frozen=True)
class Rows:
    """A linear layer that sees one row for each example: the gradient is an outer product."""

    layer: Layer
    inputs: Tensor
    output_gradients: Tensor

    def squared_norms(self) -> Tensor:
        """Return |b|^2 |a|^2 for the weight, |b|^2 for the bias."""
        factor = _bounded(squared(self.inputs)) if self.layer.weight is not None else 0.0
        return squared(self.output_gradients) * (factor + (self.layer.bias is not None))

    def weighted_sums(self, weights: Tensor) -> list[Sum]:
        """Return one matrix product for the weight and one sum for the bias."""
        return _linear_sums(self.layer, self.inputs, self.output_gradients * weights[:, None])

    def held_values(self) -> int:
        """Return the size of one input and one output."""
        return self.inputs.shape[1] + self.output_gradients.shape[1]


@dataclass(frozen=True)
class Positions:
    """A linear layer that sees several positions (n, t, width) of each example, by its ghost norm.

    Rounding can hide the norm where the positions' outer products nearly cancel. Examples for which
    this may be so (squared norm below `1 / (16 t)` of what it is without cancellation) have their
    gradient instantiated, so that no record can be larger than it appears. So have examples whose values
    are so small or large that products of them leave the range of float32.
    """

    layer: Layer
    inputs: Tensor
    output_gradients: Tensor

    def squared_norms(self) -> Tensor:
        """Return the sum over pairs of positions, and |sum_t b_t|^2 for the bias."""
        a_lengths = _bounded(squared(self.inputs)).sqrt()
        b_lengths = squared(self.output_gradients).sqrt()
        parts = []
        if self.layer.weight is not None:
            parts.append(self._weight_norms(a_lengths, b_lengths))
        if self.layer.bias is not None:
            parts.append(squared(self.output_gradients.sum(dim=1)))
        return not_below_rounding(added_up(parts), (b_lengths * (1 + a_lengths)).sum(dim=1))

    def _weight_norms(self, a_lengths: Tensor, b_lengths: Tensor) -> Tensor:
        a, b = self.inputs, self.output_gradients
        reach = (a_lengths * b_lengths).sum(dim=1)
        products: Tensor = torch.linalg.vecdot(torch.bmm(a, a.mT).flatten(1), torch.bmm(b, b.mT).flatten(1))
        squares = products.double()
        doubtful = ~(squares * (16 * a.shape[1]) >= reach.square())
        for longest in (a_lengths.amax(dim=1), b_lengths.amax(dim=1)):
            # an example of nothing but zeros has a norm of zero, and needs no second look
            doubtful |= ((longest < _SMALL) | (longest > _LARGE)) & (longest > 0)
        for index in doubtful.nonzero().flatten().tolist():
            squares[index] = (b[index].T.double() @ a[index].double()).square().sum()
        return squares

    def weighted_sums(self, weights: Tensor) -> list[Sum]:
        """Return one matrix product over all positions of all examples."""
        scaled = (self.output_gradients * weights[:, None, None]).flatten(0, 1)
        return _linear_sums(self.layer, self.inputs.flatten(0, 1), scaled)

    def held_values(self) -> int:
        """Return the size of inputs, outputs and their products."""
        _, t, width = self.inputs.shape
        return int(t * (width + self.output_gradients.shape[2] + 2 * t))


@dataclass(frozen=True)
class Lookups:
    """An embedding; the gradient of an example has one row for each different index."""

    parameter: nn.Parameter
    padding_index: int | None
    indices: Tensor
    output_gradients: Tensor

    def squared_norms(self) -> Tensor:
        """Return the squared norm of the rows, after adding up what falls on the same row."""
        n = len(self.indices)
        rows = self._kept(self.output_gradients)
        keys = self.indices + torch.arange(n)[:, None] * self.parameter.shape[0]
        unique, position = torch.unique(keys, return_inverse=True)
        added = rows.new_zeros(len(unique), rows.shape[-1])
        added.index_add_(0, position.flatten(), rows.flatten(0, 1))
        owners = torch.div(unique, self.parameter.shape[0], rounding_mode="floor")
        squares = rows.new_zeros(n, dtype=torch.float64).index_add_(0, owners, squared(added))
        return not_below_rounding(squares, squared(rows).sqrt().sum(dim=1))

    def weighted_sums(self, weights: Tensor) -> list[Sum]:
        """Return the weighted rows, added up by index."""
        rows = self._kept(self.output_gradients) * weights[:, None, None]
        total = torch.zeros_like(self.parameter)
        return [(self.parameter, total.index_add_(0, self.indices.flatten(), rows.flatten(0, 1)))]

    def held_values(self) -> int:
        """Return the size of the rows that are looked up, before and after adding up."""
        return 2 * self.output_gradients[0].numel()

    def _kept(self, rows: Tensor) -> Tensor:
        if self.padding_index is None:
            return rows
        return rows * (self.indices != self.padding_index)[..., None]


def linear(layer: Layer, inputs: Tensor, output_gradients: Tensor) -> Call:
    """Return the rule of nn.Linear for inputs (n, ..., in) and output gradients (n, ..., out)."""
    if inputs.dim() == 2:
        return Rows(layer, inputs, output_gradients)
    a, b = inputs.flatten(1, -2), output_gradients.flatten(1, -2)
    if layer.weight is None or ghost_pays(a.shape[1], a.shape[2], b.shape[2]):
        return Positions(layer, a, b)
    gradients = [(layer.weight, torch.bmm(b.mT, a))]
    if layer.bias is not None:
        gradients.append((layer.bias, b.sum(dim=1)))
    return Instantiated(gradients)


def embedding(layer: Layer, inputs: Tensor, output_gradients: Tensor) -> Call:
    """Return the rule of nn.Embedding for indices (n, ...), also expanded and non-contiguous ones."""
    indices = inputs.reshape(len(inputs), -1)
    rows = output_gradients.reshape(*indices.shape, -1)
    (parameter,) = layer.parameters()
    return Lookups(parameter, cast(nn.Embedding, layer.module).padding_idx, indices, rows)


def layer_norm(layer: Layer, inputs: Tensor, output_gradients: Tensor) -> Call:
    """Return the rule of nn.LayerNorm: scale and shift have the width of one position."""
    module = cast(nn.LayerNorm, layer.module)
    shape = module.normalized_shape
    normal = functional.layer_norm(inputs, shape, None, None, module.eps)
    products = normal * output_gradients if layer.weight is not None else None

    def per_example(values: Tensor) -> Tensor:
        return values.reshape(len(values), -1, *shape).sum(dim=1)

    return _scale_and_shift(layer, products, output_gradients, per_example)


def group_norm(layer: Layer, inputs: Tensor, output_gradients: Tensor) -> Call:
    """Return the rule of nn.GroupNorm: scale and shift have one value for each channel."""
    module = cast(nn.GroupNorm, layer.module)
    normal = functional.group_norm(inputs, module.num_groups, None, None, module.eps)
    products = normal * output_gradients if layer.weight is not None else None

    def per_example(values: Tensor) -> Tensor:
        return values.reshape(*values.shape[:2], -1).sum(dim=2)

    return _scale_and_shift(layer, products, output_gradients, per_example)


def ghost_pays(positions: int, fan_in: int, fan_out: int) -> bool:
    """Say whether the products of all pairs of positions cost less than one gradient for each example."""
    return positions * (fan_in + fan_out) < fan_in * fan_out


def _scale_and_shift(
    layer: Layer, products: Tensor | None, output_gradients: Tensor, per_example: Callable[[Tensor], Tensor]
) -> Call:
    gradients = []
    if layer.weight is not None and products is not None:
        gradients.append((layer.weight, per_example(products)))
    if layer.bias is not None:
        gradients.append((layer.bias, per_example(output_gradients)))
    return Instantiated(gradients)


def _linear_sums(layer: Layer, inputs: Tensor, scaled: Tensor) -> list[Sum]:
    sums = []
    if layer.weight is not None:
        sums.append((layer.weight, scaled.T @ inputs))
    if layer.bias is not None:
        sums.append((layer.bias, scaled.sum(dim=0)))
    return sums


def not_below_rounding(squares: Tensor, reach: Tensor) -> Tensor:
    """Return squared norms of at least what rounding may leave of terms that cancel.

    The weighted sum is rounded in another order than the norm. Where the terms of an example cancel,
    what is left in the sum may be larger than the norm; the larger of the two clips the example.

    Args:
        squares: Computed squared norms, float64 (n,).
        reach: The norm if nothing cancelled, float64 (n,); float32 rounds to 2^-24 of it.
    """
    return torch.maximum(squares, (reach * 2.0**-18).square())


def squared(rows: Tensor) -> Tensor:
    """Return the squared L2 norm along the last dimension, in float64 and exact to about 1e-6.

    In float32, the squares of values below 1e-23 vanish, those of values above 1e19 overflow, and a sum of
    millions of equal squares loses a hundredth. So float32 adds up pieces only, and rows of extreme norm
    are computed again.
    """
    if rows.dtype == torch.float64:
        wide: Tensor = torch.linalg.vector_norm(rows, dim=-1)
        return wide.square()
    whole = rows.shape[-1] - rows.shape[-1] % _PIECE
    squares: Tensor = torch.linalg.vector_norm(rows[..., whole:], dim=-1).double().square()
    if whole:
        pieces = rows[..., :whole].view(*rows.shape[:-1], -1, _PIECE)
        squares = squares + torch.linalg.vector_norm(pieces, dim=-1).double().square().sum(dim=-1)
    extreme = ~((squares >= 1e-24) & (squares <= 1e30))
    if bool(extreme.any()):
        squares[extreme] = rows[extreme].double().square().sum(dim=-1)
    return squares


def _bounded(squares: Tensor) -> Tensor:
    """Return squared norms of inputs; infinite where an input is larger than `LARGEST_INPUT`."""
    return squares.masked_fill(~(squares <= LARGEST_INPUT**2), math.inf)


def added_up(parts: list[Tensor]) -> Tensor:
    """Return the sum of one or more tensors of one shape."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
