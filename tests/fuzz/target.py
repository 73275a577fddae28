"""What the fuzzer needs to know of one decoder."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class SilentAccept(Exception):
    """A decoder took what it must refuse, or read something else than it was given."""


@dataclass(frozen=True)
class Target:
    """One decoder.

    Attributes:
        name: Names it in results.
        weight: Its share of a group's inputs.
        make: Returns a mutated input; a function of the generator alone.
        feed: Decodes an input. Refuses it by a coded error, or returns; raises `SilentAccept` if what it
            accepted is not what it was given.
    """

    name: str
    weight: int
    make: Callable[[random.Random], Any]
    feed: Callable[[Any], None]


def require(condition: bool, what: str) -> None:
    """Raise `SilentAccept` unless what a decoder accepted is as it must be."""
    if not condition:
        raise SilentAccept(what)
