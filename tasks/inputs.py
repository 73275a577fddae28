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
IMAGE_CHANNELS = (1, 3)
"""Channels of an image that has them: they are the first axis, as torch has it."""

_PROGRESS_PLANES = 4096


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
        words = UNIT_ROWS if _centre(low, high) == 0 else CENTRED_UNIT_ROWS
        width = math.prod(shape)
        return InputForm((width,), (-1.0, 1.0), words, lambda x: unit_rows(x, low, high))
    if model == "cnn":
        channels, height, width = _image(shape, "cnn")
        words = GREY_IMAGES if len(shape) == 2 else COLOUR_IMAGES
        form = channels, height, width
        return InputForm(
            form, (-1.0, 1.0), words, lambda x: _scaled(x, low, high).reshape(-1, *form) * 2 - 1
        )
    if model == "scattering":
        channels, height, width = _image(shape, "scattering")
        if height % STRIDE or width % STRIDE or min(height, width) < SMALLEST_SIDE:
            raise PlanInvalid("task.input_shape: `scattering` needs sides of 8, 12, 16, ...")
        values = math.prod(feature_shape(height, width))
        # a value of a group of g has at most the square root of g - 1 after normalization
        bound = math.sqrt(values / SCATTERING_GROUPS - 1)
        words = FEATURES if len(shape) == 2 else f"{FEATURES} {COLOUR_FEATURES}"
        return InputForm(
            (channels * values,), (-bound, bound), words, lambda x: scattering_features(x, low, high)
        )
    raise PlanInvalid("model.name: this task knows `linear`, `mlp`, `cnn` and `scattering`")


UNIT_ROWS = (
    "Flatten the raw values in row-major order and divide them by their L2 norm; an example of norm zero "
    "stays zero."
)

CENTRED_UNIT_ROWS = (
    "Subtract the middle of raw_range from the raw values, flatten them in row-major order, and divide "
    "them by their L2 norm; an example of norm zero stays zero."
)

GREY_IMAGES = "Scale the raw values linearly from raw_range to [-1, 1] and add a channel axis in front."

COLOUR_IMAGES = (
    "Scale the raw values linearly from raw_range to [-1, 1]; the first axis holds the channels."
)

FEATURES = (
    f"Scale the raw values linearly from raw_range to [0, 1]; take the scattering transform of order 2 "
    f"with J = {SCALES} and L = {ORIENTATIONS} (tasks/scattering.py: {CHANNELS} channels at a quarter of "
    f"the size); normalize each of {SCATTERING_GROUPS} groups of successive channels of the example to "
    f"mean 0 and variance 1, with {NORMALIZATION_EPSILON:g} added to the variance; flatten in row-major "
    f"order."
)

COLOUR_FEATURES = (
    "Do so for each colour channel by itself, as for a grey image; the features of the channels follow "
    "each other."
)


def unit_rows(x: NDArray[Any], low: float, high: float) -> NDArray[np.float32]:
    """Flatten raw rows and divide each by its L2 norm; zero stays zero where the range holds it.

    Where the declared range holds zero, zero means "nothing here" in most data: counts of words, one-hot
    categories, background. Moving it away from zero would let what is absent drown what is there. A
    range without zero has no such value, and rows are taken relative to its middle.

    Args:
        x: Raw values, shape (n, ...), within [low, high].
        low: Smallest declared value.
        high: Largest declared value, > low.

    Returns:
        float32, shape (n, d), rows of norm 1; rows of norm zero stay zero. It bounds what a record can
        do to a gradient before it is clipped.
    """
    width = math.prod(x.shape[1:])
    rows = (x.astype(np.float64) - _centre(low, high)).reshape(len(x), width)
    # scaled by the largest value first, because squares of large or small values leave the range
    rows /= _or_one(np.max(np.abs(rows), axis=1, keepdims=True, initial=0.0))
    rows /= _or_one(np.linalg.norm(rows, axis=1, keepdims=True))
    return (rows + 0.0).astype(np.float32)  # adding zero turns minus zero into zero


def _centre(low: float, high: float) -> float:
    return 0.0 if low <= 0.0 <= high else low + (high - low) / 2


def _or_one(divisors: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(divisors > 0, divisors, 1.0)


def scattering_features(x: NDArray[Any], low: float, high: float) -> NDArray[np.float32]:
    """Return normalized scattering features of raw images; about a millisecond of CPU time a channel.

    The normalization is over groups of three of the 81 features of one channel of one image, with public
    constants. For 28 x 28 grey pixels an image takes 3,969 values, 15.5 KiB: 60,000 images fill 0.95 GB
    of memory; colour images take three times that.

    Args:
        x: Raw values, shape (n, height, width) or (n, channels, height, width), within [low, high].
        low: Smallest declared value.
        high: Largest declared value, > low.

    Returns:
        float32, shape (n, channels * 81 * height / 4 * width / 4), channel by channel.
    """
    height, width = x.shape[-2:]
    channels = math.prod(x.shape[1:-2])
    planes = x.reshape(len(x) * channels, height, width)
    result = np.empty((len(planes), math.prod(feature_shape(height, width))), dtype=np.float32)
    for start in range(0, len(planes), _PROGRESS_PLANES):
        block = slice(start, start + _PROGRESS_PLANES)
        features = torch.from_numpy(scatter(_scaled(planes[block], low, high)))
        normal = torch.nn.functional.group_norm(features, SCATTERING_GROUPS, eps=NORMALIZATION_EPSILON)
        result[block] = normal.flatten(start_dim=1).numpy()
        done = min(1.0, (start + _PROGRESS_PLANES) / len(planes))
        _LOG.info("scattering features: %.0f %% computed", 100 * done)
    return result.reshape(len(x), -1) if len(x) else result.reshape(0, channels * result.shape[1])


def _image(shape: tuple[int, ...], model: str) -> tuple[int, int, int]:
    """Return channels, height and width; a shape of two numbers is a grey image."""
    channels, sides = (1, shape) if len(shape) == 2 else (shape[0], shape[1:])
    if len(sides) != 2 or channels not in IMAGE_CHANNELS:
        hint = " (channels come first)" if len(shape) == 3 and shape[2] in IMAGE_CHANNELS else ""
        raise PlanInvalid(f"task.input_shape: `{model}` needs [height, width] or [3, height, width]{hint}")
    return channels, sides[0], sides[1]


def _scaled(x: NDArray[Any], low: float, high: float) -> NDArray[np.float32]:
    return ((x.astype(np.float64) - low) / (high - low)).astype(np.float32)
