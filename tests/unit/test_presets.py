"""The parameter sets are what they say, and their proof of capacity holds where it must and no further."""

from dataclasses import replace
from fractions import Fraction

import pytest

from crypto.bfv import BfvContext
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

NAMES = sorted(PRESETS)
COHORTS = [1, 2, 3, 7, 8, 9, 63, 64, 65, 128, 255, 256]
WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)


def is_prime(number: int) -> bool:
    """Miller-Rabin with the witnesses that are proved to suffice below 3.18e23 (Sorenson, Webster)."""
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


@pytest.mark.parametrize("name", NAMES)
def test_the_ciphertext_modulus_is_a_prime_of_56_bits(name: str) -> None:
    preset = PRESETS[name]
    assert preset.name == name
    assert preset.coefficient_modulus.bit_length() == 56
    assert preset.coefficient_modulus % (2 * preset.poly_modulus_degree) == 1
    assert is_prime(preset.coefficient_modulus)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cohort", [1, 8, 9, 64, 65, 256])
def test_the_library_builds_exactly_these_moduli(name: str, cohort: int) -> None:
    packing = packing_for(name, cohort)
    context = BfvContext(packing).seal
    for data in (context.first_context_data(), context.key_context_data()):
        built = data.parms()
        assert [modulus.value() for modulus in built.coeff_modulus()] == [
            packing.preset.coefficient_modulus
        ]
        assert built.plain_modulus().value() == packing.plain_modulus
        assert built.poly_modulus_degree() == 4096
    assert not context.using_keyswitching()


def test_a_library_with_other_moduli_is_refused() -> None:
    packing = packing_for("exact16", 8)
    other_t = replace(packing, plain_modulus=PLAIN_MODULI[47] - 8192)
    other_q = replace(packing, preset=replace(packing.preset, coefficient_modulus=2**56 - 5))
    weak_q = replace(packing, preset=replace(packing.preset, coefficient_modulus=2**60 - 1))
    for changed in (other_t, other_q, weak_q):
        with pytest.raises(EncryptionUnavailable):
            BfvContext(changed)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cohort", COHORTS)
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
    packings = [packing_for(name, cohort) for cohort in range(1, 257)]
    for smaller, larger in zip(packings, packings[1:], strict=False):
        assert larger.plain_modulus <= smaller.plain_modulus
        assert larger.radix <= smaller.radix
        assert larger.half_levels <= smaller.half_levels


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cohort", [257, 1024, 10**9])
def test_a_cohort_above_the_limit_is_refused(name: str, cohort: int) -> None:
    with pytest.raises(CapacityExceeded) as refused:
        packing_for(name, cohort)
    assert refused.value.code == "FS-PLAN-02"
    assert "256" in refused.value.detail


def forged(packing: Packing) -> list[Packing]:
    return [
        replace(packing, cohort=packing.cohort * 64),
        replace(packing, half_levels=packing.half_levels * 2),
        replace(packing, half_levels=0),
        replace(packing, radix=packing.radix * 2),
        replace(packing, plain_modulus=PLAIN_MODULI[47] * 1024),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_the_proof_fails_for_a_forged_packing(name: str) -> None:
    packing = packing_for(name, 64)
    prove_capacity(packing)
    for changed in forged(packing):
        with pytest.raises(CapacityExceeded):
            prove_capacity(changed)


def test_the_noise_bound_is_what_limits_the_table() -> None:
    """With a larger plain modulus than the table's, the proof fails: no row is wasteful by a row."""
    for name in NAMES:
        for largest, bits in PRESETS[name].plain_bits[1:]:
            packing = packing_for(name, largest)
            wider = max(t for b, t in PLAIN_MODULI.items() if b > bits)
            with pytest.raises(CapacityExceeded, match="noise"):
                prove_capacity(replace(packing, plain_modulus=wider))


@pytest.mark.parametrize(("name", "values"), [("exact16", 8184), ("compact", 12276)])
def test_sizes_of_a_frame(name: str, values: int) -> None:
    packing = packing_for(name, 8)
    assert packing.values_per_frame == values == (4096 - CHECK_SLOTS) * packing.preset.values_per_slot
    assert packing.residue_bytes == 7
    assert packing.frame_bytes == 64 + 4096 * 7
    assert [packing.frames_for(n) for n in (0, 1, values, values + 1)] == [0, 1, 1, 2]


@pytest.mark.parametrize("name", NAMES)
def test_an_update_of_8192_values_is_smaller_than_float32(name: str) -> None:
    """From 8,192 values on; just above a whole number of frames is the worst case."""
    packing = packing_for(name, 256)
    for parameters in [8192 * 4, 16_369, 24_553, 100_000, 1_000_000]:
        sent = packing.frames_for(parameters) * packing.frame_bytes
        assert sent < 4 * parameters


def test_different_packings_have_different_hashes() -> None:
    packings = [packing_for(name, cohort) for name in NAMES for cohort in COHORTS]
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
        replace(packing, preset=replace(packing.preset, coefficient_modulus=2**56 - 5)),
    ):
        assert changed.sha256() != packing.sha256()
