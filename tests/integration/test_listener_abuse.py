"""A member that misuses the coordinator's listener during a run: the run finishes, memory is bounded."""

from __future__ import annotations

import gzip
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from random import Random

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from real_federation import PASSPHRASE, RealFederation, small_plan

from crypto.identity import load_owner, ssl_key_file
from server.listeners.limits import MAX_BODY_BYTES, MAX_REQUESTS
from tests.fuzz.mutations import mutate_bytes

PATHS = (
    *("/v1/fleet/fedseal/answer", "/v1/fleet/fedseal/receive", "/v1/fleet/push-object"),
    *("/v1/fleet/push-messages", "/v1/fleet/pull-messages", "/v1/fleet/activate-node", "/health"),
)
READS_FIRST = "/v1/fleet/push-object"
"""Flower reads the whole body of its own requests before it looks at who sent it."""

MEMORY_GROWTH_KB = 400 * 1024


@pytest.fixture(scope="module")
def context(real: RealFederation, tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    """What a member shows; it has no node, so that it disturbs none of the run."""
    member = load_owner(real.owner("owner-5").folder / "identity", PASSPHRASE)
    made = ssl.create_default_context(cafile=str(real.home / "identity" / "ca.crt"))
    file = tmp_path_factory.mktemp("abuse") / "shown.crt"
    file.write_bytes(member.transport_certificate.public_bytes(Encoding.PEM))
    with ssl_key_file(member.transport_key) as (key_file, password):
        made.load_cert_chain(file, key_file, password)
    return made


@contextmanager
def connected(real: RealFederation, context: ssl.SSLContext) -> Iterator[ssl.SSLSocket]:
    with (
        socket.create_connection(("127.0.0.1", real.port), timeout=60) as raw,
        context.wrap_socket(raw, server_hostname="127.0.0.1") as connection,
    ):
        yield connection


def head(path: str, *lines: str) -> bytes:
    fixed = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/protobuf"]
    return "\r\n".join([*fixed, *lines, "", ""]).encode()


def status(connection: ssl.SSLSocket) -> int:
    """Return the status of an answer; 0 if the connection was cut without one."""
    try:
        answer = connection.recv(4096)
    except (ssl.SSLError, ConnectionError):
        return 0
    return int(answer.split(b" ")[1]) if answer else 0


def memory_kb(real: RealFederation) -> int:
    """Return the peak of what the coordinator's process had in memory."""
    pid = real.processes.pids()["coordinator"]
    lines = (Path("/proc") / str(pid) / "status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def open_files(real: RealFederation) -> int:
    return len(list((Path("/proc") / str(real.processes.pids()["coordinator"]) / "fd").iterdir()))


# --- one at a time -----------------------------------------------------------------------------------


@pytest.mark.parametrize("claim", [str(MAX_BODY_BYTES + 1), str(2**31), str(2**62), "9" * 40])
def test_a_claim_of_a_long_body_is_refused_at_once(
    real: RealFederation, context: ssl.SSLContext, claim: str
) -> None:
    with connected(real, context) as connection:
        connection.sendall(head(PATHS[0], f"Content-Length: {claim}"))
        assert status(connection) in (400, 413)


def test_a_long_body_without_a_claim_is_cut_off(real: RealFederation, context: ssl.SSLContext) -> None:
    before = memory_kb(real)
    chunk = b"%x\r\n" % (1 << 20) + bytes(1 << 20) + b"\r\n"
    with connected(real, context) as connection:
        connection.sendall(head(READS_FIRST, "Transfer-Encoding: chunked"))
        sent = 0
        with suppress(ssl.SSLError, ConnectionError):
            for _ in range(200):
                connection.sendall(chunk)
                sent += 1
        assert sent < 100, "the listener took what it must refuse"
    assert memory_kb(real) - before < MEMORY_GROWTH_KB


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "gzip, gzip"])
def test_nothing_compressed_is_ever_expanded(
    real: RealFederation, context: ssl.SSLContext, encoding: str
) -> None:
    bomb = gzip.compress(bytes(200 << 20), 9)
    before = memory_kb(real)
    with connected(real, context) as connection:
        lines = (f"Content-Encoding: {encoding}", f"Content-Length: {len(bomb)}")
        with suppress(ssl.SSLError, ConnectionError):
            connection.sendall(head(PATHS[0], *lines) + bomb)
        assert status(connection) in (0, 415)
    assert memory_kb(real) - before < 50 * 1024


def test_a_head_without_end_is_cut_off(real: RealFederation, context: ssl.SSLContext) -> None:
    sent = 0
    with connected(real, context) as connection, suppress(ssl.SSLError, ConnectionError):
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        for _ in range(20_000):
            connection.sendall(b"X-Filler: " + b"a" * 1_000 + b"\r\n")
            sent += 1
    assert sent < 20_000, "the listener took a head of twenty megabytes"


