"""Several byte strings as one, so that one request carries what would take many."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Final

from protocol.errors import EncodingInvalid

INLINE_BYTES: Final = 12 * 1024 * 1024
"""Content that one batch carries at most; what is left over travels by itself. A part of an encrypted
update (`crypto.parts`) fits."""

MAX_BATCH_BYTES: Final = 32 * 1024 * 1024
"""Longest accepted batch."""

MAX_ITEMS: Final = 65_536
"""Most byte strings of a batch."""

LONGEST_WAIT_S: Final = 10.0
"""Longest time that a request waits for something to come; below every limit of HTTP clients."""

LONGEST_RECONNECT_S: Final = 15.0
"""Longest pause of a node between two attempts to connect."""

RECEIVE_PATH: Final = "/v1/fleet/fedseal/receive"
ANSWER_PATH: Final = "/v1/fleet/fedseal/answer"
PUSH_PATH: Final = "/v1/runtime/fedseal/push"
PULL_PATH: Final = "/v1/runtime/fedseal/pull"

_LENGTH: Final = struct.Struct("<Q")

ITEM_HEAD_BYTES: Final = _LENGTH.size
"""Length of what stands before an item."""


def join_batch(items: Iterable[bytes]) -> bytes:
    """Return byte strings as one, each after its length as eight little-endian bytes."""
    return b"".join(piece for item in items for piece in (item_head(len(item)), item))


def item_head(length: int) -> bytes:
    """Return what stands before an item of a batch that is that many bytes long."""
    return _LENGTH.pack(length)


def item_length(head: bytes) -> int:
    """Return the length of an item, from the `ITEM_HEAD_BYTES` that stand before it.

    Raises:
        EncodingInvalid: The item is longer than any batch.
    """
    (length,) = _LENGTH.unpack(head)
    if length > MAX_BATCH_BYTES:
        raise EncodingInvalid(f"a batch is longer than {MAX_BATCH_BYTES} bytes")
    return int(length)


def fitting(contents: Iterable[bytes]) -> Iterator[bytes]:
    """Yield contents as long as a batch carries them; what is left over travels by itself."""
    left = INLINE_BYTES
    for content in contents:
        left -= len(content)
        if left < 0:
            return
        yield content


class RawMessage:
    """Stands where Flower's HTTP client takes a protobuf message, and is nothing but its bytes.

    Args:
        content: The bytes, of a request; those of an answer are read into it.
    """

    def __init__(self, content: bytes = b"") -> None:
        self.content = content

    def SerializeToString(self, *, deterministic: bool = False) -> bytes:
        """Return the bytes, as Flower calls it."""
        del deterministic
        return self.content

    def ParseFromString(self, data: bytes) -> None:
        """Take the bytes, as Flower calls it."""
        self.content = data


def split_batch(data: bytes | bytearray) -> list[bytes]:
    """Inverse of `join_batch` for bytes of a peer.

    Raises:
        EncodingInvalid: The bytes are no batch, or one beyond the limits.
    """
    if len(data) > MAX_BATCH_BYTES:
        raise EncodingInvalid(f"a batch is longer than {MAX_BATCH_BYTES} bytes")
    items: list[bytes] = []
    view = memoryview(data)
    while view:
        if len(view) < ITEM_HEAD_BYTES or len(items) == MAX_ITEMS:
            raise EncodingInvalid("a batch is cut off or has too many items")
        length, view = item_length(bytes(view[:ITEM_HEAD_BYTES])), view[ITEM_HEAD_BYTES:]
        if length > len(view):
            raise EncodingInvalid("a batch is cut off")
        items.append(bytes(view[:length]))
        view = view[length:]
    return items
