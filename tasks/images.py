"""Image classification with small dense networks: reader, model, loss and metric.

Every step from a raw row to the model is a function of that row alone. A statistic of the whole
dataset (a mean image, a maximum) would let one record change the others' features, and then clipping
one record's gradient would not bound that record's influence.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from protocol.encoding import digest
from protocol.errors import DataInvalid, ModelMismatch, PlanInvalid
from protocol.plan import Plan, TaskSection

PREPROCESSING = (
    "Scale the raw values linearly from raw_range to [-0.5, 0.5], flatten the example in row-major "
    "order, and divide it by its L2 norm; an example of norm zero stays zero."
)


@dataclass(frozen=True)
class Examples:
    """Preprocessed rows with their labels.

    Attributes:
        x: float32, shape (n, d), each row of L2 norm 1 or 0.
        y: int64, shape (n,), in [0, classes).
    """

    x: NDArray[np.float32]
    y: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class ImageClassification:
    """The task `image-classification` for data of one description.

    Attributes:
        description: Public shape, range and classes of the data.
    """

    description: TaskSection

    def read(self, path: Path) -> Examples:
        """Load and check an `.npz` file with the arrays `x` and `y`.

        Args:
            path: File with `x` (n, *input_shape), float32 or uint8, and `y` (n,), integer.

        Raises:
            DataInvalid: The file does not fit the task; the message has neither path nor values.
        """
        return self.check(*_load(path))

    def read_private(self, path: Path) -> Examples:
        """Load an owner's file; rows that do not fit the description are left out, one by one.

        A coordinator chooses the description. If a row outside it were an error, the coordinator could
        search for the largest value or label of an owner by sending one description after the other.
        Leaving a row out depends on that row alone, which the privacy guarantee covers.

        Raises:
            DataInvalid: The arrays' shapes or types do not fit; no value has any part in that.
        """
        x, y = _load(path)
        self._check_form(x, y)
        low, high = self.description.value_range
        fits = np.all((x >= low) & (x <= high), axis=tuple(range(1, x.ndim)))
        fits &= (y >= 0) & (y < self.description.classes)
        return Examples(preprocess(x[fits], low, high), y[fits].astype(np.int64))

    def check(self, x: NDArray[Any], y: NDArray[Any]) -> Examples:
        """Check raw arrays against the description and preprocess them; no rows at all are allowed.

        Raises:
            DataInvalid: Shape, dtype, range, finiteness or labels are not as described.
        """
        self._check_form(x, y)
        low, high = self.description.value_range
        if not bool(np.all((x >= low) & (x <= high))):
            raise DataInvalid("x has values that are not finite or outside task.value_range")
        if not bool(np.all((y >= 0) & (y < self.description.classes))):
            raise DataInvalid("y has labels outside 0 .. task.classes - 1")
        return Examples(preprocess(x, low, high), y.astype(np.int64))

    def _check_form(self, x: NDArray[Any], y: NDArray[Any]) -> None:
        task = self.description
        if x.dtype not in (np.float32, np.uint8):
            raise DataInvalid("x must be float32 or uint8")
        if x.shape[1:] != tuple(task.input_shape) or x.ndim != len(task.input_shape) + 1:
            raise DataInvalid("x does not have the shape (n, *task.input_shape)")
        if y.dtype.kind not in "iu" or y.shape != (len(x),):
            raise DataInvalid("y must hold one integer for each row of x")

    def build_model(self, plan: Plan) -> nn.Module:
        """Return round 0's model: the same weights everywhere, drawn from `model.initial_seed` alone.

        `linear` is one layer of zeros. `mlp` is a stack of Linear and Tanh whose weights and biases
        are uniform in +-1/sqrt(fan_in). The global random state is neither used nor changed.

        Raises:
            PlanInvalid: The model's name or its hidden widths are not usable.
        """
        model, task = plan.model, self.description
        if model.name not in ("linear", "mlp"):
            raise PlanInvalid("model.name: this task knows `linear` and `mlp`")
        if (model.name == "mlp") != bool(model.hidden):
            raise PlanInvalid("model.hidden: `mlp` needs at least one width and `linear` takes none")
        widths = [math.prod(task.input_shape), *model.hidden, task.classes]
        generator = torch.Generator().manual_seed(model.initial_seed)
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            if layers:
                layers.append(nn.Tanh())
            bound = 0.0 if model.name == "linear" else 1 / math.sqrt(fan_in)
            layers.append(_linear(fan_in, fan_out, bound, generator))
        return nn.Sequential(*layers)

    def initial_weights(self, plan: Plan) -> NDArray[np.float64]:
        """Return round 0's model as the flat vector that travels between rounds, shape (n_params,)."""
        return flatten(self.build_model(plan)).astype(np.float64)

    def loss(self, logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the cross entropy of each example.

        Args:
            logits: float32, shape (n, classes).
            y: int64, shape (n,).

        Returns:
            float32, shape (n,): one loss for each example, never mixed with another's.
        """
        return nn.functional.cross_entropy(logits, y, reduction="none")

    def evaluate(self, model: nn.Module, examples: Examples) -> float:
        """Return the accuracy on public examples, in [0, 1].

        An accuracy on private examples is a release of its own, which nothing here accounts for.

        Raises:
            DataInvalid: There are no examples.
        """
        if len(examples) == 0:
            raise DataInvalid("an accuracy needs at least one example")
        with torch.no_grad():
            predicted = model(torch.from_numpy(examples.x)).argmax(dim=1).numpy()
        return float(np.mean(predicted == examples.y))

    def input_schema(self, plan: Plan) -> dict[str, Any]:
        """Return what the deployed model takes: a preprocessed row, and how to make it from a raw one."""
        task = plan.task
        return {
            "name": "input",
            "shape": [math.prod(task.input_shape)],
            "dtype": "float32",
            "range": [-1.0, 1.0],
            "raw_shape": list(task.input_shape),
            "raw_range": list(task.value_range),
            "preprocessing": PREPROCESSING,
        }


def preprocess(x: NDArray[Any], low: float, high: float) -> NDArray[np.float32]:
    """Turn raw rows into model rows, each by itself: scale, flatten, divide by the L2 norm.

    Args:
        x: Raw values, shape (n, ...), within [low, high].
        low: Smallest declared value.
        high: Largest declared value, > low.

    Returns:
        float32, shape (n, d), rows of norm 1; rows of norm zero stay zero.
    """
    width = math.prod(x.shape[1:])
    rows = ((x.astype(np.float64) - low) / (high - low) - 0.5).reshape(len(x), width)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.where(norms > 0, norms, 1.0)).astype(np.float32)


def flatten(model: nn.Module) -> NDArray[np.float32]:
    """Return all parameters as one float32 vector, in the order of `named_parameters`."""
    parts = [parameter.detach().reshape(-1).numpy() for parameter in model.parameters()]
    return np.concatenate(parts).astype(np.float32)


def unflatten(model: nn.Module, vector: NDArray[np.floating[Any]]) -> None:
    """Copy a vector of all parameters into the model, as float32; the inverse of `flatten`.

    Args:
        model: Changed in place.
        vector: float32 or float64, shape (n_params,).

    Raises:
        ModelMismatch: The vector has another number of values than the model has parameters.
    """
    count = sum(parameter.numel() for parameter in model.parameters())
    if vector.shape != (count,):
        raise ModelMismatch(f"the model has {count} parameters, the vector has the shape {vector.shape}")
    values = torch.from_numpy(vector.astype(np.float32))
    start = 0
    with torch.no_grad():
        for parameter in model.parameters():
            end = start + parameter.numel()
            parameter.copy_(values[start:end].view_as(parameter))
            start = end


def layout_hash(model: nn.Module) -> str:
    """Return the SHA-256 of the ordered parameter names and shapes: what a flat vector's values mean."""
    named: Iterable[tuple[str, nn.Parameter]] = model.named_parameters()
    return digest([[name, list(parameter.shape)] for name, parameter in named])


def _load(path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    try:
        # Opened here, because numpy leaves a file that it opened itself open after an error.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return archive["x"], archive["y"]
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
        # The cause may quote the path or the content, so that it is not chained.
        raise DataInvalid("the file is not an .npz file with the arrays x and y") from None


def _linear(fan_in: int, fan_out: int, bound: float, generator: torch.Generator) -> nn.Linear:
    # Made without storage first, because the usual constructor draws from the global generator.
    layer = nn.Linear(fan_in, fan_out, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    return layer
