"""Canonical bytes for everything that is hashed, signed or sent.

The form is JSON with sorted keys, no white space, ASCII only, and no NaN or infinity, so that equal
values have equal bytes. A decoder accepts a text only if encoding its value again gives the same bytes:
there is one spelling of every message, and a signature covers exactly what was parsed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, StringConstraints

from protocol.errors import EncodingInvalid

MAX_BODY_BYTES = 8 * 1024 * 1024
"""Upper limit of one encoded message body, in bytes. Ciphertext frames travel outside the body."""

MAX_DEPTH = 32
"""Deepest nesting that `decode` accepts."""

_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def encode(value: Any) -> bytes:
    """Return the canonical bytes of a JSON value.

    Args:
        value: dict with string keys, list, str, int, finite float, bool or None, nested at will.

    Raises:
        EncodingInvalid: The value has NaN, infinity, half a surrogate pair, or a type outside JSON.
    """
    try:
        text = _CANONICAL.encode(value)
        if "\\ud" in text:
            # half of a surrogate pair is no text: it fails here, not where somebody writes it down
            json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise EncodingInvalid("a value cannot be encoded") from error
    return text.encode("ascii")


def decode(data: bytes, limit_bytes: int = MAX_BODY_BYTES) -> Any:
    """Parse canonical bytes of a peer; anything but the one canonical spelling is refused.

    Args:
        data: Bytes as received.
        limit_bytes: Longest accepted input.

    Raises:
        EncodingInvalid: Too long, not JSON, nested too deeply, or not canonical.
    """
    if len(data) > limit_bytes:
        raise EncodingInvalid(f"the message is longer than {limit_bytes} bytes")
    try:
        value = json.loads(data.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise EncodingInvalid("the message is not JSON") from error
    if _depth_exceeds(value, MAX_DEPTH):
        raise EncodingInvalid("the message is nested too deeply")
    if encode(value) != data:
        raise EncodingInvalid("the message is not in its canonical spelling")
    return value


def digest(value: Any) -> str:
    """Return the SHA-256 of the canonical bytes of `value`, as 64 lower-case hex digits."""
    return hashlib.sha256(encode(value)).hexdigest()


def digest_bytes(data: bytes) -> str:
    """Return the SHA-256 of raw bytes, as 64 lower-case hex digits."""
    return hashlib.sha256(data).hexdigest()


def _depth_exceeds(value: Any, limit: int) -> bool:
    if limit < 0:
        return True
    if isinstance(value, dict):
        return any(_depth_exceeds(item, limit - 1) for item in value.values())
    if isinstance(value, list):
        return any(_depth_exceeds(item, limit - 1) for item in value)
    return False


def _bytes_to_text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _text_to_bytes(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        data = base64.b64decode(value.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise ValueError("not base64") from error
    if _bytes_to_text(data) != value:
        raise ValueError("not canonical base64")
    return data


Blob = Annotated[bytes, BeforeValidator(_text_to_bytes), PlainSerializer(_bytes_to_text, return_type=str)]
"""Bytes that stand in a message as base64 with padding."""

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""A SHA-256 as 64 lower-case hex digits."""
