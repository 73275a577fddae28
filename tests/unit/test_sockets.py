"""The sockets of the coordinator's listeners: which are bound, and what is said where they cannot be."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import AddressUnavailable
from server.listeners.sockets import ListenerOptions, free_port, listening

OUTGOING = Path("/proc/sys/net/ipv4/ip_local_port_range")


def test_a_free_port_is_none_that_an_outgoing_connection_may_take_first() -> None:
    first = int(OUTGOING.read_text().split()[0])
    for _ in range(50):
        assert 1_024 <= free_port() < first


def test_a_port_that_is_taken_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = free_port()
    monkeypatch.setattr("server.listeners.sockets._PORTS", [taken])
    monkeypatch.setattr("server.listeners.sockets._PORT_TRIES", 1)
    assert free_port() == taken
    with socket.create_server(("127.0.0.1", taken)), pytest.raises(OSError, match="in use"):
        free_port()


def test_connections_wait_from_the_first_moment() -> None:
    with listening(ListenerOptions("127.0.0.1", 0)) as [only]:
        address = only.getsockname()
        socket.create_connection(address, timeout=5).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=5)


def test_the_system_s_choice_stays_ours() -> None:
    with listening(ListenerOptions("127.0.0.1", 0)) as [only]:
        port = only.getsockname()[1]
        with (
            pytest.raises(AddressUnavailable, match=f"port {port}: something else listens there"),
            listening(ListenerOptions("127.0.0.1", port)),
        ):
            pass
        socket.create_connection(("127.0.0.1", port), timeout=5).close()


def test_an_address_of_another_machine_is_refused() -> None:
    with (
        pytest.raises(AddressUnavailable, match="this machine has no such address"),
        listening(ListenerOptions("192.0.2.1", free_port())),
    ):
        pass


@pytest.mark.parametrize(
    "error", [socket.gaierror(socket.EAI_AGAIN, "try again"), UnicodeError("label too long")]
)
def test_a_name_without_an_address_is_said(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def unknown(*_arguments: Any, **_options: Any) -> None:
        raise error

    monkeypatch.setattr("server.listeners.sockets.socket.getaddrinfo", unknown)
    with (
        pytest.raises(AddressUnavailable, match="no address is known"),
        listening(ListenerOptions("coordinator.example", 8443)),
    ):
        pass


def fake_bind(monkeypatch: pytest.MonkeyPatch, refused: dict[str, int]) -> None:
    """Let a name stand for an IPv6 and an IPv4 address, of which the system refuses some."""
    bind = socket.create_server

    def create(address: Any, **options: Any) -> socket.socket:
        if number := refused.get(address[0]):
            raise OSError(number, os.strerror(number))
        return bind(("127.0.0.1", address[1]), **(options | {"family": socket.AF_INET}))

    found = [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0)),
    ]
    monkeypatch.setattr("server.listeners.sockets.socket.getaddrinfo", lambda *_a, **_k: found)
    monkeypatch.setattr("server.listeners.sockets.socket.create_server", create)


@pytest.mark.parametrize("number", [errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL])
def test_a_family_that_the_machine_lacks_is_left_out(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    fake_bind(monkeypatch, {"::1": number})
    with listening(ListenerOptions("localhost", 0)) as sockets:
        assert len(sockets) == 1


@pytest.mark.parametrize("number", [errno.EADDRINUSE, errno.EADDRNOTAVAIL])
def test_another_address_of_several_is_not_left_out(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """One that is not there yet may be the one by which owners come."""
    fake_bind(monkeypatch, {"127.0.0.1": number})
    with pytest.raises(AddressUnavailable), listening(ListenerOptions("localhost", 0)):
        pass


def test_a_port_that_the_user_may_not_use_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_bind(monkeypatch, {"::1": errno.EAFNOSUPPORT, "127.0.0.1": errno.EACCES})
    with (
        pytest.raises(AddressUnavailable, match="this user may not use that port"),
        listening(ListenerOptions("localhost", 443)),
    ):
        pass
