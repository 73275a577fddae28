"""What operators may ask of a running coordinator: start a run, stop it, see the runs.

The endpoint is a Unix socket of mode 0600 in the coordinator's home. Every connection speaks TLS 1.3 with a
client certificate for the role of operator, whoever the user of the machine is, and every act is in the
log with the fingerprint of that certificate's key.
"""

from __future__ import annotations

import asyncio
import http.client
import os
import re
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Protocol

from crypto.auditlog import KeptLog
from crypto.certificates import OperatorCredentials
from crypto.identity import FILES, load_pair
from crypto.trust import CA_CERTIFICATE, REVOCATIONS
from protocol.encoding import Digest, decode
from protocol.errors import (
    CertificateRefused,
    EncodingInvalid,
    FedsealError,
    RunBusy,
    RunFailed,
    RunPaused,
    ServerUnavailable,
)
from protocol.messages import Message
from protocol.storage import STORAGE_FAULTS
from server.flower.control import ControlClient
from server.home import RUNS
from server.listeners.admission import PEER
from server.listeners.limits import refuse
from server.store import RESUMABLE, RunStore

SOCKET: Final = "control.sock"

_MAX_REQUEST_BYTES: Final = 4096
_RUN_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,90}")
_ANSWER_S: Final = 60.0


class RunRequest(Message):
    """Which run folder to start or to stop."""

    run: str


class Answer(Message):
    """What a coordinator answers: a result, or the code of an error; and where its log stands."""

    code: str | None
    result: dict[str, Any]
    log_sequence: int
    log_hash: Digest


class Runs(Protocol):
    """What a coordinator knows of the runs that it has begun; see `server.runs.BegunRuns`."""

    def begun(self, name: str) -> None:
        """Take note of a run that was handed to Flower."""

    def note_ends(self, *, lost: bool = False) -> list[int]:
        """Record the interruption of each run whose process is gone; return ids of those that wait."""

    def note_all(self, wait_s: float) -> None:
        """Record the interruption of every run, whose processes are about to end."""


class ControlEndpoint:
    """The operators' endpoint as an ASGI app; `admission` has checked the certificate before.

    Args:
        home: The coordinator's home.
        flower: Flower's control API.
        log: The coordinator's log of acts.
        runs: What the coordinator has begun.
    """

    def __init__(self, home: Path, flower: ControlClient, log: KeptLog, runs: Runs) -> None:
        self._home = home
        self._flower = flower
        self._log = log
        self._begun = runs
        self._acts: dict[tuple[str, str], Callable[[str, bytes], dict[str, Any]]] = {
            ("POST", "/runs/start"): self._start,
            ("POST", "/runs/stop"): self._stop,
            ("GET", "/runs"): self._runs,
        }

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Answer one request of an operator."""
        if scope["type"] != "http":
            return
        act = self._acts.get((scope["method"], scope["path"]))
        body = await _body(receive)
        if act is None or body is None:
            await refuse(send, 404)
            return
        answer = await asyncio.to_thread(self._answer, act, scope[PEER], body)
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(answer))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    def _answer(self, act: Callable[[str, bytes], dict[str, Any]], operator: str, body: bytes) -> bytes:
        code, result = None, {}
        try:
            result = act(operator, body)
        except FedsealError as error:
            code = error.code
        try:
            head = self._log.sign()
        except STORAGE_FAULTS:
            # what was done is done, and is in the log: only its newest head is not signed yet
            head = self._log.signed
        return Answer(code=code, result=result, log_sequence=head.sequence, log_hash=head.hash).to_bytes()

    def _start(self, operator: str, body: bytes) -> dict[str, Any]:
        with self._store(body) as store:
            if store.get("state") not in RESUMABLE:
                raise RunFailed("the run has ended")
            if store.is_carried_out():
                raise RunBusy
            name, plan_hash = store.folder.name, str(store.get("plan_hash"))
            self._log.record("operator.start", operator, run=name, plan_hash=plan_hash)
            run_id = self._flower.start_run(name)
            store.set("flower_run", run_id)
            store.set("operator", operator)
            self._begun.begun(name)
        return {"flower_run": run_id}

    def _stop(self, operator: str, body: bytes) -> dict[str, Any]:
        with self._store(body) as store:
            self._log.record("operator.stop", operator, run=store.folder.name)
            if store.get("state") not in RESUMABLE or store.get("flower_run") is None:
                return {"state": store.get("state")}
            self._flower.stop_run(int(store.get("flower_run")))
            stopped = RunPaused("an operator stopped it")
            store.set("state", "paused")
            store.set("problem", {"code": stopped.code, "text": stopped.explain()})
            store.event("ended", state="paused", code=stopped.code)
            return {"state": "paused"}

    def _runs(self, operator: str, _body: bytes) -> dict[str, Any]:
        self._log.record("operator.runs", operator)
        self._begun.note_ends()
        folders = sorted((self._home / RUNS).glob("*/run.db"))
        return {"runs": [_summary_or_problem(file.parent) for file in folders]}

    @contextmanager
    def _store(self, body: bytes) -> Iterator[RunStore]:
        run = RunRequest.from_bytes(body).run
        folder = self._home / RUNS / run
        if not _RUN_NAME.fullmatch(run) or not (folder / "run.db").is_file():
            raise RunFailed("there is no such run")
        store = RunStore.existing(folder)
        try:
            yield store
        finally:
            store.close()


class ControlLink:
    """An operator's connection to the coordinator of a home folder. For that operator only.

    Args:
        home: The coordinator's home, on this machine.
        identity: The operator's identity folder.
        credentials: What was opened from it.
    """

    def __init__(self, home: Path, identity: Path, credentials: OperatorCredentials) -> None:
        self._home = home
        self._context = _operator_context(identity, credentials)

    def start(self, run: str) -> int:
        """Start the run of a prepared folder; returns Flower's run id."""
        return int(self._ask("POST", "/runs/start", RunRequest(run=run))["flower_run"])

    def stop(self, run: str) -> str:
        """Stop a run; returns the state that it is in then."""
        return str(self._ask("POST", "/runs/stop", RunRequest(run=run))["state"])

    def runs(self) -> list[dict[str, Any]]:
        """Return what is known of every run, oldest first."""
        return list(self._ask("GET", "/runs")["runs"])

    def _ask(self, method: str, path: str, body: Message | None = None) -> dict[str, Any]:
        content = b"" if body is None else body.to_bytes()
        try:
            with _connected(self._home) as raw, self._context.wrap_socket(raw) as connection:
                status, data = _exchange(connection, method, path, content)
            parsed = Answer.from_fields(decode(data))
        except (OSError, http.client.HTTPException, EncodingInvalid):
            raise ServerUnavailable(
                "the control socket of this home does not answer, or refuses this operator"
            ) from None
        if status != http.HTTPStatus.OK:
            raise ServerUnavailable(f"the coordinator answered with the status {status}")
        fault = next((kind for kind in STORAGE_FAULTS if kind.code == parsed.code), None)
        if fault is not None:
            raise fault("in the coordinator's home; its log says which file")
        if parsed.code is not None:
            raise RunFailed(f"the coordinator refused with {parsed.code}")
        return parsed.result


