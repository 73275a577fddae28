"""How a message and its blob stand in a Flower record.

Flower moves every object of a record with requests of its own, so a small message is one configuration
record with bytes, and only a large blob becomes an array, which Flower cuts into chunks.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from protocol.errors import EncodingInvalid

LARGE_BLOB_BYTES: Final = 4 * 1024 * 1024
_RECORD: Final = "fedseal"
_ARRAYS: Final = "fedseal-blob"


def to_record(body: bytes, blob: bytes = b"") -> RecordDict:
    """Put a message's canonical bytes and its blob into a record."""
    values: dict[str, bytes] = {"body": body}
    if len(blob) <= LARGE_BLOB_BYTES:
        values["blob"] = blob
        return RecordDict({_RECORD: ConfigRecord(dict(values))})
    array = Array(np.frombuffer(blob, dtype=np.uint8))
    return RecordDict({_RECORD: ConfigRecord(dict(values)), _ARRAYS: ArrayRecord({"blob": array})})


def from_record(record: RecordDict) -> tuple[bytes, bytes]:
    """Return (body, blob) of a peer's record.

    Raises:
        EncodingInvalid: The record does not have this form.
    """
    try:
        config = record.config_records[_RECORD]
        body = config["body"]
        if _ARRAYS in record.array_records:
            array = record.array_records[_ARRAYS]["blob"].numpy()
            blob: object = array.tobytes() if array.dtype == np.uint8 and array.ndim == 1 else None
        else:
            blob = config["blob"]
    except (KeyError, ValueError, TypeError):
        raise EncodingInvalid("a record does not hold a fedseal message") from None
    if not isinstance(body, bytes) or not isinstance(blob, bytes):
        raise EncodingInvalid("a record does not hold a fedseal message")
    return body, blob
