"""The listener for the run's own process: its certificate, and a try whether it can be reached.

What a coordinator does inside its machine must not depend on what it shows outside. Its public
certificate may name one host that this machine cannot even look up, so the loopback listener has one of
its own, made anew at each start, and the run's own process trusts that one alone.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx
from cryptography.hazmat.primitives.serialization import Encoding

from crypto.identity import ssl_key_file
from crypto.loopback import loopback_pair
from crypto.vault import write_private
from protocol.errors import InsideUnreachable

LOOPBACK: Final = "127.0.0.1"
ROOT: Final = "runtime.crt"
"""In the folder ``flower/`` of the coordinator's home, while it runs: what its own processes trust."""

_TIMEOUT_S: Final = 10.0


@dataclass(frozen=True)
class TlsFiles:
    """What a listener shows.

    Attributes:
        certificate: PEM of the certificate.
        key: Path from which its private key can be loaded with `password`.
        password: One-time password of `key`.
    """

    certificate: Path
    key: str
    password: str


@contextmanager
def loopback_certificate(folder: Path) -> Iterator[TlsFiles]:
    """Yield a fresh certificate for 127.0.0.1. For the loopback listener only.

    Its file, mode 0600, is gone after the block. The key is on no disk where there are files in memory.

    Args:
        folder: Gets the certificate, for the processes that are to trust it; made if it is missing.
    """
    key, certificate = loopback_pair(LOOPBACK)
    file = folder / ROOT
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_private(file, certificate.public_bytes(Encoding.PEM))
    try:
        with ssl_key_file(key) as (key_file, password):
            yield TlsFiles(file, key_file, password)
    finally:
        with suppress(FileNotFoundError):
            file.unlink()


def require_reachable(port: int, root: Path) -> None:
    """Connect to the loopback listener as the run's own process does: same library, root and environment.

    Args:
        port: The listener's.
        root: The only certificate that is trusted.

    Raises:
        InsideUnreachable: It does not answer, or something else does.
    """
    try:
        context = ssl.create_default_context(cafile=root)
        # the environment counts, as it does for the program that Flower starts
        with httpx.Client(verify=context, timeout=_TIMEOUT_S) as client:
            status = client.get(f"https://{LOOPBACK}:{port}/health").status_code
    except Exception as error:  # a library that an environment asks for may be missing
        raise InsideUnreachable(f"port {port}: {type(error).__name__}") from None
    if status != httpx.codes.OK:
        raise InsideUnreachable(f"port {port} answers with the status {status}")
