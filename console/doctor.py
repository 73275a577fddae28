"""Look at this machine, and at one party's home folder, for what would stop a run later.

Nothing is sent anywhere and no secret is opened, unless a coordinator is named. What a check needs is
imported inside it, so that a package that is missing or broken becomes one finding and not the end of the
doctor.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import ssl
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from console.doctor_home import certificate_files, check_home, role_of_home
from console.doctor_net import check_inside, check_port
from console.findings import INSTALL, Finding, Status, guarded, show_findings
from protocol.environment import prepare_environment

if TYPE_CHECKING:
    from protocol.plan import Plan

__all__ = ["Finding", "Status", "check_port", "examine", "guarded", "show_findings"]

FLOWER_VERSION = "1.41.0"
FLOWER_MODULES = (
    "flwr.cli.build",
    "flwr.common.constant",
    "flwr.common.serde",
    "flwr.proto.control_pb2",
    "flwr.proto.fleet_pb2",
    "flwr.proto.message_pb2",
    "flwr.proto.node_pb2",
    "flwr.proto.runtime_pb2",
    "flwr.supercore.constant",
    "flwr.supercore.control",
    "flwr.supercore.dependencies.task",
    "flwr.supercore.error",
    "flwr.supercore.fab",
    "flwr.supercore.inflatable.inflatable_object",
    "flwr.supercore.inflatable.inflatable_protobuf_utils",
    "flwr.supercore.inflatable.inflatable_utils",
    "flwr.supercore.interceptors",
    "flwr.supercore.object_store.in_memory_object_store",
    "flwr.supercore.object_store.object_store_factory",
    "flwr.supercore.run",
    "flwr.supercore.superexec.executor.subprocess_executor",
    "flwr.supercore.task_identity",
    "flwr.superlink.cli.flower_superlink",
    "flwr.superlink.main",
    "flwr.superlink.routers.fleet.node_auth",
    "flwr.superlink.servicer.fleet",
    "flwr.superlink.servicer.runtime",
    "flwr.supernode.fleet_http_connection",
)
"""Modules of Flower outside its public API that launcher and node import."""

FLOWER_PROGRAM = "flower-superexec"
MIN_DISK_BYTES = 1024**3
OLDEST_NOW = datetime(2026, 1, 1, tzinfo=UTC)
"""This code is younger, so no right clock shows an earlier time."""

CLOCK_SKEW = timedelta(minutes=5)

_PINNED = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==([^\s;]+)")


def examine(home: Path | None, port: int, plan: Plan | None = None) -> list[Finding]:
    """Run every check; an error inside a check is that check's finding and never leaves.

    The ledger of an owner's home is opened and verified and its data file read, as the node would do;
    nothing is spent. What is counted in the data is for this owner's own screen.

    Args:
        home: Home folder of an owner or of the coordinator; None looks at the machine alone.
        port: Loopback port that must be free, or that of the running coordinator of `home`. Not looked at
            for an owner, who listens nowhere.
        plan: Says which rows of an owner's data a run would use.
    """
    now = datetime.now(UTC)
    role = role_of_home(home) if home is not None else None
    findings = [
        *guarded("Python", check_python, sys.version_info[:3]),
        *guarded("system", check_system),
        *guarded("packages", _check_installed),
        *guarded("encryption", check_encryption),
        *guarded("TLS", check_tls, ssl.OPENSSL_VERSION_INFO[:2], ssl.HAS_TLSv1_3),
        *guarded("key agreement", check_key_agreement),
        *guarded("Flower", check_flower, FLOWER_MODULES),
        *guarded("clock", check_clock, home, now),
        *guarded("disk", check_disk, home, MIN_DISK_BYTES),
        *guarded("resources", describe_resources),
    ]
    if role != "owner":
        findings += guarded("port", check_port, port, home)
        findings += guarded("inside", check_inside, home)
    if home is not None:
        findings += check_home(home, now, plan)
    return findings


# --- the machine -------------------------------------------------------------------------------------


def check_python(version: tuple[int, ...]) -> Finding:
    """Check the interpreter's version: 3.11, for which the packages are pinned."""
    text = ".".join(map(str, version))
    if version[:2] != (3, 11):
        return Finding("Python", "fail", text, "Install Python 3.11 and make the environment anew with it.")
    return Finding("Python", "ok", text)


def check_system() -> Finding:
    """Check that keys can be lent to TLS and SEAL in memory; elsewhere a temporary file holds them."""
    name = f"{platform.system()} {platform.machine()}"
    if os.name != "posix":
        return Finding("system", "fail", name, "Run fedseal on Linux; it needs POSIX file locks and modes.")
    if not hasattr(os, "memfd_create"):
        remedy = "Use Linux, or keep the temporary folder in memory or on an encrypted disk."
        return Finding("system", "warn", f"{name} has no files in memory", remedy)
    os.close(os.memfd_create("fedseal-doctor"))
    return Finding("system", "ok", f"{name}, with files in memory")


