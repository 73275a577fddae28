"""The mask graph: symmetric, regular, unpredictable, and connected among honest owners."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest

from crypto.graph import SECURITY_BITS, degree, graph_seed, neighbours
from crypto.masks import MaskContext, Masks
from crypto.presets import PLAIN_MODULI


def fingerprints(count: int) -> list[str]:
    return sorted(hashlib.sha256(str(number).encode()).hexdigest() for number in range(count))


SEED = graph_seed([hashlib.sha256(b"nonce").hexdigest()])


@pytest.mark.parametrize("count", [2, 3, 8, 64, 85, 128, 400])
def test_every_owner_has_the_same_number_of_neighbours_and_the_relation_is_symmetric(count: int) -> None:
    signers = fingerprints(count)
    peers = {own: neighbours(own, signers, SEED, 1, 1 / 3) for own in signers}
    assert {len(found) for found in peers.values()} == {degree(count, 1 / 3)}
    for own, found in peers.items():
        assert own not in found
        assert found == sorted(set(found))
        assert all(own in peers[peer] for peer in found)


def test_short_lists_use_all_pairs() -> None:
    signers = fingerprints(64)
    assert neighbours(signers[5], signers, SEED, 1, 1 / 3) == signers[:5] + signers[6:]


@pytest.mark.parametrize("corrupted", [1 / 3, 0.5])
@pytest.mark.parametrize("count", [256, 512, 1024])
def test_the_degree_meets_its_bound(count: int, corrupted: float) -> None:
    peers = degree(count, corrupted)
    if peers < count - 1:
        assert count * corrupted ** (peers // 2) <= 2.0**-SECURITY_BITS
        assert count * corrupted ** (peers // 2 - 1) > 2.0**-SECURITY_BITS


def test_the_order_depends_on_nonces_and_on_the_list() -> None:
    signers = fingerprints(400)
    first = neighbours(signers[0], signers, SEED, 1, 1 / 3)
    other_nonce = graph_seed([hashlib.sha256(b"another").hexdigest()])
    assert first != neighbours(signers[0], signers, other_nonce, 1, 1 / 3)
    assert first != neighbours(signers[0], signers, SEED, 2, 1 / 3)
    assert first != neighbours(signers[0], signers[:-1], SEED, 1, 1 / 3)


def test_honest_owners_stay_connected_when_a_third_colludes() -> None:
    signers, draw = fingerprints(400), random.Random(0)
    peers = {own: set(neighbours(own, signers, SEED, 1, 1 / 3)) for own in signers}
    for _ in range(200):
        honest = set(draw.sample(signers, 267))
        assert _reached(next(iter(honest)), honest, peers) == honest


def _reached(start: str, honest: set[str], peers: dict[str, set[str]]) -> set[str]:
    found, todo = {start}, [start]
    while todo:
        for peer in peers[todo.pop()] & honest - found:
            found.add(peer)
            todo.append(peer)
    return found


def test_the_check_would_see_a_graph_that_is_too_thin() -> None:
    signers = fingerprints(200)
    ring = {own: {signers[index - 1], signers[(index + 1) % 200]} for index, own in enumerate(signers)}
    honest = set(signers) - {signers[10], signers[20]}
    assert _reached(signers[0], honest, ring) != honest


def test_masks_over_the_graph_cancel_in_the_sum_of_the_whole_list_and_in_no_smaller_one() -> None:
    signers, modulus, rng = fingerprints(180), PLAIN_MODULI[42], np.random.default_rng(5)
    context = MaskContext("a" * 64, 1, "train", "b" * 64, "c" * 64, modulus)
    slots = rng.integers(0, modulus, (len(signers), 3), dtype=np.uint64)
    masked = []
    for own, row in zip(signers, slots, strict=True):
        peers = neighbours(own, signers, SEED, 1, 1 / 3)
        assert len(peers) == degree(180, 1 / 3) < len(signers) - 1
        chains = {peer: hashlib.sha256("".join(sorted((own, peer))).encode()).digest() for peer in peers}
        masked.append(Masks(own, chains, context).apply(row).astype(object))
    assert not np.any(np.array(masked) == slots)
    plain = slots.astype(object)
    assert np.array_equal(sum(masked) % modulus, sum(plain) % modulus)
    for left_out in (0, 90, 179):
        rest = (sum(masked) - masked[left_out]) % modulus
        assert not np.any(rest == (sum(plain) - plain[left_out]) % modulus)
