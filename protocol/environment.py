"""The environment in which Flower and other libraries run, in every process of every party."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

FLOWER_ENVIRONMENT: Final = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
    "FLWR_LOG_LEVEL": "WARNING",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
}
"""Nothing is reported, looked up or installed at run time, and the libraries stay quiet."""


def prepare_environment() -> None:
    """Set the environment for this process and its children; call it before Flower is imported.

    Flower's own programs are found beside the running Python.
    """
    os.environ.update(FLOWER_ENVIRONMENT)
    programs = str(Path(sys.executable).parent)
    if programs not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = programs + os.pathsep + os.environ.get("PATH", "")


@contextmanager
def root_logger_kept() -> Iterator[None]:
    """Undo what a library does to the root logger.

    Importing Opacus, and a first warning of absl, give it a handler that prints every package's log.
    """
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
