"""Flower's control API, called inside the coordinator's process; no socket of any kind serves it.

Flower 1.41.0 answers its control API to anybody who can reach it. So nobody can:
`server.listeners.control` decides who may ask for what, and asks here.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any, Final

import httpx

from protocol.errors import ServerUnavailable

_ANSWER_S: Final = 30.0
_NOWHERE: Final = "http://coordinator.invalid"

BUNDLE = """
[project]
name = "fedseal"
version = "0.1.0"
description = "Run configuration; the code is the installed one."
license = {text = "Apache-2.0"}
dependencies = []

[tool.flwr.app]
publisher = "fedseal"

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"

[tool.flwr.app.config]
run = ""
"""
"""What Flower is told of a run. A benchmark names another ServerApp here, for the same coordinator."""


class InProcess(httpx.BaseTransport):
    """Carries requests of another thread to an ASGI app of a running event loop.

    Args:
        app: The app.
        loop: The loop that serves it; its own thread must not wait for an answer here.
    """

    def __init__(self, app: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._inner = httpx.ASGITransport(app)
        self._loop = loop

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Return the app's answer, all of it."""
        return asyncio.run_coroutine_threadsafe(self._answer(request), self._loop).result(_ANSWER_S)

    async def _answer(self, request: httpx.Request) -> httpx.Response:
        asked = httpx.Request(request.method, request.url, headers=request.headers, content=request.read())
        answer = await self._inner.handle_async_request(asked)
        content = await answer.aread()
        return httpx.Response(answer.status_code, headers=answer.headers, content=content)


class ControlClient:
    """Client of the control API of a SuperLink in this process. Not for the thread of its event loop.

    Assumes `flwr.supercore.control.ControlHttpClient`, that it keeps its HTTP client as ``_client``, and
    the protobuf requests that it takes.

    Args:
        app: From `server.flower.superlink_app`.
        loop: The event loop that serves it.
    """

    def __init__(self, app: Any, loop: asyncio.AbstractEventLoop) -> None:
        from flwr.supercore.control import ControlHttpClient
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

        self._client = ControlHttpClient(
            _NOWHERE, interceptors=[RuntimeVersionHttpInterceptor(component_name="fedseal")]
        )
        self._client._client.close()
        self._client._client = httpx.Client(transport=InProcess(app, loop), timeout=_ANSWER_S)

    def register_node(self, name: str, public_key: bytes) -> None:
        """Let a node with this PEM-encoded EC public key in; a known key is left as it is."""
        from flwr.proto.control_pb2 import RegisterNodeRequest

        try:
            self._client.RegisterNode(RegisterNodeRequest(public_key=public_key, name=name))
        except httpx.HTTPStatusError as error:
            if error.response.status_code != httpx.codes.CONFLICT and not _already_there(error):
                raise ServerUnavailable("a node could not be registered") from None

    def start_run(self, run: str) -> int:
        """Start a run whose configuration names a folder of the run store; returns Flower's run id."""
        from flwr.common.serde import fab_to_proto, user_config_to_proto
        from flwr.proto.control_pb2 import StartRunRequest

        request = StartRunRequest(
            fab=fab_to_proto(_bundle()), override_config=user_config_to_proto({"run": run})
        )
        try:
            return int(self._client.StartRun(request).run_id)
        except httpx.HTTPError:
            raise ServerUnavailable("Flower's control API does not answer") from None

    def stop_run(self, run_id: int) -> None:
        """Stop a run; one that has ended stays as it is."""
        from flwr.proto.control_pb2 import StopRunRequest

        try:
            self._client.StopRun(StopRunRequest(run_id=run_id))
        except httpx.HTTPStatusError:
            return
        except httpx.HTTPError:
            raise ServerUnavailable("Flower's control API does not answer") from None

    def run_status(self, run_id: int) -> str:
        """Return Flower's word for a run's state, or an empty string if the SuperLink does not answer."""
        from flwr.proto.control_pb2 import ListRunsRequest

        try:
            runs = self._client.ListRuns(ListRunsRequest(run_id=run_id)).run_dict
        except httpx.HTTPError:
            return ""
        status = runs[run_id].status if run_id in runs else None
        return "" if status is None else f"{status.status}:{status.sub_status}".rstrip(":")

    def close(self) -> None:
        """Release the client."""
        self._client.close()


def _already_there(error: Any) -> bool:
    return "already" in error.response.text.lower()


def _bundle() -> Any:
    """Return Flower's app bundle with nothing but a configuration.

    The components are named but their code is not in the bundle: the coordinator runs its installed
    `server.app`, and owners never load anything from a bundle.
    """
    from flwr.cli.build import build_fab_from_files
    from flwr.supercore.fab import Fab

    content, _ = build_fab_from_files({"pyproject.toml": BUNDLE.encode()})
    return Fab(hashlib.sha256(content).hexdigest(), content, {})
