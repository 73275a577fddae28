"""Nested values as flat lists of facts, the form in which a report holds what other packages name."""

from __future__ import annotations

from typing import Any

from protocol.errors import ReportInvalid


def flatten(value: Any, pointer: str = "") -> list[dict[str, Any]]:
    """Return nested dicts as a list of `pointer` (RFC 6901) and `value`, in order of the pointers.

    A report's schema forbids unknown keys everywhere; in this form it can hold values whose keys other
    packages choose. Lists of scalars stay whole, an empty dict leaves nothing.
    """
    if isinstance(value, dict):
        steps = [(str(key).replace("~", "~0").replace("/", "~1"), value[key]) for key in value]
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        steps = [(str(index), item) for index, item in enumerate(value)]
    else:
        return [{"pointer": pointer, "value": value}]
    facts = [fact for step, item in steps for fact in flatten(item, f"{pointer}/{step}")]
    return sorted(facts, key=lambda fact: str(fact["pointer"]))


def unflatten(facts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the nested dicts of `flatten`; a list of dicts comes back as a dict of its indices.

    Raises:
        ReportInvalid: One pointer is a value and also a prefix of another.
    """
    root: dict[str, Any] = {}
    for fact in facts:
        *path, last = (
            step.replace("~1", "/").replace("~0", "~") for step in fact["pointer"].split("/")[1:]
        )
        place: Any = root
        for step in path:
            place = place.setdefault(step, {}) if isinstance(place, dict) else None
        if not isinstance(place, dict) or last in place:
            raise ReportInvalid("a list of facts contradicts itself")
        place[last] = fact["value"]
    return root
