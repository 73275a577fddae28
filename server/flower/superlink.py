"""Building Flower's SuperLink inside the coordinator's process."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol.errors import FlowerChanged
from server.flower.clock import tolerate_clocks
from server.flower.objects import objects_on_disk
from server.flower.programs import Executor, lifespan_with


@dataclass(frozen=True)
class SuperLinkOptions:
    """Addresses and files of a SuperLink.

    Attributes:
        runtime_port: Loopback port of the runtime API.
        authority_file: PEM of the only certificate that Flower's programs trust at the runtime API.
        certificate_file: PEM of the runtime API's certificate.
        key_file: Path from which the runtime API's private key can be loaded with `key_password`.
        key_password: One-time password of `key_file`.
        object_folder: Gets large objects in transit; it is emptied.
    """

    runtime_port: int
    authority_file: Path
    certificate_file: Path
    key_file: str
    key_password: str
    object_folder: Path


def superlink_app(options: SuperLinkOptions, executor: Executor) -> Any:
    """Build Flower's SuperLink as an ASGI app, with node authentication and in-memory link state.

    Assumes `flwr.superlink.cli.flower_superlink._parse_superlink_lifespan_config` reads `sys.argv`, and
    `flwr.superlink.main.create_app(config, lifespan_class)`. The link state is kept in memory because
    a run cannot outlive its SuperLink; what must last is in our own run store.

    Args:
        options: Addresses and files.
        executor: Starts, with the app, the program that starts the processes of runs.

    Raises:
        FlowerChanged: Flower does not have these functions.
    """
    try:
        cli = importlib.import_module("flwr.superlink.cli.flower_superlink")
        create_app = importlib.import_module("flwr.superlink.main").create_app
        arguments = [
            "flower-superlink",
            "--host=127.0.0.1",
            f"--port={options.runtime_port}",
            f"--ssl-ca-certfile={options.authority_file}",
            f"--ssl-certfile={options.certificate_file}",
            f"--ssl-keyfile={options.key_file}",
            "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
        ]
        with _arguments(arguments):
            config = cli._parse_superlink_lifespan_config()
        tolerate_clocks()
        with objects_on_disk(options.object_folder):
            return create_app(config, lifespan_with(executor, cli))
    except (ImportError, AttributeError, TypeError) as error:
        raise FlowerChanged("the SuperLink cannot be built") from error


@contextmanager
def _arguments(arguments: Sequence[str]) -> Iterator[None]:
    saved, sys.argv = sys.argv, list(arguments)
    try:
        yield
    finally:
        sys.argv = saved
