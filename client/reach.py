"""Whether a coordinator can be reached and lets this owner in, and if not, why.

One TLS connection of its own tells names, ports, certificates, membership and clocks apart. Flower's client
tells none of them, so that a node which cannot connect asks here.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Final

from client.address import Address
from client.proxy import Proxy
from crypto.trust import REVOCATIONS
from protocol.admission import ADMISSION_PATH, CLOCK_TOLERANCE_S, REFUSAL_HEADER
from protocol.errors import (
    CertificateRefused,
    ClocksDiffer,
    CoordinatorExpired,
    CoordinatorForeign,
    CoordinatorMisnamed,
    FedsealError,
    HostUnknown,
    ListStale,
    NoAnswer,
    NotACoordinator,
    NotAMember,
    OwnCertificateExpired,
    OwnCertificateRevoked,
    PortRefused,
    ServerUnavailable,
)

_TIMEOUT_S: Final = 10.0
_TOTAL_S: Final = 20.0
"""Longest that one try may take, for a peer that says a little again and again."""

_ALERT_S: Final = 1.0
"""In TLS 1.3 a server judges the client's certificate after the client's handshake is done."""

# OpenSSL's X509_V_ERR numbers
_NO_LIST, _LIST_EARLY, _LIST_STALE = 3, 11, 12
_EARLY, _EXPIRED, _REVOKED = 9, 10, 23
_OTHER_NAME, _OTHER_ADDRESS = 62, 64

_SAID: Final[dict[str, type[FedsealError]]] = {
    error.code: error for error in (NotAMember, OwnCertificateExpired, OwnCertificateRevoked)
}


@dataclass(frozen=True)
class Reach:
    """The way to a coordinator.

    Attributes:
        address: Where it listens.
        context: Makes the TLS context of a new connection, with the revocation list as it is now.
        proxy: What the way leads through, if anything.
    """

    address: Address
    context: Callable[[], ssl.SSLContext]
    proxy: Proxy | None = None

    @contextmanager
    def connected(self) -> Iterator[ssl.SSLSocket]:
        """Yield a TLS connection whose server is the federation's coordinator.

        Raises:
            HostUnknown, PortRefused, NoAnswer, ProxyFailed: There is no way to it.
            NotACoordinator, CoordinatorForeign, CoordinatorMisnamed, CoordinatorExpired: It is another.
            CertificateRefused: The revocation list is missing or stale.
            ServerUnavailable: It ended the connection.
        """
        context = self.context()
        with self._opened() as raw, _ended_in_time(raw):
            try:
                connection = context.wrap_socket(raw, server_hostname=self.address.host)
            except OSError as error:
                raise self._handshake_reason(error) from None
            with connection, _ended_in_time(connection):
                yield connection

    def require_admitted(self) -> float:
        """Return if the coordinator lets this owner in now; by how many seconds this clock is ahead of its.

        Raises:
            CertificateRefused: It does not take this owner's certificate.
            NotAMember: It takes the certificate, and does not have this owner among its members.
            ClocksDiffer: The clocks differ by more than is tolerated.
            ServerUnavailable: It does not let anybody in, or as of `connected`.
        """
        with self.connected() as connection:
            try:
                _await_alert(connection)
                status, headers, now = _asked(connection)
            except (OSError, http.client.HTTPException) as error:
                raise self._refusal_reason(error) from None
        code = headers.get(REFUSAL_HEADER, "")
        ahead = now - _time_of(headers, now)
        if code in _SAID:
            raise _SAID[code](f"{self.address}: so says the coordinator")
        if abs(ahead) > CLOCK_TOLERANCE_S or code == ClocksDiffer.code:
            direction = "ahead of" if ahead > 0 else "behind"
            raise ClocksDiffer(f"{self.address}: this clock is {abs(ahead):.0f} s {direction} its")
        if code == ListStale.code:
            raise ServerUnavailable(f"{self.address}: its revocation list is stale; it lets nobody in")
        if status >= http.HTTPStatus.BAD_REQUEST:
            raise ServerUnavailable(f"{self.address}: it answers with the status {status}")
        return ahead

    def _opened(self) -> socket.socket:
        address = self.address
        if self.proxy is not None:
            return self.proxy.connect(address, _TIMEOUT_S)
        try:
            return socket.create_connection((address.host, address.port), _TIMEOUT_S)
        except (socket.gaierror, UnicodeError):
            raise HostUnknown(str(address)) from None
        except ConnectionRefusedError:
            raise PortRefused(str(address)) from None
        except TimeoutError:
            raise NoAnswer(f"{address}: nothing in {_TIMEOUT_S:.0f} s") from None
        except OSError as error:
            raise NoAnswer(f"{address}: {error.strerror}") from None

    def _handshake_reason(self, error: OSError) -> FedsealError:
        if isinstance(error, ssl.SSLCertVerificationError):
            return self._certificate_reason(error)
        if isinstance(error, TimeoutError):
            return NoAnswer(f"{self._way()}: it accepts connections and says nothing")
        if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError | ConnectionError):
            return ServerUnavailable(f"{self._way()}: it ends the connection at once")
        reason = getattr(error, "reason", None) or type(error).__name__
        return NotACoordinator(f"{self._way()}: {_plain(reason)}")

    def _certificate_reason(self, error: ssl.SSLCertVerificationError) -> FedsealError:
        number, detail = error.verify_code, f"{self._way()}: {error.verify_message}"
        if number in (_NO_LIST, _LIST_EARLY, _LIST_STALE):
            return CertificateRefused(
                f"{self._way()}: this owner's revocation list: {error.verify_message}"
            )
        if number in (_EARLY, _EXPIRED, _REVOKED):
            return CoordinatorExpired(detail)
        if number in (_OTHER_NAME, _OTHER_ADDRESS):
            return CoordinatorMisnamed(detail)
        return CoordinatorForeign(detail)

    def _refusal_reason(self, error: Exception) -> FedsealError:
        reason = str(getattr(error, "reason", None) or "")
        if "ALERT_CERTIFICATE_EXPIRED" in reason:
            return OwnCertificateExpired(f"{self._way()}: so says the coordinator, by its clock")
        if "ALERT_CERTIFICATE_REVOKED" in reason:
            return OwnCertificateRevoked(f"{self._way()}: so says the coordinator")
        if "ALERT" in reason:
            return CertificateRefused(f"{self._way()}: the coordinator refuses ours: {_plain(reason)}")
        if isinstance(error, TimeoutError):
            return NoAnswer(f"{self._way()}: it accepts connections and says nothing")
        return ServerUnavailable(f"{self._way()}: it ends the connection ({type(error).__name__})")

    def _way(self) -> str:
        return f"{self.address} by the proxy {self.proxy}" if self.proxy is not None else str(self.address)


@contextmanager
def _ended_in_time(connection: socket.socket) -> Iterator[None]:
    """End a connection after `_TOTAL_S`, however busily its other side keeps it open."""

    def end() -> None:
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(_TOTAL_S, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def trusting_context(authority_file: Path) -> ssl.SSLContext:
    """Return a TLS 1.3 context that trusts one authority only, and shows nothing itself.

    A coordinator whose certificate is on the revocation list beside `authority_file` is refused, and every
    coordinator once that list is stale.

    Raises:
        CertificateRefused: One of the files cannot be read.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_verify_locations(authority_file)
        context.load_verify_locations(authority_file.with_name(REVOCATIONS))
    except OSError:
        raise CertificateRefused("ca.crt or crl.pem cannot be read") from None
    context.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_CRL_CHECK_LEAF
    return context


def _await_alert(connection: ssl.SSLSocket) -> None:
    """Give a coordinator that refuses this side's certificate the time to say so, which raises."""
    connection.settimeout(_ALERT_S)
    try:
        if not connection.recv(1):
            raise ConnectionResetError
    except TimeoutError:
        # it waits for a request, as it should
        connection.settimeout(_TIMEOUT_S)


def _asked(connection: ssl.SSLSocket) -> tuple[int, http.client.HTTPMessage, float]:
    """Ask whether this owner is let in; returns status, headers and the present, in seconds."""
    client = http.client.HTTPConnection("coordinator")
    client.sock = connection
    client.request("GET", ADMISSION_PATH, headers={"connection": "close"})
    answer = client.getresponse()
    return answer.status, answer.headers, time.time()


def _time_of(headers: http.client.HTTPMessage, otherwise: float) -> float:
    """Return the time that an answer names, in seconds; it is rounded down to a whole one."""
    try:
        return parsedate_to_datetime(headers["date"]).timestamp() + 0.5
    except (ValueError, TypeError, OverflowError):
        return otherwise


def _plain(reason: str) -> str:
    """Return OpenSSL's reason as words."""
    return reason.lower().replace("_", " ")
