"""The tasks that a plan can name. What a task needs for its models is imported with the first one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from protocol.errors import PlanInvalid
from protocol.plan import Plan

if TYPE_CHECKING:
    import torch
    from torch import nn

    from tasks.images import Examples, RowFilter
    from tasks.rows import FittingRows


class Task(Protocol):
    """A reader, a model, a loss and a metric for one kind of data; nothing about privacy or transport."""

    def read(self, path: Path) -> Examples:
        """Load and check one owner's data file, or raise DataInvalid."""

    def read_private(self, path: Path, among: RowFilter | None = None) -> Examples:
        """Load an owner's file; rows that do not fit are left out, or raise DataInvalid for its form."""

    def require_form(self, path: Path) -> None:
        """Check a file's shapes and types without reading a value, or raise DataInvalid."""

    def fitting(self, path: Path) -> FittingRows:
        """Load the raw rows that fit, with the counts of all, or raise DataInvalid for the form."""

    def prepare(self, rows: FittingRows, among: RowFilter | None = None) -> Examples:
        """Preprocess raw rows that fit, or the chosen ones of them, each by itself."""

    def check(self, x: NDArray[Any], y: NDArray[Any]) -> Examples:
        """Check raw arrays and preprocess them, each row by itself, or raise DataInvalid."""

    def build_model(self, plan: Plan) -> nn.Module:
        """Return round 0's model, the same on every machine."""

    def initial_weights(self, plan: Plan) -> NDArray[np.float64]:
        """Return round 0's model as a flat vector, shape (n_params,)."""

    def loss(self, logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return one loss for each example, shape (n,)."""

    def evaluate(self, model: nn.Module, examples: Examples) -> float:
        """Return the metric on public examples; more is better."""

    def correct(self, model: nn.Module, examples: Examples) -> NDArray[np.bool_]:
        """Tell for each example, by itself, whether the model's answer is right, shape (n,)."""

    def input_schema(self, plan: Plan) -> dict[str, Any]:
        """Return name, shape, dtype, range and preprocessing of the deployed model's input."""


def task_for(plan: Plan) -> Task:
    """Return the task that a plan names, for data and model as the plan describes them.

    Raises:
        PlanInvalid: No task has this name.
    """
    if plan.task.name != "image-classification":
        raise PlanInvalid("task.name: the only task is `image-classification`")
    from tasks.images import ImageClassification

    return ImageClassification(plan.task, plan.model.name)
