"""What the page lists, so that it stays readable: some of many rounds, the highest of many bounds."""

from __future__ import annotations

from typing import Any

from audit.pages.charts import evenly

MOST_ATTEMPTS = 40
"""Most attempts that are listed one by one."""

_MOST_VOID = 12


def listed_attempts(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the attempts that are listed: all of a short run, else the void ones and others, in order."""
    entries = report["rounds"]
    if len(entries) <= MOST_ATTEMPTS:
        return list(entries)
    void = [index for index, entry in enumerate(entries) if entry["void"]]
    chosen = set(evenly(void, _MOST_VOID))
    rest = [index for index, entry in enumerate(entries) if not entry["void"]]
    chosen |= set(evenly(rest, MOST_ATTEMPTS - len(chosen)))
    return [entries[index] for index in sorted(chosen)]


def strongest_bounds(bounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, of bounds that several places made, the one nearest to its claim, with how many there are."""
    places: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for bound in bounds:
        places.setdefault((bound["observer"], bound["method"]), []).append(bound)
    return [max(made, key=_excess) | {"made": len(made)} for made in places.values()]


def _excess(bound: dict[str, Any]) -> float:
    return float(bound["epsilon"]) - float(bound["claimed"] or 0.0)
