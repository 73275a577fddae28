"""Book-keeping: clipped gradient sums from one forward pass and one backward pass (Bu et al. 2023).

Only the gradients with respect to the layers' outputs are computed by autograd. Each layer's rule then
gives the examples' gradient norms, and, once the norms of all layers are known, one weighted product:
the sum of the clipped gradients. No example's gradient is kept for a whole model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from client.convolution_gradients import convolution
from client.layer_gradients import Call, Layer, Rule, embedding, group_norm, layer_norm, linear
from client.padding import ROWS, padded

RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: linear,
    nn.Conv1d: convolution,
    nn.Conv2d: convolution,
    nn.Embedding: embedding,
    nn.LayerNorm: layer_norm,
    nn.GroupNorm: group_norm,
}
"""The layers that book-keeping treats; a subclass counts as its base while it keeps the base's forward."""

LARGEST_NORM = 1e30
"""Of a larger gradient, the factor that brings it to the clipping norm has lost digits of float32; such an
example counts as one whose gradient is not finite."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""Gives from the model's output and the targets one loss for each example, shape (n,)."""


class Untreatable(Exception):
    """An engine cannot give the per-example gradients of this model; the text names the layer."""


def clip_factors(norms: Tensor, max_grad_norm: float) -> Tensor:
    """Return for each example the factor, at most 1, that brings its gradient norm to `max_grad_norm`.

    The small constant is Opacus' own. Norms that are not usable give a factor of zero.

    Args:
        norms: Gradient norms, shape (n,).
        max_grad_norm: L2 bound; infinity for none.
    """
    factors = (max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
    return torch.where(_usable(norms), factors, torch.zeros_like(factors))


def _usable(norms: Tensor) -> Tensor:
    """Say which norms are finite and not so large that rounding spoils what is clipped by them."""
    return norms <= LARGEST_NORM


class BookKeeping:
    """The book-keeping engine for a model of supported layers.

    Attributes:
        name: Name in plans and logs.
        parameters: The trained parameters, in the model's order.
        values_per_example: Values that one example holds in memory; known after the first batch.
        rows: Number of rows that a clipped batch is filled up to a multiple of.

    Args:
        model: Trained in place by the caller; its forward pass takes the examples as first dimension.
        loss: One loss for each example.

    Raises:
        Untreatable: A layer with trained parameters has no rule.
    """

    name = "book-keeping"

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        self._model, self._loss = model, loss
        self._layers = list(_trained_layers(model))
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.values_per_example = sum(parameter.numel() for parameter in self.parameters)
        self.rows = ROWS

    def clipped_sums(self, x: Tensor, y: Tensor, max_grad_norm: float) -> list[Tensor]:
        """Return for each trained parameter the sum of the examples' clipped gradients.

        Args:
            x: Examples, shape (n, ...), n >= 1.
            y: Targets, shape (n, ...).
            max_grad_norm: L2 bound of one example over all parameters; infinity for none.

        Returns:
            Tensors of the parameters' shapes. An example whose gradient is not finite counts as zero.

        Guarantee: if n is at most `rows`, what an example adds does not depend on the others, up to the
        rounding of the sum.

        Raises:
            Untreatable: A layer that is not linear is used twice, a layer is not used at all, or an input
                is overwritten after its use.
        """
        while True:
            calls = self._calls(*padded(x, y, self.rows))
            norms = torch.stack([call.squared_norms() for call in calls]).sum(dim=0).sqrt()
            usable = _usable(norms[: len(x)])
            if bool(usable.all()):
                factors = clip_factors(norms, max_grad_norm)
                factors[len(x) :] = 0.0
                return self._sums(calls, factors.to(self.parameters[0].dtype))
            # Zero times infinity is not zero: the others are computed again, without the bad examples.
            x, y = x[usable], y[usable]
            if len(x) == 0:
                return [torch.zeros_like(parameter) for parameter in self.parameters]

    def plain_sums(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """Return for each trained parameter the sum of the examples' gradients, not clipped.

        It costs an ordinary backward pass. Only if the sum is not finite, the examples whose gradient is
        not finite are found, and count as zero.
        """
        sums = torch.autograd.grad(self._loss(self._model(x), y).sum(), self.parameters)
        if all(bool(torch.isfinite(total.sum())) for total in sums):
            return list(sums)
        return self.clipped_sums(x, y, math.inf)

    def _sums(self, calls: Sequence[Call], weights: Tensor) -> list[Tensor]:
        sums = dict(pair for call in calls for pair in call.weighted_sums(weights))
        return [sums[parameter].detach() for parameter in self.parameters]

    def _calls(self, x: Tensor, y: Tensor) -> list[Call]:
        """Run the two passes and return each layer's rule on what it saw."""
        taps = [_Tap() for _ in self._layers]
        anchor = torch.zeros((), requires_grad=True)
        with _frozen(self.parameters), _tapped(self._layers, taps, anchor):
            losses = self._loss(self._model(x), y)
            torch.autograd.grad(losses.sum(), [anchor], allow_unused=True)
        calls = []
        held = 0
        for layer, tap in zip(self._layers, taps, strict=True):
            inputs, gradient = tap.result(len(x), layer)
            calls.append(_rule_of(layer.module)(layer, inputs, gradient))
            held += (inputs.numel() + gradient.numel()) // len(x) + calls[-1].held_values()
        self.values_per_example = held
        return calls


@dataclass
class _Tap:
    """What one layer took in and the gradients at its outputs, call by call."""

    inputs: list[Tensor] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    gradients: dict[int, Tensor] = field(default_factory=dict)

    def result(self, n: int, layer: Layer) -> tuple[Tensor, Tensor]:
        """Return inputs and output gradients, (n, ...) each; the calls of a repeated one as positions."""
        if not self.gradients:
            raise Untreatable("a layer takes no part in the loss")
        # a call whose output is not used has no gradient and adds nothing
        pairs = [(self.inputs[call], gradient) for call, gradient in sorted(self.gradients.items())]
        if any(self.inputs[call]._version != self.versions[call] for call in self.gradients):
            raise Untreatable("a layer's input is overwritten after its use")
        if any(len(part) != n for pair in pairs for part in pair):
            raise Untreatable("a layer's first dimension is not the examples")
        if len(self.inputs) == 1:
            return pairs[0]
        if _rule_of(layer.module) is not linear:
            raise Untreatable(f"{type(layer.module).__name__} is used more than once")
        inputs, gradients = zip(*pairs, strict=True)
        return _side_by_side(inputs), _side_by_side(gradients)


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.reshape(len(part), -1, part.shape[-1]) for part in parts], dim=1)


