"""A proxy on 127.0.0.1 that connects by CONNECT, and notes what it sees."""

from __future__ import annotations

import base64
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field


@dataclass
class ConnectProxy:
    """What a proxy does, and what it saw.

    Attributes:
        port: Where it listens.
        login: What it wants to be told, ``user:password``; nothing if empty.
        status: What it answers where all else is right.
        heads: The requests that came, each whole.
        passed: First bytes that came after them.
    """

    port: int = 0
    login: str = ""
    status: int = 200
    heads: list[bytes] = field(default_factory=list)
    passed: list[bytes] = field(default_factory=list)

    def serve(self, raw: socket.socket) -> None:
        """Answer one CONNECT, then move bytes until an end is gone."""
        with raw, suppress(OSError):
            raw.settimeout(30)
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += raw.recv(1)
            self.heads.append(head)
            token = base64.b64encode(self.login.encode())
            if self.login and b"Proxy-Authorization: Basic " + token not in head:
                raw.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
                return
            if self.status != 200:
                raw.sendall(b"HTTP/1.1 %d No\r\nContent-Length: 0\r\n\r\n" % self.status)
                return
            host, _, port = head.split()[1].decode().rpartition(":")
            with socket.create_connection((host.strip("[]"), int(port)), timeout=30) as target:
                raw.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                self._move(raw, target)

    def _move(self, raw: socket.socket, target: socket.socket) -> None:
        first = True
        while True:
            for source in select.select([raw, target], [], [], 30)[0]:
                data = source.recv(65536)
                if not data:
                    return
                if first and source is raw:
                    self.passed.append(data)
                    first = False
                (target if source is raw else raw).sendall(data)


@contextmanager
def connect_proxy(login: str = "", status: int = 200) -> Iterator[ConnectProxy]:
    """Run a proxy; it ends with the block."""
    proxy, stop = ConnectProxy(login=login, status=status), threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        proxy.port = listener.getsockname()[1]
        listener.settimeout(0.1)

        def accept() -> None:
            while not stop.is_set():
                with suppress(TimeoutError):
                    raw, _ = listener.accept()
                    threading.Thread(target=proxy.serve, args=(raw,), daemon=True).start()

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield proxy
        finally:
            stop.set()
            thread.join()
