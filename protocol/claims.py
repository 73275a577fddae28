"""What a plan promises, in words: the unit, the adjacency, and what the promise rests on.

Every output that shows a privacy loss takes its words from here, so that none says one unit and means
the other.
"""

from __future__ import annotations

import math
from typing import Final, Literal

from protocol.evaluation import planned_worst_epsilon
from protocol.plan import Plan

Unit = Literal["example", "client"]
Adjacency = Literal["add/remove", "zero-out"]

UNITS: Final[dict[Unit, str]] = {
    "example": "one record of one owner",
    "client": "everything that one owner contributes",
}
"""What one guarantee covers, in the words of every output."""

_ADJACENCY: Final[dict[Unit, Adjacency]] = {"example": "add/remove", "client": "zero-out"}

EXPERIMENTAL: Final = "EXPERIMENTAL"
"""How every output marks distributed noise."""


def adjacency(plan: Plan) -> Adjacency:
    """Return which two data sets the promise compares.

    `add/remove`: with and without one record. `zero-out`: with one owner's update and with zeros in its
    place; the owner still takes part and still adds its noise.
    """
    return _ADJACENCY[plan.privacy.unit]


def assumption(plan: Plan) -> str:
    """Return in one or two sentences what the promised epsilon rests on."""
    privacy = plan.privacy
    if privacy.noise == "none":
        return "Nothing is promised: no noise is added."
    if privacy.noise == "local":
        return "It rests on no other owner and not on the coordinator: an owner adds all its noise itself."
    return (
        f"{EXPERIMENTAL}. It rests on the other owners: all add their noise shares, and apart from one who "
        f"reads the sum at most {privacy.tolerated_colluders} tell their share to anybody. The worst "
        "epsilon holds even if all others collude."
    )


def planned_worst(plan: Plan) -> float | None:
    """Return epsilon of a whole run if all other owners collude; None if nothing bounds it."""
    worst = planned_worst_epsilon(plan)
    return worst if worst is not None and math.isfinite(worst) else None
