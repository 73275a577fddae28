"""Every value has one spelling, and a decoder takes no other."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from protocol.encoding import MAX_BODY_BYTES, MAX_DEPTH, Blob, Digest, decode, digest, digest_bytes, encode
from protocol.errors import EncodingInvalid

VECTORS = Path(__file__).parents[1] / "vectors"


class Holder(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    blob: Blob = b""
    hash: Digest = "0" * 64


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "spelling"),
    [
        ({"b": 1, "a": [True, None, "x"]}, b'{"a":[true,null,"x"],"b":1}'),
        ({"k": 1.0, "j": 1}, b'{"j":1,"k":1.0}'),
        ("ü\n\x7f", b'"\\u00fc\\n\\u007f"'),
        ("😀", b'"\\ud83d\\ude00"'),
        (1e300, b"1e+300"),
        (-0.0, b"-0.0"),
        (2**70, b"1180591620717411303424"),
        ({}, b"{}"),
        ([], b"[]"),
    ],
)
def test_known_spellings_go_both_ways(value: Any, spelling: bytes) -> None:
    assert encode(value) == spelling
    assert decode(spelling) == value
    assert digest(value) == digest_bytes(spelling) == hashlib.sha256(spelling).hexdigest()


def test_key_order_of_the_writer_does_not_matter() -> None:
    assert encode({"a": {"y": 1, "x": 2}, "b": 3}) == encode({"b": 3, "a": {"x": 2, "y": 1}})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_that_json_lacks_is_written(value: float) -> None:
    with pytest.raises(EncodingInvalid):
        encode({"deep": [value]})


@pytest.mark.parametrize("value", [b"bytes", {1, 2}, object(), 1j, {("a",): 1}, {1: 1, "1": 2}])
def test_no_type_outside_json_is_written(value: Any) -> None:
    with pytest.raises(EncodingInvalid):
        encode(value)


@pytest.mark.parametrize("data", [b"NaN", b"[Infinity]", b"-Infinity", b"[1e999]", b'{"a":NaN}'])
def test_no_number_that_json_lacks_is_read(data: bytes) -> None:
    with pytest.raises(EncodingInvalid):
        decode(data)


@pytest.mark.parametrize(
    "data",
    [
        b'{"a":1,"a":1}',
        b'{"a":1,"a":2}',
        b'{"b":1,"a":2}',
        b'{"a": 1}',
        b' {"a":1}',
        b'{"a":1}\n',
        b"[1,\t2]",
        b'"\\u0061"',
        b'"\\/"',
        b'"\\u00FC"',
        b'"\\u000a"',
        b"1.50",
        b"1E5",
        b"1e5",
        b"1e+5",
        b"0.10",
        b"-0",
        b"100000000000000000000.0",
    ],
)
def test_another_spelling_of_the_same_value_is_refused(data: bytes) -> None:
    json.loads(data)
    with pytest.raises(EncodingInvalid, match="canonical"):
        decode(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"01",
        b"'a'",
        b"{}{}",
        b"[1,]",
        b"\xff",
        b"\xef\xbb\xbf{}",
        '"ü"'.encode(),
        '"ü"'.encode("utf-16"),
        b"\x00",
        b'"\n"',
        b"nul",
    ],
)
def test_what_is_not_json_in_ascii_is_refused(data: bytes) -> None:
    with pytest.raises(EncodingInvalid):
        decode(data)


def test_the_deepest_allowed_value_passes_and_one_level_more_does_not() -> None:
    assert decode(encode(nested(MAX_DEPTH))) == nested(MAX_DEPTH)
    with pytest.raises(EncodingInvalid, match="nested"):
        decode(encode(nested(MAX_DEPTH + 1)))


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_depth_that_would_exhaust_the_stack_is_refused(opening: bytes) -> None:
    closing = {b"[": b"]"}.get(opening, b"}")
    with pytest.raises(EncodingInvalid):
        decode(opening * 200_000 + b"1" + closing * 200_000)
    with pytest.raises(EncodingInvalid):
        encode(nested(100_000))


def test_size_is_checked_before_anything_is_parsed() -> None:
    text = b'"' + b"a" * 10 + b'"'
    assert decode(text, limit_bytes=12) == "a" * 10
    with pytest.raises(EncodingInvalid, match="11 bytes"):
        decode(text, limit_bytes=11)
    with pytest.raises(EncodingInvalid, match="longer"):
        decode(b"\xff" * (MAX_BODY_BYTES + 1))


def test_a_number_of_too_many_digits_is_refused() -> None:
    with pytest.raises(EncodingInvalid):
        decode(b"1" * 5000)
    with pytest.raises(EncodingInvalid):
        encode(10**5000)


def test_refusals_do_not_echo_what_was_received() -> None:
    with pytest.raises(EncodingInvalid) as refused:
        decode(b'{"secret": "patient 7731"}')
    assert "7731" not in refused.value.explain()


@pytest.mark.parametrize("text", ["YQ==", "", "AAECAwQ=", "////"])
def test_base64_goes_both_ways(text: str) -> None:
    holder = Holder.model_validate({"blob": text})
    assert holder.model_dump(mode="json")["blob"] == text


@pytest.mark.parametrize("text", ["YQ", "YQ=", "YR==", "YQ==\n", " YQ==", "Y Q==", "-_-_", "YQ===", "é", 7])
def test_other_spellings_of_base64_are_refused(text: object) -> None:
    with pytest.raises(ValidationError):
        Holder.model_validate({"blob": text})


@pytest.mark.parametrize("text", ["0" * 63, "0" * 65, "A" * 64, "g" * 64, "0" * 64 + "\n", "", 0])
def test_a_digest_has_64_lower_case_hex_digits(text: object) -> None:
    with pytest.raises(ValidationError):
        Holder.model_validate({"hash": text})


def test_the_published_vectors_are_reproduced() -> None:
    vectors = json.loads((VECTORS / "encoding.json").read_text())
    for entry in vectors["canonical"]:
        assert encode(entry["value"]) == entry["bytes"].encode("ascii")
        assert digest(entry["value"]) == entry["sha256"]
    for text in vectors["refused"]:
        with pytest.raises(EncodingInvalid):
            decode(text.encode())


@pytest.mark.parametrize("codes", [[0xD800], [0xDFFF], [0x61, 0xDC00], [0xD83D, 0xD83D]])
def test_half_a_surrogate_pair_is_no_text(codes: list[int]) -> None:
    """It has bytes in JSON and nowhere else: whoever wrote it down would stop with an error of its own."""
    half = "".join(map(chr, codes))
    for value in (half, {half: 1}, [[half]]):
        with pytest.raises(EncodingInvalid):
            encode(value)
        with pytest.raises(EncodingInvalid):
            decode(json.dumps(value, separators=(",", ":")).encode())
    assert decode(encode("\U0001f600 \\ud800")) == "\U0001f600 \\ud800"
