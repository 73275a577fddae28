"""The coordinator process: Flower's SuperLink behind two listeners.

The control and runtime APIs are served on the loopback address only. Owners reach nothing but the fleet
API, on a listener that demands TLS 1.3 and a client certificate of the federation's authority. Owners
are registered from the certificates in the members folder.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from server.flower import ControlClient, SuperLinkOptions, superlink_app

_LOG = logging.getLogger("fedseal.server")
_DENIED = {"/v1/fleet/register-node", "/v1/fleet/unregister-node"}
_RESCAN_S = 2.0


@dataclass(frozen=True)
class ListenerOptions:
    """Where owners connect.

    Attributes:
        host: Address to bind; loopback unless told otherwise.
        port: Port to bind.
    """

    host: str
    port: int


class FleetOnly:
    """ASGI filter: only the fleet API, without self-registration, and the health check pass."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Answer 404 to everything that owners have no business with."""
        path = scope.get("path", "")
        fleet = path.startswith("/v1/fleet/") and path.rstrip("/") not in _DENIED
        allowed = path == "/health" or fleet
        if scope["type"] == "http" and allowed:
            await self._app(scope, receive, send)
            return
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 404, "headers": []})
            await send({"type": "http.response.body", "body": b""})


def serve(options: SuperLinkOptions, listener: ListenerOptions, members: Path, ready: Any = None) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        options: The SuperLink's addresses and files.
        listener: Where owners connect.
        members: Folder with the transport certificates of all members.
        ready: Called once without arguments when both listeners accept connections.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        # uvicorn raises a signal again once it has stopped; the process is to end normally then
        signal.signal(number, lambda _number, _frame: None)
    app = superlink_app(options)
    private = uvicorn.Server(_config(app, options, "127.0.0.1", options.control_port, lifespan="on"))
    public_config = _config(FleetOnly(app), options, listener.host, listener.port, lifespan="off")
    _require_client_certificates(public_config, options.authority_file)
    asyncio.run(_serve_both(private, uvicorn.Server(public_config), options, members, ready))


def _config(app: Any, options: SuperLinkOptions, host: str, port: int, lifespan: Any) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        lifespan=lifespan,
        access_log=False,
        log_level="warning",
        server_header=False,
        ssl_keyfile=options.key_file,
        ssl_keyfile_password=options.key_password,
        ssl_certfile=options.certificate_file,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=2,
    )


def _require_client_certificates(config: uvicorn.Config, authority_file: Path) -> None:
    config.load()
    context = config.ssl
    if context is None:
        raise RuntimeError("the fleet listener has no TLS context")
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(authority_file)
    context.verify_mode = ssl.CERT_REQUIRED


async def _serve_both(
    private: uvicorn.Server,
    public: uvicorn.Server,
    options: SuperLinkOptions,
    members: Path,
    ready: Any,
) -> None:
    tasks = [asyncio.create_task(private.serve())]
    while not private.started and not tasks[0].done():
        await asyncio.sleep(0.02)
    client = ControlClient(options.control_port, options.authority_file.read_bytes())
    registered: set[str] = set()
    await asyncio.to_thread(_register_members, client, members, registered)
    tasks.append(asyncio.create_task(public.serve()))
    while not public.started and not any(task.done() for task in tasks):
        await asyncio.sleep(0.02)
    if ready is not None and public.started:
        ready()
    rescan = asyncio.create_task(_keep_registering(client, members, registered))
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    rescan.cancel()
    private.should_exit = public.should_exit = True
    await asyncio.gather(*tasks, return_exceptions=True)
    client.close()


async def _keep_registering(client: ControlClient, members: Path, registered: set[str]) -> None:
    while True:
        await asyncio.sleep(_RESCAN_S)
        await asyncio.to_thread(_register_members, client, members, registered)


def _register_members(client: ControlClient, members: Path, registered: set[str]) -> None:
    """Register every member whose transport certificate is new in the folder."""
    for file in sorted(members.glob("*.transport.crt")):
        name = file.name.removesuffix(".transport.crt")
        if name in registered:
            continue
        certificate = x509.load_pem_x509_certificate(file.read_bytes())
        public_key = certificate.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        client.register_node(name, public_key)
        registered.add(name)
        _LOG.info("member registered")
