"""An HTTP proxy between an owner's node and its coordinator, which connects by CONNECT and sees no content.

TLS is from end to end, so that a proxy need not be trusted; one that opens TLS itself is refused as a
foreign coordinator. Source: RFC 9110, 9.3.6.
"""

from __future__ import annotations

import base64
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import unquote, urlsplit

import httpx

from client.address import Address, parse_address
from protocol.errors import AddressMalformed, ProxyFailed, ProxyUnusable

VARIABLE: Final = "FEDSEAL_PROXY"
"""Environment variable with a proxy's URL, which alone may hold a login."""

_MAX_HEAD_BYTES: Final = 16 * 1024
_HEAD_S: Final = 20.0


@dataclass(frozen=True)
class Proxy:
    """A proxy that supports CONNECT.

    Attributes:
        address: Where it listens.
        login: User and password, if it wants them. Never in an error or a log.
    """

    address: Address
    login: tuple[str, str] | None = field(default=None, repr=False)

    def __str__(self) -> str:
        """Return its address, without a login."""
        return str(self.address)

    def for_httpx(self) -> httpx.Proxy:
        """Return it as the library takes it."""
        return httpx.Proxy(f"http://{self.address}", auth=self.login)

    def connect(self, target: Address, timeout_s: float) -> socket.socket:
        """Return a socket that leads to a target.

        Raises:
            ProxyFailed: The proxy is not there, or refuses.
        """
        try:
            raw = socket.create_connection((self.address.host, self.address.port), timeout_s)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise ProxyFailed(f"{target}: proxy {self}: {reason}") from None
        try:
            status = self._asked(raw, target)
        except OSError as error:
            raw.close()
            raise ProxyFailed(f"{target}: proxy {self}: {type(error).__name__}") from None
        if status != "200":
            raw.close()
            raise ProxyFailed(f"{target}: proxy {self} answers {status or 'what is not HTTP'}")
        return raw

    def _asked(self, raw: socket.socket, target: Address) -> str:
        """Ask for a connection; returns the status, or an empty string if there is none."""
        lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
        if self.login is not None:
            token = base64.b64encode(":".join(self.login).encode()).decode()
            lines.append(f"Proxy-Authorization: Basic {token}")
        raw.sendall("\r\n".join([*lines, "", ""]).encode())
        head, deadline = b"", time.monotonic() + _HEAD_S
        # byte by byte, because what follows the head is the target's
        while not head.endswith(b"\r\n\r\n"):
            byte = raw.recv(1)
            if not byte or len(head) == _MAX_HEAD_BYTES or time.monotonic() > deadline:
                return ""
            head += byte
        words = head.split(b"\r\n")[0].split()
        if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
            return ""
        return words[1].decode()


def chosen_proxy(option: str | None, environment: Mapping[str, str] = os.environ) -> Proxy | None:
    """Return the proxy that a command line names, else `VARIABLE`; None if neither does.

    Raises:
        ProxyUnusable: It is not supported, or the command line holds a login, which others could read.
    """
    text = option if option is not None else environment.get(VARIABLE)
    if not text:
        return None
    proxy = read_proxy(text)
    if option is not None and proxy.login is not None:
        raise ProxyUnusable(f"a login stands on the command line, where others read it; use {VARIABLE}")
    return proxy


def read_proxy(text: str) -> Proxy:
    """Read ``http://[USER:PASSWORD@]HOST:PORT``.

    Raises:
        ProxyUnusable: It is anything else; what it is, is not repeated, for it may hold a password.
    """
    try:
        parts = urlsplit(text)
        scheme, _, host = parts.scheme, *parts.netloc.rpartition("@")[1:]
        address = parse_address(host)
    except (ValueError, AddressMalformed):
        raise ProxyUnusable("it is not a URL with a host and a port") from None
    if scheme != "http":
        raise ProxyUnusable(f"proxies of the kind {scheme or 'unknown'} are not supported")
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ProxyUnusable("something follows the port")
    if parts.username is None:
        return Proxy(address)
    return Proxy(address, (unquote(parts.username), unquote(parts.password or "")))
