"""Which rows of an owner's file are used, and how many are left out and why.

The counts are about private data: they are for the owner's own screen and log, and for nobody else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocol.sections import TaskSection

NOT_FINITE = "not finite"
OUT_OF_RANGE = "outside task.value_range"
WRONG_LABEL = "label outside 0 .. task.classes - 1"
NEGATIVE_LABEL = "negative label"

MOST_CLASSES = 24
"""Most classes that are named; a file with more may hold in `y` what is no label at all."""


@dataclass(frozen=True)
class RowCounts:
    """What an owner's file holds, by number of rows.

    Attributes:
        rows: All rows.
        left_out: Rows that are not used, by the first reason that applies.
        classes: Rows that are used, by label.
    """

    rows: int
    left_out: Mapping[str, int]
    classes: Mapping[int, int]

    @property
    def kept(self) -> int:
        """Number of rows that are used."""
        return self.rows - sum(self.left_out.values())

    def words(self) -> str:
        """Return the counts as one line, without any value of a record."""
        reasons = [f"{count} {reason}" for reason, count in self.left_out.items() if count]
        left_out = self.rows - self.kept
        why = f" ({', '.join(reasons)})" if reasons else ""
        return f"{self.rows} rows: {self.kept} kept, {left_out} left out{why}; {self._shares()}"

    def _shares(self) -> str:
        if not self.classes:
            return "no classes"
        if len(self.classes) > MOST_CLASSES:
            largest = max(self.classes.values()) / self.kept
            return f"{len(self.classes)} classes, the largest has {largest:.1%}"
        shares = (f"{label}: {count / self.kept:.1%}" for label, count in self.classes.items())
        return f"classes {', '.join(shares)}"


@dataclass(frozen=True)
class FittingRows:
    """The raw rows that are used.

    Attributes:
        x: Raw values, shape (n, ...), finite and within the declared range.
        y: int64 (n,), in [0, classes).
        counts: What was left out.
    """

    x: NDArray[Any]
    y: NDArray[np.int64]
    counts: RowCounts


def fitting_rows(x: NDArray[Any], y: NDArray[Any], task: TaskSection | None) -> FittingRows:
    """Leave out, each by itself, the rows that do not fit a description.

    Args:
        x: Raw values, shape (n, ...).
        y: Integers, shape (n,).
        task: What a plan says of the data; without one only rows that fit no plan are left out.
    """
    left, counts = np.zeros(len(y), dtype=np.bool_), {}
    for reason, wrong in _objections(x, y, task):
        counts[reason] = int(np.count_nonzero(wrong & ~left))
        left |= wrong
    kept = y[~left].astype(np.int64)
    labels, sizes = np.unique(kept, return_counts=True)
    classes = dict(zip(labels.tolist(), sizes.tolist(), strict=True))
    return FittingRows(x[~left], kept, RowCounts(len(y), counts, classes))


def _objections(
    x: NDArray[Any], y: NDArray[Any], task: TaskSection | None
) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    axes = tuple(range(1, x.ndim))
    yield NOT_FINITE, ~np.all(np.isfinite(x), axis=axes)
    if task is None:
        yield NEGATIVE_LABEL, y < 0
        return
    low, high = task.value_range
    yield OUT_OF_RANGE, ~np.all((x >= low) & (x <= high), axis=axes)
    yield WRONG_LABEL, (y < 0) | (y >= task.classes)
