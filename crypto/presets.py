"""Parameter sets of the homomorphic encryption, and the proof that a sum fits into them.

All presets are BFV over a small ciphertext modulus, because nothing but addition is needed. The
arithmetic here is plain Python integers, so that a plan can be checked without the encryption library;
`crypto.frames` asserts that the library builds exactly these moduli.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

from protocol.encoding import digest
from protocol.errors import CapacityExceeded

CHECK_SLOTS: Final = 4
"""Slots of every frame in which each contributor puts a 1."""

FRESH_NOISE: Final = 21.5
"""Bound on one fresh symmetric ciphertext's noise: SEAL's centred binomial error is at most 21, and
encoding rounds by at most 1/2."""

SEED_BYTES: Final = 64
"""Public seed from which half of a symmetric ciphertext is expanded."""

PLAIN_MODULI: Final = {
    53: 9007199254429697,
    51: 2251799813554177,
    50: 1125899906826241,
    48: 281474976694273,
    47: 140737488273409,
    46: 70368743669761,
    44: 17592186028033,
    42: 4398046486529,
}
"""Largest primes congruent to 1 modulo 8192 of a given bit length, as SEAL chooses them."""


FLOAT32_BYTES: Final = 4.0
"""Bytes of a value that is not encrypted; an encrypted one takes fewer, unless a preset promises more."""

PROMISED_BYTES: Final = {"exact16": 3.6, "compact": 2.4}
"""Most bytes per value of a full frame that a preset promises; others promise less than float32."""


@dataclass(frozen=True)
class Preset:
    """One named parameter set.

    Attributes:
        name: Name in the plan.
        poly_modulus_degree: Ring dimension, also the number of slots of a frame.
        coefficient_moduli: Primes whose product is the ciphertext modulus q.
        values_per_slot: Quantized values that share one slot as digits of a radix.
        plain_bits: (largest cohort, bits of the plain modulus t), in ascending order of cohort.
        security_bits: Security class that SEAL's table gives for this q; asserted at start.
        scheme: BFV, or CKKS for compatibility; see `crypto.ckks`.
        special_modulus: A prime that SEAL adds to a CKKS context for key switching, which is never done.
    """

    name: str
    poly_modulus_degree: int
    coefficient_moduli: tuple[int, ...]
    values_per_slot: int
    plain_bits: tuple[tuple[int, int], ...]
    security_bits: int
    scheme: Literal["BFV", "CKKS"] = "BFV"
    special_modulus: int | None = None

    @property
    def slots(self) -> int:
        """Integers that one frame carries in its slots, check slots included."""
        return self.poly_modulus_degree if self.scheme == "BFV" else self.poly_modulus_degree // 2

    @property
    def key_moduli(self) -> tuple[int, ...]:
        """Primes of a secret key."""
        special = () if self.special_modulus is None else (self.special_modulus,)
        return self.coefficient_moduli + special

    @property
    def coefficient_modulus(self) -> int:
        """The ciphertext modulus q."""
        return math.prod(self.coefficient_moduli)


_Q56, _Q60 = (72057594037641217,), (1152921504606830593,)
_Q62 = (2147352577, 2147377153)
_Q100 = (1152921504606830593, 1099510890497)
_SMALL_T = ((8, 47), (64, 44), (256, 42))

PRESETS: Final = {
    "exact16": Preset("exact16", 4096, _Q56, 2, _SMALL_T, 256),
    "compact": Preset("compact", 4096, _Q56, 3, _SMALL_T, 256),
    "fine": Preset("fine", 4096, _Q60, 2, ((8, 51), (64, 48), (256, 46)), 192),
    "wide": Preset("wide", 4096, _Q62, 2, ((8, 53), (64, 50), (256, 48), (1024, 46)), 192),
    "ckks": Preset("ckks", 8192, _Q100, 1, ((256, 31),), 128, "CKKS", 1099511480321),
}

CKKS_SCALE_BITS: Final = 40
"""CKKS values are multiplied by 2**40 before they are rounded to ring elements."""


@dataclass(frozen=True)
class Packing:
    """A preset fitted to a cohort: how values are quantized, packed and summed.

    Attributes:
        preset: The parameter set.
        cohort: Most contributors of one sum.
        plain_modulus: t; slots are integers modulo t.
        radix: B, the size of one field; a slot holds `values_per_slot` fields.
        half_levels: L; a value is quantized to an integer in [-L, L] and sent as an integer in [0, 2L].
    """

    preset: Preset
    cohort: int
    plain_modulus: int
    radix: int
    half_levels: int

    @property
    def values_per_frame(self) -> int:
        """Quantized values that one frame carries."""
        return (self.preset.slots - CHECK_SLOTS) * self.preset.values_per_slot

    @property
    def residues_bytes(self) -> int:
        """Bytes of all residues of one polynomial, packed without gaps."""
        bits = sum(modulus.bit_length() for modulus in self.preset.coefficient_moduli)
        return self.preset.poly_modulus_degree * bits // 8

    @property
    def frame_bytes(self) -> int:
        """Exact length of one frame in bytes."""
        return SEED_BYTES + self.residues_bytes

    def frames_for(self, parameters: int) -> int:
        """Return the number of frames for `parameters` values."""
        return -(-parameters // self.values_per_frame)

    def sha256(self) -> str:
        """Return the hash that headers carry; equal packings have equal hashes."""
        return digest(
            {
                "preset": self.preset.name,
                "poly_modulus_degree": self.preset.poly_modulus_degree,
                "coefficient_moduli": [str(q) for q in self.preset.coefficient_moduli],
                "plain_modulus": str(self.plain_modulus),
                "values_per_slot": self.preset.values_per_slot,
                "half_levels": self.half_levels,
                "cohort": self.cohort,
            }
        )


def packing_for(preset_name: str, cohort: int) -> Packing:
    """Fit a preset to a cohort and prove that its sums are exact.

    The proof has two parts, both over integers. Decryption never fails if
    ``cohort * 21.5 < q / (2 t)``. Fields never carry if twice the largest sum, ``2 * cohort * 2L``, is
    below the radix; the factor two is one guard bit, so that a field out of range is evidence.

    Args:
        preset_name: A key of `PRESETS`.
        cohort: Most contributors of one sum, at least 1.

    Raises:
        CapacityExceeded: No plain modulus of the preset holds this cohort.
    """
    preset = PRESETS[preset_name]
    bits = next((bits for largest, bits in preset.plain_bits if cohort <= largest), None)
    if bits is None:
        largest = preset.plain_bits[-1][0]
        raise CapacityExceeded(
            f"encryption.preset: {preset_name} holds at most {largest} owners, cohort.maximum is {cohort}"
        )
    plain_modulus = PLAIN_MODULI[bits] if preset.scheme == "BFV" else 1 << bits
    radix = _integer_root(plain_modulus, preset.values_per_slot)
    half_levels = (radix - 1) // (4 * cohort)
    packing = Packing(preset, cohort, plain_modulus, radix, half_levels)
    prove_capacity(packing)
    return packing


def broken_byte_promise(preset_name: str, bytes_per_value: float) -> str | None:
    """Say which promise about the size of an update frames of this size break; None if none.

    Args:
        preset_name: A key of `PRESETS`.
        bytes_per_value: Bytes of a full frame over the values in it.
    """
    limit = PROMISED_BYTES.get(preset_name)
    broken = []
    if limit is not None and bytes_per_value > limit:
        broken.append(f"above the {limit:g} that {preset_name} promises")
    if bytes_per_value >= FLOAT32_BYTES:
        broken.append(f"not below float32's {FLOAT32_BYTES:g}")
    return f"{bytes_per_value:.2f} bytes per value are {' and '.join(broken)}" if broken else None


def prove_capacity(packing: Packing) -> None:
    """Check the two inequalities of `packing_for`; see there.

    Raises:
        CapacityExceeded: One of them does not hold.
    """
    t = packing.plain_modulus
    if not packing.cohort * FRESH_NOISE < noise_limit(packing):
        raise CapacityExceeded("encryption.preset: the noise of this many ciphertexts is too large")
    if packing.half_levels < 1 or not 4 * packing.cohort * packing.half_levels < packing.radix:
        raise CapacityExceeded("encryption.preset: a field cannot hold twice the largest sum")
    if packing.radix**packing.preset.values_per_slot > t:
        raise CapacityExceeded("encryption.preset: the fields of a slot do not fit the plain modulus")


def noise_limit(packing: Packing) -> float:
    """Return what the summed noise of all ciphertexts must stay below.

    BFV decrypts correctly below ``q / (2 t)``. In CKKS a slot's error is at most the sum of its
    coefficients' errors over the scale; it must stay below a quarter, which leaves room for float64.
    """
    preset = packing.preset
    if preset.scheme == "CKKS":
        return 2.0**CKKS_SCALE_BITS / (4 * preset.poly_modulus_degree)
    return preset.coefficient_modulus / (2 * packing.plain_modulus)


def _integer_root(value: int, degree: int) -> int:
    root: int = round(float(value) ** (1.0 / degree))
    while root**degree > value:
        root -= 1
    while (root + 1) ** degree <= value:
        root += 1
    return root
