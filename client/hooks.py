"""Opacus' hooks as a gradient engine: every example's gradient is made, then clipped and added up.

It treats more layers than book-keeping (recurrent ones, layers that are used twice, parameters outside
layers), at two to seven times the cost of a plain step.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn

from client.bookkeeping import Loss
from protocol.environment import root_logger_kept

with root_logger_kept():
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer
    from opacus.validators import ModuleValidator

__all__ = ["DPOptimizer", "Hooks", "ModuleValidator"]


class Hooks:
    """The engine of Opacus' GradSampleModule and its DPOptimizer's clipping.

    Attributes:
        name: Name in plans and logs.
        parameters: The trained parameters, in the model's order.
        values_per_example: Values that one example holds in memory.

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

        Raises:
            ValueError: Opacus has no gradient of each example for a parameter.
        """
        try:
            with warnings.catch_warnings():
                # no gradient flows to the examples themselves, and none is needed
                warnings.filterwarnings("ignore", "Full backward hook is firing")
                torch.autograd.backward(self._loss(self._model(x), y).sum())
            self._drop_bad_examples(len(x))
            self._clipper.max_grad_norm = max_grad_norm
            self._clipper.clip_and_accumulate()
            return [parameter.summed_grad.detach() for parameter in self._clipper.params]
        finally:
            self._clipper.zero_grad(set_to_none=True)
            self._forget()

    def plain_sums(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """Return for each trained parameter the sum of the examples' gradients, not clipped.

        It costs as much as clipping: the hooks stay in the model. Examples whose gradient is not finite
        count as zero.
        """
        return self.clipped_sums(x, y, math.inf)

    def _drop_bad_examples(self, n: int) -> None:
        samples = self._clipper.grad_samples
        if any(len(gradient) != n for gradient in samples):
            raise ValueError("a parameter has no gradient of each example")
        norms = torch.stack([gradient.flatten(start_dim=1).norm(dim=1) for gradient in samples])
        bad = ~torch.isfinite(norms.norm(dim=0))
        if bool(bad.any()):
            for gradient in samples:
                gradient[bad] = 0.0

    def _forget(self) -> None:
        """Drop what the hooks keep of a forward pass that never reached its backward pass."""
        for module in self._model.modules():
            for name in ("activations", "max_batch_len"):
                if hasattr(module, name):
                    delattr(module, name)
        for parameter in self._clipper.params:
            parameter._forward_counter = 0
