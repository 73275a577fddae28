"""Image classification: reader, models, loss and metric."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from protocol.encoding import digest
from protocol.errors import DataInvalid, ModelMismatch
from protocol.plan import Plan
from protocol.sections import TaskSection
from tasks.arrays import plain, read_arrays, read_forms
from tasks.inputs import InputForm, input_form
from tasks.networks import build_network
from tasks.rows import FittingRows, fitting_rows

_EVALUATION_ROWS = 1024


RowFilter = Callable[[NDArray[Any], NDArray[Any]], NDArray[np.bool_]]
"""Chooses among raw rows (n, ...) and labels (n,): bool (n,), decided for each row by itself."""


@dataclass(frozen=True)
class Examples:
    """Preprocessed rows with their labels.

    Attributes:
        x: float32, shape (n, ...): rows as the task's model takes them, see `tasks.inputs`.
        y: int64, shape (n,), in [0, classes).
    """

    x: NDArray[np.float32]
    y: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class ImageClassification:
    """The task `image-classification` for data of one description and one model.

    Attributes:
        description: Public shape, range and classes of the data.
        model: Name of the model, which decides how rows are preprocessed.
    """

    description: TaskSection
    model: str = "linear"

    @property
    def form(self) -> InputForm:
        """What the model takes.

        Raises:
            PlanInvalid: There is no such model, or it does not take examples of this shape.
        """
        return input_form(self.model, self.description)

    def read(self, path: Path) -> Examples:
        """Load and check an `.npz` file with the arrays `x` and `y`.

        Args:
            path: File with `x` (n, *input_shape), float32 or uint8, and `y` (n,) or (n, 1), integer.

        Raises:
            DataUnavailable: The file cannot be opened.
            DataInvalid: The file does not fit the task; the message has neither path nor values.
        """
        return self.check(*read_arrays(path))

    def require_form(self, path: Path) -> None:
        """Check a file by the headers of its arrays alone; no value is read.

        Raises:
            DataUnavailable: The file cannot be opened.
            DataInvalid: Its arrays have other shapes or types than `read` takes.
        """
        self._require_shape(read_forms(path)[0].shape)

    def read_private(self, path: Path, among: RowFilter | None = None) -> Examples:
        """Load an owner's file; rows that do not fit the description are left out, one by one.

        A coordinator chooses the description. If a row outside it were an error, the coordinator could
        search for the largest value or label of an owner by sending one description after the other.
        Leaving a row out depends on that row alone, which the privacy guarantee covers.

        Args:
            path: As in `read`.
            among: Chooses among the rows that fit, each by itself; all of them if left out.

        Raises:
            DataUnavailable: The file cannot be opened.
            DataInvalid: The arrays' shapes or types do not fit; no value has any part in that.
        """
        return self.prepare(self.fitting(path), among)

    def fitting(self, path: Path) -> FittingRows:
        """Load the raw rows that `read_private` uses, with the counts of all; errors as there."""
        x, y = read_arrays(path)
        self._require_shape(x.shape)
        return fitting_rows(x, y, self.description)

    def prepare(self, rows: FittingRows, among: RowFilter | None = None) -> Examples:
        """Preprocess rows that fit, or those of them that `among` chooses."""
        x, y = rows.x, rows.y
        if among is not None:
            chosen = among(x, y)
            x, y = x[chosen], y[chosen]
        return Examples(self.form.prepare(x), y)

    def check(self, x: NDArray[Any], y: NDArray[Any]) -> Examples:
        """Check raw arrays against the description and preprocess them; no rows at all are allowed.

        Raises:
            DataInvalid: Shape, dtype, range, finiteness or labels are not as described.
        """
        x, y = plain(x, y)
        self._require_shape(x.shape)
        low, high = self.description.value_range
        if not bool(np.all((x >= low) & (x <= high))):
            raise DataInvalid("x has values that are not finite or outside task.value_range")
        if not bool(np.all((y >= 0) & (y < self.description.classes))):
            raise DataInvalid("y has labels outside 0 .. task.classes - 1")
        return Examples(self.form.prepare(x), y.astype(np.int64))

    def _require_shape(self, shape: tuple[int, ...]) -> None:
        if shape[1:] != tuple(self.description.input_shape):
            raise DataInvalid("x does not have the shape (n, *task.input_shape)")

    def build_model(self, plan: Plan) -> nn.Module:
        """Return round 0's model: the same weights everywhere, drawn from `model.initial_seed` alone.

        Raises:
            PlanInvalid: The model's name or hidden widths are not usable, or not for this task's shape.
        """
        form = input_form(plan.model.name, self.description)
        return build_network(plan.model, form.shape, self.description.classes)

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
        right = 0
        with torch.no_grad():
            for start in range(0, len(examples), _EVALUATION_ROWS):
                block = slice(start, start + _EVALUATION_ROWS)
                predicted = model(torch.from_numpy(examples.x[block])).argmax(dim=1).numpy()
                right += int(np.sum(predicted == examples.y[block]))
        return right / len(examples)

    def correct(self, model: nn.Module, examples: Examples) -> NDArray[np.bool_]:
        """Tell for each example whether the model's answer is right, from that example alone.

        Each one goes through the model by itself: in a batch the last digits of an output depend on how
        many rows there are, and one row could turn the answer to another one.

        Returns:
            bool, shape (n,). On private examples it must not leave the node.
        """
        right = np.zeros(len(examples), dtype=np.bool_)
        with torch.no_grad():
            for index in range(len(examples)):
                logits = model(torch.from_numpy(examples.x[index : index + 1]))
                right[index] = int(logits.argmax(dim=1)) == examples.y[index]
        return right

    def input_schema(self, plan: Plan) -> dict[str, Any]:
        """Return what the deployed model takes: a preprocessed row, and how to make it from a raw one."""
        task, form = plan.task, self.form
        return {
            "name": "input",
            "shape": list(form.shape),
            "dtype": "float32",
            "range": list(form.bounds),
            "raw_shape": list(task.input_shape),
            "raw_range": list(task.value_range),
            "preprocessing": form.preprocessing,
        }


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
