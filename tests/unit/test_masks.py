"""Masks are uniform, bound to everything that names their use, and ratcheted one way."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from crypto.masks import (
    MaskContext,
    Masks,
    MaskStream,
    advance,
    apply_masks,
    first_chain_key,
    mask_stream,
)
from crypto.presets import PLAIN_MODULI

T = PLAIN_MODULI[47]
CONTEXT = MaskContext("a" * 64, 3, "train", "b" * 64, "c" * 64, T)
KEY = first_chain_key(b"\x07" * 32)
VECTORS = Path(__file__).parents[1] / "vectors"


def small(modulus: int) -> MaskContext:
    return replace(CONTEXT, plain_modulus=modulus)


@pytest.mark.parametrize(
    "change",
    [
        {"session": "d" * 64},
        {"attempt": 4},
        {"purpose": "evaluate"},
        {"list_hash": "c" * 64, "model_hash": "b" * 64},
        {"list_hash": "d" * 64},
        {"model_hash": "d" * 64},
        {"plain_modulus": T - 2},
    ],
)
def test_another_context_gives_an_unrelated_stream(change: dict[str, object]) -> None:
    other = replace(CONTEXT, **change)  # type: ignore[arg-type]
    one, two = mask_stream(KEY, CONTEXT, 500), mask_stream(KEY, other, 500)
    assert not np.any(one == two)


def test_another_key_gives_an_unrelated_stream() -> None:
    other = bytes([KEY[0] ^ 1]) + KEY[1:]
    assert not np.any(mask_stream(KEY, CONTEXT, 500) == mask_stream(other, CONTEXT, 500))


def test_no_two_attempts_or_pairs_share_a_stream() -> None:
    streams = {
        mask_stream(advance(first_chain_key(seed), attempt), replace(CONTEXT, attempt=attempt), 4).tobytes()
        for seed in (b"1" * 32, b"2" * 32)
        for attempt in range(20)
    }
    assert len(streams) == 40


def test_a_stream_is_the_same_for_both_sides_and_has_prefixes() -> None:
    long = mask_stream(KEY, CONTEXT, 10_000)
    assert long.dtype == np.uint64
    assert np.array_equal(long, mask_stream(KEY, CONTEXT, 10_000))
    for count in (0, 1, 17, 9_999):
        assert np.array_equal(mask_stream(KEY, CONTEXT, count), long[:count])


@pytest.mark.parametrize("modulus", [5, 2**20 + 7, T])
def test_a_stream_does_not_depend_on_how_it_is_taken(modulus: int) -> None:
    whole = mask_stream(KEY, small(modulus), 3000)
    for sizes in ([1] * 3000, [0, 1, 2999], [1000, 0, 1000, 1000], [17] * 176 + [8]):
        stream = MaskStream(KEY, small(modulus))
        assert np.array_equal(np.concatenate([stream.take(size) for size in sizes]), whole)


def test_frame_by_frame_is_the_same_as_all_at_once() -> None:
    slots = np.random.default_rng(2).integers(0, T, (5, 4096), dtype=np.uint64)
    keys = {"a": KEY, "z": advance(KEY, 1)}
    masks = Masks("m", keys, CONTEXT)
    assert np.array_equal(
        np.stack([masks.apply(row) for row in slots]), apply_masks(slots, "m", keys, CONTEXT)
    )


@pytest.mark.parametrize("modulus", [3, 5, 11, 2**20 + 7, *PLAIN_MODULI.values()])
def test_every_number_is_below_the_modulus(modulus: int) -> None:
    """Just above a power of two nearly half of the words must be rejected."""
    stream = mask_stream(KEY, small(modulus), 20_000)
    assert stream.size == 20_000
    assert int(stream.max()) < modulus
    assert int(stream.max()) > 0.99 * (modulus - 1)


@pytest.mark.parametrize("modulus", [2, 3, 5, 11, 127, 129])
def test_numbers_are_uniform(modulus: int) -> None:
    """Chi-square, with a bound that a uniform stream exceeds about once in a million."""
    draws = 400_000
    counts = np.bincount(mask_stream(KEY, small(modulus), draws).astype(np.int64), minlength=modulus)
    assert counts.size == modulus
    chi_square = float(np.sum((counts - draws / modulus) ** 2) / (draws / modulus))
    freedom = modulus - 1
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom) + 25


def test_bits_are_fair_and_neighbours_independent() -> None:
    draws = 200_000
    stream = mask_stream(KEY, CONTEXT, draws)
    bits = (stream[:, None] >> np.arange(47, dtype=np.uint64)) & np.uint64(1)
    deviations = (bits.mean(axis=0) - 0.5) * 2 * np.sqrt(draws)
    assert np.abs(deviations).max() < 5.5
    assert float(np.sum(deviations**2)) < 47 + 5 * np.sqrt(2 * 47) + 25
    both = (bits[1:] == bits[:-1]).mean(axis=0)
    assert np.abs((both - 0.5) * 2 * np.sqrt(draws)).max() < 5.5


def test_masked_slots_look_uniform_whatever_they_hold() -> None:
    """All-zero slots, such as padding, come out as random as any others."""
    masked = apply_masks(np.zeros((1, 4096), dtype=np.uint64), "a", {"b": KEY}, CONTEXT)
    assert int((masked == 0).sum()) == 0
    assert abs(float(masked.astype(np.float64).mean()) / T - 0.5) < 0.03
    assert len(np.unique(masked)) == 4096


def test_the_lower_fingerprint_adds_and_the_higher_subtracts() -> None:
    zero = np.zeros((1, 8), dtype=np.uint64)
    stream = mask_stream(KEY, CONTEXT, 8)
    assert np.array_equal(apply_masks(zero, "a", {"b": KEY}, CONTEXT)[0], stream)
    assert np.array_equal(apply_masks(zero, "b", {"a": KEY}, CONTEXT)[0], np.uint64(T) - stream)


def test_the_extremes_stay_below_the_modulus() -> None:
    for fill in (0, T - 1):
        slots = np.full((2, 4096), fill, dtype=np.uint64)
        masked = apply_masks(slots, "m", {"a": KEY, "z": advance(KEY, 1)}, CONTEXT)
        assert int(masked.max()) < T
        assert masked.shape == slots.shape
        assert np.all(slots == fill)


def test_the_ratchet_is_additive_and_never_returns() -> None:
    for a in range(6):
        for b in range(6):
            assert advance(advance(KEY, a), b) == advance(KEY, a + b)
    chain = [advance(KEY, steps) for steps in range(100)]
    assert len(set(chain)) == 100
    assert advance(KEY, 0) == KEY


def test_the_chain_key_is_not_the_pair_seed() -> None:
    seed = b"\x07" * 32
    assert first_chain_key(seed) not in (seed, advance(seed, 1))
    assert len(first_chain_key(seed)) == 32


def test_the_published_vectors_are_reproduced() -> None:
    for entry in json.loads((VECTORS / "masks.json").read_text())["streams"]:
        context = MaskContext(**entry["context"])
        stream = mask_stream(bytes.fromhex(entry["chain_key"]), context, len(entry["stream"]))
        assert stream.tolist() == entry["stream"]
