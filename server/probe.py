"""What a stranger sees of the coordinator's listener: measured, so that a report need not believe."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
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


def probe_listener(host: str, port: int, authority_file: Path) -> ListenerFacts:
    """Connect as a stranger on the coordinator's own machine and report what happens.

    The certificate must be the authority's, for a server. Its names are for those who come from outside;
    the address that is connected to here need not be among them.

    Raises:
        OSError: Nothing listens there, or its certificate is not the authority's.
    """
    with _connected(host, port, _context(authority_file)) as connection:
        version, cipher = connection.version() or "", (connection.cipher() or ("",))[0]
        cut_off = _is_cut_off(connection)
    return ListenerFacts(version, cipher, cut_off, _refuses_old(host, port, authority_file))


def shows_certificate(host: str, port: int, authority_file: Path, certificate_file: Path) -> bool:
    """Tell whether a coordinator of this machine listens somewhere, and shows a certificate.

    Args:
        host: Where it would listen.
        port: The same.
        authority_file: PEM of the authority that its certificate must be of.
        certificate_file: PEM of the certificate.
    """
    try:
        expected = ssl.PEM_cert_to_DER_cert(certificate_file.read_text(encoding="ascii"))
        with _connected(host, port, _context(authority_file)) as connection:
            return connection.getpeercert(binary_form=True) == expected
    except (OSError, ValueError):
        return False


def _context(authority_file: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=authority_file)
    context.check_hostname = False
    return context


@contextmanager
def _connected(host: str, port: int, context: ssl.SSLContext) -> Iterator[ssl.SSLSocket]:
    with (
        socket.create_connection((host, port), timeout=_TIMEOUT_S) as raw,
        context.wrap_socket(raw) as connection,
    ):
        yield connection


def _is_cut_off(connection: ssl.SSLSocket) -> bool:
    """In TLS 1.3 a server judges the client's certificate after the client's handshake is done."""
    try:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        return connection.recv(1) == b""
    except OSError:
        return True


def _refuses_old(host: str, port: int, authority_file: Path) -> bool:
    context = _context(authority_file)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    try:
        with _connected(host, port, context):
            return False
    except OSError:
        return True
