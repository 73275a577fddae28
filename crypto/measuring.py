"""Measuring SEAL's own forms with throw-away keys. Only owners may import this.

The coordinator, which loads no code that handles secret keys, runs this module as a program of its own:
``python -m crypto.measuring PRESET COHORT`` writes the layout of a ciphertext to standard output.
"""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Callable
from typing import Any, Final

import tenseal.sealapi as seal
import zstandard

from crypto.frames import SEAL_HEADER, SealContext, SealFile, build_context
from crypto.layouts import SAMPLES, Layout
from crypto.presets import Packing, packing_for
from protocol.errors import EncryptionUnavailable
from protocol.plan import Plan

_NONE, _ZLIB, _ZSTD = 0, 1, 2
_EXPAND: Final[dict[int, Callable[[bytes], bytes]]] = {
    _NONE: bytes,
    _ZLIB: zlib.decompress,
    _ZSTD: lambda data: zstandard.ZstdDecompressor().decompressobj().decompress(data),
}


def expanded(blob: bytes) -> bytes:
    """Return an object that SEAL saved in this process in its uncompressed form, outer header included.

    Never call this on bytes of a peer.

    Raises:
        EncryptionUnavailable: The outer header is not the one of SEAL 3.4 to 4.
    """
    try:
        magic, size, major, minor, compression, zero, total = SEAL_HEADER.unpack_from(blob)
        if size != SEAL_HEADER.size or total != len(blob):
            raise EncryptionUnavailable("SEAL's outer header is not the expected one")
        body = _EXPAND[compression](blob[size:])
    except (KeyError, struct.error, zlib.error, zstandard.ZstdError) as error:
        raise EncryptionUnavailable("SEAL's own format cannot be expanded") from error
    return SEAL_HEADER.pack(magic, size, major, minor, _NONE, zero, size + len(body)) + body


def ciphertext_layout(packing: Packing) -> Layout:
    """Measure how SEAL serializes a seeded ciphertext here.

    Raises:
        EncryptionUnavailable: Not with a fixed length.
    """
    context = build_context(packing)
    encryptor = seal.Encryptor(context, seal.KeyGenerator(context).secret_key())
    return _measured(lambda: encryptor.encrypt_symmetric(seal.Plaintext()))


def key_layout(context: SealContext) -> Layout:
    """Measure how SEAL serializes a secret key here.

    Raises:
        EncryptionUnavailable: Not with a fixed length.
    """
    return _measured(lambda: seal.KeyGenerator(context.seal).secret_key())


def _measured(make: Callable[[], Any]) -> Layout:
    file = SealFile()
    samples = []
    for _ in range(SAMPLES):
        make().save(file.path)
        samples.append(expanded(file.read()))
        file.write(b"")
    file.close()
    return Layout.measure(samples)


def plan_context(plan: Plan) -> SealContext:
    """Return the encryption context that a plan orders, for an owner.

    Raises:
        CapacityExceeded: The preset does not hold the plan's cohort.
        EncryptionUnavailable: The installed library cannot do what the plan orders.
    """
    packing = packing_for(plan.encryption.preset, plan.cohort.maximum)
    return SealContext(packing, ciphertext_layout(packing) if plan.encryption.frames == "seal" else None)


if __name__ == "__main__":
    sys.stdout.buffer.write(ciphertext_layout(packing_for(sys.argv[1], int(sys.argv[2]))).to_bytes())
