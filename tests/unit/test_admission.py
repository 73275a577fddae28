"""A peer that is refused again and again fills neither the coordinator's log nor its log of acts."""

from __future__ import annotations

from typing import Any, cast

from crypto.authority import create_authority
from protocol.errors import ClocksDiffer
from server.listeners.admission import Admission
from tests.credentials import owner_of


class Acts:
    """Keeps the acts that a coordinator records."""

    def __init__(self) -> None:
        self.kept: list[tuple[str, str]] = []

    def record(self, act: str, actor: str, **_facts: Any) -> None:
        self.kept.append((act, actor))


def test_a_member_whose_clock_comes_and_goes_is_noted_a_few_times() -> None:
    acts = Acts()
    member = owner_of(create_authority("an authority", 10), "anna", 1).transport_certificate
    admission = Admission(cast(Any, None), "owner-transport", cast(Any, acts))
    for _ in range(1000):
        admission.note(member, ClocksDiffer.code, "its clock is 400 s ahead of this machine's")
        admission.forgive(member, ClocksDiffer.code)
    assert 1 <= len(acts.kept) <= 5
