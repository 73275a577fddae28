"""The only module of the coordinator that touches private parts of Flower 1.41.0.

Each function says what it assumes. `tests/integration/test_flower_contract.py` checks every assumption by
name, so that an upgrade of Flower fails there first.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from protocol.errors import FlowerChanged, ServerUnavailable

PULL_BACKOFF_S = 0.02
"""First wait for an object that is still being uploaded; Flower's own default is a whole second."""

_BUNDLE = """
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


@dataclass(frozen=True)
class SuperLinkOptions:
    """Addresses and files of a SuperLink.

    Attributes:
        control_port: Loopback port of the control and runtime APIs.
        authority_file: PEM of the authority that signed the server's certificate.
        certificate_file: PEM of the server's certificate.
        key_file: Path from which the server's private key can be loaded with `key_password`.
        key_password: One-time password of `key_file`.
    """

    control_port: int
    authority_file: Path
    certificate_file: Path
    key_file: str
    key_password: str


def superlink_app(options: SuperLinkOptions) -> Any:
    """Build Flower's SuperLink as an ASGI app, with node authentication and in-memory link state.

    Assumes `flwr.superlink.cli.flower_superlink._parse_superlink_lifespan_config` reads `sys.argv`, and
    `flwr.superlink.main.create_app(config, lifespan_class)`. The link state is kept in memory because
    a run cannot outlive its SuperLink; what must last is in our own run store.

    Raises:
        FlowerChanged: Flower does not have these functions.
    """
    try:
        cli = importlib.import_module("flwr.superlink.cli.flower_superlink")
        create_app = importlib.import_module("flwr.superlink.main").create_app
        arguments = [
            "flower-superlink",
            "--host=127.0.0.1",
            f"--port={options.control_port}",
            f"--ssl-ca-certfile={options.authority_file}",
            f"--ssl-certfile={options.certificate_file}",
            f"--ssl-keyfile={options.key_file}",
            "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
        ]
        with _arguments(arguments):
            config = cli._parse_superlink_lifespan_config()
        return create_app(config, cli.SuperLinkLifespan)
    except (ImportError, AttributeError, TypeError) as error:
        raise FlowerChanged("the SuperLink cannot be built") from error


@contextmanager
def _arguments(arguments: Sequence[str]) -> Iterator[None]:
    saved, sys.argv = sys.argv, list(arguments)
    try:
        yield
    finally:
        sys.argv = saved


class ControlClient:
    """Client of the loopback control API.

    Assumes `flwr.supercore.control.ControlHttpClient` and the protobuf requests that it takes.

    Args:
        port: Loopback port of the control API.
        authority: PEM of the authority that signed the server's certificate.
    """

    def __init__(self, port: int, authority: bytes) -> None:
        from flwr.supercore.control import ControlHttpClient
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

        self._client = ControlHttpClient.from_server_address(
            f"127.0.0.1:{port}",
            False,
            authority,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="fedseal")],
        )

    def register_node(self, name: str, public_key: bytes) -> None:
        """Let a node with this PEM-encoded EC public key in; a known key is left as it is."""
        import httpx
        from flwr.proto.control_pb2 import RegisterNodeRequest

        try:
            self._client.RegisterNode(RegisterNodeRequest(public_key=public_key, name=name))
        except httpx.HTTPStatusError as error:
            if error.response.status_code != httpx.codes.CONFLICT and not _already_there(error):
                raise ServerUnavailable("a node could not be registered") from None

    def start_run(self, run: str) -> int:
        """Start a run whose configuration names a folder of the run store; returns Flower's run id."""
        import httpx
        from flwr.common.serde import fab_to_proto, user_config_to_proto
        from flwr.proto.control_pb2 import StartRunRequest

        request = StartRunRequest(
            fab=fab_to_proto(_bundle()), override_config=user_config_to_proto({"run": run})
        )
        try:
            return int(self._client.StartRun(request).run_id)
        except httpx.HTTPError:
            raise ServerUnavailable("the control API on the loopback port does not answer") from None

    def stop_run(self, run_id: int) -> None:
        """Stop a run."""
        from flwr.proto.control_pb2 import StopRunRequest

        self._client.StopRun(StopRunRequest(run_id=run_id))

    def run_status(self, run_id: int) -> str:
        """Return Flower's word for a run's state, or an empty string if the SuperLink does not answer."""
        import httpx
        from flwr.proto.control_pb2 import ListRunsRequest

        try:
            runs = self._client.ListRuns(ListRunsRequest(run_id=run_id)).run_dict
        except httpx.HTTPError:
            return ""
        status = runs[run_id].status if run_id in runs else None
        return "" if status is None else f"{status.status}:{status.sub_status}".rstrip(":")

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


def _already_there(error: Any) -> bool:
    return "already" in error.response.text.lower()


def _bundle() -> Any:
    """Return Flower's app bundle with nothing but a configuration.

    The components are named but their code is not in the bundle: the coordinator runs its installed
    `server.app`, and owners never load anything from a bundle.
    """
    import hashlib

    from flwr.cli.build import build_fab_from_files
    from flwr.supercore.fab import Fab

    content, _ = build_fab_from_files({"pyproject.toml": _BUNDLE.encode()})
    return Fab(hashlib.sha256(content).hexdigest(), content, {})


def pull(grid: Grid, message_ids: Iterable[str]) -> list[Message]:
    """Pull the replies that are there, without Flower's first wait of a second per object.

    Assumes that `HttpGrid.pull_messages` calls `flwr.superlink.grid.http_grid.pull_objects`, whose
    waits are keyword arguments with module-level defaults. Other grids pull as they are.
    """
    module = sys.modules.get("flwr.superlink.grid.http_grid")
    if module is not None and not hasattr(module.pull_objects, "fedseal"):
        original = module.pull_objects

        def quick(*arguments: Any, **options: Any) -> Any:
            options.setdefault("initial_backoff", PULL_BACKOFF_S)
            options.setdefault("backoff_cap", 1.0)
            return original(*arguments, **options)

        quick.fedseal = True  # type: ignore[attr-defined]
        module.pull_objects = quick  # type: ignore[attr-defined]
    return list(grid.pull_messages(set(message_ids)))


def online_nodes(grid: Grid) -> dict[int, str]:
    """Return the nodes that are online, with the time of their last activation.

    Assumes `HttpGrid.get_nodes`; a grid without it reports node ids only.
    """
    get_nodes = getattr(grid, "get_nodes", None)
    if get_nodes is None:
        return dict.fromkeys(grid.get_node_ids(), "")
    return {node.node_id: str(node.last_activated_at) for node in get_nodes()}


def set_identity(run_id: int, node_id: int) -> None:
    """Give messages that are made in this process a run and a node.

    Assumes `flwr.supercore.task_identity.TaskIdentity`; only for grids without a SuperLink.
    """
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = node_id
    TaskIdentity.task_id = run_id
