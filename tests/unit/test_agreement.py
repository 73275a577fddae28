"""Both sides of a pair get one seed, and nobody else's wrap opens in its place."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from crypto.agreement import (
    HALF_SEED_BYTES,
    HpkeKey,
    WrapContext,
    fresh_half_seed,
    pair_seed,
    signed_hash,
    wrap,
)
from crypto.masks import advance, first_chain_key
from protocol.errors import ProtocolViolation
from protocol.messages import Signed

A, B, C, ROSTER = "a" * 64, "b" * 64, "c" * 64, "d" * 64
CONTEXT = WrapContext("e" * 64, ROSTER, A, B, "pair")
VECTORS = Path(__file__).parents[1] / "vectors"


def signed(kind: str, value: int) -> Signed:
    return Signed(kind=kind, body={"value": value}, signer=A, signature=b"s" * 64)


def test_both_sides_derive_the_same_pair_seed_over_hpke() -> None:
    lower, higher = HpkeKey.generate(), HpkeKey.generate()
    halves = {A: fresh_half_seed(), B: fresh_half_seed()}
    to_higher = wrap(higher.public(), halves[A], CONTEXT)
    to_lower = wrap(lower.public(), halves[B], replace(CONTEXT, sender=B, receiver=A))
    seed_of_lower = pair_seed(
        A, B, halves[A], lower.unwrap(to_lower, replace(CONTEXT, sender=B, receiver=A)), ROSTER
    )
    seed_of_higher = pair_seed(B, A, halves[B], higher.unwrap(to_higher, CONTEXT), ROSTER)
    assert seed_of_lower == seed_of_higher
    assert len(seed_of_lower) == 32


def test_a_pair_seed_depends_on_everything_that_goes_in() -> None:
    one, two = b"1" * 32, b"2" * 32
    seeds = {
        pair_seed(A, B, one, two, ROSTER),
        pair_seed(A, B, two, one, ROSTER),
        pair_seed(A, B, one, one, ROSTER),
        pair_seed(A, B, b"1" * 31 + b"0", two, ROSTER),
        pair_seed(A, B, one, b"2" * 31 + b"0", ROSTER),
        pair_seed(A, B, one, two, "f" * 64),
        pair_seed(A, C, one, two, ROSTER),
        pair_seed(B, C, one, two, ROSTER),
    }
    assert len(seeds) == 8


@pytest.mark.parametrize("half", [b"", b"1" * 31, b"1" * 33, b"1" * 64])
def test_a_half_of_another_length_is_refused(half: bytes) -> None:
    with pytest.raises(ProtocolViolation) as refused:
        pair_seed(A, B, b"1" * 32, half, ROSTER)
    assert refused.value.code == "FS-WIRE-03"


def test_fresh_halves_are_fresh() -> None:
    halves = {fresh_half_seed() for _ in range(100)}
    assert len(halves) == 100
    assert {len(half) for half in halves} == {HALF_SEED_BYTES}


@pytest.mark.parametrize(
    "change",
    [
        {"sender": B, "receiver": A},
        {"sender": C},
        {"receiver": C},
        {"run": "0" * 64},
        {"roster_hash": "0" * 64},
        {"run": ROSTER, "roster_hash": "e" * 64},
        {"purpose": "bfv"},
    ],
)
def test_a_wrap_opens_in_its_own_context_only(change: dict[str, Any]) -> None:
    key = HpkeKey.generate()
    ciphertext = wrap(key.public(), b"x" * 32, CONTEXT)
    assert key.unwrap(ciphertext, CONTEXT) == b"x" * 32
    with pytest.raises(ProtocolViolation):
        key.unwrap(ciphertext, replace(CONTEXT, **change))


def test_a_wrap_opens_for_its_receiver_only() -> None:
    key, other = HpkeKey.generate(), HpkeKey.generate()
    with pytest.raises(ProtocolViolation):
        other.unwrap(wrap(key.public(), b"x" * 32, CONTEXT), CONTEXT)


def test_half_a_key_does_not_open_a_wrap() -> None:
    """The KEM is a hybrid: with one of the two secrets replaced, nothing opens."""
    key, other = HpkeKey.generate(), HpkeKey.generate()
    ciphertext = wrap(key.public(), b"x" * 32, CONTEXT)
    lattice_only = HpkeKey.from_secret(key.secret()[:64] + other.secret()[64:])
    curve_only = HpkeKey.from_secret(other.secret()[:64] + key.secret()[64:])
    for half in (lattice_only, curve_only):
        with pytest.raises(ProtocolViolation):
            half.unwrap(ciphertext, CONTEXT)


def test_a_changed_wrap_does_not_open() -> None:
    key = HpkeKey.generate()
    ciphertext = wrap(key.public(), b"x" * 32, CONTEXT)
    for position in (0, 500, 1087, 1088, 1119, 1120, len(ciphertext) - 1):
        changed = bytearray(ciphertext)
        changed[position] ^= 1
        with pytest.raises(ProtocolViolation):
            key.unwrap(bytes(changed), CONTEXT)
    low_order_point = ciphertext[:1088] + bytes(32) + ciphertext[1120:]
    for wrong in (
        b"",
        ciphertext[:31],
        ciphertext[:1120],
        ciphertext[:-1],
        ciphertext + b"\0",
        low_order_point,
    ):
        with pytest.raises(ProtocolViolation):
            key.unwrap(wrong, CONTEXT)


def test_two_wraps_of_one_secret_differ() -> None:
    key = HpkeKey.generate()
    assert wrap(key.public(), b"x" * 32, CONTEXT) != wrap(key.public(), b"x" * 32, CONTEXT)


def test_a_malformed_public_key_is_refused() -> None:
    public = HpkeKey.generate().public()
    assert len(public) == 1216
    low_order_point = public[:1184] + bytes(32)
    unreduced = b"\xff" * 1184 + public[1184:]
    for wrong in (b"", public[:-1], public + b"\0", public[:1184], low_order_point, unreduced):
        with pytest.raises(ProtocolViolation, match="malformed"):
            wrap(wrong, b"x" * 32, CONTEXT)


def test_a_key_survives_its_secret_form() -> None:
    key = HpkeKey.generate()
    assert len(key.secret()) == 96
    copy = HpkeKey.from_secret(key.secret())
    assert copy.public() == key.public()
    assert copy.secret() == key.secret()
    assert copy.unwrap(wrap(key.public(), b"residues" * 3584, CONTEXT), CONTEXT) == b"residues" * 3584
    assert HpkeKey.generate().public() != key.public()


def test_the_hash_of_signed_messages_covers_order_and_every_field() -> None:
    one, two = signed("join", 1), signed("join", 2)
    lists = [
        [],
        [one],
        [one, two],
        [two, one],
        [one, one],
        [one.model_copy(update={"signature": b"t" * 64}), two],
        [one.model_copy(update={"signer": B}), two],
        [one.model_copy(update={"kind": "ready"}), two],
    ]
    assert len({signed_hash(messages) for messages in lists}) == len(lists)


def test_the_published_vectors_are_reproduced() -> None:
    vector = json.loads((VECTORS / "seeds.json").read_text())
    lower, higher = vector["lower"], vector["higher"]
    seed = pair_seed(
        lower["fingerprint"],
        higher["fingerprint"],
        bytes.fromhex(lower["half"]),
        bytes.fromhex(higher["half"]),
        vector["roster_hash"],
    )
    assert seed.hex() == vector["pair_seed"]
    chain = first_chain_key(seed)
    for entry in vector["chain"]:
        assert advance(chain, entry["attempt"]).hex() == entry["chain_key"]
