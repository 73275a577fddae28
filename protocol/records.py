"""How a message and its blob stand in a Flower record.

Flower moves every object of a record with requests of its own, so a small message is one configuration
record with bytes, and only a large blob becomes an array, which Flower cuts into chunks.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Final

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common.constant import SType

from protocol.errors import EncodingInvalid

LARGE_BLOB_BYTES: Final = 1024 * 1024
_RECORD: Final = "fedseal"
_ARRAYS: Final = "fedseal-blob"


def to_record(body: bytes, blob: bytes = b"") -> RecordDict:
    """Put a message's canonical bytes and its blob into a record."""
    return to_records([(body, blob)])[0]


def to_records(messages: Iterable[tuple[bytes, bytes]]) -> list[RecordDict]:
    """Do the same for several messages; a large blob that is the same object in some is copied once."""
    records, arrays = [], dict[int, ArrayRecord]()
    for body, blob in messages:
        if len(blob) <= LARGE_BLOB_BYTES:
            records.append(RecordDict({_RECORD: ConfigRecord({"body": body, "blob": blob})}))
            continue
        if id(blob) not in arrays:
            data = _header(len(blob)) + blob
            array = Array(dtype="uint8", shape=(len(blob),), stype=SType.NUMPY, data=data)
            arrays[id(blob)] = ArrayRecord({"blob": array})
        records.append(RecordDict({_RECORD: ConfigRecord({"body": body}), _ARRAYS: arrays[id(blob)]}))
    return records


def from_record(record: RecordDict) -> tuple[bytes, bytes]:
    """Return (body, blob) of a peer's record. Nothing of it reaches numpy's parser.

    Raises:
        EncodingInvalid: The record is not as `to_record` makes it.
    """
    arrays = set(record) - {_RECORD}
    names = {"body"} if arrays else {"body", "blob"}
    try:
        config = record.config_records[_RECORD]
        if arrays - {_ARRAYS} or set(config) != names:
            raise KeyError
        body = config["body"]
        blob = _vector(record.array_records[_ARRAYS]) if arrays else config["blob"]
    except (KeyError, TypeError):
        raise EncodingInvalid("a record does not hold a fedseal message") from None
    if not isinstance(body, bytes) or not isinstance(blob, bytes):
        raise EncodingInvalid("a record does not hold a fedseal message")
    return body, blob


def _vector(arrays: ArrayRecord) -> bytes:
    """Return the bytes of the one array, which must be serialized exactly as numpy writes a byte vector."""
    data = arrays["blob"].data
    header = _header(len(data) - len(_header(0)))
    if len(arrays) != 1 or arrays["blob"].stype != SType.NUMPY or not data.startswith(header):
        raise EncodingInvalid("a record's array is not a vector of bytes")
    return data[len(header) :]


def _header(size: int) -> bytes:
    written = io.BytesIO()
    shape = {"descr": "|u1", "fortran_order": False, "shape": (size,)}
    np.lib.format.write_array_header_1_0(written, shape)
    return written.getvalue()
