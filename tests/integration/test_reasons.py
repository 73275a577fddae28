"""Why a node is out: told apart on the node, with the address, and on the coordinator, by codes."""

from __future__ import annotations

import datetime as clock
import logging
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from connect_proxy import connect_proxy
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from real_federation import PASSPHRASE, made_federation, wait_until
from served import Served, served
from test_listener import coordinator as listener_of

from client import node
from client.address import Address
from client.flower import fleet_connection, tls_context
from client.node import run_node
from client.proxy import Proxy, chosen_proxy, read_proxy
from client.reach import Reach
from console.doctor_net import check_inside, check_port, check_server
from console.findings import Finding
from crypto.authority import Authority, create_authority
from crypto.certificates import OwnerCredentials
from crypto.identity import load_owner, load_server, open_ec_key
from crypto.pki import revoke
from crypto.trust import load_trust, replace_revocations
from protocol.admission import CLOCK_TOLERANCE_S
from protocol.errors import (
    AddressMalformed,
    CertificateRefused,
    ClocksDiffer,
    CoordinatorExpired,
    CoordinatorForeign,
    CoordinatorMisnamed,
    FedsealError,
    HostUnknown,
    InsideUnreachable,
    ListStale,
    NoAnswer,
    NotACoordinator,
    NotAMember,
    OwnCertificateExpired,
    OwnCertificateRevoked,
    PortRefused,
    ProxyFailed,
)
from scenarios.federation import Federation
from server.addresses import write_addresses
from server.home import ADDRESSES
from server.listeners.sockets import free_port
from tests.credentials import owner_of, server_of

NOW = datetime.now(UTC)
HOST = "127.0.0.1"
STRANGER = "owner-3"
SECRET = "s3cret-word"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """Three owners, one of whom the coordinator does not have among its members."""
    made = made_federation(tmp_path_factory.mktemp("reasons") / "federation", owners=3)
    for file in (made.server_home / "members").glob(f"{STRANGER}.*"):
        file.unlink()
    return made


@pytest.fixture(scope="module")
def authority(made: Federation) -> Authority:
    trust = load_trust(made.folder / "pki")
    key = open_ec_key(made.folder / "pki" / "ca.key.sealed", PASSPHRASE, trust.authority)
    return Authority(trust.authority, key)


@pytest.fixture(scope="module")
def coordinator(made: Federation) -> Iterator[Served]:
    with served(made.server_home, PASSPHRASE) as running:
        yield running


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What the coordinator's log said."""
    caplog.set_level(logging.INFO, "fedseal")
    return caplog


def home_of(made: Federation, name: str) -> Path:
    return next(owner.folder for owner in made.owners if owner.name == name)


def why(
    monkeypatch: pytest.MonkeyPatch, home: Path, address: str, proxy: Proxy | None = None
) -> FedsealError:
    """Return the error with which a node ends that tries once."""
    monkeypatch.setattr(node, "_stop_on_signals", lambda _stop: None)
    with pytest.raises(FedsealError) as caught:
        run_node(home, PASSPHRASE, address, keep_trying=False, proxy=proxy)
    return caught.value


def reach_of(home: Path, port: int, credentials: OwnerCredentials | None = None) -> Reach:
    """Return an owner's way to a port, with its own certificate or another."""
    identity = home / "identity"
    shown = load_owner(identity, PASSPHRASE) if credentials is None else credentials
    file = identity / "transport.crt"
    if credentials is not None:
        file = home / "shown.crt"
        file.write_bytes(shown.transport_certificate.public_bytes(Encoding.PEM))
    return Reach(Address(HOST, port), partial(tls_context, identity / "ca.crt", file, shown))


