"""Who may command a running coordinator, and that a revocation takes effect while it runs."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from real_federation import (
    PASSPHRASE,
    RealFederation,
    federation_of,
    listening_addresses,
    made_federation,
    small_plan,
    wait_until,
)

from client.address import Address
from client.coordinator import CoordinatorWatch
from client.flower import tls_context
from client.reach import Reach
from crypto.auditlog import Act, AuditLog, KeptLog
from crypto.authority import Authority, create_authority
from crypto.certificates import OperatorCredentials, OwnerCredentials, key_sha256
from crypto.identity import load_operator, load_owner, load_server, open_ec_key, ssl_key_file
from crypto.pki import revoke
from crypto.trust import load_trust, replace_revocations
from protocol.admission import REFUSAL_HEADER, REFUSAL_STATUS
from protocol.errors import (
    CertificateRefused,
    LogBroken,
    OwnCertificateRevoked,
    RunBusy,
    RunFailed,
    RunPaused,
    ServerUnavailable,
)
from server.home import OPERATOR
from server.listeners.admission import loopback_user
from server.listeners.control import SOCKET, ControlLink, _short_path
from tests.credentials import enrol, operator_of, owner_of

SECONDS = 5.0
"""A revocation must take effect within this time."""


@pytest.fixture(scope="module")
def authority(real: RealFederation) -> Authority:
    pki = real.made.folder / "pki"
    trust = load_trust(pki)
    return Authority(trust.authority, open_ec_key(pki / "ca.key.sealed", PASSPHRASE, trust.authority))


def link_of(real: RealFederation, folder: Path, credentials: OperatorCredentials) -> ControlLink:
    """Return the link of somebody who has put any certificate into an identity folder."""
    for name in ("ca.crt", "crl.pem"):
        (folder / name).write_bytes((real.home / "identity" / name).read_bytes())
    (folder / "operator.crt").write_bytes(credentials.certificate.public_bytes(Encoding.PEM))
    return ControlLink(real.home, folder, credentials)


def as_operator(owner: OwnerCredentials) -> OperatorCredentials:
    return OperatorCredentials(owner.transport_key, owner.transport_certificate)


class TestWhoCommands:
    def test_operator(self, real: RealFederation, authority: Authority, tmp_path: Path) -> None:
        assert isinstance(real.made.link().runs(), list)
        second = operator_of(authority, "bob", 1)
        assert isinstance(link_of(real, tmp_path, second).runs(), list)

    def test_nobody_with_another_certificate(
        self, real: RealFederation, authority: Authority, tmp_path: Path
    ) -> None:
        past = datetime.now(UTC) - timedelta(days=3)
        member = load_owner(real.owner("owner-1").folder / "identity", PASSPHRASE)
        for credentials in (
            as_operator(member),
            as_operator(owner_of(authority, "operator", 1)),
            operator_of(create_authority("fedseal demo authority", 10), "operator", 5),
            operator_of(authority, "operator", 1, past),
        ):
            with pytest.raises(ServerUnavailable):
                link_of(real, tmp_path, credentials).runs()

    def test_nobody_without_a_certificate_or_with_old_tls(self, real: RealFederation) -> None:
        for newest in (ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_2):
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.maximum_version = newest
            context.load_verify_locations(real.home / "identity" / "ca.crt")
            with (
                _short_path(real.home) as path,
                httpx.Client(transport=httpx.HTTPTransport(verify=context, uds=path)) as client,
                pytest.raises(httpx.TransportError),
            ):
                client.get("https://coordinator/runs")

    def test_nobody_without_tls(self, real: RealFederation) -> None:
        with (
            _short_path(real.home) as path,
            httpx.Client(transport=httpx.HTTPTransport(uds=path)) as client,
            pytest.raises(httpx.TransportError),
        ):
            client.get("http://coordinator/runs")

    def test_socket_is_closed_to_other_users(self, real: RealFederation) -> None:
        mode = (real.home / SOCKET).lstat().st_mode
        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) == 0o600
        assert stat.S_IMODE(real.home.stat().st_mode) == 0o700

    def test_operators_do_not_pass_for_owners(
        self, real: RealFederation, authority: Authority, tmp_path: Path
    ) -> None:
        operator = operator_of(authority, "bob", 1)
        context = fleet_context(real, tmp_path, operator.key, operator.certificate)
        with pytest.raises(httpx.TransportError), fleet_client(real, context) as client:
            client.get("/health")

    def test_an_operator_that_meets_another_server_says_so(
        self, real: RealFederation, authority: Authority, tmp_path: Path
    ) -> None:
        """A member who has put a listener in the place of the socket is not a coordinator."""
        operator = operator_of(authority, "bob", 1)
        member = owner_of(authority, "eve", 1)
        link = link_of(real, tmp_path, operator)
        link._home = tmp_path
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        (tmp_path / "eve.crt").write_bytes(member.transport_certificate.public_bytes(Encoding.PEM))
        with ssl_key_file(member.transport_key) as (key_file, password):
            context.load_cert_chain(tmp_path / "eve.crt", key_file, password)
        with socket.socket(socket.AF_UNIX) as listener, _short_path(tmp_path) as path:
            listener.bind(path)
            listener.listen()
            listener.settimeout(20)
            child = os.fork()
            if child == 0:
                try:
                    context.wrap_socket(listener.accept()[0], server_side=True)
                finally:
                    os._exit(0)
            with pytest.raises(ServerUnavailable):
                link.runs()
            os.waitpid(child, 0)


class TestWhatIsCommanded:
    @pytest.mark.parametrize("run", ["nothing", "../members", "", "a" * 100, "small/../small"])
    def test_runs_that_are_not_there(self, real: RealFederation, run: str) -> None:
        for act in (real.made.link().start, real.made.link().stop):
            with pytest.raises(RunFailed):
                act(run)

    def test_paths_that_are_not_there(self, real: RealFederation) -> None:
        link = real.made.link()
        for method, path in (
            ("GET", "/"),
            ("POST", "/runs"),
            ("GET", "/runs/start"),
            ("POST", "/v1/control/start-run"),
            ("POST", "/v1/control/list-runs"),
            ("POST", "/v1/runtime/acquire-task"),
        ):
            with pytest.raises(ServerUnavailable):
                link._ask(method, path)

    def test_flowers_control_api_is_on_no_listener(self, real: RealFederation) -> None:
        """Ask every TCP port on which a process of the coordinator listens."""
        ports = listening_ports(real)
        assert real.port in ports
        for port in ports - {real.port}:
            with httpx.Client(verify=False, base_url=f"https://127.0.0.1:{port}") as client:
                assert client.get("/health").status_code == 200
                for path in ("/v1/control/list-runs", "/v1/fleet/pull-messages", "/docs", "/openapi.json"):
                    for method in ("GET", "POST"):
                        assert client.request(method, path).status_code == 404, path
                answer = client.post("/v1/runtime/get-nodes", content=b"")
                assert 400 <= answer.status_code < 500


def listening_ports(real: RealFederation) -> set[int]:
    return {int(port, 16) for _address, port in listening_addresses(set(real.living()))}


class TestOtherUsersOfTheMachine:
    def test_owner_of_a_connection_is_read_from_the_kernel(self, tmp_path: Path) -> None:
        with (
            socket.create_server(("127.0.0.1", 0)) as listener,
            socket.create_connection(listener.getsockname()) as client,
        ):
            ends = client.getsockname(), client.getpeername()
            assert loopback_user(*ends) == os.geteuid()
        assert loopback_user(None, ends[1]) is None
        assert loopback_user(("127.0.0.1", 1), ends[1]) is None

    def test_one_port_of_two_users_is_told_apart(self, tmp_path: Path) -> None:
        """Somebody may open a connection from a port that this user's own connection elsewhere has, too."""
        ours, theirs, closed = 1000, 65534, 0
        rows = [
            f"{number}: 0100007F:{local:04X} 0100007F:{remote:04X} {state} 0:0 00:0 0 {user} 0 {number}"
            for number, (local, remote, state, user) in enumerate(
                [
                    (5000, 9000, "01", ours),
                    (5000, 8000, "06", closed),
                    (5000, 8000, "01", theirs),
                    (8000, 5000, "01", ours),
                ]
            )
        ]
        table = tmp_path / "tcp"
        table.write_text("\n".join(["header", *rows]) + "\n", encoding="ascii")
        assert loopback_user(("127.0.0.1", 5000), ("127.0.0.1", 8000), table) == theirs
        assert loopback_user(("127.0.0.1", 5000), ("127.0.0.1", 9000), table) == ours
        assert loopback_user(("127.0.0.1", 5000), ("127.0.0.1", 7000), table) is None

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
    def test_another_user_reaches_no_listener_of_this_machine(self, real: RealFederation) -> None:
        """A real process of another user: it is cut off by the loopback port, and denied the socket."""
        (port,) = listening_ports(real) - {real.port}
        program = (
            "import encodings.idna, os, socket, ssl, sys\n"
            "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
            "context = ssl._create_unverified_context()\n"
            "try:\n"
            "    raw = socket.create_connection(('127.0.0.1', int(sys.argv[1])), 10)\n"
            "    tls = context.wrap_socket(raw)\n"
            "    tls.sendall(b'GET /health HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n')\n"
            "    print('answer', tls.recv(100))\n"
            "except OSError as error:\n"
            "    print('cut off', type(error).__name__)\n"
            "try:\n"
            "    socket.socket(socket.AF_UNIX).connect(sys.argv[2])\n"
            "    print('connected')\n"
            "except OSError as error:\n"
            "    print('denied', type(error).__name__)\n"
        )
        command = [sys.executable, "-c", program, str(port), str(real.home / SOCKET)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout.startswith(("cut off", "answer b''")), done.stdout
        assert "denied" in done.stdout


# --- revocation while everything runs ------------------------------------------------------------------


@pytest.fixture(scope="module")
def revocable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealFederation]:
    """A coordinator of its own, without owners, whose members are revoked one after the other."""
    made = made_federation(tmp_path_factory.mktemp("revocable") / "federation", owners=3)
    with federation_of(made, []) as federation:
        yield federation


