"""What the coordinator's listener lets in, and which coordinator an owner's node accepts."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_der_private_key
from real_federation import PASSPHRASE, RealFederation, listening_addresses, wait_until

from client.flower import fleet_connection, tls_context
from crypto.authority import Authority, create_authority
from crypto.certificates import OwnerCredentials, ServerCredentials
from crypto.identity import load_owner, ssl_key_file
from crypto.trust import load_trust
from crypto.vault import open_secret
from protocol.errors import NotAMember, ServerUnavailable
from tests.credentials import owner_of, server_of

NOW = datetime.now(UTC)
HIDDEN = (
    "/v1/control/list-runs",
    "/v1/control/start-run",
    "/v1/control/register-node",
    "/v1/runtime/get-nodes",
    "/v1/runtime/push-messages",
    "/v1/fleet/register-node",
    "/v1/fleet/unregister-node",
    "/docs",
    "/redoc",
    "/openapi.json",
    "/",
    "/v1/fleet",
    "//v1/control/list-runs",
    "/v1/fleet/../control/list-runs",
    "/v1/fleet/%2e%2e/control/list-runs",
    "/V1/FLEET/register-node",
    "/v1/fleet/register-node/",
    "/v1/fleet//register-node",
    "/v1/fleet/%72egister-node",
)


@pytest.fixture(scope="module")
def authority(real: RealFederation) -> Authority:
    """The federation's own authority, which the tests may use to make bad certificates."""
    pki = real.made.folder / "pki"
    key = load_der_private_key(open_secret(pki / "ca.key.sealed", PASSPHRASE), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return Authority(load_trust(real.home / "identity").authority, key)


@pytest.fixture(scope="module")
def member(real: RealFederation) -> OwnerCredentials:
    return load_owner(real.owner("owner-1").folder / "identity", PASSPHRASE)


def context_for(real: RealFederation, credentials: OwnerCredentials | None, folder: Path) -> ssl.SSLContext:
    """Return a context that trusts the coordinator and shows a certificate, if any."""
    context = ssl.create_default_context(cafile=str(real.home / "identity" / "ca.crt"))
    if credentials is not None:
        file = folder / "shown.crt"
        file.write_bytes(credentials.transport_certificate.public_bytes(Encoding.PEM))
        with ssl_key_file(credentials.transport_key) as (key_file, password):
            context.load_cert_chain(file, key_file, password)
    return context


def health(real: RealFederation, context: ssl.SSLContext) -> bytes:
    """Ask for /health over a bare TLS socket; returns the answer's first line."""
    with (
        socket.create_connection(("127.0.0.1", real.port), timeout=30) as raw,
        context.wrap_socket(raw, server_hostname="127.0.0.1") as connection,
    ):
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = b""
        while chunk := connection.recv(4096):
            answer += chunk
        return answer.split(b"\r\n")[0]


def is_refused(real: RealFederation, context: ssl.SSLContext) -> bool:
    """Tell whether the listener cut the connection without an answer."""
    try:
        return health(real, context) == b""
    except (ssl.SSLError, ConnectionError):
        return True


class TestWhoIsLetIn:
    def test_member(self, real: RealFederation, member: OwnerCredentials, tmp_path: Path) -> None:
        assert health(real, context_for(real, member, tmp_path)).endswith(b"200 OK")

    def test_nobody_without_a_certificate(self, real: RealFederation, tmp_path: Path) -> None:
        assert is_refused(real, context_for(real, None, tmp_path))

    def test_nobody_of_another_authority(self, real: RealFederation, tmp_path: Path) -> None:
        foreign = owner_of(create_authority("fedseal demo authority", days=30), "owner-1", days=10)
        assert is_refused(real, context_for(real, foreign, tmp_path))

    def test_nobody_with_an_expired_certificate(
        self, real: RealFederation, authority: Authority, tmp_path: Path
    ) -> None:
        expired = owner_of(authority, "owner-1", days=1, now=NOW - timedelta(days=2))
        assert is_refused(real, context_for(real, expired, tmp_path))
        fresh = owner_of(authority, "owner-1", days=1)
        assert health(real, context_for(real, fresh, tmp_path)).endswith(b"200 OK"), "the date decides"

    def test_nobody_with_a_certificate_that_is_not_valid_yet(
        self, real: RealFederation, authority: Authority, tmp_path: Path
    ) -> None:
        early = owner_of(authority, "owner-1", days=1, now=NOW + timedelta(days=2))
        assert is_refused(real, context_for(real, early, tmp_path))

    def test_nobody_with_a_certificate_for_another_use(
        self, real: RealFederation, authority: Authority, tmp_path: Path
    ) -> None:
        server = server_of(authority, ["localhost"], days=1)
        file = tmp_path / "server.crt"
        file.write_bytes(server.certificate.public_bytes(Encoding.PEM))
        context = context_for(real, None, tmp_path)
        with ssl_key_file(server.key) as (key_file, password):
            context.load_cert_chain(file, key_file, password)
        assert is_refused(real, context)

    def test_nobody_over_tls_1_2(
        self, real: RealFederation, member: OwnerCredentials, tmp_path: Path
    ) -> None:
        context = context_for(real, member, tmp_path)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises((ssl.SSLError, ConnectionError)):
            health(real, context)

    def test_nobody_without_tls(self, real: RealFederation) -> None:
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{real.port}/health", timeout=30, trust_env=False)


class TestWhatIsServed:
    @pytest.fixture
    def client(
        self, real: RealFederation, member: OwnerCredentials, tmp_path: Path
    ) -> Iterator[httpx.Client]:
        context = context_for(real, member, tmp_path)
        base = f"https://127.0.0.1:{real.port}"
        with httpx.Client(verify=context, base_url=base, timeout=30, trust_env=False) as client:
            yield client

    def test_health(self, client: httpx.Client) -> None:
        assert client.get("/health").status_code == 200

    @pytest.mark.parametrize("path", HIDDEN)
    def test_everything_else_is_not_there(
        self, real: RealFederation, client: httpx.Client, path: str
    ) -> None:
        """The path is sent as it stands, because a client library may tidy it up."""
        for method in ("GET", "POST"):
            request = client.build_request(method, "/health", content=b"")
            request.url = request.url.copy_with(raw_path=path.encode())
            answer = client.send(request)
            assert answer.status_code == 404
            assert answer.content in (b"", b'{"detail":"Not Found"}')

    def test_fleet_api_wants_a_signature_beside_the_certificate(self, client: httpx.Client) -> None:
        for path in ("/v1/fleet/pull-messages", "/v1/fleet/activate-node", "/v1/fleet/push-messages"):
            answer = client.post(path, headers={"content-type": "application/protobuf"}, content=b"")
            assert 400 <= answer.status_code < 500

    def test_control_api_listens_on_loopback_alone(self, real: RealFederation) -> None:
        """Read what the kernel says of every process of the coordinator."""
        listening = listening_addresses(set(real.living()))
        assert listening, "the kernel's table names the listeners"
        assert {address for address, _port in listening} == {"0100007F"}
        assert f"{real.port:04X}" in {port for _address, port in listening}


class TestNodeAuthentication:
    def test_certified_owner_that_is_not_registered_cannot_act(self, real: RealFederation) -> None:
        home = real.owner("owner-4").folder / "identity"
        credentials = load_owner(home, PASSPHRASE)
        context = tls_context(home / "ca.crt", home / "transport.crt", credentials)
        with (
            pytest.raises(ServerUnavailable),
            fleet_connection(f"127.0.0.1:{real.port}", context, credentials),
        ):
            pytest.fail("an unregistered owner was connected")
        assert not [thread for thread in threading.enumerate() if "force_exit" in thread.name], (
            "Flower is about to end this process, although the node wants to try again"
        )

    def test_members_certificate_with_another_key_cannot_act(
        self, real: RealFederation, member: OwnerCredentials
    ) -> None:
        """TLS with a member's certificate, node authentication with a key that nobody registered."""
        home = real.owner("owner-1").folder / "identity"
        context = tls_context(home / "ca.crt", home / "transport.crt", member)
        stranger = load_owner(real.owner("owner-4").folder / "identity", PASSPHRASE)
        with (
            pytest.raises(ServerUnavailable),
            fleet_connection(f"127.0.0.1:{real.port}", context, stranger),
        ):
            pytest.fail("a key that is not registered was connected")

    def test_node_process_of_an_unregistered_owner_gives_up_with_a_code(self, real: RealFederation) -> None:
        real.processes.start(
            "stranger",
            [
                "client",
                "--once",
                "--home",
                str(real.owner("owner-4").folder),
                "--server",
                f"127.0.0.1:{real.port}",
            ],
            PASSPHRASE,
        )
        status = wait_until(lambda: real.processes.ended().get("stranger"), 60, "the stranger's end")
        assert status == NotAMember.exit_code
        assert f"{NotAMember.code}  " in real.log("stranger")
        assert f"127.0.0.1:{real.port}" in real.log("stranger")
        assert "Traceback" not in real.log("stranger")


class TestWhichCoordinatorIsAccepted:
    @pytest.fixture
    def context(self, authority: Authority, tmp_path: Path) -> ssl.SSLContext:
        """What an owner's node connects with."""
        credentials = owner_of(authority, "owner-9", days=1)
        (tmp_path / "ca.crt").write_bytes(authority.certificate.public_bytes(Encoding.PEM))
        (tmp_path / "crl.pem").write_bytes(authority.revocation_list([], 7).public_bytes(Encoding.PEM))
        shown = credentials.transport_certificate.public_bytes(Encoding.PEM)
        (tmp_path / "transport.crt").write_bytes(shown)
        return tls_context(tmp_path / "ca.crt", tmp_path / "transport.crt", credentials)

    def test_right_name_and_authority(
        self, authority: Authority, context: ssl.SSLContext, tmp_path: Path
    ) -> None:
        with coordinator(server_of(authority, ["127.0.0.1"], 1), tmp_path) as port:
            assert connect(context, port) == "TLSv1.3"

    def test_another_name(self, authority: Authority, context: ssl.SSLContext, tmp_path: Path) -> None:
        with (
            coordinator(server_of(authority, ["evil.example"], 1), tmp_path) as port,
            pytest.raises(ssl.SSLCertVerificationError),
        ):
            connect(context, port)

    def test_another_authority(self, context: ssl.SSLContext, tmp_path: Path) -> None:
        foreign = create_authority("fedseal demo authority", 10)
        with (
            coordinator(server_of(foreign, ["127.0.0.1"], 1), tmp_path) as port,
            pytest.raises(ssl.SSLCertVerificationError),
        ):
            connect(context, port)

    def test_expired(self, authority: Authority, context: ssl.SSLContext, tmp_path: Path) -> None:
        expired = server_of(authority, ["127.0.0.1"], 1, now=NOW - timedelta(days=2))
        with coordinator(expired, tmp_path) as port, pytest.raises(ssl.SSLCertVerificationError):
            connect(context, port)

    def test_revoked(self, authority: Authority, context: ssl.SSLContext, tmp_path: Path) -> None:
        issued = server_of(authority, ["127.0.0.1"], 1)
        with coordinator(issued, tmp_path) as port:
            assert connect(context, port) == "TLSv1.3"
            revoked = authority.revocation_list([issued.certificate.serial_number], 7)
            (tmp_path / "crl.pem").write_bytes(revoked.public_bytes(Encoding.PEM))
            owner = owner_of(authority, "owner-7", days=1)
            (tmp_path / "transport.crt").write_bytes(owner.transport_certificate.public_bytes(Encoding.PEM))
            informed = tls_context(tmp_path / "ca.crt", tmp_path / "transport.crt", owner)
            with pytest.raises(ssl.SSLCertVerificationError, match="revoked"):
                connect(informed, port)

    def test_nobody_by_a_stale_list(self, authority: Authority, tmp_path: Path) -> None:
        past = NOW - timedelta(days=9)
        owner = owner_of(authority, "owner-7", days=1)
        for name, data in (
            ("ca.crt", authority.certificate.public_bytes(Encoding.PEM)),
            ("crl.pem", authority.revocation_list([], 7, past).public_bytes(Encoding.PEM)),
            ("transport.crt", owner.transport_certificate.public_bytes(Encoding.PEM)),
        ):
            (tmp_path / name).write_bytes(data)
        context = tls_context(tmp_path / "ca.crt", tmp_path / "transport.crt", owner)
        with (
            coordinator(server_of(authority, ["127.0.0.1"], 1), tmp_path) as port,
            pytest.raises(ssl.SSLCertVerificationError, match="CRL has expired"),
        ):
            connect(context, port)

    def test_owner_that_poses_as_the_coordinator(
        self, authority: Authority, context: ssl.SSLContext, tmp_path: Path
    ) -> None:
        """A member has a certificate of the right authority, but not for a server."""
        owner = owner_of(authority, "owner-8", days=1)
        posing = ServerCredentials(owner.transport_key, owner.transport_certificate)
        with coordinator(posing, tmp_path) as port, pytest.raises(ssl.SSLCertVerificationError):
            connect(context, port)

    def test_node_says_so_with_a_code(self, real: RealFederation, tmp_path: Path) -> None:
        foreign = create_authority("fedseal demo authority", 10)
        home = real.owner("owner-4").folder / "identity"
        credentials = load_owner(home, PASSPHRASE)
        context = tls_context(home / "ca.crt", home / "transport.crt", credentials)
        with (
            coordinator(server_of(foreign, ["127.0.0.1"], 1), tmp_path) as port,
            pytest.raises(ServerUnavailable),
            fleet_connection(f"127.0.0.1:{port}", context, credentials),
        ):
            pytest.fail("a foreign coordinator was accepted")


@contextmanager
def coordinator(credentials: ServerCredentials, folder: Path) -> Iterator[int]:
    """Serve TLS handshakes under some certificate, one after the other; yields the port."""
    file = folder / "listening.crt"
    file.write_bytes(credentials.certificate.public_bytes(Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with ssl_key_file(credentials.key) as (key_file, password):
        context.load_cert_chain(file, key_file, password)
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.1)

        def serve() -> None:
            while not stop.is_set():
                try:
                    raw, _address = listener.accept()
                except TimeoutError:
                    continue
                raw.settimeout(10)
                try:
                    with context.wrap_socket(raw, server_side=True) as connection:
                        connection.recv(1)
                except OSError:
                    raw.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            stop.set()
            thread.join()


def connect(context: ssl.SSLContext, port: int) -> str | None:
    """Connect as an owner's node would; returns the TLS version."""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=30) as raw,
        context.wrap_socket(raw, server_hostname="127.0.0.1") as connection,
    ):
        return connection.version()
