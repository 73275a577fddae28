"""What decides whether a step of compression is kept: public examples, or agreement without them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from deploy.measure import ACCURACY, AGREEMENT, Floats, Labels, Measure
from protocol.errors import ModelNotFinite
from protocol.plan import Plan
from tasks.registry import task_for

SYNTHETIC_USE = (
    "No public examples were given. Whether a step was kept was decided by agreement: the share of "
    "synthetic inputs, others than those of rebuilding and calibration, to which the compressed model "
    "gives the class that the unpruned model gives. Agreement is not accuracy, and real inputs may fare "
    "otherwise. Synthetic inputs are drawn from the declared input range."
)
"""What a package says where there was no public data."""

PUBLIC_DATA_USE = (
    "Public examples decided whether a step was kept (the accuracy gate) and gave the accuracy figures; "
    "no weight and no quantization range was fitted to them. The same examples chose and measured, so "
    "the accuracy after compression leans slightly to the good side. Rebuilding and calibration used "
    "synthetic inputs from the declared input range."
)


def synthetic_inputs(plan: Plan, count: int = 2048, seed: int = 0) -> Floats:
    """Return inputs drawn uniformly from the declared raw range and preprocessed by the plan's task.

    Args:
        plan: Names the task, the raw shape and the raw range.
        count: Number of inputs.
        seed: Public seed; equal seeds give equal inputs.

    Returns:
        float32 (count, d): inputs that hold nothing of anybody's data.
    """
    low, high = plan.task.value_range
    rng = np.random.default_rng(seed)
    raw = rng.uniform(low, high, (count, *plan.task.input_shape)).astype(np.float32)
    return task_for(plan).check(np.clip(raw, low, high), np.zeros(count, dtype=np.int64)).x


@dataclass(frozen=True)
class Gate:
    """What decides whether a step of compression is kept.

    Attributes:
        measure: What the share of right answers is.
        x: Preprocessed inputs, float32 (n, ...), n at least 1.
        y: The class that is right for each, int64 (n,).
    """

    measure: Measure
    x: Floats
    y: Labels

    @property
    def public_examples(self) -> int:
        """How many of the inputs are public examples."""
        return len(self.x) if self.measure == ACCURACY else 0

    @property
    def use(self) -> str:
        """What a package says of the public data that made it."""
        return PUBLIC_DATA_USE if self.measure == ACCURACY else SYNTHETIC_USE

    @property
    def word(self) -> str:
        """The measure in one word."""
        return "accuracy" if self.measure == ACCURACY else "agreement"


def agreement_gate(plan: Plan, model: nn.Module, count: int = 2048) -> Gate:
    """Return a gate for a model of which no public examples are at hand.

    Args:
        plan: Declares the range of inputs.
        model: The unpruned model, in evaluation mode; its own answers are right.
        count: Number of synthetic inputs; none of them is used for rebuilding or calibration.

    Raises:
        ModelNotFinite: An answer of the model is not finite.
    """
    x = synthetic_inputs(plan, count, seed=1)
    with torch.inference_mode():
        answers = model(torch.from_numpy(x)).numpy()
    if not np.isfinite(answers).all():
        raise ModelNotFinite("its answers to inputs within the declared range")
    return Gate(AGREEMENT, x, answers.argmax(axis=1).astype(np.int64))


@dataclass(frozen=True)
class FederatedAccuracy:
    """What federated evaluation says of the unpruned model: a share of records, and its standard error."""

    accuracy: float
    standard_error: float
