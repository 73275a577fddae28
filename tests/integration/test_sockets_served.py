"""Sockets of a serving coordinator and of its clients: what was written leaves at once."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from real_federation import PASSPHRASE, made_federation, wait_until
from served import Served, served

from client.flower import tls_context
from crypto.identity import load_owner
from scenarios.federation import Federation
from server.listeners import sockets

HOST = "localhost"
BOTH = [(socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_INET6, ("::1", 0, 0, 0))]
"""What the name stands for in these tests, whatever this machine's file of hosts says."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return made_federation(tmp_path_factory.mktemp("sockets") / "federation", owners=1)


@pytest.fixture(scope="module")
def coordinator(made: Federation) -> Iterator[Served]:
    found = sockets._addresses
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sockets, "_addresses", lambda at: BOTH if at.host == HOST else found(at))
        with served(made.server_home, PASSPHRASE, HOST) as running:
            yield running


@pytest.fixture(scope="module")
def anybody(made: Federation) -> ssl.SSLContext:
    """A context that shows an owner's certificate and asks for none."""
    identity = made.owners[0].folder / "identity"
    credentials = load_owner(identity, PASSPHRASE)
    context = tls_context(identity / "ca.crt", identity / "transport.crt", credentials)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def listening(coordinator: Served) -> list[tuple[str, int]]:
    """Return the address of every TCP listener of a coordinator."""
    found = []
    for server in coordinator.servers:
        for one in server.servers:
            found += [item.getsockname()[:2] for item in one.sockets if item.family != socket.AF_UNIX]
    return found


def accepted_from(coordinator: Served, address: tuple[str, int]) -> Any:
    """Return the coordinator's end of a connection, once it has one."""
    for server in coordinator.servers:
        for connection in list(server.server_state.connections):
            transport: Any = getattr(connection, "transport", None)
            if transport is not None and transport.get_extra_info("peername")[:2] == address:
                return transport.get_extra_info("socket")
    return None


def test_answers_are_not_held_back_on_any_listener(coordinator: Served, anybody: ssl.SSLContext) -> None:
    """Without this every exchange waits for the peer's delayed acknowledgement, some 40 ms each time."""
    addresses = listening(coordinator)
    assert len(addresses) >= 2, "the listeners of owners and of the run's own process"
    families = {":" in address for address, _port in addresses}
    assert families == {False, True} or not Path("/proc/net/if_inet6").exists()
    for address in addresses:
        with (
            socket.create_connection(address, timeout=10) as raw,
            anybody.wrap_socket(raw, server_hostname=HOST) as client,
        ):
            own = client.getsockname()[:2]
            accepted = wait_until(partial(accepted_from, coordinator, own), 10, "the accepted socket")
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY), address


def test_requests_are_not_held_back_by_the_clients_that_flower_uses(
    coordinator: Served, anybody: ssl.SSLContext
) -> None:
    """A node and the run's own process ask by httpx."""
    port = coordinator.addresses.port
    with httpx.Client(verify=anybody, trust_env=False) as client:
        answer = client.get(f"https://127.0.0.1:{port}/health")
        used = answer.extensions["network_stream"].get_extra_info("socket")
        assert answer.status_code == httpx.codes.OK
        assert used.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
