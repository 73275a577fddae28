"""Which nodes a run asks to join no more: rosters cost everybody, so that patience has an end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

from server.cohort.members import Member
from server.cohort.session import Joining
from server.exchange import Exchanger

_MOST_FAILURES: Final = 4
"""Joins that a node may refuse, leave unanswered or need anew before it is out."""

Arrival = tuple[str, str]
"""A node's public transport key and the time of its last activation."""


class Patience:
    """Remembers nodes that refused, or were silent twice, until they connect anew; at last for good."""

    def __init__(self) -> None:
        self._refused: set[Arrival] = set()
        self._silences = Counter[Arrival]()
        self._failures = Counter[str]()

    def is_over(self, key: str, since: str) -> bool:
        """Tell whether a node is not to be asked again."""
        silent = self._silences[key, since] > 1 or self._failures[key] > _MOST_FAILURES
        return silent or (key, since) in self._refused

    def note(self, exchanger: Exchanger, joining: Joining) -> None:
        """Take what failed in joining since the last time, which is forgotten there."""
        for key, (node, since) in exchanger.online_by_key().items():
            if node in joining.failed:
                self.refuse(key, since)
            silent = joining.silences[node]
            self._failures[key] += silent
            self._silences[key, since] += silent
        joining.forget()

    def refuse(self, key: str, since: str) -> None:
        """Do not ask a node again before it connects anew."""
        self._refused.add((key, since))
        self._failures[key] += 1

    def count(self, keys: Iterable[str]) -> None:
        """Count one more failure for each of some nodes."""
        self._failures.update(keys)

    def suspect(self, newcomers: Iterable[Member], joining: Joining) -> None:
        """Leave newcomers out of the next try, and blame nobody else for the one that failed.

        Who sends what the others must refuse makes them look like those that fail. So newcomers that failed
        themselves are left out, or all of them if others refused. Silence of others is nobody's fault.
        """
        newcomers, failed = list(newcomers), joining.failed.keys() | joining.silences.keys()
        suspects = [one for one in newcomers if one.node in failed] or (newcomers if joining.failed else [])
        if suspects:
            joining.forget()
        for member in suspects:
            self.refuse(member.node_key, member.activated)
