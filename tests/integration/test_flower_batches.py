"""Batched requests: who may send them, what is refused, and that Flower's own requests work beside them."""

from __future__ import annotations

import base64
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime

import httpx
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse, PushMessagesRequest
from flwr.proto.message_pb2 import Message
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import AcquireTaskResponse
from real_federation import PASSPHRASE, RealFederation

from client.flower import fleet_connection, tls_context
from crypto.certificates import OwnerCredentials
from crypto.identity import load_owner
from protocol.batches import (
    ANSWER_PATH,
    LONGEST_WAIT_S,
    MAX_BATCH_BYTES,
    MAX_ITEMS,
    PULL_PATH,
    PUSH_PATH,
    RECEIVE_PATH,
    join_batch,
    split_batch,
)
from protocol.errors import EnvironmentUnfit, ServerUnavailable
from server.addresses import read_addresses
from server.listeners.loopback import ROOT

OWNER = "owner-1"
PROTOBUF = {"content-type": "application/protobuf", "accept": "application/protobuf"}


@pytest.fixture(scope="module")
def credentials(real: RealFederation) -> OwnerCredentials:
    return load_owner(real.owner(OWNER).folder / "identity", PASSPHRASE)


@pytest.fixture(scope="module")
def client(real: RealFederation, credentials: OwnerCredentials) -> Iterator[httpx.Client]:
    """A client with an owner's certificate and nothing else."""
    identity = real.owner(OWNER).folder / "identity"
    context = tls_context(identity / "ca.crt", identity / "transport.crt", credentials)
    base = f"https://127.0.0.1:{real.port}"
    with httpx.Client(verify=context, base_url=base, timeout=30, trust_env=False) as made:
        yield made


def signed(credentials: OwnerCredentials, key: ec.EllipticCurvePrivateKey | None = None) -> dict[str, str]:
    """Return the headers of Flower's node authentication, signed by the node's key or another."""
    moment = datetime.now(UTC).isoformat()
    public = credentials.transport_key.public_key().public_bytes(
        Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
    )
    signature = (key or credentials.transport_key).sign(moment.encode(), ec.ECDSA(hashes.SHA256()))
    return PROTOBUF | {
        "flwr-public-key": base64.b64encode(public).decode(),
        "flwr-timestamp": moment,
        "flwr-signature": base64.b64encode(signature).decode(),
    }


@pytest.fixture(scope="module")
def node_id(real: RealFederation, credentials: OwnerCredentials) -> int:
    """Connect as the owner's node did, which stays connected itself, and return its id."""
    identity = real.owner(OWNER).folder / "identity"
    context = tls_context(identity / "ca.crt", identity / "transport.crt", credentials)
    with fleet_connection(f"127.0.0.1:{real.port}", context, credentials) as connection:
        return connection.node_id


