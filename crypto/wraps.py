"""One signature over all wraps of an owner, of which each receiver checks its own: a Merkle tree.

Its leaves are the wraps in ascending order of their receivers' fingerprints. A receiver needs the hashes
beside its way to the root, one for each doubling of the roster; digests of all wraps would grow with the
square of it. Leaves and inner nodes are hashed under different tags, so that none passes for the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from protocol.encoding import digest, digest_bytes
from protocol.errors import ProtocolViolation

_LEAF, _NODE = "wrap", "wraps"


def wrap_digests(
    seeds: Mapping[str, bytes], keys: Mapping[str, bytes], dealt: bytes | None
) -> dict[str, list[str]]:
    """Return per receiver the SHA-256 of the ciphertexts for it.

    Args:
        seeds: The wrapped half seed of each receiver.
        keys: The dealer's wrapped content key of each receiver; empty for others.
        dealt: What the content key opens; the same for all receivers of `keys`.
    """
    return {
        receiver: [digest_bytes(one) for one in (seed, keys.get(receiver), dealt) if one is not None]
        for receiver, seed in seeds.items()
    }


class WrapTree:
    """The tree over one owner's wraps.

    Args:
        digests: As `wrap_digests` returns them; not empty.

    Attributes:
        root: What the sender signs as `wraps_hash`.
    """

    def __init__(self, digests: Mapping[str, Sequence[str]]) -> None:
        self._places = {receiver: place for place, receiver in enumerate(sorted(digests))}
        self._levels = [[_leaf(receiver, digests[receiver]) for receiver in self._places]]
        while len(self._levels[-1]) > 1:
            below = self._levels[-1]
            pairs = [_node(*below[place : place + 2]) for place in range(0, len(below) - 1, 2)]
            # a node without a neighbour moves up as it is
            self._levels.append(pairs + below[len(below) - len(below) % 2 :])
        self.root = self._levels[-1][0]

    def proof(self, receiver: str) -> list[str]:
        """Return the hashes beside the way from a receiver's leaf to the root, from below."""
        place, beside = self._places[receiver], []
        for level in self._levels[:-1]:
            if place ^ 1 < len(level):
                beside.append(level[place ^ 1])
            place //= 2
        return beside


def require_wrapped(
    root: str, receiver: str, receivers: Sequence[str], digests: Sequence[str], proof: Sequence[str]
) -> None:
    """Check that the wraps for one receiver are those that their sender signed.

    Args:
        root: The signed `wraps_hash` of the sender.
        receiver: Whose wraps they are; one of `receivers`.
        receivers: All owners that the sender wraps for.
        digests: SHA-256 of each ciphertext that arrived.
        proof: What `wrap_proof` returned, as it arrived.

    Raises:
        ProtocolViolation: They are not.
    """
    place, width = sorted(receivers).index(receiver), len(receivers)
    node, remaining = _leaf(receiver, digests), list(proof)
    while width > 1:
        if place ^ 1 < width:
            if not remaining:
                raise ProtocolViolation("the proof of a wrap is too short")
            sibling = remaining.pop(0)
            node = _node(sibling, node) if place % 2 else _node(node, sibling)
        place, width = place // 2, (width + 1) // 2
    if remaining or node != root:
        raise ProtocolViolation("a wrap for this owner was replaced")


def _leaf(receiver: str, digests: Sequence[str]) -> str:
    return digest([_LEAF, receiver, list(digests)])


def _node(left: str, right: str) -> str:
    return digest([_NODE, left, right])
