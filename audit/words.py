"""How numbers, sizes and moments of a report are written for people."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any


def size(count: int) -> str:
    """Return a number of bytes with a decimal unit, for example ``1.4 MB``."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.95 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{count} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def number(value: Any) -> str:
    """Return a value for a person: four significant digits, and a word for what is unbounded."""
    if value == "inf":
        return "no limit"
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(number(item) for item in value) or "none"
    if not isinstance(value, float):
        return str(value)
    text = f"{value:.4g}"
    return f"{Decimal(text):f}" if 1e-9 <= abs(value) < 1e12 else text


def odds(probability: float) -> str:
    """Return a probability as a person says it: 1 in so many."""
    return "zero" if probability <= 0 else f"1 in {1 / probability:,.0f}"


def path(pointer: str, separator: str) -> str:
    """Return a JSON pointer with its steps set apart by `separator`."""
    steps = pointer.split("/")[1:]
    return separator.join(step.replace("~1", "/").replace("~0", "~") for step in steps)


def factor(epsilon: float | str) -> str:
    """Return e to the epsilon in words: how much one record can change the odds of any result."""
    if epsilon == "inf" or float(epsilon) > 20:
        return "more than a million"
    value = math.exp(float(epsilon))
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def moment(text: str) -> str:
    """Return an ISO 8601 moment in UTC as a person writes it, to the minute."""
    return f"{text[:10]} {text[11:16]} UTC"


def percent(share: float) -> str:
    """Return a share of one as a percentage with one decimal."""
    return f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """Return a number of seconds, or of minutes where there are many."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def spans(numbers: Iterable[int]) -> str:
    """Return whole numbers in order, with runs of three or more as spans, for example ``1, 4 to 9``."""
    runs: list[list[int]] = []
    for value in sorted(set(numbers)):
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    parts = [[f"{run[0]} to {run[-1]}"] if len(run) > 2 else [str(value) for value in run] for run in runs]
    return ", ".join(part for listed in parts for part in listed)


def some(names: Sequence[str], most: int) -> str:
    """Return names for a sentence: all of a few, else the first of them and how many others there are."""
    if len(names) <= most:
        return ", ".join(names) or "none"
    return f"{', '.join(names[: most - 1])} and {len(names) - most + 1} others"
