"""Opacus' hooks as a gradient engine: every example's gradient is made by them, then clipped and added up.

It treats more layers than book-keeping (recurrent ones, layers that are used twice, parameters outside
layers), at two to seven times the cost of a plain step.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn

from client.bookkeeping import Loss, clip_factors
from client.layer_gradients import added_up, squared
from client.padding import ROWS, padded
from protocol.environment import root_logger_kept

with root_logger_kept():
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer
    from opacus.validators import ModuleValidator

__all__ = ["DPOptimizer", "Hooks", "ModuleValidator"]


class Hooks:
    """The engine of Opacus' GradSampleModule.

    Attributes:
        name: Name in plans and logs.
        parameters: The trained parameters, in the model's order.
        values_per_example: Values that one example holds in memory.
        rows: Number of rows that a batch is filled up to a multiple of.

    Args:
        model: Gets Opacus' hooks; must be in training mode, its forward pass takes the examples as first
            dimension.
        loss: One loss for each example.
    """

    name = "hooks"

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        self._model, self._loss = GradSampleModule(model, loss_reduction="sum"), loss
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.values_per_example = sum(parameter.numel() for parameter in self.parameters)
        self.rows = ROWS
        self._clipper = DPOptimizer(
            torch.optim.SGD(self.parameters, lr=0.0),
            noise_multiplier=0.0,
            max_grad_norm=0.0,
            expected_batch_size=None,
            loss_reduction="sum",
        )

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
            ValueError: Opacus has no gradient of each example for a parameter.
        """
        try:
            with warnings.catch_warnings():
                # no gradient flows to the examples themselves, and none is needed
                warnings.filterwarnings("ignore", "Full backward hook is firing")
                filled = padded(x, y, self.rows)
                torch.autograd.backward(self._loss(self._model(filled[0]), filled[1]).sum())
            return self._clipped(len(filled[0]), len(x), max_grad_norm)
        finally:
            self._clipper.zero_grad(set_to_none=True)
            self._forget()

    def plain_sums(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """Return for each trained parameter the sum of the examples' gradients, not clipped.

        It costs as much as clipping: the hooks stay in the model. Examples whose gradient is not finite
        count as zero.
        """
        return self.clipped_sums(x, y, math.inf)

    def _clipped(self, rows: int, n: int, max_grad_norm: float) -> list[Tensor]:
        """Return the sums of the first n examples' clipped gradients.

        The norms are not Opacus' own, which are added up in float32 and then too small for long gradients.
        """
        samples = self._clipper.grad_samples
        if any(len(gradient) != rows for gradient in samples):
            raise ValueError("a parameter has no gradient of each example")
        norms = added_up([squared(gradient.flatten(start_dim=1)) for gradient in samples]).sqrt()
        factors = clip_factors(norms, max_grad_norm)
        factors[n:] = 0.0
        if bool((factors == 0.0).any()):
            # zero times infinity is not zero
            for gradient in samples:
                gradient[factors == 0.0] = 0.0
        return [
            torch.einsum("i,i...", factors.to(gradient.dtype), gradient).detach() for gradient in samples
        ]

    def _forget(self) -> None:
        """Drop what the hooks keep of a forward pass that never reached its backward pass."""
        for module in self._model.modules():
            for name in ("activations", "max_batch_len"):
                if hasattr(module, name):
                    delattr(module, name)
        for parameter in self._clipper.params:
            parameter._forward_counter = 0