def fleet_context(
    real: RealFederation, folder: Path, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate
) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(real.home / "identity" / "ca.crt"))
    file = folder / "fleet.crt"
    file.write_bytes(certificate.public_bytes(Encoding.PEM))
    with ssl_key_file(key) as (key_file, password):
        context.load_cert_chain(file, key_file, password)
    return context


def fleet_client(real: RealFederation, context: ssl.SSLContext) -> httpx.Client:
    base = f"https://127.0.0.1:{real.port}"
    return httpx.Client(verify=context, base_url=base, timeout=30, trust_env=False)


def owner_client(real: RealFederation, name: str, folder: Path) -> httpx.Client:
    owner = load_owner(real.owner(name).folder / "identity", PASSPHRASE)
    return fleet_client(real, fleet_context(real, folder, owner.transport_key, owner.transport_certificate))


def publish(real: RealFederation, *names: str) -> Path:
    """Revoke names at the authority, and hand the list to the running coordinator alone."""
    fresh = revoke(real.made.folder / "pki", PASSPHRASE, names)
    replace_revocations(real.home / "identity", fresh)
    return fresh


class TestStopping:
    def test_operator_starts_and_stops_a_run(self, revocable: RealFederation) -> None:
        """It waits for owners that are not there; it ends as paused, and its process ends too."""
        store = revocable.submit(small_plan(run={"name": "endless"}))
        name, link = store.folder.name, revocable.made.link()
        wait_until(lambda: store.get("state") == "running", 60, lambda: f"a run; {revocable.logs()}")
        operator = load_operator(revocable.home / OPERATOR, revocable.made.operator_passphrase)
        fingerprint = key_sha256(operator.certificate.public_key())
        with pytest.raises(RunFailed, match=RunBusy.code):
            link.start(name)
        (row,) = link.runs()
        assert (row["run"], row["state"], row["operator"]) == (name, "running", fingerprint)
        assert link.stop(name) == "paused"
        wait_until(lambda: not store.is_carried_out(), 60, "the end of the run's process")
        assert store.get("state") == "paused"
        assert store.get("problem")["code"] == RunPaused.code
        for kind in ("operator.start", "operator.stop"):
            (act,) = acts(revocable, kind)
            assert (act.actor, act.facts["run"]) == (fingerprint, name)
        asked = acts(revocable, "operator.runs")
        assert asked
        assert {act.actor for act in asked} == {fingerprint}
        command = [sys.executable, "-m", "fedseal", "log", "verify", "--home", str(revocable.home)]
        verified = subprocess.run(command, capture_output=True, text=True, timeout=100)
        assert verified.returncode == 0, verified.stderr


