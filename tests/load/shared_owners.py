"""Very many owners on one machine: a few processes hold them, and do equal work once.

Every owner of a round verifies the same list and the same signatures. On machines of their own that is
what makes them safe; in one process it is the same computation a thousand times. Here equal bytes are
parsed once, equal signatures verified once, and one list of a round checked once, in each process. All else
an owner does for itself: keys, wraps, masks, noise, training, encryption, its ledger and its database.
"""

from __future__ import annotations

import json
import multiprocessing
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

import client.membership
import crypto.signing
import protocol.messages
from client.app import make_app
from client.owner import Owner, open_owner
from protocol.encoding import digest_bytes
from protocol.records import from_record, to_record
from scenarios.federation import OwnerHome
from scenarios.grid import LocalGrid

_KEPT_MESSAGES = 4
_KEPT_SIGNATURES = 8_192
_PATIENCE_S = 60.0
_CONTEXT = multiprocessing.get_context("spawn")
"""A forked process would hold its siblings' connections open, and never hear that its user is gone."""


class OwnersProcess(ClientApp):
    """A process that holds open owners and answers for them; it ends with its user.

    Args:
        homes: Their homes, by node id.
    """

    def __init__(self, homes: Mapping[int, OwnerHome]) -> None:
        super().__init__()
        self._connection, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_serve, args=(theirs, homes))
        self._process.start()
        theirs.close()
        self._lock = threading.Lock()

    def __enter__(self) -> OwnersProcess:
        """Use it in a `with` statement."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(_PATIENCE_S)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()

    @property
    def pid(self) -> int:
        """The process."""
        assert self._process.pid is not None
        return self._process.pid

    def wait(self) -> None:
        """Return when all owners are open."""
        assert self._connection.recv_bytes() == b"open"

    def __call__(self, message: Message, context: Context) -> Message:
        """Deliver a message to its owner, as a node's app would."""
        del context
        to = {"node": message.metadata.dst_node_id, "kind": message.metadata.message_type}
        with self._lock:
            for part in (json.dumps(to).encode(), *from_record(message.content)):
                self._connection.send_bytes(part)
            code, body, blob = (self._connection.recv_bytes() for _ in range(3))
        if code:
            error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, code.decode())
            return Message(error, reply_to=message)
        return Message(to_record(body, blob), reply_to=message)


def _serve(connection: Connection, homes: Mapping[int, OwnerHome]) -> None:
    torch.set_num_threads(1)
    _do_equal_work_once()
    owners = {node: open_owner(home.folder, home.passphrase) for node, home in homes.items()}
    grid = LocalGrid(
        {node: make_app(lambda _context, owner=owner: owner) for node, owner in owners.items()}
    )
    connection.send_bytes(b"open")
    while True:
        try:
            head, body, blob = (connection.recv_bytes() for _ in range(3))
        except EOFError:
            break
        to = json.loads(head)
        message = Message(to_record(body, blob), dst_node_id=to["node"], message_type=to["kind"])
        (reply,) = grid.send_and_receive([message])
        code, answer = "", (b"", b"")
        if reply.has_error():
            code = reply.error.reason or "an error without a code"
        else:
            answer = from_record(reply.content)
        for part in (code.encode(), *answer):
            connection.send_bytes(part)
    for owner in owners.values():
        owner.close()


def _do_equal_work_once() -> None:
    """Let this process, which is a test's own, remember which signatures verified and what it parsed."""
    verify_bytes, from_bytes = crypto.signing.verify_bytes, protocol.messages.Message.from_bytes.__func__
    verified: set[bytes] = set()
    parsed: dict[tuple[type, str], Any] = {}

    def verify_once(key: Ed25519PublicKey, kind: str, data: bytes, signature: bytes) -> None:
        signed = b"\0".join((key.public_bytes_raw(), kind.encode(), signature, data))
        known = bytes.fromhex(digest_bytes(signed))
        if known not in verified:
            verify_bytes(key, kind, data, signature)
            if len(verified) >= _KEPT_SIGNATURES:
                verified.clear()
            verified.add(known)

    def parse_once(cls: type[Any], data: bytes) -> Any:
        name = cls, digest_bytes(data)
        if name not in parsed:
            message = from_bytes(cls, data)
            while len(parsed) >= _KEPT_MESSAGES:
                del parsed[next(iter(parsed))]
            parsed[name] = message
        return parsed[name]

    def once_for_a_list(name: str) -> None:
        """Remember the newest outcome for the same list object, which owners share that parsed it once."""
        check, newest = getattr(client.membership, name), list[Any]()

        def checked_once(*arguments: Any) -> Any:
            # the owner is left out of what must agree: all of them trust one authority and one list
            same = [one for one in arguments if not isinstance(one, Owner)]
            if not newest or any(one is not other for one, other in zip(same, newest[0], strict=True)):
                newest[:] = [same, check(*arguments)]
            return newest[1]

        setattr(client.membership, name, checked_once)

    for name in ("valid_keys", "verified_bodies", "signed_hash"):
        once_for_a_list(name)
    crypto.signing.verify_bytes = verify_once
    protocol.messages.Message.from_bytes = classmethod(parse_once)  # type: ignore[assignment, method-assign]
