"""The coordinator process: Flower's SuperLink behind three listeners.

Owners reach nothing but the fleet API, on a listener that demands TLS 1.3 and a certificate for an
owner's transport. Operators reach nothing but `server.listeners.control`, on a Unix socket that demands
TLS 1.3 and an operator's certificate. The runtime API is for the run's own process; its loopback
listener closes connections of other users of the machine. Flower's control API is on no listener.
Owners are registered from the certificates in the members folder.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from crypto.auditlog import KeptLog
from crypto.certificates import key_sha256
from crypto.trust import Trust, list_number
from protocol.environment import heeded
from protocol.errors import FedsealError, InsideUnreachable
from server.flower.batches import Batches
from server.flower.control import ControlClient
from server.flower.programs import Executor
from server.flower.starts import Starts
from server.flower.superlink import SuperLinkOptions, superlink_app
from server.home import MEMBERS
from server.listeners.admission import (
    PEER,
    Admission,
    SameUserProtocol,
    certified_protocol,
    end_refused_connections,
)
from server.listeners.control import ControlEndpoint, Runs, control_socket
from server.listeners.gate import Gate
from server.listeners.handshakes import PatientLoop
from server.listeners.limits import Bounded, allow_many_files, refuse
from server.listeners.loopback import TlsFiles, require_reachable

_LOG = logging.getLogger("fedseal.server")
_DENIED = {"/v1/fleet/register-node", "/v1/fleet/unregister-node"}
_WATCH_S = 1.0
_EXIT_CHECK_S = 0.1


@dataclass(frozen=True)
class Sockets:
    """Listening TCP sockets of a coordinator.

    Attributes:
        owners: Where owners connect.
        runtime: Where the run's own process connects, on loopback.
    """

    owners: list[socket.socket]
    runtime: list[socket.socket]


@dataclass(frozen=True)
class Coordinator:
    """What the listeners of a coordinator share.

    Attributes:
        home: Its home folder.
        trust: The authority, and its list as it is now.
        log: Its log of acts.
        runs: What it has begun.
    """

    home: Path
    trust: Trust
    log: KeptLog
    runs: Runs


class Only:
    """ASGI filter: what a listener does not serve is not there.

    Args:
        app: The app behind it.
        serves: Tells whether a path is served.
    """

    def __init__(self, app: Any, serves: Callable[[str], bool]) -> None:
        self._app = app
        self._serves = serves

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Answer 404 to everything that the peers of this listener have no business with."""
        if scope["type"] == "lifespan" or (scope["type"] == "http" and self._serves(scope["path"])):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await refuse(send, 404)


def for_owners(path: str) -> bool:
    """Tell whether the listener of the owners serves a path: the fleet API without self-registration."""
    return path == "/health" or (path.startswith("/v1/fleet/") and path.rstrip("/") not in _DENIED)


def for_own_processes(path: str) -> bool:
    """Tell whether the loopback listener serves a path."""
    return path == "/health" or path.startswith("/v1/runtime/")


def serve(
    options: SuperLinkOptions,
    shown: TlsFiles,
    sockets: Sockets,
    coordinator: Coordinator,
    ready: Callable[[], None] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        options: The SuperLink's addresses and files, among them the loopback listener's certificate.
        shown: The certificate that owners and operators see.
        sockets: Where owners and the run's own process connect; closed at the end.
        coordinator: Home, trust and log.
        ready: Called once without arguments when all listeners accept connections, and the loopback
            listener was connected to.

    Raises:
        InsideUnreachable: The loopback listener cannot be connected to; nothing serves any longer.
    """
    for number in heeded(signal.SIGINT, signal.SIGTERM):
        # uvicorn raises a signal again once it has stopped; the process is to end normally then
        signal.signal(number, lambda _number, _frame: None)
    allow_many_files()
    with asyncio.Runner(loop_factory=PatientLoop) as runner:
        runner.run(_serve(options, shown, sockets, coordinator, ready))


async def _serve(
    options: SuperLinkOptions,
    shown: TlsFiles,
    sockets: Sockets,
    coordinator: Coordinator,
    ready: Callable[[], None] | None,
) -> None:
    executor = Executor()
    app = superlink_app(options, executor)
    batches, starts = Batches(app), Starts()
    flower = ControlClient(starts.noted(app), asyncio.get_running_loop())
    private = _server(
        Only(starts.awaited(batches.runtime), for_own_processes),
        TlsFiles(options.certificate_file, options.key_file, options.key_password),
        SameUserProtocol,
        lifespan="on",
    )
    endpoint = ControlEndpoint(coordinator.home, flower, coordinator.log, coordinator.runs)
    let_in = partial(Admission, coordinator.trust, log=coordinator.log)
    authority = coordinator.trust.authority
    operators = _certified_server(endpoint, shown, let_in("operator"), authority)
    members, admission = Members(coordinator, flower), let_in("owner-transport")
    fleet = Gate(Only(batches.fleet, for_owners), admission, members.__contains__)
    owners = _certified_server(Bounded(fleet, PEER), shown, admission, authority)
    with control_socket(coordinator.home) as control:
        tasks = [asyncio.create_task(private.serve(sockets=sockets.runtime))]
        await _started(private, tasks)
        await asyncio.to_thread(members.register)
        tasks += [
            asyncio.create_task(operators.serve(sockets=[control])),
            asyncio.create_task(owners.serve(sockets=sockets.owners)),
        ]
        await _started(operators, tasks)
        await _started(owners, tasks)
        failure = await _tried(options) if owners.started else None
        if ready is not None and owners.started and failure is None:
            ready()
        watch = asyncio.create_task(_watch(coordinator, members, [owners, operators]))
        executing = asyncio.create_task(_keep_executor(executor, coordinator.runs, flower))

        def end_waits() -> None:
            batches.close()
            starts.close()

        ending = asyncio.create_task(_when_told_to_end([private, operators, owners], end_waits))
        private.should_exit |= failure is not None
        await asyncio.wait([*tasks, watch, executing], return_when=asyncio.FIRST_COMPLETED)
        for task in (watch, executing, ending):
            task.cancel()
        for server in (private, operators, owners):
            server.should_exit = True
        # one listener may have ended before it was seen that it was told to
        end_waits()
        await asyncio.gather(*tasks, return_exceptions=True)
        flower.close()
        if failure is not None:
            raise failure
        for task in (watch, executing):
            if task.done() and not task.cancelled():
                task.result()


async def _tried(options: SuperLinkOptions) -> InsideUnreachable | None:
    """Connect to the loopback listener; returns what is wrong with it."""
    try:
        await asyncio.to_thread(require_reachable, options.runtime_port, options.certificate_file)
    except InsideUnreachable as error:
        return error
    return None


async def _when_told_to_end(servers: list[uvicorn.Server], end_waits: Callable[[], None]) -> None:
    """Answer the requests that wait as soon as a listener is told to end, which waits for them."""
    while not any(server.should_exit for server in servers):
        await asyncio.sleep(_EXIT_CHECK_S)
    end_waits()


async def _started(server: uvicorn.Server, tasks: list[asyncio.Task[None]]) -> None:
    while not server.started and not any(task.done() for task in tasks):
        await asyncio.sleep(0.02)


class _Listener(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Let uvicorn take the signals that end it, less those that this process was told to ignore."""
        ignored = {signal.SIGINT, signal.SIGTERM} - set(heeded(signal.SIGINT, signal.SIGTERM))
        with super().capture_signals():
            for number in ignored:
                signal.signal(number, signal.SIG_IGN)
            yield


def _server(
    app: Any,
    shown: TlsFiles,
    protocol: type[HttpToolsProtocol],
    lifespan: Literal["on", "off"],
) -> uvicorn.Server:
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        access_log=False,
        log_level="warning",
        server_header=False,
        ssl_keyfile=shown.key,
        ssl_keyfile_password=shown.password,
        ssl_certfile=shown.certificate,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=2,
        lifespan=lifespan,
    )
    config.load()
    if config.ssl is None:
        raise RuntimeError("a listener has no TLS context")
    config.ssl.minimum_version = ssl.TLSVersion.TLSv1_3
    return _Listener(config)


