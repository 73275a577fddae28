"""Which pairs of owners share a mask when a list is too long for all pairs.

Up to `ALL_PAIRS_UP_TO` owners, everybody masks with everybody. In longer lists the owners stand on a ring
in an order that nobody could choose: it follows from nonces that all members committed to before any was
known, and from who is in the list. Each owner masks with the nearest ``degree / 2`` on either side (Bell et
al. 2020, "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead", section 3: a Harary graph in a
random order).

Guarantee: as long as at most the share `corrupted` of the list colludes, the honest owners are connected
with each other, and so only their common sum can be opened, except with probability below
``n * corrupted ** (degree / 2) <= 2 ** -SECURITY_BITS``. Proof: honest owners fall apart only if somewhere
on the ring ``degree / 2`` neighbours in a row collude; a row starts at one of n places, and its members are
a random draw without repetition.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Final

SECURITY_BITS: Final = 128
"""Not the usual 40: a coordinator can try lists offline for as long as it likes before it sends one."""

ALL_PAIRS_UP_TO: Final = 64
"""Longest list in which all pairs share a mask."""


def degree(owners: int, corrupted: float) -> int:
    """Return how many peers an owner masks with, an even number or all others.

    Args:
        owners: Length of the list, at least 2.
        corrupted: Share of the list that may collude, in (0, 1).
    """
    if owners <= ALL_PAIRS_UP_TO:
        return owners - 1
    half = math.ceil((math.log2(owners) + SECURITY_BITS) / math.log2(1.0 / corrupted))
    return min(owners - 1, 2 * half)


def graph_seed(nonces: Sequence[str]) -> str:
    """Return the seed that all members' revealed nonces make together, as hex digits.

    Args:
        nonces: Revealed nonces in roster order; each was committed to in its owner's join.
    """
    return hashlib.sha256(b"fedseal/graph/1\0" + "".join(nonces).encode("ascii")).hexdigest()


def neighbours(own: str, signers: Sequence[str], seed: str, attempt: int, corrupted: float) -> list[str]:
    """Return the peers of a round's list with whom an owner shares masks, in ascending order.

    The relation is symmetric: if B is A's neighbour, A is B's.

    Args:
        own: This owner's fingerprint; must be in `signers`.
        signers: Fingerprints of the list.
        seed: From `graph_seed`.
        attempt: Attempt that the list is for.
        corrupted: Share of the list that may collude.
    """
    count = degree(len(signers), corrupted)
    if count == len(signers) - 1:
        return sorted(signer for signer in signers if signer != own)
    members = hashlib.sha256("".join(sorted(signers)).encode("ascii")).hexdigest()
    ring = sorted(signers, key=lambda signer: _place(seed, attempt, members, signer))
    place, half = ring.index(own), count // 2
    steps = [*range(-half, 0), *range(1, half + 1)]
    return sorted({ring[(place + step) % len(ring)] for step in steps})


def _place(seed: str, attempt: int, members: str, signer: str) -> bytes:
    text = f"{seed}{attempt:016x}{members}{signer}".encode("ascii")
    return hashlib.sha256(b"fedseal/place/1\0" + text).digest()
