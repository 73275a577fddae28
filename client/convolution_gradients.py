"""Per-example gradient norms and weighted gradient sums of convolutions; see `client.layer_gradients`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from client.layer_gradients import Call, Instantiated, Layer, Positions, Sum, added_up, ghost_pays, squared

_PATCH_VALUES = 2**17
"""Most patch values that are copied out at once, so that they stay in the processor's cache.

So many examples are a power of two, which divides the number of rows or is a multiple of what all numbers
of rows are multiples of: no example is alone where the others are in company.
"""


@dataclass(frozen=True)
class Patches:
    """A convolution with few positions and many channels, by the ghost norm of its patches."""

    layer: Layer
    inputs: Tensor
    output_gradients: Tensor

    def squared_norms(self) -> Tensor:
        """Return the ghost norms of the patches, one group of channels after the other."""
        weight = Layer(self.layer.module, self.layer.weight, None)
        groups = _of(self.layer).groups
        windows = _windows(self.layer, self.inputs)
        patches = windows.reshape(len(windows), -1, self.output_gradients[0, 0].numel()).chunk(
            groups, dim=1
        )
        gradients = self.output_gradients.flatten(2).chunk(groups, dim=1)
        squares = [
            Positions(weight, a.mT, b.mT).squared_norms() for a, b in zip(patches, gradients, strict=True)
        ]
        if self.layer.bias is not None:
            squares.append(squared(self.output_gradients.flatten(2).sum(dim=2)))
        return added_up(squares)

    def weighted_sums(self, weights: Tensor) -> list[Sum]:
        """Return the gradient of an ordinary backward pass from weighted output gradients."""
        scaled = self.output_gradients * weights.view(-1, *[1] * (self.output_gradients.dim() - 1))
        return list(_weighted_convolutions(self.layer, self.inputs, scaled))

    def held_values(self) -> int:
        """Return the size of the patches and their products."""
        positions = self.output_gradients[0, 0].numel()
        module = _of(self.layer)
        return int(positions * (module.in_channels * math.prod(module.kernel_size) + 2 * positions))


def convolution(layer: Layer, inputs: Tensor, output_gradients: Tensor) -> Call:
    """Return the rule of nn.Conv1d and nn.Conv2d, with any groups, stride, padding and dilation."""
    if layer.weight is not None:
        positions, fan_in = output_gradients[0, 0].numel(), layer.weight[0].numel()
        if ghost_pays(positions, fan_in, layer.weight.shape[0] // _of(layer).groups):
            return Patches(layer, inputs, output_gradients)
    return Instantiated(list(_example_convolutions(layer, inputs, output_gradients)))


def _example_convolutions(layer: Layer, inputs: Tensor, output_gradients: Tensor) -> Iterator[Sum]:
    """Yield each example's gradients, shape (n, *shape)."""
    if layer.weight is not None:
        n, groups, windows = len(inputs), _of(layer).groups, _windows(layer, inputs)
        outputs, fan_in = len(layer.weight) // groups, layer.weight[0].numel()
        gradients = inputs.new_empty(n * groups, outputs, fan_in)
        size = 1 << (max(1, _PATCH_VALUES // windows[0].numel()).bit_length() - 1)
        for start in range(0, n, size):
            patches = windows[start : start + size].reshape(-1, fan_in, output_gradients[0, 0].numel())
            rows = slice(start * groups, start * groups + len(patches))
            part = output_gradients[start : start + size].reshape(len(patches), outputs, -1)
            torch.bmm(part, patches.mT, out=gradients[rows])
        yield layer.weight, gradients.view(n, *layer.weight.shape)
    if layer.bias is not None:
        yield layer.bias, output_gradients.flatten(2).sum(dim=2)


def _weighted_convolutions(layer: Layer, inputs: Tensor, scaled: Tensor) -> Iterator[Sum]:
    """Yield what an ordinary backward pass gives for output gradients that have their weights in them."""
    if layer.weight is not None:
        module = _of(layer)
        _, total, _ = torch.ops.aten.convolution_backward(
            scaled, _padded(module, inputs), layer.weight, None, module.stride, [0] * len(module.stride),
            module.dilation, False, [0] * len(module.stride), module.groups, [False, True, False],
        )  # fmt: skip
        yield layer.weight, total
    if layer.bias is not None:
        yield layer.bias, scaled.flatten(2).sum(dim=(0, 2))


def _of(layer: Layer) -> nn.Conv2d:
    """Return the module; a Conv1d has the same attributes with one number instead of two."""
    return cast(nn.Conv2d, layer.module)


def _padded(module: nn.Conv2d, inputs: Tensor) -> Tensor:
    if module.padding == "valid":
        return inputs
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        before = [total // 2 for total in totals]
    else:
        before = [int(side) for side in module.padding]
        totals = [2 * side for side in before]
    sides = [(side, total - side) for side, total in zip(before, totals, strict=True)]
    flat = [number for pair in reversed(sides) for number in pair]
    return functional.pad(inputs, flat) if any(flat) else inputs


def _windows(layer: Layer, inputs: Tensor) -> Tensor:
    """Return what each output position sees: a view (n, channels, *kernel, *positions) of padded inputs."""
    module = _of(layer)
    inputs = _padded(module, inputs)
    steps = inputs.stride()[2:]
    positions = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, d, s in zip(
            inputs.shape[2:], module.kernel_size, module.dilation, module.stride, strict=True
        )
    ]
    within = [step * d for step, d in zip(steps, module.dilation, strict=True)]
    between = [step * s for step, s in zip(steps, module.stride, strict=True)]
    return inputs.as_strided(
        (*inputs.shape[:2], *module.kernel_size, *positions), (*inputs.stride()[:2], *within, *between)
    )
