"""Masks vanish in the sum over exactly the list that they were made for, and over no other."""

from itertools import combinations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from crypto.masks import MaskContext, advance, apply_masks, first_chain_key
from crypto.presets import PLAIN_MODULI

Slots = NDArray[np.uint64]

OWNERS = st.lists(
    st.text("0123456789abcdef", min_size=64, max_size=64), min_size=2, max_size=8, unique=True
)
MODULI = st.sampled_from(sorted(PLAIN_MODULI.values()))
SEEDS = st.integers(0, 2**32 - 1)
QUICK = settings(max_examples=60, deadline=None)
SHAPE = (2, 64)


def context(modulus: int, list_hash: str = "b" * 64) -> MaskContext:
    return MaskContext("a" * 64, 3, "train", list_hash, "c" * 64, modulus)


def chain(pair: frozenset[str]) -> bytes:
    return advance(first_chain_key("/".join(sorted(pair)).encode()), 3)


def masked_by(owner: str, members: list[str], slots: Slots, bound_to: MaskContext) -> Slots:
    keys = {peer: chain(frozenset((owner, peer))) for peer in members if peer != owner}
    return apply_masks(slots, owner, keys, bound_to)


def total(frames: list[Slots], modulus: int) -> Slots:
    summed = np.zeros(SHAPE, dtype=np.uint64)
    for frame in frames:
        summed = (summed + frame) % np.uint64(modulus)
    return summed


def draw_slots(owners: list[str], modulus: int, seed: int) -> dict[str, Slots]:
    rng = np.random.default_rng(seed)
    return {owner: rng.integers(0, modulus, SHAPE, dtype=np.uint64) for owner in owners}


@QUICK
@given(OWNERS, MODULI, SEEDS)
def test_the_sum_over_exactly_the_list_is_the_plain_sum(owners: list[str], modulus: int, seed: int) -> None:
    slots = draw_slots(owners, modulus, seed)
    masked = {owner: masked_by(owner, owners, slots[owner], context(modulus)) for owner in owners}
    assert np.array_equal(total(list(masked.values()), modulus), total(list(slots.values()), modulus))
    for owner in owners:
        assert not np.any((masked[owner] == slots[owner]).all(axis=1))


@QUICK
@given(OWNERS, MODULI, SEEDS)
def test_no_smaller_sum_comes_out(owners: list[str], modulus: int, seed: int) -> None:
    slots = draw_slots(owners, modulus, seed)
    masked = {owner: masked_by(owner, owners, slots[owner], context(modulus)) for owner in owners}
    for size in range(1, len(owners)):
        for some in list(combinations(owners, size))[:6]:
            difference = total([masked[o] for o in some], modulus) != total(
                [slots[o] for o in some], modulus
            )
            assert difference.mean() > 0.9


@QUICK
@given(OWNERS.filter(lambda owners: len(owners) > 2), MODULI, SEEDS)
def test_an_owner_that_masked_for_another_list_spoils_the_sum(
    owners: list[str], modulus: int, seed: int
) -> None:
    """One owner leaves out a peer; another time it masks for all of them under another list hash."""
    slots = draw_slots(owners, modulus, seed)
    honest = [masked_by(owner, owners, slots[owner], context(modulus)) for owner in owners[1:]]
    shorter = masked_by(owners[0], owners[:-1], slots[owners[0]], context(modulus))
    other = masked_by(owners[0], owners, slots[owners[0]], context(modulus, "d" * 64))
    for odd in (shorter, other):
        wrong = total([odd, *honest], modulus) != total(list(slots.values()), modulus)
        assert wrong.mean() > 0.9


@QUICK
@given(OWNERS, MODULI, SEEDS)
def test_one_owner_too_many_or_twice_spoils_the_sum(owners: list[str], modulus: int, seed: int) -> None:
    slots = draw_slots(owners, modulus, seed)
    masked = [masked_by(owner, owners, slots[owner], context(modulus)) for owner in owners]
    stranger = "f" * 63 + "!"
    extra = masked_by(stranger, [stranger, *owners], slots[owners[0]], context(modulus))
    plain = [*slots.values(), slots[owners[0]]]
    for addition in (extra, masked[0]):
        wrong = total([*masked, addition], modulus) != total(plain, modulus)
        assert wrong.mean() > 0.9


@QUICK
@given(st.binary(min_size=32, max_size=32), st.integers(0, 40), st.integers(0, 40))
def test_the_ratchet_is_additive(key: bytes, a: int, b: int) -> None:
    assert advance(advance(key, a), b) == advance(key, a + b)
    assert (advance(key, a) == advance(key, b)) == (a == b)
