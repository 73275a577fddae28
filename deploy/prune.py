"""Structured pruning of a finished model, and its rebuilding without any training data.

Whole hidden units with the smallest weights are removed (Li et al. 2017, 'Pruning Filters for Efficient
ConvNets'); the layers that read them are then refitted in closed form so that the smaller model repeats
the larger one's outputs on synthetic inputs. Both use the trained weights and public constants only, so
they are post-processing of a differentially private model and cost no epsilon.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
import torch_pruning as tp
from torch import nn

from deploy.measure import Floats, Labels
from protocol.errors import CompressionRefused, ModelNotFinite

Accuracy = Callable[[nn.Module, Floats, Labels], float]
"""Share of correct answers of a model on inputs and labels."""

STEPS_DOWN = (1.0, 0.75, 0.5, 0.25, 0.0)
"""Fractions of the requested ratio that `prune_within` tries, largest first."""

RIDGE = 0.01
"""Weight of staying near the old weights, relative to the mean square of the layer's inputs.

Synthetic inputs excite directions that real ones do not, and the other way round; without the ridge the
fit spends large weights on directions that it hardly sees. On digits 1e-3 to 3e-2 served equally well.
"""


@dataclass(frozen=True)
class Pruned:
    """A smaller model and how much smaller it really is.

    Attributes:
        model: The new model, in evaluation mode.
        requested_ratio: Share of each layer's hidden units that was to go.
        reached_parameter_ratio: Share of all parameters that went; 0 when nothing could be pruned.
        kept: For each layer with fewer outputs, which of the original outputs remain, ascending.
    """

    model: nn.Module
    requested_ratio: float
    reached_parameter_ratio: float
    kept: dict[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class PruneTry:
    """One ratio that was tried: accuracies on the public data right after pruning and as kept."""

    requested_ratio: float
    reached_parameter_ratio: float
    accuracy_pruned: float
    accuracy_rebuilt: float | None
    accepted: bool


@dataclass(frozen=True)
class PruneOutcome:
    """The accepted model, the accuracy of the original, and every try in order."""

    pruned: Pruned
    accuracy_before: float
    tries: tuple[PruneTry, ...]

    @property
    def ratio_used(self) -> float:
        """Share of hidden units that the accepted model gave up; 0 when there were none to remove."""
        return self.pruned.requested_ratio if self.pruned.reached_parameter_ratio > 0 else 0.0


def prune(model: nn.Module, example_input: torch.Tensor, ratio: float) -> Pruned:
    """Remove the hidden units with the smallest weights; the output layer keeps all its units.

    Args:
        model: Trained model; it is not changed.
        example_input: A batch of any content, for tracing the graph.
        ratio: Share of every hidden layer's units to remove, from 0 to below 1.

    Raises:
        CompressionRefused: The ratio is out of range, or a weight is not finite.
    """
    if not 0 <= ratio < 1:
        raise CompressionRefused("the pruning ratio must be at least 0 and below 1")
    require_finite(model)
    smaller = copy.deepcopy(model).eval()
    layers = _layers_in_order(smaller, example_input)
    if ratio == 0 or len(layers) < 2:
        return Pruned(smaller, ratio, 0.0)
    names = {layer: name for name, layer in smaller.named_modules()}
    pruner = tp.pruner.BasePruner(
        smaller,
        example_input,
        importance=tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=[layers[-1]],
    )
    kept: dict[str, tuple[int, ...]] = {}
    for group in pruner.step(interactive=True):
        for dependency, removed in group:
            layer = dependency.target.module
            if layer in names and pruner.DG.is_out_channel_pruning_fn(dependency.handler):
                kept[names[layer]] = _others(_outputs(layer), removed)
        group.prune()
    return Pruned(smaller, ratio, 1 - count_parameters(smaller) / count_parameters(model), kept)


def rebuild(pruned: Pruned, original: nn.Module, synthetic: Floats) -> Pruned:
    """Refit every linear layer that lost inputs so that it repeats the original's outputs.

    Layers are refitted in the order of the forward pass by least squares with a ridge towards the present
    weights. Neither labels nor private data are used: the targets are the original model's own outputs.

    Args:
        pruned: Result of `prune` for `original`; it is not changed.
        original: The unpruned model.
        synthetic: Inputs drawn from the declared input range and preprocessed, float32 (n, ...).

    Raises:
        CompressionRefused: No synthetic inputs, or values that are not finite.
    """
    if len(synthetic) == 0 or not np.isfinite(synthetic).all():
        raise CompressionRefused("rebuilding needs finite synthetic inputs")
    model, x = copy.deepcopy(pruned.model), torch.from_numpy(synthetic)
    targets = {name: output for name, (_, output) in _linear_traffic(original, x).items()}
    before = {name: layer.in_features for name, layer in _linear_layers(original).items()}
    for name, layer in _linear_layers(model).items():
        if layer.in_features == before[name]:
            continue
        inputs, _ = _linear_traffic(model, x)[name]
        target = targets[name]
        _refit(layer, inputs, target[:, pruned.kept[name]] if name in pruned.kept else target)
    require_finite(model)
    return replace(pruned, model=model)


def prune_within(
    model: nn.Module,
    example_input: torch.Tensor,
    public: tuple[Floats, Labels],
    ratio: float,
    max_drop: float,
    accuracy_fn: Accuracy,
    synthetic: Floats | None = None,
) -> PruneOutcome:
    """Prune as much as the accuracy on public data allows, up to `ratio`.

    The requested ratio is tried first, then three quarters, half, a quarter and none of it. With
    `synthetic` given, each pruned model is rebuilt; the rebuilt one is kept unless it is less accurate.

    Args:
        model: Trained model; it is not changed.
        example_input: A batch for tracing the graph.
        public: Public inputs, float32 (n, ...), and labels, int64 (n,); used for this decision alone.
        ratio: Largest share of hidden units to remove.
        max_drop: Largest accepted loss of accuracy, as a share from 0 to 1.
        accuracy_fn: How accuracy is measured.
        synthetic: Inputs for `rebuild`, or None to prune without rebuilding.

    Returns:
        The first model within `max_drop`. Ratio 0 always is, as it leaves the model as it was.
    """
    before, tries = accuracy_fn(model, *public), []
    for fraction in STEPS_DOWN:
        candidate = prune(model, example_input, ratio * fraction)
        plain = best = accuracy_fn(candidate.model, *public)
        rebuilt_accuracy = None
        if synthetic is not None and candidate.reached_parameter_ratio > 0:
            rebuilt = rebuild(candidate, model, synthetic)
            rebuilt_accuracy = accuracy_fn(rebuilt.model, *public)
            if rebuilt_accuracy >= plain:
                candidate, best = rebuilt, rebuilt_accuracy
        accepted = within(before, best, max_drop)
        tries.append(
            PruneTry(
                candidate.requested_ratio,
                candidate.reached_parameter_ratio,
                plain,
                rebuilt_accuracy,
                accepted,
            )
        )
        if accepted:
            return PruneOutcome(candidate, before, tuple(tries))
    raise CompressionRefused("the unpruned model does not repeat its own accuracy")


def within(before: float, after: float, max_drop: float) -> bool:
    """Tell whether accuracy fell by at most `max_drop`; rounding of the difference does not count."""
    return before - after <= max_drop + 1e-9


def require_finite(model: nn.Module) -> None:
    """Refuse a model with a weight that is NaN or infinite.

    Raises:
        ModelNotFinite: Says so, without naming the value.
    """
    if not all(bool(torch.isfinite(value).all()) for value in model.state_dict().values()):
        raise ModelNotFinite("its weights")


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def _outputs(layer: nn.Module) -> int:
    weight = layer.weight
    if not isinstance(weight, torch.Tensor):
        raise CompressionRefused("a pruned layer has no weight")
    return weight.shape[0]


def _others(count: int, removed: list[int]) -> tuple[int, ...]:
    return tuple(sorted(set(range(count)) - set(removed)))


def _layers_in_order(model: nn.Module, example_input: torch.Tensor) -> list[nn.Module]:
    """Return linear and convolution layers as the forward pass reaches them; the last one is the output."""
    order: list[nn.Module] = []

    def note(layer: nn.Module, _inputs: object, _output: object) -> None:
        order.append(layer)

    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)]
    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        with torch.no_grad():
            model(example_input)
    finally:
        for handle in handles:
            handle.remove()
    return order


def _linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}


def _linear_traffic(model: nn.Module, x: torch.Tensor) -> dict[str, tuple[_Matrix, _Matrix]]:
    """Return inputs and outputs of every linear layer, as float64 (rows, features), in forward order."""
    seen: dict[str, tuple[_Matrix, _Matrix]] = {}
    handles = []
    for name, layer in _linear_layers(model).items():

        def note(
            _layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor, key: str = name
        ) -> None:
            seen[key] = (_rows(inputs[0]), _rows(output))

        handles.append(layer.register_forward_hook(note))
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return seen


_Matrix = npt.NDArray[np.float64]


def _rows(tensor: torch.Tensor) -> _Matrix:
    return tensor.reshape(-1, tensor.shape[-1]).double().numpy()


def _refit(layer: nn.Linear, inputs: _Matrix, target: _Matrix) -> None:
    """Solve min |A(W + D) - T|^2 + r |D|^2 for D, where A carries a column of ones for the bias."""
    columns = [inputs] if layer.bias is None else [inputs, np.ones((len(inputs), 1))]
    a = np.hstack(columns)
    w = layer.weight.detach().double().numpy().T
    if layer.bias is not None:
        w = np.vstack([w, layer.bias.detach().double().numpy()])
    ridge = np.sqrt(RIDGE * len(a) * np.mean(a**2)) * np.eye(a.shape[1])
    residual = np.vstack([target - a @ w, np.zeros_like(w)])
    change, *_ = np.linalg.lstsq(np.vstack([a, ridge]), residual, rcond=None)
    w = w + change
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(w[: layer.in_features].T))
        if layer.bias is not None:
            layer.bias.copy_(torch.from_numpy(w[-1]))
