"""What a stranger sees of the coordinator's listener: measured, so that a report need not believe."""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class ListenerFacts:
    """Measured facts of a TLS listener.

    Attributes:
        version: TLS version that a modern client gets, for example ``TLSv1.3``.
        cipher: Its cipher suite.
        client_certificate_required: A client without a certificate was cut off.
        older_versions_refused: A client that offers TLS 1.2 at most was refused.
    """

    version: str
    cipher: str
    client_certificate_required: bool
    older_versions_refused: bool


def probe_listener(host: str, port: int, authority_file: Path, server_name: str) -> ListenerFacts:
    """Connect as a stranger and report what happens.

    Raises:
        OSError: Nothing listens there, or its certificate is not the authority's.
    """
    context = ssl.create_default_context(cafile=authority_file)
    with (
        socket.create_connection((host, port), timeout=_TIMEOUT_S) as raw,
        context.wrap_socket(raw, server_hostname=server_name) as connection,
    ):
        version, cipher = connection.version() or "", (connection.cipher() or ("",))[0]
        cut_off = _is_cut_off(connection)
    return ListenerFacts(version, cipher, cut_off, _refuses_old(host, port, authority_file, server_name))


def _is_cut_off(connection: ssl.SSLSocket) -> bool:
    """In TLS 1.3 a server judges the client's certificate after the client's handshake is done."""
    try:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        return connection.recv(1) == b""
    except OSError:
        return True


def _refuses_old(host: str, port: int, authority_file: Path, server_name: str) -> bool:
    context = ssl.create_default_context(cafile=authority_file)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    try:
        with (
            socket.create_connection((host, port), timeout=_TIMEOUT_S) as raw,
            context.wrap_socket(raw, server_hostname=server_name),
        ):
            return False
    except OSError:
        return True
