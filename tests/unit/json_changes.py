"""Every place of a JSON value, and what it looks like with another value there."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any


def leaves(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every value that is not a container, or an empty one."""
    items = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    if value in ({}, []) or not isinstance(value, dict | list):
        yield place
    for step, item in items:
        yield from leaves(item, (*place, step))


def changed(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value[:-1] + ("1" if value[-1:] != "1" else "2")
    return ["x"] if value == [] else 1


def put(report: dict[str, Any], place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    copied = copy.deepcopy(report)
    target: Any = copied
    for step in place[:-1]:
        target = target[step]
    target[place[-1]] = value
    return copied


def get(value: Any, place: tuple[Any, ...]) -> Any:
    for step in place:
        value = value[step]
    return value