class TestRevocation:
    def test_revoked_owner_is_refused_without_a_restart(
        self, revocable: RealFederation, tmp_path: Path
    ) -> None:
        with (
            owner_client(revocable, "owner-1", tmp_path) as revoked,
            owner_client(revocable, "owner-2", tmp_path) as other,
        ):
            assert revoked.get("/health").status_code == other.get("/health").status_code == 200
            publish(revocable, "owner-1")
            # the very next request on the open connection
            assert refuses(revoked)
            assert other.get("/health").status_code == 200
        with owner_client(revocable, "owner-1", tmp_path) as again:
            answer = again.get("/health")
        assert answer.status_code == REFUSAL_STATUS
        assert answer.headers[REFUSAL_HEADER] == OwnCertificateRevoked.code
        assert answer.content == b""
        assert acts(revocable, "peer.refused")[-1].facts["reason"] == "the certificate is revoked"

    def test_open_connection_of_a_revoked_owner_is_closed(
        self, revocable: RealFederation, tmp_path: Path
    ) -> None:
        """It asks for nothing more, and half of a request is under way."""
        owner = load_owner(revocable.owner("owner-2").folder / "identity", PASSPHRASE)
        context = fleet_context(revocable, tmp_path, owner.transport_key, owner.transport_certificate)
        with (
            socket.create_connection(("127.0.0.1", revocable.port), timeout=30) as raw,
            context.wrap_socket(raw, server_hostname="127.0.0.1") as connection,
        ):
            connection.sendall(
                b"POST /v1/fleet/push-object HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nx"
            )
            publish(revocable, "owner-2")
            started = time.monotonic()
            connection.settimeout(SECONDS)
            try:
                while connection.recv(4096):
                    pass
            except (ConnectionError, ssl.SSLError):
                pass
            assert time.monotonic() - started < SECONDS

    def test_revoked_operator_is_refused_without_a_restart(
        self, revocable: RealFederation, tmp_path: Path
    ) -> None:
        identity = tmp_path / "carol"
        enrol(revocable.made.folder / "pki", PASSPHRASE, identity, "operator", "carol", PASSPHRASE)
        link = ControlLink(revocable.home, identity, load_operator(identity, PASSPHRASE))
        assert isinstance(link.runs(), list)
        publish(revocable, "carol")
        with pytest.raises(ServerUnavailable):
            link.runs()
        assert isinstance(revocable.made.link().runs(), list)

    def test_stale_list_refuses_everybody_until_a_fresh_one_comes(
        self, revocable: RealFederation, tmp_path: Path
    ) -> None:
        file = revocable.home / "identity" / "crl.pem"
        with owner_client(revocable, "owner-3", tmp_path) as member:
            assert member.get("/health").status_code == 200
            pki = revocable.made.folder / "pki"
            trust = load_trust(pki)
            signer = Authority(
                trust.authority, open_ec_key(pki / "ca.key.sealed", PASSPHRASE, trust.authority)
            )
            # its number is that of now, so it is the newest, but it ran out yesterday
            serials = [entry.serial_number for entry in trust.revocations]
            stale = stale_list(signer, serials)
            file.write_bytes(stale)
            assert refuses(member)
            with pytest.raises(ServerUnavailable):
                revocable.made.link().runs()
            publish(revocable)
        with owner_client(revocable, "owner-3", tmp_path) as member:
            assert member.get("/health").status_code == 200
        assert isinstance(revocable.made.link().runs(), list)

    def test_coordinators_own_revocation_reaches_a_connected_node(
        self, revocable: RealFederation, tmp_path: Path
    ) -> None:
        """Last of all, because nobody talks to this coordinator afterwards."""
        home = revocable.owner("owner-3").folder / "identity"
        credentials, trust = load_owner(home, PASSPHRASE), load_trust(home)

        def context() -> ssl.SSLContext:
            return tls_context(home / "ca.crt", home / "transport.crt", credentials)

        watch = CoordinatorWatch(trust, Reach(Address("127.0.0.1", revocable.port), context))
        watch.check()
        replace_revocations(home, revoke(revocable.made.folder / "pki", PASSPHRASE))
        watch.check()
        replace_revocations(home, revoke(revocable.made.folder / "pki", PASSPHRASE, ["coordinator"]))
        with pytest.raises(ServerUnavailable):
            watch.check()
        (home / "crl.pem").unlink()
        with pytest.raises(CertificateRefused):
            watch.check()