def check_packages(requirements: Sequence[str]) -> Finding:
    """Check that every pinned requirement is installed in exactly that version.

    Args:
        requirements: As the metadata lists them, ``name==version``; those of an extra are left out. A
            local part of the installed version (``+cpu``) does not count.
    """
    direct = [item for item in requirements if "extra ==" not in item]
    problems = [problem for item in direct if (problem := _package_problem(item)) is not None]
    if problems:
        return Finding("packages", "fail", "; ".join(problems), INSTALL)
    if not direct:
        return Finding("packages", "fail", "the installed fedseal lists no packages", INSTALL)
    return Finding("packages", "ok", f"{len(direct)} packages in their pinned versions")


def _check_installed() -> Finding:
    try:
        requirements = importlib.metadata.requires("fedseal") or []
    except importlib.metadata.PackageNotFoundError:
        return Finding("packages", "fail", "fedseal itself is not installed in this Python", INSTALL)
    return check_packages(requirements)


def check_encryption() -> Finding:
    """Encrypt, add and open a test sum with the installed SEAL."""
    from crypto.frames import SealContext
    from crypto.presets import packing_for
    from crypto.secret import self_test

    self_test(SealContext(packing_for("exact16", 3)))
    return Finding("encryption", "ok", "a test sum opened to what went in")


def check_tls(version: tuple[int, ...], has_tls13: bool) -> Finding:
    """Check that Python's ssl module offers TLS 1.3 on OpenSSL 3 or later."""
    text = f"OpenSSL {'.'.join(map(str, version))}"
    if version < (3, 0) or not has_tls13:
        remedy = "Use a Python 3.11 that is built with OpenSSL 3 or later."
        return Finding("TLS", "fail", f"{text}, {'with' if has_tls13 else 'without'} TLS 1.3", remedy)
    return Finding("TLS", "ok", f"{text}, with TLS 1.3")


def check_key_agreement() -> Finding:
    """Wrap and unwrap a throw-away secret by HPKE with ML-KEM-768 and X25519."""
    from crypto.agreement import HpkeKey, WrapContext, fresh_half_seed, wrap

    key, secret = HpkeKey.generate(), fresh_half_seed()
    context = WrapContext("doctor", "doctor", "doctor", "doctor", "pair")
    if key.unwrap(wrap(key.public(), secret, context), context) != secret:
        return Finding("key agreement", "fail", "a wrapped secret changed", INSTALL)
    return Finding("key agreement", "ok", "HPKE with ML-KEM-768 and X25519")


def check_flower(modules: Iterable[str]) -> Finding:
    """Check Flower's version, and that the modules and the program that fedseal builds on are there."""
    prepare_environment()
    version = importlib.metadata.version("flwr")
    missing = [module for module in modules if not _importable(module)]
    if shutil.which(FLOWER_PROGRAM) is None:
        missing.append(FLOWER_PROGRAM)
    if version != FLOWER_VERSION or missing:
        detail = f"version {version}, needed {FLOWER_VERSION}"
        return Finding("Flower", "fail", "; ".join([detail, *(f"no {item}" for item in missing)]), INSTALL)
    return Finding("Flower", "ok", version)


def check_clock(home: Path | None, now: datetime) -> Finding:
    """Check that the clock is not behind this code, nor behind the home's certificate files."""
    files = certificate_files(home) if home is not None else []
    written = [datetime.fromtimestamp(file.stat().st_mtime, UTC) for file in files]
    text = now.strftime("%Y-%m-%d %H:%M UTC")
    if now + CLOCK_SKEW < max([OLDEST_NOW, *written]):
        remedy = "Set the clock, best by a time service; certificates are judged by it."
        return Finding("clock", "fail", f"{text} is earlier than what is already here", remedy)
    return Finding("clock", "ok", text)


def check_disk(home: Path | None, needed_bytes: int) -> Finding:
    """Check the free space where runs are written: the home, or the current folder."""
    folder = home if home is not None and home.is_dir() else Path.cwd()
    free = shutil.disk_usage(folder).free
    text = f"{free / 1024**3:.1f} GiB free"
    if free < needed_bytes:
        remedy = f"Free at least {needed_bytes / 1024**3:.1f} GiB, or move the home."
        return Finding("disk", "fail", text, remedy)
    return Finding("disk", "ok", text)


def describe_resources() -> Finding:
    """Tell cores and memory; no amount is wrong."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Finding("resources", "ok", f"{cores} cores, {memory / 1024**3:.1f} GiB of memory")


def _package_problem(requirement: str) -> str | None:
    pinned = _PINNED.match(requirement)
    if pinned is None:
        return f"{requirement} is not pinned"
    name, wanted = pinned.groups()
    try:
        installed = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"{name} {wanted} is missing"
    same = installed == wanted or installed.split("+")[0] == wanted
    return None if same else f"{name} is {installed}, needed {wanted}"


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False
