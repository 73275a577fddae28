"""Sockets of the coordinator's TCP listeners, bound before anything else of it starts.

A port that something else has is so known before a key is used or an act is logged, and a port that the
system chooses stays the coordinator's own from then on.
"""

from __future__ import annotations

import errno
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from protocol.errors import AddressUnavailable

_REASONS = {
    errno.EADDRINUSE: "something else listens there",
    errno.EACCES: "this user may not use that port",
    errno.EADDRNOTAVAIL: "this machine has no such address",
}
_PORTS, _PORT_TRIES = range(20_000, 32_000), 100
_BACKLOG = 2048
"""As many as uvicorn takes: it listens anew on these sockets once it serves."""


@dataclass(frozen=True)
class ListenerOptions:
    """Where a listener accepts connections.

    Attributes:
        host: Address or name to bind; loopback unless told otherwise.
        port: Port to bind; 0 lets the system choose.
    """

    host: str
    port: int


@contextmanager
def listening(where: ListenerOptions) -> Iterator[list[socket.socket]]:
    """Yield a listening socket for each address that a host's name stands for; all close after the block.

    Left out is what the machine has no use for: an address of a family that it lacks, such as IPv6's own
    loopback, for which `localhost` stands everywhere.

    Args:
        where: Host and port. With port 0 a name of several addresses gets several ports.

    Raises:
        AddressUnavailable: One of them is taken, not allowed or not this machine's, or there is none.
    """
    with ExitStack() as stack:
        sockets = []
        for family, address in _addresses(where):
            try:
                listener = socket.create_server(address, family=family, backlog=_BACKLOG)
                # Accepted sockets take this over. asyncio itself sets it where a socket names its protocol,
                # which these do not; without it every answer waits for an acknowledgement that is delayed.
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except OSError as error:
                if not _of_an_unused_family(address, error.errno):
                    raise _unavailable(where, error.errno) from None
            else:
                sockets.append(stack.enter_context(listener))
        if not sockets:
            raise _unavailable(where, errno.EADDRNOTAVAIL)
        yield sockets


def free_port() -> int:
    """Return a loopback TCP port that is free now.

    It is below those that systems give to outgoing connections: one of these could take it before its
    program listens there, seconds later.

    Raises:
        OSError: None was free in many tries.
    """
    for port in secrets.SystemRandom().sample(_PORTS, _PORT_TRIES):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _addresses(where: ListenerOptions) -> list[tuple[int, Any]]:
    try:
        found = socket.getaddrinfo(where.host, where.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise AddressUnavailable(f"{where.host}: no address is known for this name") from None
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


def _of_an_unused_family(address: tuple[Any, ...], number: int | None) -> bool:
    return number == errno.EAFNOSUPPORT or (number == errno.EADDRNOTAVAIL and address[0] == "::1")


def _unavailable(where: ListenerOptions, number: int | None) -> AddressUnavailable:
    reason = _REASONS.get(number or 0, "the system refuses it")
    return AddressUnavailable(f"{where.host}, port {where.port}: {reason}")
