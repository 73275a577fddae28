"""The coordinator's process: which port it takes where nobody names one."""

from __future__ import annotations

import socket
from pathlib import Path

from server.process import free_port

OUTGOING = Path("/proc/sys/net/ipv4/ip_local_port_range")


def test_a_free_port_is_none_that_an_outgoing_connection_may_take_first() -> None:
    first = int(OUTGOING.read_text().split()[0])
    for _ in range(50):
        port = free_port()
        assert 1_024 <= port < first
        with socket.create_server(("127.0.0.1", port)):
            assert free_port() != port
