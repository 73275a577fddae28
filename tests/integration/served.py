"""A whole coordinator in a thread of the test's process, so that a test may look inside its listeners."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import uvicorn
from real_federation import wait_until

from protocol.environment import prepare_environment
from server.addresses import Addresses, read_addresses
from server.listeners import launcher
from server.listeners.sockets import ListenerOptions
from server.process import run_server

START_S, STOP_S = 60.0, 30.0


@dataclass
class Served:
    """A coordinator that serves.

    Attributes:
        home: Its home.
        servers: Its listeners: the run's own process, operators, owners.
        failure: What ended it, if anything did.
    """

    home: Path
    servers: list[uvicorn.Server] = field(default_factory=list)
    failure: BaseException | None = None

    @property
    def addresses(self) -> Addresses:
        """Return where it listens."""
        return read_addresses(self.home)


@contextmanager
def served(
    home: Path, passphrase: bytes, host: str = "127.0.0.1", environment: Mapping[str, str] | None = None
) -> Iterator[Served]:
    """Serve a home by the code of `fedseal server`, and end it after the block.

    Args:
        home: The coordinator's home.
        passphrase: Opens it.
        host: Where owners connect, at a port that the system chooses.
        environment: What something else has put into the environment meanwhile.
    """
    result, ready = Served(home), threading.Event()

    class Noted(launcher._Listener):
        def __init__(self, config: uvicorn.Config) -> None:
            super().__init__(config)
            result.servers.append(self)

    def serve() -> None:
        try:
            run_server(home, passphrase, ListenerOptions(host, 0), ready.set)
        except BaseException as error:
            result.failure = error

    before = dict(os.environ)
    prepare_environment()
    os.environ.update(environment or {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "_Listener", Noted)
        # only a process's main thread may do this
        patch.setattr(launcher.signal, "signal", lambda *_: None)
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            wait_until(lambda: ready.is_set() or not thread.is_alive(), START_S, "the coordinator")
            if result.failure is not None:
                raise result.failure
            yield result
        finally:
            for server in result.servers:
                server.should_exit = True
            thread.join(STOP_S)
            os.environ.clear()
            os.environ.update(before)
            assert not thread.is_alive(), "the coordinator does not end"
