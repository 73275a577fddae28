"""The parameter sets are what they say, and their proof of capacity holds where it must and no further."""

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest

from crypto.frames import SealContext
from crypto.presets import (
    CHECK_SLOTS,
    FRESH_NOISE,
    PLAIN_MODULI,
    PRESETS,
    Packing,
    packing_for,
    prove_capacity,
)
from protocol.errors import CapacityExceeded, EncryptionUnavailable

NAMES = [name for name in sorted(PRESETS) if PRESETS[name].scheme == "BFV"]
LIMITS = {name: PRESETS[name].plain_bits[-1][0] for name in NAMES}
COHORTS = [
    (name, cohort)
    for name in NAMES
    for cohort in (1, 2, 3, 7, 8, 9, 63, 64, 65, 128, 255, 256, 257, 1024)
    if cohort <= LIMITS[name]
]
WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)


def is_prime(number: int) -> bool:
    """Miller-Rabin with the witnesses that are proved to suffice below 3.18e23 (Sorenson, Webster)."""
    if number < 2:
        return False
    if any(number % prime == 0 for prime in WITNESSES):
        return number in WITNESSES
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for witness in WITNESSES:
        power = pow(witness, odd, number)
        if power in (1, number - 1):
            continue
        for _ in range(twos - 1):
            power = power * power % number
            if power == number - 1:
                break
        else:
            return False
    return True


def largest_batching_prime(bits: int) -> int:
    candidate = (1 << bits) - 8192 + 1
    while not is_prime(candidate):
        candidate -= 8192
    return candidate


def test_the_primality_test_knows_its_trade() -> None:
    assert [n for n in range(40) if is_prime(n)] == [2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37]
    assert not is_prime(3_215_031_751)
    assert not is_prime(341_550_071_728_321)
    assert is_prime(2**61 - 1)


@pytest.mark.parametrize("bits", sorted(PLAIN_MODULI))
def test_plain_moduli_are_the_largest_batching_primes(bits: int) -> None:
    modulus = PLAIN_MODULI[bits]
    assert modulus.bit_length() == bits
    assert modulus % 8192 == 1
    assert modulus == largest_batching_prime(bits)


@pytest.mark.parametrize(
    ("name", "bits"), [("exact16", [56]), ("compact", [56]), ("fine", [60]), ("wide", [31, 31])]
)
def test_the_ciphertext_modulus_is_a_product_of_batching_primes(name: str, bits: list[int]) -> None:
    preset = PRESETS[name]
    assert preset.name == name
    assert [prime.bit_length() for prime in preset.coefficient_moduli] == bits
    assert len(set(preset.coefficient_moduli)) == len(bits)
    for prime in preset.coefficient_moduli:
        assert prime % (2 * preset.poly_modulus_degree) == 1
        assert is_prime(prime)


@pytest.mark.parametrize(("name", "cohort"), COHORTS)
def test_the_library_builds_exactly_these_moduli(name: str, cohort: int) -> None:
    packing = packing_for(name, cohort)
    context = SealContext(packing).seal
    for data in (context.first_context_data(), context.key_context_data()):
        built = data.parms()
        moduli = tuple(modulus.value() for modulus in built.coeff_modulus())
        assert moduli == packing.preset.coefficient_moduli
        assert built.plain_modulus().value() == packing.plain_modulus
        assert built.poly_modulus_degree() == 4096


def test_a_library_with_other_moduli_is_refused() -> None:
    packing = packing_for("exact16", 8)
    other_t = replace(packing, plain_modulus=PLAIN_MODULI[47] - 8192)
    other_q = replace(packing, preset=replace(packing.preset, coefficient_moduli=(2**56 - 5,)))
    # The modulus of `fine` is in order, but not in the security class that `exact16` promises.
    weak_q = replace(packing, preset=replace(PRESETS["fine"], security_bits=256))
    for changed in (other_t, other_q, weak_q):
        with pytest.raises(EncryptionUnavailable):
            SealContext(changed)


@pytest.mark.parametrize(("name", "cohort"), COHORTS)
def test_both_inequalities_hold_as_exact_fractions(name: str, cohort: int) -> None:
    packing = packing_for(name, cohort)
    q, t = packing.preset.coefficient_modulus, packing.plain_modulus
    fields = packing.preset.values_per_slot
    assert cohort * Fraction(FRESH_NOISE) < Fraction(q, 2 * t)
    assert packing.half_levels >= 1
    assert 2 * (cohort * 2 * packing.half_levels) < packing.radix
    assert packing.radix**fields <= t < (packing.radix + 1) ** fields
    largest_slot = sum(2 * packing.half_levels * cohort * packing.radix**i for i in range(fields))
    assert largest_slot < t


