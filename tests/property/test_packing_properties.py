"""Packed sums are the exact integer sums, and nothing else passes for one."""

import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from crypto.packing import clipped_share, mean_update, pack, quantize, unpack_sum
from crypto.presets import CHECK_SLOTS, PRESETS, Packing, packing_for
from protocol.errors import OpeningRefused

Integers = NDArray[np.uint64]

NAMES = st.sampled_from([name for name in sorted(PRESETS) if PRESETS[name].scheme == "BFV"])
COHORTS = st.integers(1, 256)
FITTED = NAMES.flatmap(
    lambda name: st.tuples(st.just(name), st.integers(1, PRESETS[name].plain_bits[-1][0]))
)
"""A preset and any cohort that it holds: up to 1,024 owners for `wide`."""
SIZES = st.sampled_from([1, 2, 4091, 4092, 4093, 8183, 8184, 8185, 12_276, 12_277]) | st.integers(1, 300)
KINDS = st.sampled_from(["random", "all-max", "all-min", "mixed"])
SEEDS = st.integers(0, 2**32 - 1)
QUICK = settings(max_examples=40, deadline=None)
VECTORS = Path(__file__).parents[1] / "vectors"


def reference_slots(values: list[int], packing: Packing) -> list[list[int]]:
    """The layout in plain integers: frame by frame, field by field, slot by slot."""
    usable = packing.preset.poly_modulus_degree - CHECK_SLOTS
    per_frame = usable * packing.preset.values_per_slot
    frames = [[0] * usable + [1] * CHECK_SLOTS for _ in range(-(-len(values) // per_frame))]
    for index, value in enumerate(values):
        frame, place = divmod(index, per_frame)
        field, slot = divmod(place, usable)
        frames[frame][slot] += value * packing.radix**field
    return frames


def draw_values(rng: np.random.Generator, kind: str, size: int, packing: Packing) -> Integers:
    largest = 2 * packing.half_levels
    drawn = rng.integers(0, largest, size, dtype=np.uint64, endpoint=True)
    if kind == "all-max":
        drawn[:] = largest
    elif kind == "all-min":
        drawn[:] = 0
    elif kind == "mixed":
        drawn = np.where(rng.integers(0, 2, size) == 1, np.uint64(largest), np.uint64(0))
    return drawn


def add(frames: list[Integers], packing: Packing) -> Integers:
    """What encryption does to packed slots: addition modulo t, in integers without a limit."""
    total = sum((frame.astype(object) for frame in frames), np.zeros_like(frames[0], dtype=object))
    return (total % packing.plain_modulus).astype(np.uint64)


@QUICK
@given(NAMES, COHORTS, st.integers(1, 6), SIZES, KINDS, SEEDS)
def test_the_sum_of_few_updates_is_exact(
    name: str, cohort: int, contributors: int, size: int, kind: str, seed: int
) -> None:
    packing, rng = packing_for(name, cohort), np.random.default_rng(seed)
    updates = [draw_values(rng, kind, size, packing) for _ in range(min(contributors, packing.cohort))]
    opened = unpack_sum(
        add([pack(update, packing) for update in updates], packing), size, len(updates), packing
    )
    assert opened.tolist() == [sum(column) for column in zip(*(u.tolist() for u in updates), strict=True)]


@QUICK
@given(FITTED, KINDS, SEEDS)
@example(("wide", 1024), "all-max", 0)
@example(("wide", 1024), "random", 1)
def test_the_sum_of_a_full_cohort_is_exact(fitted: tuple[str, int], kind: str, seed: int) -> None:
    name, cohort = fitted
    packing, rng = packing_for(name, cohort), np.random.default_rng(seed)
    total = np.zeros((1, 4096), dtype=np.uint64)
    expected = [0] * 50
    for _ in range(cohort):
        update = draw_values(rng, kind, 50, packing)
        total = (total + pack(update, packing)) % np.uint64(packing.plain_modulus)
        expected = [a + b for a, b in zip(expected, update.tolist(), strict=True)]
    assert unpack_sum(total, 50, cohort, packing).tolist() == expected


@QUICK
@given(NAMES, COHORTS, SIZES, KINDS, SEEDS)
def test_the_layout_is_the_documented_one(name: str, cohort: int, size: int, kind: str, seed: int) -> None:
    packing = packing_for(name, cohort)
    values = draw_values(np.random.default_rng(seed), kind, size, packing)
    packed = pack(values, packing)
    assert packed.dtype == np.uint64
    assert packed.tolist() == reference_slots(values.tolist(), packing)
    assert int(packed.max()) < packing.plain_modulus


@QUICK
@given(NAMES, COHORTS, st.integers(1, 20), SEEDS)
def test_one_value_just_out_of_range_is_refused(name: str, cohort: int, size: int, seed: int) -> None:
    """The guard bit: whatever one contributor can add to a field within twice the range is seen."""
    packing, rng = packing_for(name, cohort), np.random.default_rng(seed)
    honest = [draw_values(rng, "all-max", size, packing) for _ in range(cohort - 1)]
    rogue = draw_values(rng, "all-max", size, packing)
    rogue[rng.integers(size)] += np.uint64(1)
    total = add([pack(update, packing) for update in [*honest[:3], rogue]], packing)
    with pytest.raises(OpeningRefused, match="larger"):
        unpack_sum(total, size, min(cohort, len(honest[:3]) + 1), packing)


@QUICK
@given(NAMES, COHORTS, st.integers(0, 300), SEEDS)
def test_only_the_true_number_of_contributors_is_accepted(
    name: str, cohort: int, claimed: int, seed: int
) -> None:
    packing, rng = packing_for(name, cohort), np.random.default_rng(seed)
    real = int(rng.integers(1, cohort + 1))
    total = pack(np.zeros(5, dtype=np.uint64), packing) * np.uint64(real)
    if claimed == real:
        assert unpack_sum(total, 5, claimed, packing).tolist() == [0] * 5
    else:
        with pytest.raises(OpeningRefused):
            unpack_sum(total, 5, claimed, packing)


def test_nothing_opens_for_no_contributors_or_for_more_than_the_cohort() -> None:
    packing = packing_for("exact16", 4)
    with pytest.raises(OpeningRefused):
        unpack_sum(np.zeros((1, 4096), dtype=np.uint64), 5, 0, packing)
    beyond = pack(np.ones(5, dtype=np.uint64), packing) * np.uint64(5)
    with pytest.raises(OpeningRefused):
        unpack_sum(beyond, 5, 5, packing)


@pytest.mark.parametrize("slot", range(1, CHECK_SLOTS + 1))
@pytest.mark.parametrize("change", [-1, 1, 2**40])
def test_every_check_slot_of_every_frame_counts(slot: int, change: int) -> None:
    packing = packing_for("exact16", 8)
    for frame in (0, 1):
        total = pack(np.zeros(9000, dtype=np.uint64), packing) * np.uint64(3)
        total[frame, -slot] = 3 + change
        with pytest.raises(OpeningRefused, match="check slots"):
            unpack_sum(total, 9000, 3, packing)


@pytest.mark.parametrize("name", [name for name in sorted(PRESETS) if PRESETS[name].scheme == "BFV"])
def test_padding_that_is_not_zero_is_refused(name: str) -> None:
    packing = packing_for(name, 8)
    usable = 4096 - CHECK_SLOTS
    for field in range(packing.preset.values_per_slot):
        for slot in (10, usable - 1):
            total = pack(np.zeros(10, dtype=np.uint64), packing)
            total[0, slot] += np.uint64(packing.radix**field)
            with pytest.raises(OpeningRefused, match="padding"):
                unpack_sum(total, 10, 1, packing)


def test_a_missing_or_an_additional_frame_is_refused() -> None:
    packing = packing_for("exact16", 8)
    total = pack(np.zeros(9000, dtype=np.uint64), packing)
    assert total.shape == (2, 4096)
    for frames in (total[:1], np.vstack([total, total[:1]]), total[:0]):
        with pytest.raises(OpeningRefused, match="frames"):
            unpack_sum(frames, 9000, 1, packing)


@pytest.mark.parametrize("name", [name for name in sorted(PRESETS) if PRESETS[name].scheme == "BFV"])
def test_random_slots_never_open(name: str) -> None:
    packing, rng = packing_for(name, 8), np.random.default_rng(4)
    for _ in range(50):
        total = rng.integers(0, packing.plain_modulus, (1, 4096), dtype=np.uint64)
        total[:, -CHECK_SLOTS:] = 8
        with pytest.raises(OpeningRefused):
            unpack_sum(total, packing.values_per_frame, 8, packing)


RANGES = st.floats(1e-6, 1e6)


@QUICK
@given(NAMES, COHORTS, RANGES, st.integers(1, 200), SEEDS)
def test_the_error_of_a_value_in_range_is_below_one_step(
    name: str, cohort: int, update_range: float, size: int, seed: int
) -> None:
    packing, rng = packing_for(name, cohort), np.random.default_rng(seed)
    update = rng.uniform(-update_range, update_range, size)
    update[0] = rng.choice([-update_range, 0.0, update_range])
    values = quantize(update, update_range, packing, rng.random(size))
    assert int(values.max()) <= 2 * packing.half_levels
    step = update_range / packing.half_levels
    error = np.abs(mean_update(values, 1, update_range, packing) - update)
    assert np.all(error < step * (1 + 1e-9))


@QUICK
@given(NAMES, COHORTS, RANGES, st.lists(st.floats(allow_nan=False, width=64), min_size=1, max_size=20))
def test_what_is_outside_the_range_is_clamped(
    name: str, cohort: int, update_range: float, factors: list[float]
) -> None:
    packing = packing_for(name, cohort)
    update = np.array(factors)
    outside = np.abs(update) > update_range
    for uniform in (1e-6, 0.5, 0.999):
        values = quantize(update, update_range, packing, np.full(update.shape, uniform))
        assert np.all(values[update > update_range] == 2 * packing.half_levels)
        assert np.all(values[update < -update_range] == 0)
        assert int(values.max()) <= 2 * packing.half_levels
    assert clipped_share(update, update_range) == pytest.approx(outside.mean())


@pytest.mark.parametrize("name", [name for name in sorted(PRESETS) if PRESETS[name].scheme == "BFV"])
@pytest.mark.parametrize("share", [-0.999999, -0.4321, -1e-9, 1e-9, 0.3141592, 0.75])
def test_rounding_is_unbiased(name: str, share: float) -> None:
    """The mean of 200,000 roundings is within six standard errors of the value."""
    packing, draws = packing_for(name, 256), 200_000
    values = quantize(np.full(draws, share), 1.0, packing, np.random.default_rng(17).random(draws)).astype(
        np.float64
    )
    steps = values.mean() - packing.half_levels - share * packing.half_levels
    assert abs(steps) < 6 * 0.5 / np.sqrt(draws)


def test_values_on_the_grid_are_not_rounded() -> None:
    packing = packing_for("compact", 256)
    levels = packing.half_levels
    update = np.arange(-levels, levels + 1) / levels
    for uniform in (0.0, 0.49):
        values = quantize(update, 1.0, packing, np.full(update.shape, uniform))
        assert np.abs(values.astype(np.int64) - np.arange(2 * levels + 1)).max() <= 1
    exact = quantize(np.array([-1.0, 0.0, 1.0]), 1.0, packing, np.full(3, 1 - 1e-12))
    assert exact.tolist() == [0, levels, 2 * levels]


def test_the_mean_is_the_exact_integer_mean() -> None:
    packing = packing_for("exact16", 8)
    updates = [[0, 1, 2 * packing.half_levels], [5, 7, 0], [11, 13, 17]]
    sums = np.array([sum(column) for column in zip(*updates, strict=True)], dtype=np.uint64)
    mean = mean_update(sums, 3, 0.5, packing)
    expected = [
        (total - 3 * packing.half_levels) * 0.5 / packing.half_levels / 3 for total in sums.tolist()
    ]
    np.testing.assert_allclose(mean, expected, rtol=1e-14)


ODD_WEIGHTS = (1 / 3, 0.7, 1 - 2.0**-53)


@QUICK
@given(
    NAMES,
    st.floats(1e-6, 1e6),
    st.sampled_from(ODD_WEIGHTS),
    st.lists(st.sampled_from([*ODD_WEIGHTS, 5e-324]), max_size=7),
    SEEDS,
)
def test_under_odd_public_weights_sums_are_exact_and_the_mean_is_the_fraction(
    name: str, update_range: float, first: float, others: list[float], seed: int
) -> None:
    """The mean is rounded once for the product, and twice before for the public factor R / (L * weight)."""
    packing, rng, weights = packing_for(name, 8), np.random.default_rng(seed), [first, *others]
    updates = rng.uniform(-update_range, update_range, (len(weights), 20))
    values = [
        quantize(update * weight, update_range, packing, rng.random(20))
        for update, weight in zip(updates, weights, strict=True)
    ]
    opened = unpack_sum(add([pack(row, packing) for row in values], packing), 20, len(weights), packing)
    sums = [sum(column) for column in zip(*(row.tolist() for row in values), strict=True)]
    assert opened.tolist() == sums
    total, levels = math.fsum(weights), packing.half_levels
    mean = mean_update(opened, len(weights), update_range, packing, total)
    factor = Fraction(update_range / levels / total)
    for value, integer in zip(mean.tolist(), sums, strict=True):
        shifted = Fraction(integer - len(weights) * levels)
        exact = shifted * Fraction(update_range) / levels / Fraction(total)
        assert value == float(shifted * factor)
        assert abs(Fraction(value) - exact) <= abs(exact) * Fraction(301, 100 * 2**53)


def test_the_published_vectors_are_reproduced() -> None:
    for entry in json.loads((VECTORS / "packing.json").read_text())["packings"]:
        packing = packing_for(entry["preset"], entry["cohort"])
        assert packing.sha256() == entry["preset_hash"]
        index = np.arange(entry["parameters"], dtype=np.uint64)
        values = index * np.uint64(entry["multiplier"]) % np.uint64(2 * packing.half_levels + 1)
        packed = pack(values, packing)
        assert packed.shape[0] == entry["frames"]
        for frame, slot, expected in entry["slots"]:
            assert int(packed[frame, slot]) == expected
