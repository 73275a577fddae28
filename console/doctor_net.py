"""Look at what connects the parties: a coordinator's address from outside, and its own inside.

What is needed is imported inside each check, so that a package that is missing is one finding.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from console.findings import Finding, guarded
from protocol.errors import ServerUnavailable

if TYPE_CHECKING:
    from client.proxy import Proxy
    from server.addresses import Addresses
    from server.listeners.loopback import TlsFiles

_IDENTITY = "identity"
_HEALTHY = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


# --- a coordinator's own machine -----------------------------------------------------------------------


def check_port(port: int, home: Path | None = None) -> Finding:
    """Check that a loopback TCP port can be bound now, or is that of the coordinator of `home`."""
    with socket.socket() as probe:
        # As the listener does it: connections that ended a moment ago are not in the way.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            running = None if home is None else _running(home)
            if running is not None and running.port == port:
                return Finding("port", "ok", f"the coordinator of this home listens at {port}")
            name = errno.errorcode.get(error.errno or 0, "unknown error")
            remedy = f"Stop what listens there (ss -ltnp 'sport = :{port}'), or choose another with --port."
            if error.errno == errno.EACCES:
                remedy = "Choose a port above 1023 with --port."
            return Finding("port", "fail", f"{port} on 127.0.0.1 cannot be bound ({name})", remedy)
    return Finding("port", "ok", f"{port} on 127.0.0.1 is free")


def check_inside(home: Path | None) -> Finding:
    """Connect to the loopback listener of a running coordinator, or of one that is made for this.

    Raises:
        InsideUnreachable: It cannot be connected to, as by a run's own process.
    """
    from server.listeners.loopback import ROOT, loopback_certificate, require_reachable

    running = None if home is None else _running(home)
    if home is not None and running is not None:
        require_reachable(running.runtime_port, home / "flower" / ROOT)
        return Finding("inside", "ok", "the running coordinator's own listener was connected to")
    with (
        tempfile.TemporaryDirectory(prefix="fedseal-doctor-") as folder,
        loopback_certificate(Path(folder)) as shown,
        _answering(shown) as port,
    ):
        require_reachable(port, shown.certificate)
    return Finding("inside", "ok", "a listener on 127.0.0.1 was connected to over TLS")


def _running(home: Path) -> Addresses | None:
    """Return where the coordinator of a home listens, if it runs: what a killed one left tells nothing."""
    from server.addresses import reachable_host, read_addresses
    from server.probe import shows_certificate

    try:
        addresses = read_addresses(home)
    except ServerUnavailable:
        return None
    identity, host = home / _IDENTITY, reachable_host(addresses.host)
    shown = shows_certificate(host, addresses.port, identity / "ca.crt", identity / "server.crt")
    return addresses if shown else None


@contextmanager
def _answering(shown: TlsFiles) -> Iterator[int]:
    """Answer one request over TLS on 127.0.0.1; yields the port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(shown.certificate, shown.key, shown.password)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with suppress(OSError):
                raw, _address = listener.accept()
                with raw, context.wrap_socket(raw, server_side=True) as connection:
                    connection.recv(4096)
                    connection.sendall(_HEALTHY)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            # wakes a thread to which nothing has connected
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            thread.join()


# --- a coordinator from outside ------------------------------------------------------------------------


def check_server(
    text: str, home: Path | None, proxy: Proxy | None, passphrase_file: Path | None
) -> list[Finding]:
    """Connect to a coordinator as an owner's node would, as far as can be done with what is given.

    Args:
        text: Its address, HOST:PORT.
        home: Names the authority; an owner's also what it shows.
        proxy: What the way leads through.
        passphrase_file: Opens an owner's key; else FEDSEAL_PASSPHRASE. Without it the coordinator is not
            asked whether it lets the owner in.
    """
    return guarded("server", _check_server, text, home, proxy, passphrase_file)


def _check_server(
    text: str, home: Path | None, proxy: Proxy | None, passphrase_file: Path | None
) -> Finding:
    from client.address import parse_address
    from client.reach import Reach, trusting_context

    address = parse_address(text)
    if home is None:
        with Reach(address, _believing, proxy).connected() as connection:
            version = connection.version()
        remedy = "Give --home HOME, which names the authority, to have its certificate checked."
        return Finding("server", "warn", f"{address} answers with {version}", remedy)
    identity = home / _IDENTITY
    is_owner = (identity / "transport.crt").is_file()
    if is_owner and (passphrase_file is not None or "FEDSEAL_PASSPHRASE" in os.environ):
        ahead = Reach(address, _owners_context(identity, passphrase_file), proxy).require_admitted()
        return Finding("server", "ok", f"{address} lets this owner in; clocks differ by {abs(ahead):.0f} s")
    with Reach(address, partial(trusting_context, identity / "ca.crt"), proxy).connected():
        detail = f"{address} is a coordinator of this federation"
    if is_owner:
        remedy = "Give --passphrase-file to ask it whether it lets this owner in, and for its clock."
        return Finding("server", "warn", f"{detail}; whether it lets this owner in was not asked", remedy)
    return Finding("server", "ok", detail)


def _owners_context(identity: Path, passphrase_file: Path | None) -> partial[ssl.SSLContext]:
    from client.flower import tls_context
    from crypto.identity import load_owner
    from crypto.vault import read_passphrase

    credentials = load_owner(identity, read_passphrase(passphrase_file, os.environ, None))
    return partial(tls_context, identity / "ca.crt", identity / "transport.crt", credentials)


def _believing() -> ssl.SSLContext:
    """Return a context that believes any certificate, to see whether there is TLS at all."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
