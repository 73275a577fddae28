"""Signatures: what they bind, and every way to show one for something else."""

from __future__ import annotations

import hashlib
import json
from typing import Any, ClassVar

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from crypto.certificates import fingerprint
from crypto.signing import sign, sign_bytes, verify, verify_bytes
from protocol.errors import EncodingInvalid, SignatureInvalid
from protocol.messages import Body, Ready, Session, Signed

# RFC 8032, section 7.1, test 1.
KEY = Ed25519PrivateKey.from_private_bytes(
    bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
)
PUBLIC = KEY.public_key()
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(32))
SESSION = Session(session="ab" * 32)


class Weight(Body):
    """A body with a float and a default, which JSON can spell in several ways."""

    KIND: ClassVar[str] = "weight"
    value: float
    note: str = ""


class Handover(Body):
    """A body with the same fields as `Session` under another kind."""

    KIND: ClassVar[str] = "handover"
    session: str


def _changed(signed: Signed, **fields: Any) -> Signed:
    return signed.model_copy(update=fields)


def test_known_answer() -> None:
    # The hex was computed with a program of its own, from RFC 8032 and hashlib alone.
    signed = sign(KEY, SESSION)
    text = json.dumps({"session": "ab" * 32}, sort_keys=True, separators=(",", ":"))
    spki = bytes.fromhex("302a300506032b6570032100") + PUBLIC.public_bytes(Encoding.Raw, PublicFormat.Raw)
    assert signed.kind == "session"
    assert signed.signer == hashlib.sha256(spki).hexdigest()
    assert signed.signature.hex() == (
        "db475f4529bbff3080bdbf0bb9fda76ae6fb6927f901ee1c31525351c9ca4f62"
        "a0e39570f03b7d2023687ba79b0627043334dc0e78d170f326bb0059c93f030a"
    )
    PUBLIC.verify(signed.signature, b"fedseal/session/1\x00" + text.encode("ascii"))
    with pytest.raises(InvalidSignature):
        PUBLIC.verify(signed.signature, text.encode("ascii"))


def test_body_comes_back_also_after_the_wire() -> None:
    received = Signed.from_bytes(sign(KEY, SESSION).to_bytes())
    assert verify(received, PUBLIC, Session) == SESSION


@given(value=st.floats(allow_nan=False, allow_infinity=False), note=st.text(max_size=20))
def test_every_body_verifies(value: float, note: str) -> None:
    body = Weight(value=value, note=note)
    assert verify(Signed.from_bytes(sign(KEY, body).to_bytes()), PUBLIC, Weight) == body


def test_another_kind_is_refused_also_with_the_same_fields() -> None:
    signed = sign(KEY, SESSION)
    with pytest.raises(SignatureInvalid, match="kind handover"):
        verify(signed, PUBLIC, Handover)
    with pytest.raises(SignatureInvalid):
        verify(_changed(signed, kind="handover"), PUBLIC, Handover)
    with pytest.raises(SignatureInvalid):
        verify(signed, PUBLIC, Ready)


def test_another_body_is_refused() -> None:
    signed = sign(KEY, SESSION)
    for body in ({"session": "cd" * 32}, {}, {"session": "ab" * 32, "more": 1}):
        with pytest.raises(SignatureInvalid):
            verify(_changed(signed, body=body), PUBLIC, Session)


def test_another_signer_is_refused() -> None:
    signed, other = sign(KEY, SESSION), OTHER.public_key()
    with pytest.raises(SignatureInvalid, match="another signer"):
        verify(signed, other, Session)
    with pytest.raises(SignatureInvalid):
        verify(_changed(signed, signer=fingerprint(other)), other, Session)
    with pytest.raises(SignatureInvalid, match="another signer"):
        verify(_changed(signed, signer=fingerprint(other)), PUBLIC, Session)


def test_a_changed_or_cut_signature_is_refused() -> None:
    signed = sign(KEY, SESSION)
    good = signed.signature
    flipped = [good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :] for i in range(len(good))]
    for signature in (*flipped, good[:-1], good + b"\0", b"", bytes(64)):
        with pytest.raises(SignatureInvalid):
            verify(_changed(signed, signature=signature), PUBLIC, Session)


def test_s_plus_group_order_is_not_a_second_signature() -> None:
    order = 2**252 + 27742317777372353535851937790883648493
    signed = sign(KEY, SESSION)
    s = int.from_bytes(signed.signature[32:], "little") + order
    malleated = signed.signature[:32] + s.to_bytes(32, "little")
    with pytest.raises(SignatureInvalid):
        verify(_changed(signed, signature=malleated), PUBLIC, Session)


def _sign_fields(kind: str, fields: dict[str, Any]) -> Signed:
    text = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode("ascii")
    return Signed(kind=kind, body=fields, signer=fingerprint(PUBLIC), signature=sign_bytes(KEY, kind, text))


@pytest.mark.parametrize(
    "fields",
    [
        {"value": 1, "note": ""},
        {"value": 1.0},
        {"value": "1", "note": ""},
        {"value": 1.0, "note": "", "x": 0},
        {},
    ],
)
def test_a_true_signature_over_another_spelling_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(EncodingInvalid):
        verify(_sign_fields("weight", fields), PUBLIC, Weight)


def test_bytes_are_bound_to_key_kind_and_data() -> None:
    signature = sign_bytes(KEY, "report", b"data")
    PUBLIC.verify(signature, b"fedseal/report/1\0data")
    verify_bytes(PUBLIC, "report", b"data", signature)
    for key, kind, data, value in (
        (PUBLIC, "package", b"data", signature),
        (PUBLIC, "report", b"datA", signature),
        (PUBLIC, "report", b"", signature),
        (OTHER.public_key(), "report", b"data", signature),
        (PUBLIC, "report", b"data", signature[::-1]),
    ):
        with pytest.raises(SignatureInvalid):
            verify_bytes(key, kind, data, value)


@given(st.text(max_size=12))
def test_only_plain_kinds_are_accepted(kind: str) -> None:
    plain = bool(kind) and set(kind) <= set("abcdefghijklmnopqrstuvwxyz-")
    if plain:
        verify_bytes(PUBLIC, kind, b"", sign_bytes(KEY, kind, b""))
        return
    with pytest.raises(SignatureInvalid):
        sign_bytes(KEY, kind, b"")
    with pytest.raises(SignatureInvalid):
        verify_bytes(PUBLIC, kind, b"", bytes(64))


@pytest.mark.parametrize("kind", ["", "report\n", "report/1\0", "Report", "repört", "a/b"])
def test_a_kind_cannot_carry_another_tag(kind: str) -> None:
    with pytest.raises(SignatureInvalid, match="lower-case"):
        sign_bytes(KEY, kind, b"")