@pytest.mark.parametrize("raised", [OSError("/home/anna/secret.so"), httpx.ReadError("secret")])
def test_what_breaks_a_connection_is_told_by_its_type(
    real: RealFederation,
    credentials: OwnerCredentials,
    raised: Exception,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Flower would write the text down and go on as if nothing had been."""
    identity = real.owner(OWNER).folder / "identity"
    context = tls_context(identity / "ca.crt", identity / "transport.crt", credentials)
    with (
        pytest.raises(ServerUnavailable, match=type(raised).__name__) as caught,
        fleet_connection(f"127.0.0.1:{real.port}", context, credentials),
    ):
        raise raised
    assert caught.value.__suppress_context__
    shown = capfd.readouterr()
    assert "secret" not in f"{caplog.text}{shown.out}{shown.err}{caught.value}"


def test_a_coded_error_leaves_a_connection_as_it_is(
    real: RealFederation, credentials: OwnerCredentials
) -> None:
    identity = real.owner(OWNER).folder / "identity"
    context = tls_context(identity / "ca.crt", identity / "transport.crt", credentials)
    with (
        pytest.raises(EnvironmentUnfit),
        fleet_connection(f"127.0.0.1:{real.port}", context, credentials),
    ):
        raise EnvironmentUnfit("as it is")


# --- who may ask -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [RECEIVE_PATH, ANSWER_PATH])
def test_a_certificate_without_a_signature_is_not_enough(client: httpx.Client, path: str) -> None:
    assert client.post(path, content=b"", headers=PROTOBUF).status_code == 401


@pytest.mark.parametrize("path", [RECEIVE_PATH, ANSWER_PATH])
def test_a_signature_of_another_key_is_refused(
    client: httpx.Client, credentials: OwnerCredentials, path: str
) -> None:
    headers = signed(credentials, ec.generate_private_key(ec.SECP384R1()))
    assert client.post(path, content=b"", headers=headers).status_code == 401
    garbled = signed(credentials) | {"flwr-public-key": "no base64!"}
    assert client.post(path, content=b"", headers=garbled).status_code == 401


def test_a_reply_in_another_nodes_name_is_refused(
    client: httpx.Client, credentials: OwnerCredentials, node_id: int
) -> None:
    for node, messages in ((node_id + 1, [Message()]), (node_id, []), (node_id, [Message(), Message()])):
        pushed = PushMessagesRequest(node=Node(node_id=node), messages_list=messages)
        body = join_batch([b"x", pushed.SerializeToString()])
        assert client.post(ANSWER_PATH, content=body, headers=signed(credentials)).status_code == 401


def test_a_question_for_a_task_waits(real: RealFederation) -> None:
    """For a second, as nobody starts a run."""
    own = f"https://127.0.0.1:{read_addresses(real.home).runtime_port}"
    context = ssl.create_default_context(cafile=real.home / "flower" / ROOT)
    with httpx.Client(verify=context, base_url=own, timeout=30, trust_env=False) as made:
        began = time.monotonic()
        for _ in range(3):
            answer = made.post("/v1/runtime/acquire-task", content=b"", headers=PROTOBUF)
            assert not AcquireTaskResponse.FromString(answer.content).HasField("task")
        assert time.monotonic() - began > 1.0


@pytest.mark.parametrize("path", [PUSH_PATH, PULL_PATH])
def test_owners_do_not_reach_the_runs_own_batches(
    real: RealFederation, client: httpx.Client, credentials: OwnerCredentials, path: str
) -> None:
    assert client.post(path, content=b"", headers=signed(credentials)).status_code == 404
    own = f"https://127.0.0.1:{read_addresses(real.home).runtime_port}"
    trusted = ssl.create_default_context(cafile=real.home / "flower" / ROOT)
    with httpx.Client(verify=trusted, base_url=own, timeout=30, trust_env=False) as local:
        assert local.post(path, content=b"", headers=PROTOBUF).status_code in (401, 403)
        wrong = PROTOBUF | {"flwr-task-token": "guessed"}
        assert local.post(path, content=b"", headers=wrong).status_code in (401, 403)
        for fleet in (RECEIVE_PATH, ANSWER_PATH):
            assert local.post(fleet, content=b"", headers=PROTOBUF).status_code == 404


# --- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff" * 8,
        b"\xff" * 100,
        join_batch([b"one"]),
        join_batch([b"", b"\xff\xff"]),
        b"\x01" + bytes(7),
    ],
)
def test_what_is_no_reply_is_refused(
    client: httpx.Client, credentials: OwnerCredentials, body: bytes
) -> None:
    answer = client.post(ANSWER_PATH, content=body, headers=signed(credentials))
    assert answer.status_code in (400, 401)
    assert b"Traceback" not in answer.content


@pytest.mark.parametrize(
    "body",
    [
        join_batch([bytes(MAX_BATCH_BYTES // 2)] * 2),
        struct.pack("<Q", MAX_BATCH_BYTES + 1),
        join_batch([b""] * (MAX_ITEMS + 1)),
    ],
    ids=["bytes", "an item's claim", "items"],
)
def test_a_batch_beyond_the_limits_is_refused(
    client: httpx.Client, credentials: OwnerCredentials, node_id: int, body: bytes
) -> None:
    assert node_id
    try:
        answer = client.post(RECEIVE_PATH, content=body, headers=signed(credentials))
    except httpx.TransportError:
        return
    assert answer.status_code in (400, 413)


# --- waiting -----------------------------------------------------------------------------------------


def test_only_the_newest_request_of_a_node_waits(
    client: httpx.Client, credentials: OwnerCredentials, node_id: int
) -> None:
    """An older one is of a connection that is gone; a message that it got would be lost."""
    assert node_id
    ended: list[tuple[float, list[bytes]]] = []

    def ask() -> None:
        answer = client.post(RECEIVE_PATH, content=b"", headers=signed(credentials))
        ended.append((time.monotonic(), split_batch(answer.content)))

    started = time.monotonic()
    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
        time.sleep(0.3)
    threads[0].join(LONGEST_WAIT_S)
    assert ended[0][0] - started < LONGEST_WAIT_S / 2
    assert ended[0][1] == []
    client.post(RECEIVE_PATH, content=b"", headers=signed(credentials))
    threads[1].join(LONGEST_WAIT_S + 5)
    assert len(ended) == 2


def test_flowers_own_requests_are_served_beside_batches(
    client: httpx.Client, credentials: OwnerCredentials, node_id: int
) -> None:
    asked = PullMessagesRequest(node=Node(node_id=node_id)).SerializeToString()
    answer = client.post("/v1/fleet/pull-messages", content=asked, headers=signed(credentials))
    assert answer.status_code == 200
    assert not PullMessagesResponse.FromString(answer.content).messages_list


def test_the_folder_of_objects_in_transit_is_the_coordinators_alone(real: RealFederation) -> None:
    folder = real.home / "flower" / "objects"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert list(folder.iterdir()) == []