@pytest.mark.parametrize("name", NAMES)
def test_the_table_is_monotone(name: str) -> None:
    rows = PRESETS[name].plain_bits
    assert [cohort for cohort, _ in rows] == sorted({cohort for cohort, _ in rows})
    assert [bits for _, bits in rows] == sorted((bits for _, bits in rows), reverse=True)
    packings = [packing_for(name, cohort) for cohort in range(1, LIMITS[name] + 1)]
    for smaller, larger in pairwise(packings):
        assert larger.plain_modulus <= smaller.plain_modulus
        assert larger.radix <= smaller.radix
        assert larger.half_levels <= smaller.half_levels


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("excess", [1, 10**9])
def test_a_cohort_above_the_limit_is_refused(name: str, excess: int) -> None:
    packing_for(name, LIMITS[name])
    with pytest.raises(CapacityExceeded) as refused:
        packing_for(name, LIMITS[name] + excess)
    assert refused.value.code == "FS-PLAN-02"
    assert str(LIMITS[name]) in refused.value.detail


def forged(packing: Packing) -> list[Packing]:
    return [
        replace(packing, cohort=packing.cohort * 64),
        replace(packing, half_levels=packing.half_levels * 2),
        replace(packing, half_levels=0),
        replace(packing, radix=packing.radix * 2),
        replace(packing, plain_modulus=packing.plain_modulus * 1024),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_the_proof_fails_for_a_forged_packing(name: str) -> None:
    packing = packing_for(name, 64)
    prove_capacity(packing)
    for changed in forged(packing):
        with pytest.raises(CapacityExceeded):
            prove_capacity(changed)


@pytest.mark.parametrize(("name", "cohort"), COHORTS)
def test_the_proof_ends_where_the_noise_reaches_half_a_step(name: str, cohort: int) -> None:
    packing = packing_for(name, cohort)
    half_step = Fraction(packing.preset.coefficient_modulus, 2 * packing.plain_modulus)
    limit = half_step // Fraction(FRESH_NOISE)
    assert limit >= cohort
    prove_capacity(replace(packing, cohort=limit, half_levels=1))
    with pytest.raises(CapacityExceeded, match="noise"):
        prove_capacity(replace(packing, cohort=limit + 1, half_levels=1))


@pytest.mark.parametrize("name", NAMES)
def test_the_limit_of_a_row_is_set_by_the_noise(name: str) -> None:
    """The next larger plain modulus of the same table would fail the proof, so that no row is lax."""
    rows = PRESETS[name].plain_bits
    for (_, wider), (largest, _) in pairwise(rows):
        with pytest.raises(CapacityExceeded, match="noise"):
            prove_capacity(replace(packing_for(name, largest), plain_modulus=PLAIN_MODULI[wider]))


@pytest.mark.parametrize(
    ("name", "values", "size"),
    [
        ("exact16", 8184, 64 + 4096 * 56 // 8),
        ("compact", 12276, 64 + 4096 * 56 // 8),
        ("fine", 8184, 64 + 4096 * 60 // 8),
        ("wide", 8184, 64 + 4096 * 2 * 31 // 8),
    ],
)
def test_sizes_of_a_frame(name: str, values: int, size: int) -> None:
    packing = packing_for(name, 8)
    assert packing.values_per_frame == values == (4096 - CHECK_SLOTS) * packing.preset.values_per_slot
    assert packing.frame_bytes == size
    assert [packing.frames_for(n) for n in (0, 1, values, values + 1)] == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("name", "always_from"),
    [("exact16", 57_473), ("compact", 14_369), ("fine", 123_137), ("wide", 278_321)],
)
def test_an_encrypted_update_is_smaller_than_float32(name: str, always_from: int) -> None:
    """A frame is whole or not there, so that a nearly empty last frame costs as much as a full one.

    Whole frames always win; for every other size the test pins down from where on they do.
    """
    packing = packing_for(name, 256)

    def wins(parameters: int) -> bool:
        return packing.frames_for(parameters) * packing.frame_bytes < 4 * parameters

    full = packing.values_per_frame
    assert all(wins(frames * full) for frames in range(1, 200))
    assert not wins(always_from - 1)
    assert all(wins(parameters) for parameters in range(always_from, always_from + 10 * full))
    # From here on it is arithmetic: one more frame takes fewer bytes than its values as float32.
    assert packing.frame_bytes < 4 * full


def test_different_packings_have_different_hashes() -> None:
    packings = [packing_for(name, cohort) for name, cohort in COHORTS]
    hashes = {packing.sha256() for packing in packings}
    assert len(hashes) == len(packings)
    packing = packing_for("exact16", 8)
    assert packing_for("exact16", 8).sha256() == packing.sha256()
    for changed in (
        replace(packing, plain_modulus=packing.plain_modulus - 8192),
        replace(packing, half_levels=packing.half_levels - 1),
        replace(packing, cohort=7),
        replace(packing, preset=replace(packing.preset, poly_modulus_degree=8192)),
        replace(packing, preset=replace(packing.preset, values_per_slot=1)),
        replace(packing, preset=replace(packing.preset, coefficient_moduli=(2**56 - 5,))),
    ):
        assert changed.sha256() != packing.sha256()
