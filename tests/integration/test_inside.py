"""What a coordinator does inside its machine does not depend on its certificate's names or on proxies."""

from __future__ import annotations

import shutil
import ssl
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from real_federation import (
    PASSPHRASE,
    RealFederation,
    federation_of,
    made_federation,
    small_plan,
    wait_until,
)
from served import served

from protocol.errors import InsideUnreachable
from scenarios import federation
from server.addresses import read_addresses
from server.listeners.loopback import ROOT, loopback_certificate, require_reachable
from server.probe import probe_listener

OUTSIDE = "fl.hospital.example"
"""A name that this machine cannot look up."""

NOWHERE = "http://127.0.0.1:9"
PROXIES = {
    name: value
    for variable, value in (
        ("http_proxy", NOWHERE),
        ("https_proxy", NOWHERE),
        ("all_proxy", "socks5://127.0.0.1:9"),
        ("no_proxy", "example.org"),
    )
    for name in (variable, variable.upper())
}


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealFederation]:
    """A coordinator whose certificate has one name, not its machine's; its environment names proxies."""
    with ExitStack() as running:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(federation, "LOCAL_HOSTS", (OUTSIDE,))
            made = made_federation(tmp_path_factory.mktemp("outside") / "federation", owners=3)
            for name, value in PROXIES.items():
                patch.setenv(name, value)
            real = running.enter_context(federation_of(made, []))
        yield real


def test_a_run_begins_whatever_the_certificate_names_and_the_environment_says(
    outside: RealFederation,
) -> None:
    """It does once its own process, which Flower's executor starts, has reached the runtime API."""
    store = outside.submit(small_plan())
    wait_until(lambda: store.get("state") == "running", 60, lambda: f"the run: {outside.logs()}")
    assert store.get("tls")["version"] == "TLSv1.3"
    assert outside.made.link().stop(store.folder.name) == "paused"


def test_the_loopback_listener_has_a_certificate_of_its_own(outside: RealFederation) -> None:
    """It is made at each start, and neither it nor the authority vouches for what the other does."""
    root, authority = outside.home / "flower" / ROOT, outside.home / "identity" / "ca.crt"
    port = read_addresses(outside.home).runtime_port
    assert root.stat().st_mode & 0o777 == 0o600
    require_reachable(port, root)
    with pytest.raises(InsideUnreachable, match=f"port {port}: ConnectError"):
        require_reachable(port, authority)
    with pytest.raises(ssl.SSLCertVerificationError):
        probe_listener("127.0.0.1", port, authority)
    with pytest.raises(ssl.SSLCertVerificationError):
        probe_listener("127.0.0.1", outside.port, root)
    arguments = [word for command in outside.living().values() for word in command]
    assert str(root) in arguments, "what Flower's executor trusts"
    assert str(authority) not in arguments


def test_another_starts_certificate_is_not_trusted(outside: RealFederation, tmp_path: Path) -> None:
    with loopback_certificate(tmp_path / "flower") as made:
        file = made.certificate
        with pytest.raises(InsideUnreachable):
            require_reachable(read_addresses(outside.home).runtime_port, file)
    assert not file.exists()


def test_a_coordinator_that_cannot_reach_itself_is_never_ready(
    outside: RealFederation, tmp_path: Path
) -> None:
    """Here a proxy stands in the way of the program that connects, as its library finds it."""
    for name in ("identity", "members"):
        shutil.copytree(outside.home / name, tmp_path / name)
    with (
        pytest.raises(InsideUnreachable, match="ConnectError"),
        served(tmp_path, PASSPHRASE, environment={"HTTPS_PROXY": NOWHERE}),
    ):
        pytest.fail("it was ready")
    assert not (tmp_path / "addresses.json").exists()
    assert not (tmp_path / "flower" / ROOT).exists()
