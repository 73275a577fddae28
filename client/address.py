"""Where a coordinator listens, as a person writes it."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Final

from protocol.errors import AddressMalformed

_NAME: Final = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*\.?")


@dataclass(frozen=True)
class Address:
    """A host and a port.

    Attributes:
        host: Name or IP address, without brackets.
        port: 1 to 65535.
    """

    host: str
    port: int

    def __str__(self) -> str:
        """Return HOST:PORT, with brackets around an IPv6 address."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """Read ``HOST:PORT``; an IPv6 address stands in brackets.

    Raises:
        AddressMalformed: It is anything else, such as a URL or a host without a port.
    """
    if "://" in text or "/" in text:
        raise AddressMalformed(f"{text!r} is a URL or a path")
    host, colon, port = text.rpartition(":")
    if not colon:
        raise AddressMalformed(f"{text!r} has no port")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 1 <= int(port) <= 65_535):
        raise AddressMalformed(f"{text!r}: a port is a number from 1 to 65535")
    if host.startswith("[") and host.endswith("]"):
        try:
            return Address(str(ipaddress.IPv6Address(host[1:-1])), int(port))
        except ValueError:
            raise AddressMalformed(f"{text!r}: there is no IPv6 address in the brackets") from None
    if ":" in host:
        raise AddressMalformed(f"{text!r}: an IPv6 address stands in brackets")
    if _NAME.fullmatch(host) is None or len(host) > 253:
        raise AddressMalformed(f"{text!r}: this is neither the name of a host nor an IP address")
    return Address(host, int(port))
