"""What must hold for every value and for every byte string."""

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.encoding import decode, digest, encode
from protocol.errors import EncodingInvalid

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)
QUICK = settings(max_examples=200, deadline=None)


def same(a: Any, b: Any) -> bool:
    """Equal in type as well, down to the sign of zero; 1, 1.0 and true are three values."""
    return repr(a) == repr(b)


def in_order(value: Any) -> Any:
    """The value with every dict in ascending order of keys, as the wire has it."""
    if isinstance(value, dict):
        return {key: in_order(value[key]) for key in sorted(value)}
    return [in_order(item) for item in value] if isinstance(value, list) else value


@QUICK
@given(VALUES)
def test_every_value_survives(value: Any) -> None:
    assert same(decode(encode(value)), in_order(value))


@QUICK
@given(VALUES, VALUES)
def test_equal_bytes_mean_equal_values(a: Any, b: Any) -> None:
    assert (encode(a) == encode(b)) == same(in_order(a), in_order(b)) == (digest(a) == digest(b))


@QUICK
@given(VALUES)
def test_any_other_writer_of_json_is_refused_or_agrees(value: Any) -> None:
    for text in (
        json.dumps(value),
        json.dumps(value, ensure_ascii=False),
        json.dumps(value, indent=1),
        json.dumps(value, separators=(",", ":")),
    ):
        data = text.encode("utf-8", "surrogatepass")
        try:
            decode(data)
        except EncodingInvalid:
            assert data != encode(value)
        else:
            assert data == encode(value)


@QUICK
@given(st.binary(max_size=60))
def test_random_bytes_are_refused_or_canonical(data: bytes) -> None:
    try:
        value = decode(data)
    except EncodingInvalid:
        return
    assert encode(value) == data


@QUICK
@given(VALUES, st.data())
def test_one_changed_byte_never_gives_the_same_value(value: Any, data: st.DataObject) -> None:
    original = encode(value)
    position = data.draw(st.integers(0, len(original) - 1))
    changed = bytearray(original)
    changed[position] ^= data.draw(st.integers(1, 255))
    try:
        other = decode(bytes(changed))
    except EncodingInvalid:
        return
    assert not same(other, in_order(value))
