"""The networks that an image task can train; their first weights follow from the plan alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from protocol.errors import PlanInvalid
from protocol.sections import ModelSection

_KERNELS = (8, 4)
_CHANNELS = (16, 32)
_STRIDE = 2
_PADDING = 2
_POOL = 2
_HIDDEN = 32

LARGEST_MODEL = 2**27
"""Most parameters of a network. A plan comes from a coordinator: it must not be able to ask an owner's
machine for more memory than it has."""


def build_network(model: ModelSection, input_shape: Sequence[int], classes: int) -> nn.Module:
    """Return round 0's network; the global random state is neither used nor changed.

    `linear` and `scattering` are one layer of zeros. `mlp` is a stack of Linear and Tanh. `cnn` has two
    convolutions and two linear layers with Tanh between them (Papernot et al. 2021, 'Tempered Sigmoid
    Activations for Deep Learning with Differential Privacy'), 26,010 parameters for 28 x 28 pixels and
    ten classes. Weights and biases that are not zero are uniform in +-1/sqrt(fan_in), drawn from
    `model.initial_seed`.

    Args:
        model: Name, widths and seed.
        input_shape: Shape of one input of this model.
        classes: Number of outputs.

    Raises:
        PlanInvalid: The hidden widths do not fit the name, the images are too small, or the network has
            more than `LARGEST_MODEL` parameters.
    """
    if (model.name == "mlp") != bool(model.hidden):
        raise PlanInvalid("model.hidden: `mlp` needs at least one width, the other models take none")
    generator = torch.Generator().manual_seed(model.initial_seed)
    if model.name == "cnn":
        return _convolutional(input_shape, classes, generator)
    zero = model.name in ("linear", "scattering")
    layers: list[nn.Module] = []
    sizes = list(pairwise([math.prod(input_shape), *model.hidden, classes]))
    _require_size(sum(fan_in * fan_out + fan_out for fan_in, fan_out in sizes))
    for fan_in, fan_out in sizes:
        if layers:
            layers.append(nn.Tanh())
        bound = 0.0 if zero else 1 / math.sqrt(fan_in)
        layers.append(_filled(nn.Linear(fan_in, fan_out, device="meta"), bound, generator))
    return nn.Sequential(*layers)


def _convolutional(shape: Sequence[int], classes: int, generator: torch.Generator) -> nn.Module:
    channels, sides = shape[0], list(shape[1:])
    layers: list[nn.Module] = []
    for kernel, outputs, padding in zip(_KERNELS, _CHANNELS, (_PADDING, 0), strict=True):
        convolution = nn.Conv2d(channels, outputs, kernel, _STRIDE, padding, device="meta")
        layers += [_filled(convolution, 1 / math.sqrt(channels * kernel**2), generator), nn.Tanh()]
        layers.append(nn.MaxPool2d(_POOL, stride=1))
        sides = [(side + 2 * padding - kernel) // _STRIDE + 2 - _POOL for side in sides]
        channels = outputs
    if min(sides) < 1:
        raise PlanInvalid("task.input_shape: `cnn` needs at least 16 x 16 pixels")
    width = channels * math.prod(sides)
    _require_size(shape[0] * _CHANNELS[0] * _KERNELS[0] ** 2 + width * _HIDDEN + _HIDDEN * classes)
    layers += [
        nn.Flatten(),
        _filled(nn.Linear(width, _HIDDEN, device="meta"), 1 / math.sqrt(width), generator),
        nn.Tanh(),
        _filled(nn.Linear(_HIDDEN, classes, device="meta"), 1 / math.sqrt(_HIDDEN), generator),
    ]
    return nn.Sequential(*layers)


def _require_size(parameters: int) -> None:
    if parameters > LARGEST_MODEL:
        raise PlanInvalid(f"the model has more than {LARGEST_MODEL} parameters")


def _filled(layer: nn.Module, bound: float, generator: torch.Generator) -> nn.Module:
    # Made without storage first, because the usual constructor draws from the global generator.
    layer = layer.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    return layer
