"""Where a running coordinator listens, as it notes it in its home."""

from __future__ import annotations

import ipaddress
from dataclasses import asdict, dataclass
from pathlib import Path

from crypto.vault import write_private
from protocol.encoding import decode, encode
from protocol.errors import EncodingInvalid, ServerUnavailable
from server.home import ADDRESSES


@dataclass(frozen=True)
class Addresses:
    """Where a running coordinator listens.

    Attributes:
        runtime_port: Loopback port of the API for the run's own process.
        host: Host of the fleet listener.
        port: Port of the fleet listener.
    """

    runtime_port: int
    host: str
    port: int


def write_addresses(home: Path, addresses: Addresses) -> None:
    """Note where this coordinator listens, for `fedseal run` on the same machine."""
    write_private(home / ADDRESSES, encode(asdict(addresses)))


def forget_addresses(home: Path) -> None:
    """Remove the note; no coordinator runs from this home now."""
    (home / ADDRESSES).unlink(missing_ok=True)


def read_addresses(home: Path) -> Addresses:
    """Return where the coordinator of this home listens.

    Raises:
        ServerUnavailable: No coordinator was started from it.
    """
    try:
        fields = decode((home / ADDRESSES).read_bytes())
        return Addresses(int(fields["runtime_port"]), str(fields["host"]), int(fields["port"]))
    except (OSError, KeyError, TypeError, ValueError, EncodingInvalid):
        raise ServerUnavailable("no coordinator was started from this home folder") from None


def reachable_host(bound: str) -> str:
    """Return an address of this machine for a listener that may be bound to all of them."""
    try:
        return "127.0.0.1" if ipaddress.ip_address(bound).is_unspecified else bound
    except ValueError:
        return bound