def test_one_member_has_few_requests_at_a_time(real: RealFederation, context: ssl.SSLContext) -> None:
    with ExitStack() as stack:
        held = [stack.enter_context(connected(real, context)) for _ in range(MAX_REQUESTS + 1)]
        for connection in held[:-1]:
            connection.sendall(head(READS_FIRST, "Content-Length: 1000") + b"begun")
        time.sleep(0.5)
        held[-1].sendall(head(READS_FIRST, "Content-Length: 0"))
        assert status(held[-1]) == 429


def test_mutated_requests_break_nothing(real: RealFederation, context: ssl.SSLContext) -> None:
    """Raw bytes over TLS: heads and bodies; the listener answers, or closes, and goes on."""
    rng, statuses = Random(5), set[int]()
    for _ in range(300):
        body = rng.randbytes(rng.choice((0, 10, 300)))
        request = head(rng.choice(PATHS), f"Content-Length: {len(body)}", "Connection: close") + body
        if rng.random() < 0.8:
            request = mutate_bytes(request, rng)
        with connected(real, context) as connection:
            connection.settimeout(0.3)
            with suppress(ssl.SSLError, ConnectionError, TimeoutError):
                connection.sendall(request)
                statuses.add(status(connection))
    assert statuses & set(range(400, 500))
    assert 500 not in statuses


# --- all at once, during a run -----------------------------------------------------------------------


class Crowd:
    """Connections that take and never give, until the end of the block."""

    def __init__(self, real: RealFederation, context: ssl.SSLContext) -> None:
        self._real, self._context = real, context
        self._stack = ExitStack()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._stack.close()

    def idle(self, strangers: int, members: int) -> None:
        """Open connections that say nothing: before the handshake, and after it."""
        for _ in range(strangers):
            self._stack.enter_context(socket.create_connection(("127.0.0.1", self._real.port), timeout=60))
        for _ in range(members):
            self._stack.enter_context(connected(self._real, self._context))

    def slow(self, senders: int) -> None:
        """Send a request a byte at a time."""
        for _ in range(senders):
            self._begin(self._dribble)

    def greedy(self, senders: int) -> None:
        """Claim huge bodies, and send what would expand to 200 MiB, again and again."""
        bomb = gzip.compress(bytes(200 << 20), 9)
        claims = [
            head(PATHS[0], f"Content-Length: {2**62}"),
            head(READS_FIRST, f"Content-Length: {MAX_BODY_BYTES}") + bytes(1 << 16),
            head(PATHS[0], "Content-Encoding: gzip", f"Content-Length: {len(bomb)}") + bomb,
        ]
        for number in range(senders):
            self._begin(partial(self._claim, claims[number % len(claims)]))

    def _claim(self, request: bytes) -> None:
        while not self._stop.is_set():
            with suppress(OSError), connected(self._real, self._context) as connection:
                connection.sendall(request)
                connection.settimeout(5)
                status(connection)
            self._stop.wait(0.1)

    def _begin(self, work: Callable[[], None]) -> None:
        self._threads.append(threading.Thread(target=work))
        self._threads[-1].start()

    def _dribble(self) -> None:
        request = head(READS_FIRST, "Content-Length: 1000000")
        while not self._stop.is_set():
            with suppress(OSError), connected(self._real, self._context) as connection:
                for byte in request + bytes(1000):
                    connection.sendall(bytes([byte]))
                    if self._stop.wait(0.2):
                        return


def disturbed(
    real: RealFederation, context: ssl.SSLContext, strangers: int, members: int, slow: int
) -> None:
    before, files = memory_kb(real), open_files(real)
    plan = small_plan(run={"name": "disturbed", "rounds": 2}, privacy={"target_epsilon": 0.5})
    with Crowd(real, context) as crowd:
        crowd.idle(strangers, members)
        crowd.slow(slow)
        crowd.greedy(6)
        started = time.monotonic()
        store = real.run(plan)
        seconds = time.monotonic() - started
    assert store.get("state") == "finished", real.logs()
    assert [len(facts["contributors"]) for facts in store.rounds()] == [3, 3]
    assert memory_kb(real) - before < MEMORY_GROWTH_KB
    print(f"{seconds:.1f} s, {(memory_kb(real) - before) / 1024:.0f} MiB more, {files} files before")
    deadline = time.monotonic() + 30
    while open_files(real) > files + 20 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert open_files(real) <= files + 20, "connections of the crowd are still held"


def test_a_crowd_does_not_stop_a_run(real: RealFederation, context: ssl.SSLContext) -> None:
    disturbed(real, context, strangers=100, members=60, slow=10)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_thousand_connections_do_not_stop_a_run(real: RealFederation, context: ssl.SSLContext) -> None:
    disturbed(real, context, strangers=700, members=300, slow=40)