# --- the address ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        *("", "host", "host:", ":8443", "host:0", "host:65536", "host:8443x", "host:٤٤٣"),
        *("https://host:8443", "host:8443/path", "::1:8443", "[::1]", "[host]:8443", "[::1:8443"),
        *("ho st:8443", "host\n:8443", "-host:8443", "a..b:8443", f"{'a' * 64}:8443", "ü.example:8443"),
    ],
)
def test_a_malformed_address_is_refused_at_once(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Before anything is opened, and whether or not the node would keep trying."""
    with pytest.raises(AddressMalformed) as caught:
        run_node(Path("/nowhere"), b"", text, keep_trying=True)
    assert caught.value.exit_code == 2
    assert "\n" not in caught.value.detail


def test_no_address_is_known_for_the_name(monkeypatch: pytest.MonkeyPatch, made: Federation) -> None:
    def unknown(*_arguments: object, **_options: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    error = why(monkeypatch, home_of(made, "owner-1"), "fl.hospital.invalid:8443")
    assert type(error) is HostUnknown
    assert error.detail == "fl.hospital.invalid:8443"


def test_nothing_listens_there(monkeypatch: pytest.MonkeyPatch, made: Federation) -> None:
    address = f"{HOST}:{free_port()}"
    error = why(monkeypatch, home_of(made, "owner-1"), address)
    assert type(error) is PortRefused
    assert error.detail == address


def test_what_listens_says_nothing(monkeypatch: pytest.MonkeyPatch, made: Federation) -> None:
    monkeypatch.setattr("client.flower._TIMEOUT_S", 0.5)
    monkeypatch.setattr("client.reach._TIMEOUT_S", 0.5)
    with socket.create_server((HOST, 0)) as silent:
        address = f"{HOST}:{silent.getsockname()[1]}"
        error = why(monkeypatch, home_of(made, "owner-1"), address)
    assert type(error) is NoAnswer
    assert address in error.detail


# --- the coordinator's certificate -----------------------------------------------------------------------


@contextmanager
def answering(greeting: bytes) -> Iterator[int]:
    """Listen, and answer every connection with the same bytes, which are no TLS; yields the port."""
    with socket.create_server((HOST, 0)) as listener:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    raw, _ = listener.accept()
                    with raw:
                        raw.recv(65536)
                        raw.sendall(greeting)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize("greeting", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9.9\r\n"])
def test_it_is_no_tls_at_all(monkeypatch: pytest.MonkeyPatch, made: Federation, greeting: bytes) -> None:
    with answering(greeting) as port:
        error = why(monkeypatch, home_of(made, "owner-1"), f"{HOST}:{port}")
    assert type(error) is NotACoordinator
    assert error.detail == f"{HOST}:{port}: wrong version number"


def test_its_certificate_is_another_than_it_must_be(
    monkeypatch: pytest.MonkeyPatch, made: Federation, authority: Authority, tmp_path: Path
) -> None:
    home, days = home_of(made, "owner-1"), timedelta(days=1)
    foreign = create_authority("fedseal demo authority", 10)
    owner = owner_of(authority, "owner-8", days=1)
    for credentials, kind, words in (
        (server_of(foreign, [HOST], 1), CoordinatorForeign, ""),
        (replace(server_of(authority, [HOST], 1), key=owner.transport_key), None, ""),
        (server_of(authority, ["evil.example"], 1), CoordinatorMisnamed, "mismatch"),
        (server_of(authority, [HOST], 1, now=NOW - 2 * days), CoordinatorExpired, "expired"),
        (server_of(authority, [HOST], 1, now=NOW + 2 * days), CoordinatorExpired, "not yet valid"),
    ):
        if kind is None:
            credentials = replace(credentials, certificate=owner.transport_certificate)
            kind = CoordinatorForeign
        with listener_of(credentials, tmp_path) as port:
            error = why(monkeypatch, home, f"{HOST}:{port}")
        assert type(error) is kind
        assert f"{HOST}:{port}" in error.detail
        assert words in error.detail


def test_its_certificate_is_revoked_or_our_list_is_stale(
    monkeypatch: pytest.MonkeyPatch, made: Federation, authority: Authority, tmp_path: Path
) -> None:
    home, issued = tmp_path / "home", server_of(authority, [HOST], 1)
    shutil.copytree(home_of(made, "owner-1"), home)
    list_file, past = home / "identity" / "crl.pem", NOW - timedelta(days=9)
    with listener_of(issued, tmp_path) as port:
        revoked = authority.revocation_list([issued.certificate.serial_number], 7)
        list_file.write_bytes(revoked.public_bytes(Encoding.PEM))
        error = why(monkeypatch, home, f"{HOST}:{port}")
        assert type(error) is CoordinatorExpired
        assert "revoked" in error.detail
        list_file.write_bytes(authority.revocation_list([], 7, past).public_bytes(Encoding.PEM))
        error = why(monkeypatch, home, f"{HOST}:{port}")
        assert type(error) is CertificateRefused
        assert "this owner's revocation list" in error.detail


# --- the owner's own certificate --------------------------------------------------------------------------


def with_certificate(
    made: Federation, name: str, folder: Path, authority: Authority, now: datetime
) -> Path:
    """Return a copy of an owner's home whose transport certificate was issued another time, for a day."""
    home = folder / "home"
    shutil.copytree(home_of(made, name), home)
    key = load_owner(home / "identity", PASSPHRASE).transport_key.public_key()
    certificate = authority.certify(name, "owner-transport", key, 1, now=now)
    (home / "identity" / "transport.crt").write_bytes(certificate.public_bytes(Encoding.PEM))
    return home


@pytest.mark.parametrize("days", [-2, 2])
def test_own_certificate_is_not_valid_now(
    monkeypatch: pytest.MonkeyPatch, made: Federation, authority: Authority, tmp_path: Path, days: int
) -> None:
    """The node knows itself, and does not go on trying."""
    home = with_certificate(made, "owner-1", tmp_path, authority, NOW + timedelta(days=days))
    monkeypatch.setattr(node, "_stop_on_signals", lambda _stop: None)
    with pytest.raises(OwnCertificateExpired, match="this machine's clock shows") as caught:
        run_node(home, PASSPHRASE, f"{HOST}:{free_port()}", keep_trying=True)
    assert caught.value.exit_code == CertificateRefused.exit_code


def test_both_sides_say_that_a_certificate_has_expired(
    made: Federation, coordinator: Served, authority: Authority, said: pytest.LogCaptureFixture
) -> None:
    """Here the owner's clock would let it pass; by the coordinator's it is over."""
    expired = owner_of(authority, "owner-1", days=1, now=NOW - timedelta(days=2))
    reach = reach_of(home_of(made, "owner-1"), coordinator.addresses.port, expired)
    with pytest.raises(OwnCertificateExpired, match="by its clock"):
        reach.require_admitted()
    line = f"{OwnCertificateExpired.code}: a connection from {HOST} was refused: certificate has expired"
    wait_until(lambda: line in said.text, 10, lambda: said.text)


def test_both_sides_say_that_a_certificate_is_foreign(
    made: Federation, coordinator: Served, said: pytest.LogCaptureFixture
) -> None:
    foreign = owner_of(create_authority("fedseal demo authority", 10), "owner-1", 1)
    reach = reach_of(home_of(made, "owner-1"), coordinator.addresses.port, foreign)
    with pytest.raises(CertificateRefused, match="refuses ours: tlsv1 alert unknown ca"):
        reach.require_admitted()
    line = f"{CertificateRefused.code}: a connection from {HOST} was refused: unable to get local issuer"
    wait_until(lambda: line in said.text, 10, lambda: said.text)


def test_both_sides_say_who_is_not_a_member(
    monkeypatch: pytest.MonkeyPatch, made: Federation, coordinator: Served, said: pytest.LogCaptureFixture
) -> None:
    address = f"{HOST}:{coordinator.addresses.port}"
    error = why(monkeypatch, home_of(made, STRANGER), address)
    assert type(error) is NotAMember
    assert address in error.detail
    assert said.text.count(f"{NotAMember.code}: {STRANGER} was refused") == 1
    assert "Flower" not in said.text


def test_a_member_is_let_in(made: Federation, coordinator: Served) -> None:
    ahead = reach_of(home_of(made, "owner-1"), coordinator.addresses.port).require_admitted()
    assert abs(ahead) < CLOCK_TOLERANCE_S


def test_both_sides_say_who_is_revoked(
    monkeypatch: pytest.MonkeyPatch,
    made: Federation,
    coordinator: Served,
    said: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    """First the coordinator alone knows; then the owner's own list names it, and nobody is asked."""
    home = home_of(made, "owner-2")
    fresh = revoke(made.folder / "pki", PASSPHRASE, ["owner-2"])
    replace_revocations(made.server_home / "identity", fresh)
    address = f"{HOST}:{coordinator.addresses.port}"
    monkeypatch.setattr(node, "_stop_on_signals", lambda _stop: None)
    with pytest.raises(OwnCertificateRevoked, match=f"{address}: so says the coordinator"):
        run_node(home, PASSPHRASE, address, keep_trying=True)
    line = f"{OwnCertificateRevoked.code}: owner-2 was refused: the certificate is revoked"
    assert said.text.count(line) == 1
    replace_revocations(home / "identity", fresh)
    assert type(why(monkeypatch, home, f"{HOST}:{free_port()}")) is OwnCertificateRevoked


# --- clocks -----------------------------------------------------------------------------------------------


def connect(made: Federation, coordinator: Served, proxy: Proxy | None = None) -> None:
    """Connect as a node does, and end the connection."""
    identity = home_of(made, "owner-1") / "identity"
    credentials = load_owner(identity, PASSPHRASE)
    context = tls_context(identity / "ca.crt", identity / "transport.crt", credentials)
    address = f"{HOST}:{coordinator.addresses.port}"
    with fleet_connection(address, context, credentials, proxy) as connection:
        assert connection.node_id


def shifted(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let this process's node, and nothing else of it, have another time."""
    name = "flwr.supernode.node_auth_http_interceptor.now"
    monkeypatch.setattr(name, lambda: clock.datetime.now(UTC) + timedelta(seconds=seconds))
    monkeypatch.setattr("client.reach.time", SimpleNamespace(time=lambda: time.time() + seconds))


@pytest.mark.parametrize("seconds", [-290, -10, 10, 290])
def test_clocks_may_differ_by_what_the_authority_allows(
    monkeypatch: pytest.MonkeyPatch, made: Federation, coordinator: Served, seconds: int
) -> None:
    shifted(monkeypatch, seconds)
    connect(made, coordinator)


@pytest.mark.parametrize("seconds", [-400, 400])
def test_both_sides_say_by_how_much_clocks_differ(
    monkeypatch: pytest.MonkeyPatch,
    made: Federation,
    coordinator: Served,
    said: pytest.LogCaptureFixture,
    seconds: int,
) -> None:
    said.clear()
    shifted(monkeypatch, seconds)
    address = f"{HOST}:{coordinator.addresses.port}"
    error = why(monkeypatch, home_of(made, "owner-1"), address)
    assert type(error) is ClocksDiffer
    direction = "ahead of" if seconds > 0 else "behind"
    around = "(399|400|401|402)"
    assert_matches(rf"{address}: this clock is {around} s {direction} its", error.detail)
    assert_matches(rf"{ClocksDiffer.code}: owner-1 was refused: its clock is {around} s", said.text)
    # once it was let in, the next time that it is refused is told again
    monkeypatch.undo()
    connect(made, coordinator)


def assert_matches(pattern: str, text: str) -> None:
    assert re.search(pattern, text), text


# --- proxies ----------------------------------------------------------------------------------------------


def test_a_proxy_passes_tls_on_and_sees_nothing_of_it(made: Federation, coordinator: Served) -> None:
    port = coordinator.addresses.port
    with connect_proxy(login=f"user:{SECRET}") as between:
        by = read_proxy(f"http://user:{SECRET}@{HOST}:{between.port}")
        connect(made, coordinator, by)
        assert replace(reach_of(home_of(made, "owner-1"), port), proxy=by).require_admitted() < 100
    assert {head.splitlines()[0] for head in between.heads} == {f"CONNECT {HOST}:{port} HTTP/1.1".encode()}
    assert {data[:2] for data in between.passed} == {b"\x16\x03"}, "TLS records"


def test_a_proxy_that_fails_is_named_without_its_login(
    monkeypatch: pytest.MonkeyPatch, made: Federation, coordinator: Served
) -> None:
    home, address = home_of(made, "owner-1"), f"{HOST}:{coordinator.addresses.port}"
    with connect_proxy(login="user:other") as strict, connect_proxy(status=403) as closed:
        for port, words in (
            (strict.port, "answers 407"),
            (closed.port, "answers 403"),
            (free_port(), "Connection refused"),
        ):
            by = read_proxy(f"http://user:{SECRET}@{HOST}:{port}")
            error = why(monkeypatch, home, address, by)
            assert type(error) is ProxyFailed
            assert error.detail == f"{address}: proxy {HOST}:{port}{':' if words[0] == 'C' else ''} {words}"
            assert SECRET not in error.explain() + repr(by)
    with answering(b"SSH-2.0-OpenSSH_9.9\r\n") as port:
        error = why(monkeypatch, home, address, read_proxy(f"http://{HOST}:{port}"))
        assert type(error) is ProxyFailed
        assert "what is not HTTP" in error.detail


def test_what_a_proxy_cannot_reach_is_no_other_fault_of_the_way(
    monkeypatch: pytest.MonkeyPatch, made: Federation, authority: Authority, tmp_path: Path
) -> None:
    """One that opens TLS itself shows a certificate of its own."""
    foreign = server_of(create_authority("proxy", 10), [HOST], 1)
    with connect_proxy() as between, listener_of(foreign, tmp_path) as port:
        error = why(
            monkeypatch,
            home_of(made, "owner-1"),
            f"{HOST}:{port}",
            read_proxy(f"http://{HOST}:{between.port}"),
        )
    assert type(error) is CoordinatorForeign
    assert f"by the proxy {HOST}:{between.port}" in error.detail


def test_proxies_of_the_environment_are_ignored(
    monkeypatch: pytest.MonkeyPatch, made: Federation, coordinator: Served
) -> None:
    with connect_proxy() as between:
        for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, f"http://{HOST}:{between.port}")
        connect(made, coordinator)
    assert between.heads == []
    assert chosen_proxy(None, {"HTTPS_PROXY": f"http://{HOST}:1"}) is None


# --- the doctor ------------------------------------------------------------------------------------------


def examined(
    monkeypatch: pytest.MonkeyPatch, address: str, home: Path | None, proxy: Proxy | None = None
) -> Finding:
    """Return what the doctor finds of a coordinator, with the passphrase at hand."""
    monkeypatch.setenv("FEDSEAL_PASSPHRASE", PASSPHRASE.decode())
    (found,) = check_server(address, home, proxy, None)
    return found


def test_the_doctor_tells_the_same_reasons(
    monkeypatch: pytest.MonkeyPatch,
    made: Federation,
    coordinator: Served,
    authority: Authority,
    tmp_path: Path,
) -> None:
    home, address = home_of(made, "owner-1"), f"{HOST}:{coordinator.addresses.port}"
    found = examined(monkeypatch, address, home)
    assert found.status == "ok"
    assert_matches(rf"{address} lets this owner in; clocks differ by [0-3] s", found.detail)
    with connect_proxy() as between, connect_proxy(status=403) as closed:
        by = Proxy(Address(HOST, between.port))
        assert examined(monkeypatch, address, home, by).status == "ok"
        assert (
            ProxyFailed.code
            in examined(monkeypatch, address, home, Proxy(Address(HOST, closed.port))).detail
        )
    foreign = server_of(create_authority("fedseal demo authority", 10), [HOST], 1)
    with listener_of(foreign, tmp_path) as port, answering(b"SSH-2.0-OpenSSH_9.9\r\n") as other:
        for where, whose, kind in (
            ("https://host", home, AddressMalformed),
            (f"{HOST}:{free_port()}", home, PortRefused),
            (f"{HOST}:{port}", home, CoordinatorForeign),
            (f"{HOST}:{other}", home, NotACoordinator),
            (f"{HOST}:{other}", None, NotACoordinator),
            (address, home_of(made, STRANGER), NotAMember),
        ):
            found = examined(monkeypatch, where, whose)
            assert found.status == "fail"
            assert found.detail.startswith(f"{kind.code} {kind.what}")
            assert where in found.detail
            assert found.remedy == kind.remedy
    shifted(monkeypatch, 400)
    assert ClocksDiffer.code in examined(monkeypatch, address, home).detail


def test_the_doctor_says_what_it_did_not_look_at(made: Federation, coordinator: Served) -> None:
    address = f"{HOST}:{coordinator.addresses.port}"
    for home, status, words in (
        (home_of(made, "owner-1"), "warn", "whether it lets this owner in was not asked"),
        (made.server_home, "ok", "is a coordinator of this federation"),
        (None, "warn", "answers with TLSv1.3"),
    ):
        (found,) = check_server(address, home, None, None)
        assert (found.status, words in found.detail) == (status, True), found


def test_the_doctor_knows_the_coordinator_of_the_home(
    monkeypatch: pytest.MonkeyPatch, made: Federation, coordinator: Served, tmp_path: Path
) -> None:
    port = coordinator.addresses.port
    assert check_port(port, made.server_home).status == "ok"
    assert check_port(port).status == "fail"
    assert check_port(port, coordinators_home(made, tmp_path)).status == "fail", "another home"
    assert check_inside(made.server_home).detail.startswith("the running coordinator's own listener")
    # what a coordinator that was killed leaves behind
    left = tmp_path / "server"
    shutil.copy(made.server_home / ADDRESSES, left)
    write_addresses(left, replace(coordinator.addresses, port=free_port()))
    for home in (left, None):
        assert check_inside(home).detail.startswith("a listener on 127.0.0.1")
    monkeypatch.setenv("HTTPS_PROXY", f"http://{HOST}:{free_port()}")
    for home in (made.server_home, None):
        with pytest.raises(InsideUnreachable):
            check_inside(home)


# --- the coordinator itself ------------------------------------------------------------------------------


def coordinators_home(made: Federation, folder: Path) -> Path:
    home = folder / "server"
    for name in ("identity", "members"):
        shutil.copytree(made.server_home / name, home / name)
    return home


def open_server_key(home: Path) -> ec.EllipticCurvePublicKey:
    return load_server(home / "identity", PASSPHRASE).key.public_key()


def start(home: Path) -> None:
    with served(home, PASSPHRASE):
        pytest.fail("it said that it is ready")


def test_a_coordinator_says_what_is_wrong_with_itself_before_it_is_ready(
    made: Federation, authority: Authority, tmp_path: Path
) -> None:
    home = coordinators_home(made, tmp_path)
    certificate, list_file = home / "identity" / "server.crt", home / "identity" / "crl.pem"
    issued, fresh = certificate.read_bytes(), list_file.read_bytes()
    key = open_server_key(home)
    for days in (-2, 2):
        other = authority.certify("coordinator", "server", key, 1, [HOST], NOW + timedelta(days=days))
        certificate.write_bytes(other.public_bytes(Encoding.PEM))
        with pytest.raises(OwnCertificateExpired):
            start(home)
    certificate.write_bytes(issued)
    past = NOW - timedelta(days=9)
    list_file.write_bytes(authority.revocation_list([], 7, past).public_bytes(Encoding.PEM))
    with pytest.raises(ListStale, match="stale"):
        start(home)
    list_file.write_bytes(fresh)
    assert not (home / "log").exists(), "nothing was logged as an act"


def test_a_coordinator_warns_of_a_certificate_that_ends_soon(
    made: Federation, authority: Authority, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    home = coordinators_home(made, tmp_path)
    soon = authority.certify("coordinator", "server", open_server_key(home), 13, [HOST])
    (home / "identity" / "server.crt").write_bytes(soon.public_bytes(Encoding.PEM))
    with served(home, PASSPHRASE):
        assert "the coordinator's certificate is valid until" in said.text
