"""How raw rows become a model's inputs: each row by itself, by public constants alone.

A statistic of the whole dataset (a mean image, a maximum) would let one record change the others'
features, and then clipping one record's gradient would not bound that record's influence.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from protocol.errors import PlanInvalid
from protocol.sections import TaskSection
from tasks.scattering import CHANNELS, ORIENTATIONS, SCALES, SMALLEST_SIDE, STRIDE, feature_shape, scatter

_LOG = logging.getLogger("fedseal.tasks")

SCATTERING_GROUPS = 27
"""Groups of the features' normalization: 3 channels each, as Tramer & Boneh (2021) chose for this size."""

NORMALIZATION_EPSILON = 1e-5
_PROGRESS_ROWS = 4096


@dataclass(frozen=True)
class InputForm:
    """What a model takes, and how it is made of raw rows.

    Attributes:
        shape: Shape of one input.
        bounds: Smallest and largest value that an input can have.
        preprocessing: The same in words, for whoever runs the deployed model.
        prepare: Makes inputs, float32 (n, *shape), of raw rows within the declared range.
    """

    shape: tuple[int, ...]
    bounds: tuple[float, float]
    preprocessing: str
    prepare: Callable[[NDArray[Any]], NDArray[np.float32]]


def input_form(model: str, task: TaskSection) -> InputForm:
    """Return the inputs of a model by its name.

    Raises:
        PlanInvalid: There is no such model, or it does not take examples of this shape.
    """
    low, high = task.value_range
    shape = tuple(task.input_shape)
    if model in ("linear", "mlp"):
        width = math.prod(shape)
        return InputForm((width,), (-1.0, 1.0), UNIT_ROWS, lambda x: unit_rows(x, low, high))
    if model == "cnn":
        height, width = _image(shape, "cnn")
        return InputForm(
            (1, height, width), (-1.0, 1.0), IMAGES, lambda x: _scaled(x, low, high)[:, None] * 2 - 1
        )
    if model == "scattering":
        height, width = _image(shape, "scattering")
        if height % STRIDE or width % STRIDE or min(height, width) < SMALLEST_SIDE:
            raise PlanInvalid("task.input_shape: `scattering` needs sides of 8, 12, 16, ...")
        values = math.prod(feature_shape(height, width))
        # a value of a group of g has at most the square root of g - 1 after normalization
        bound = math.sqrt(values / SCATTERING_GROUPS - 1)
        return InputForm((values,), (-bound, bound), FEATURES, lambda x: scattering_features(x, low, high))
    raise PlanInvalid("model.name: this task knows `linear`, `mlp`, `cnn` and `scattering`")


UNIT_ROWS = (
    "Scale the raw values linearly from raw_range to [-0.5, 0.5], flatten the example in row-major "
    "order, and divide it by its L2 norm; an example of norm zero stays zero."
)

IMAGES = "Scale the raw values linearly from raw_range to [-1, 1] and add a channel axis in front."

FEATURES = (
    f"Scale the raw values linearly from raw_range to [0, 1]; take the scattering transform of order 2 "
    f"with J = {SCALES} and L = {ORIENTATIONS} (tasks/scattering.py: {CHANNELS} channels at a quarter of "
    f"the size); normalize each of {SCATTERING_GROUPS} groups of successive channels of the example to "
    f"mean 0 and variance 1, with {NORMALIZATION_EPSILON:g} added to the variance; flatten in row-major "
    f"order."
)


def unit_rows(x: NDArray[Any], low: float, high: float) -> NDArray[np.float32]:
    """Scale raw rows to [-0.5, 0.5], flatten them, and divide each by its L2 norm.

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


def scattering_features(x: NDArray[Any], low: float, high: float) -> NDArray[np.float32]:
    """Return normalized scattering features of raw images; about a millisecond of CPU time each.

    The normalization is over groups of three channels of one image, with public constants. For 28 x 28
    pixels an image takes 3,969 values, 15.5 KiB: 60,000 images fill 0.95 GB of memory.

    Args:
        x: Raw values, shape (n, height, width), within [low, high].
        low: Smallest declared value.
        high: Largest declared value, > low.

    Returns:
        float32, shape (n, 81 * height / 4 * width / 4).
    """
    _, height, width = x.shape
    result = np.empty((len(x), math.prod(feature_shape(height, width))), dtype=np.float32)
    for start in range(0, len(x), _PROGRESS_ROWS):
        planes = torch.from_numpy(scatter(_scaled(x[start : start + _PROGRESS_ROWS], low, high)))
        normal = torch.nn.functional.group_norm(planes, SCATTERING_GROUPS, eps=NORMALIZATION_EPSILON)
        result[start : start + _PROGRESS_ROWS] = normal.flatten(start_dim=1).numpy()
        done = min(1.0, (start + _PROGRESS_ROWS) / len(x))
        _LOG.info("scattering features: %.0f %% computed", 100 * done)
    return result


def _image(shape: tuple[int, ...], model: str) -> tuple[int, int]:
    if len(shape) != 2:
        raise PlanInvalid(f"task.input_shape: `{model}` needs [height, width]")
    return shape[0], shape[1]


def _scaled(x: NDArray[Any], low: float, high: float) -> NDArray[np.float32]:
    return ((x.astype(np.float64) - low) / (high - low)).astype(np.float32)
