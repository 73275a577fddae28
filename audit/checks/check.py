"""What one check of a report is, and how its result is put together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Report = dict[str, Any]
Check = dict[str, str]


def result(
    identifier: str, title: str, evidence: str, *, failed: list[str], missing: list[str], limit: str
) -> Check:
    """Assemble one check: faults outweigh missing evidence, and a pass states what it does not prove."""
    status, gap = ("fail", failed) if failed else ("missing", missing) if missing else ("pass", [limit])
    return {
        "id": identifier,
        "title": title,
        "status": status,
        "evidence": evidence,
        "gap": " ".join(gap),
    }


def not_applicable(identifier: str, title: str, reason: str) -> Check:
    """Assemble a check that has nothing to look at in this kind of run; it counts for nothing."""
    return {"id": identifier, "title": title, "status": "not applicable", "evidence": reason, "gap": ""}


def names(claims: Iterable[dict[str, Any]]) -> str:
    """Return the owners of some claims for a sentence."""
    return ", ".join(str(claim["owner"]) for claim in claims)


def by_reason(said: Iterable[tuple[str, str]]) -> list[str]:
    """Return each reason once, with the owners of whom it holds.

    Args:
        said: Owner and reason, in order; a reason is a sentence.
    """
    owners: dict[str, list[str]] = {}
    for owner, reason in said:
        listed = owners.setdefault(reason, [])
        if owner not in listed:
            listed.append(owner)
    return [f"{', '.join(listed)}: {reason}" for reason, listed in owners.items()]
