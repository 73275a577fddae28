"""The environment in which Flower and other libraries run, in every process of every party."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

FLOWER_ENVIRONMENT: Final = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
    "FLWR_LOG_LEVEL": "WARNING",
    "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE": str(1024 * 1024),
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
}
"""Nothing is reported, looked up or installed at run time, the libraries stay quiet, and what is large
moves in small pieces: the coordinator holds a piece of every message that is on its way."""

_PROXIES: Final = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "ftp_proxy", "grpc_proxy")
"""Variables by which libraries are told of proxies, in small or large letters."""

_MALLOC: Final = {"MALLOC_MMAP_THRESHOLD_": str(1024 * 1024), "MALLOC_ARENA_MAX": "2"}
_M_MMAP_THRESHOLD: Final = -3


def prepare_environment() -> None:
    """Set the environment for this process and its children; call it before Flower is imported.

    Flower's own programs are found beside the running Python. Proxies that the environment names are
    forgotten: what a coordinator does inside its machine must not leave it, and an owner's node uses the
    proxy that it was told of, or none.
    """
    os.environ.update(FLOWER_ENVIRONMENT)
    for name in [one for one in os.environ if one.lower() in _PROXIES]:
        del os.environ[name]
    programs = str(Path(sys.executable).parent)
    if programs not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = programs + os.pathsep + os.environ.get("PATH", "")


def return_large_memory() -> None:
    """Let this process and its children give large buffers back to the system as soon as they are freed.

    By default glibc raises the size from which it does so to that of the largest buffer that was freed, up
    to 32 MiB, and keeps what is smaller, in as many heaps as there are threads. A process that moves parts
    of several megabytes then grows to many times what it uses. Other C libraries are left as they are.
    """
    os.environ.update(_MALLOC)
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, int(_MALLOC["MALLOC_MMAP_THRESHOLD_"]))


def heeded(*numbers: signal.Signals) -> list[signal.Signals]:
    """Return those of some signals that this process may take.

    Whoever started it, such as nohup, may have set one to be ignored, and means its end to be ignored.
    """
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


@contextmanager
def importing() -> Iterator[None]:
    """Import large packages in a fifth less time: what they make stays, and needs no look for garbage."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


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