@contextmanager
def control_socket(home: Path) -> Iterator[socket.socket]:
    """Yield the listening socket of a home's control endpoint, mode 0600, and remove it after the block."""
    file = home / SOCKET
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with listener, _short_path(home) as path:
        file.unlink(missing_ok=True)
        # The mode must hold from the first moment on: bind applies the process's mask.
        before = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(before)
        try:
            yield listener
        finally:
            with suppress(FileNotFoundError):
                file.unlink()


@contextmanager
def _connected(home: Path) -> Iterator[socket.socket]:
    with _short_path(home) as path, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as raw:
        raw.settimeout(_ANSWER_S)
        raw.connect(path)
        yield raw


def _exchange(connection: ssl.SSLSocket, method: str, path: str, content: bytes) -> tuple[int, bytes]:
    client = http.client.HTTPConnection("coordinator")
    client.sock = connection
    client.request(method, path, body=content, headers={"connection": "close"})
    answer = client.getresponse()
    return answer.status, answer.read()


@contextmanager
def _short_path(home: Path) -> Iterator[str]:
    """Yield a path to a home's socket that fits into the 107 bytes which the kernel has for it."""
    try:
        folder = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        raise ServerUnavailable("the coordinator's home folder cannot be opened") from None
    try:
        yield f"/proc/self/fd/{folder}/{SOCKET}"
    finally:
        os.close(folder)


def _operator_context(identity: Path, credentials: OperatorCredentials) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # A socket in the home has no host name; a certificate for the role of server is what is asked for.
    context.check_hostname = False
    for name in (CA_CERTIFICATE, REVOCATIONS):
        try:
            context.load_verify_locations(identity / name)
        except OSError:
            raise CertificateRefused(f"{name} of the operator's identity cannot be loaded") from None
    context.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_CRL_CHECK_LEAF
    load_pair(context, identity / f"{FILES['operator']}.crt", credentials.key)
    return context


def _summary_or_problem(folder: Path) -> dict[str, Any]:
    """Return what is known of a run; a record that cannot be read hides no other run."""
    try:
        return _summary(folder)
    except FedsealError as error:
        unknown = dict.fromkeys(("submitted_at", "operator", "finished_rounds", "rounds"))
        return {"run": folder.name, "state": f"unreadable ({error.code})", **unknown}


def _summary(folder: Path) -> dict[str, Any]:
    store = RunStore.existing(folder)
    try:
        return {
            "run": folder.name,
            "state": store.get("state"),
            "submitted_at": store.get("submitted_at"),
            "operator": store.get("operator"),
            "finished_rounds": store.finished_rounds(),
            "rounds": store.plan().run.rounds,
        }
    finally:
        store.close()


async def _body(receive: Any) -> bytes | None:
    """Return a request's body, or None if it is too long."""
    body = b""
    while True:
        part = await receive()
        body += bytes(part.get("body", b""))
        if part["type"] != "http.request" or len(body) > _MAX_REQUEST_BYTES:
            return None
        if not part.get("more_body", False):
            return body
