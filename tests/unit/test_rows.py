"""An owner is told how many of its rows are used, how many are not and why, and never a value of one."""

from __future__ import annotations

import numpy as np

from protocol.sections import TaskSection
from tasks.rows import MOST_CLASSES, fitting_rows

TASK = TaskSection(name="image-classification", input_shape=[2], value_range=[-1.0, 4.0], classes=3)


def rows(*values: float) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.array([[value, 0.0] for value in values], dtype=np.float32)


def test_each_row_is_kept_or_left_out_for_the_first_reason() -> None:
    x = rows(0, 0, 4, -1, np.nan, np.inf, 4.5, -2, 9, 0, 0)
    y = np.array([0, 0, 2, 1, 0, 7, 0, 1, 8, 3, -1])
    fitting = fitting_rows(x, y, TASK)
    np.testing.assert_array_equal(fitting.x, x[:4])
    assert fitting.y.tolist() == [0, 0, 2, 1]
    assert fitting.counts.kept == 4
    assert fitting.counts.words() == (
        "11 rows: 4 kept, 7 left out (2 not finite, 3 outside task.value_range, "
        "2 label outside 0 .. task.classes - 1); classes 0: 50.0%, 1: 25.0%, 2: 25.0%"
    )


def test_without_a_plan_only_what_fits_no_plan_is_left_out() -> None:
    fitting = fitting_rows(rows(0, 900, np.nan, 5), np.array([0, 5, 1, -1]), None)
    assert fitting.counts.words() == (
        "4 rows: 2 kept, 2 left out (1 not finite, 1 negative label); classes 0: 50.0%, 5: 50.0%"
    )


def test_no_rows_and_whole_numbers_are_counted() -> None:
    none = fitting_rows(rows()[:0].reshape(0, 2), np.zeros(0, dtype=np.int64), TASK)
    assert none.counts.words() == "0 rows: 0 kept, 0 left out; no classes"
    bytes_ = fitting_rows(np.array([[3, 4], [5, 0]], dtype=np.uint8), np.array([0, 0], np.uint64), TASK)
    assert bytes_.counts.words() == (
        "2 rows: 1 kept, 1 left out (1 outside task.value_range); classes 0: 100.0%"
    )
    large = fitting_rows(rows(0), np.array([2**64 - 1], dtype=np.uint64), TASK)
    assert large.counts.kept == 0


def test_labels_that_are_no_labels_are_not_listed() -> None:
    many = np.arange(1000, 1000 + MOST_CLASSES + 1)
    words = fitting_rows(rows(*[0] * len(many)), many, None).counts.words()
    assert words.endswith("25 classes, the largest has 4.0%")
    assert "1000" not in words