def stale_list(signer: Authority, serials: list[int]) -> bytes:
    now = datetime.now(UTC)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(signer.certificate.subject)
        .last_update(now - timedelta(days=8))
        .next_update(now - timedelta(days=1))
        .add_extension(x509.CRLNumber(int(now.timestamp() * 1_000_000)), critical=False)
    )
    for serial in serials:
        entry = x509.RevokedCertificateBuilder().serial_number(serial)
        builder = builder.add_revoked_certificate(entry.revocation_date(now).build())
    return builder.sign(signer.private_key, hashes.SHA384()).public_bytes(Encoding.PEM)


def refuses(client: httpx.Client) -> bool:
    """Tell whether the next request is refused, or the connection is closed."""
    try:
        return client.get("/health").status_code == REFUSAL_STATUS
    except httpx.TransportError:
        return True


def acts(real: RealFederation, kind: str) -> list[Act]:
    authority = load_trust(real.home / "identity").authority
    log = AuditLog(real.home / "log")
    wait_until(lambda: _verifies(log, authority), SECONDS, "the log is signed")
    return [act for act in log.acts() if act.act == kind]


def _verifies(log: AuditLog, authority: x509.Certificate) -> bool:
    log.verify(authority)
    return True


# --- the log -------------------------------------------------------------------------------------------