def _certified_server(
    app: Any, shown: TlsFiles, admission: Admission, authority: x509.Certificate
) -> uvicorn.Server:
    server = _server(app, shown, certified_protocol(admission), lifespan="off")
    context = server.config.ssl
    if context is None:
        raise RuntimeError("a listener has no TLS context")
    context.load_verify_locations(cadata=authority.public_bytes(Encoding.PEM).decode())
    context.verify_mode = ssl.CERT_REQUIRED
    return server


async def _watch(coordinator: Coordinator, members: Members, servers: list[uvicorn.Server]) -> None:
    """Notice new members and revocations, and sign the log, until cancelled."""
    number = 0
    while True:
        for server in servers:
            end_refused_connections(server.server_state.connections)
        number = await asyncio.to_thread(_note_revocations, coordinator, number)
        await asyncio.to_thread(members.register)
        await asyncio.to_thread(coordinator.log.sign)
        await asyncio.sleep(_WATCH_S)


async def _keep_executor(executor: Executor, runs: Runs, flower: ControlClient) -> None:
    """Note runs whose process ended, and start the program that starts these processes if it ended."""
    noted_at = 0.0
    while True:
        if executor.has_ended:
            for number in await asyncio.to_thread(runs.note_ends, lost=True):
                await asyncio.to_thread(flower.stop_run, number)
            executor.start_again()
        if time.monotonic() - noted_at >= _WATCH_S:
            await asyncio.to_thread(runs.note_ends)
            noted_at = time.monotonic()
        # a run that is submitted before the end is noticed counts as lost too
        await asyncio.sleep(_EXIT_CHECK_S)


def _note_revocations(coordinator: Coordinator, known: int) -> int:
    """Record a revocation list that is new; returns its number."""
    try:
        revocations = coordinator.trust.revocations
    except FedsealError:
        return known
    number = list_number(revocations)
    if number != known:
        coordinator.log.record("revocations.read", number=str(number), revoked=len(revocations))
    return number


class Members:
    """Registers the owners whose transport certificates lie in the members folder.

    Args:
        coordinator: Its home and its log.
        flower: Flower's control API.
    """

    def __init__(self, coordinator: Coordinator, flower: ControlClient) -> None:
        self._folder = coordinator.home / MEMBERS
        self._log = coordinator.log
        self._flower = flower
        self._registered: set[str] = set()

    def __contains__(self, fingerprint: object) -> bool:
        """Tell whether the owner of a transport key is registered."""
        return fingerprint in self._registered

    def register(self) -> None:
        """Register every member whose transport key is new in the folder."""
        for file in sorted(self._folder.glob("*.transport.crt")):
            try:
                key = x509.load_pem_x509_certificate(file.read_bytes()).public_key()
            except (OSError, ValueError):
                # perhaps half of a file that is being copied; it is looked at again
                continue
            fingerprint = key_sha256(key)
            if fingerprint in self._registered:
                continue
            pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
            name = file.name.removesuffix(".transport.crt")
            self._flower.register_node(name, pem)
            self._registered.add(fingerprint)
            self._log.record("member.registered", name=name, transport=fingerprint)
            _LOG.info("member registered")