class _Record(torch.autograd.Function):
    """Identity whose backward pass notes the gradient; the anchor makes autograd come by.

    It returns an alias instead of a view, so that an activation may overwrite it in place; no supported
    layer needs its own output for its backward pass.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, _anchor: Tensor, tap: _Tap, call: int) -> Tensor:
        ctx.tap, ctx.call = tap, call
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.tap.gradients[ctx.call] = gradients[0]
        return gradients[0], None, None, None


@contextmanager
def _tapped(layers: Sequence[Layer], taps: Sequence[_Tap], anchor: Tensor) -> Iterator[None]:
    record: Callable[..., Tensor] = _Record.apply

    def hook_of(tap: _Tap) -> Callable[..., Tensor]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            tap.inputs.append(inputs[0].detach())
            tap.versions.append(inputs[0]._version)
            return record(output, anchor, tap, len(tap.inputs) - 1)

        return hook

    handles = [
        layer.module.register_forward_hook(hook_of(tap)) for layer, tap in zip(layers, taps, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Keep autograd from computing parameter gradients."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _rule_of(module: nn.Module) -> Rule:
    for kind, rule in RULES.items():
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return rule
    raise Untreatable(f"{type(module).__name__} has no rule")


def _trained_layers(model: nn.Module) -> Iterator[Layer]:
    for module in model.modules():
        # Opacus' recurrent layers show their cells' parameters as their own too
        inner = {id(parameter) for child in module.children() for parameter in child.parameters()}
        own = {
            name: parameter
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.requires_grad and id(parameter) not in inner
        }
        if not own:
            continue
        _rule_of(module)
        if isinstance(module, nn.Conv1d | nn.Conv2d) and module.padding_mode != "zeros":
            raise Untreatable(f"{type(module).__name__} with padding_mode {module.padding_mode}")
        if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq):
            raise Untreatable("Embedding with max_norm or scale_grad_by_freq")
        yield Layer(module, own.pop("weight", None), own.pop("bias", None))
        if own:
            raise Untreatable(f"{type(module).__name__} has more than weight and bias")
