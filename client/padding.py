"""Batches of one number of rows, so that a row's result does not depend on how many others there are.

Libraries of linear algebra choose their code by the number of rows, and with it the last digits of each
row's result. Where weights are large, a last digit can turn an example's gradient into another one: then an
example would change the sum by being there, beyond its own clipped gradient. Every piece of a batch
therefore has one public number of rows; what is missing is filled up with copies that count as nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROWS = 16
"""Least number of rows of a piece, and a divisor of all: within so many, vector code treats all alike."""


_SMALL = 64


def padded(x: Tensor, y: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Return a batch filled up to a multiple of `rows` with copies of its first example.

    Args:
        x: Examples, shape (n, ...), n >= 1.
        y: Targets, shape (n, ...).
        rows: At least 1.
    """
    missing = -len(x) % rows
    if not missing:
        return x, y
    return (_filled(x, missing), _filled(y, missing))


def rows_for(batch: float, most: float) -> int:
    """Return how many rows the pieces of batches have, a multiple of `ROWS`.

    A quarter of a batch wastes an eighth of the work on what is filled up; small batches have one piece,
    because their rows cost less than another call.

    Args:
        batch: Public number of examples to expect in a batch.
        most: As many as fit in memory; at least `ROWS` are taken all the same.
    """
    wanted = max(batch / 4, min(batch, _SMALL))
    blocks, fitting = max(1, math.ceil(wanted / ROWS)), max(1, int(most / ROWS))
    # pieces of one size waste less than a full one and a rest
    return ROWS * math.ceil(blocks / math.ceil(blocks / fitting))


def _filled(values: Tensor, missing: int) -> Tensor:
    return torch.cat([values, values[:1].expand(missing, *values.shape[1:])])