class TestLog:
    def test_start_members_and_operator_are_in_it(self, real: RealFederation) -> None:
        assert acts(real, "server.start")
        assert {act.facts["name"] for act in acts(real, "member.registered")} >= {"owner-1", "owner-2"}
        with pytest.raises(RunFailed):
            real.made.link().start("nothing")

    def test_coordinator_does_not_start_on_a_log_that_was_cut(
        self, real: RealFederation, tmp_path: Path
    ) -> None:
        for name in ("identity", "members"):
            shutil.copytree(real.home / name, tmp_path / name)
        server, trust = load_server(tmp_path / "identity", PASSPHRASE), load_trust(tmp_path / "identity")
        log = KeptLog(AuditLog(tmp_path / "log"), "coordinator", server.key, server.certificate)
        log.begin(trust.authority)
        for _ in range(2):
            log.record("server.start")
        log.sign()
        file = tmp_path / "log" / "acts.jsonl"
        file.write_bytes(file.read_bytes().splitlines(keepends=True)[0])
        command = [sys.executable, "-m", "fedseal", "server", "--home", str(tmp_path)]
        environment = os.environ | {"FEDSEAL_PASSPHRASE": PASSPHRASE.decode()}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == LogBroken.exit_code
        assert LogBroken.code in done.stderr
