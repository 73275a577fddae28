"""The owner's ClientApp: message types to protocol steps, errors to codes.

The app is the same in a warm node, under Flower's own SuperNode, and in a simulated federation; what
differs is where the `Owner` comes from. Only a code leaves the node when something fails.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from client import closing, joining, opening, rounds
from client.owner import Owner, open_owner
from client.state import Answer, Outcome, RunState
from crypto.vault import read_passphrase
from protocol.encoding import digest_bytes
from protocol.errors import FedsealError, ProtocolViolation
from protocol.messages import (
    CloseRequest,
    FitRequest,
    JoinRequest,
    KeysRequest,
    OpenRequest,
    RosterRequest,
    SealRequest,
)
from protocol.plan import Plan
from protocol.records import from_record, to_record
from protocol.storage import from_os

_LOG = logging.getLogger("fedseal.client")
_PLACES = 6

RequestMessage = RosterRequest | KeysRequest | FitRequest | SealRequest | OpenRequest | CloseRequest
Answerer = Callable[[Owner, bytes, bytes], Answer]


@dataclass(frozen=True)
class Exchange:
    """One message type: what it carries, and the protocol step that answers it."""

    kind: str
    request_type: type[RequestMessage]
    step: Callable[..., Outcome]
    with_blob: bool = False


EXCHANGES = (
    Exchange("query.roster", RosterRequest, joining.roster),
    Exchange("query.keys", KeysRequest, joining.keys),
    Exchange("train.fit", FitRequest, rounds.fit, with_blob=True),
    Exchange("train.seal", SealRequest, rounds.seal),
    Exchange("query.open", OpenRequest, opening.open_sum, with_blob=True),
    Exchange("query.close", CloseRequest, closing.close, with_blob=True),
)


def make_app(owner_of: Callable[[Context], Owner]) -> ClientApp:
    """Return a ClientApp whose handlers work for the owner that `owner_of` gives.

    Args:
        owner_of: Maps Flower's context to an open owner; called once per message.
    """
    app = ClientApp()
    lock = threading.Lock()

    def handler(answer: Answerer) -> Callable[[Message, Context], Message]:
        def handle(message: Message, context: Context) -> Message:
            with lock:
                return _reply(answer, owner_of(context), message)

        return handle

    app.query("join")(handler(_answer_join))
    for exchange in EXCHANGES:
        category, action = exchange.kind.split(".")
        register = app.train if category == "train" else app.query
        register(action)(handler(partial(_answer, exchange)))
    return app


def _reply(answer: Answerer, owner: Owner, message: Message) -> Message:
    kind, started = message.metadata.message_type, time.monotonic()
    try:
        body, blob = from_record(message.content)
        answered = answer(owner, body, blob)
    except FedsealError as error:
        _LOG.warning("%s refused: %s", kind, error.explain())
        code = error.code
    except Exception as error:  # its text may quote a record: it is for nobody, this node's log included
        _LOG.error("%s failed: %s at %s", kind, type(error).__name__, _places(error))
        coded = from_os(error) if isinstance(error, OSError) else None
        code = FedsealError.code if coded is None else coded.code
    else:
        _LOG.info("%s answered in %.3f s", kind, time.monotonic() - started)
        return Message(to_record(answered.body, answered.blob), reply_to=message)
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, code), reply_to=message)


def _places(error: BaseException) -> str:
    """Return where an error was raised, innermost last: files, lines and functions, and no values."""
    frames = traceback.extract_tb(error.__traceback__)[-_PLACES:]
    return " > ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames)


def _answer_join(owner: Owner, body: bytes, blob: bytes) -> Answer:
    request, digest = JoinRequest.from_bytes(body), digest_bytes(body + blob)
    known = owner.store.answer(request.run, digest)
    if known is not None:
        owner.require_allowed(Plan.from_fields(request.plan))
        return known
    return _store(owner, joining.join(owner, request, blob), digest, 0)


def _answer(exchange: Exchange, owner: Owner, body: bytes, blob: bytes) -> Answer:
    """Answer a request of a joined run; a byte-identical repetition gets the stored bytes again."""
    request, digest = exchange.request_type.from_bytes(body), digest_bytes(body + blob)
    state = _state(owner, request)
    known = owner.store.answer(state.run, digest)
    if known is not None:
        if isinstance(request, FitRequest):
            rounds.require_kept(owner, state, request.attempt)
        return known
    arguments = (owner, state, request, blob) if exchange.with_blob else (owner, state, request)
    outcome = exchange.step(*arguments)
    attempt = getattr(request, "attempt", 0)
    return _store(owner, outcome, digest, attempt)


def _state(owner: Owner, request: RequestMessage) -> RunState:
    if isinstance(request, RosterRequest | KeysRequest):
        state = owner.store.find(request.run)
        if state is None:
            raise ProtocolViolation("this owner did not join the run")
        return state
    return owner.store.by_session(request.session)


def _store(owner: Owner, outcome: Outcome, digest: str, attempt: int) -> Answer:
    answer = Answer(outcome.reply.to_bytes(), outcome.blob)
    if not outcome.lasting:
        return answer
    owner.store.save(
        outcome.state,
        model=outcome.model,
        request=digest,
        attempt=attempt,
        answer=answer,
        heads=outcome.heads,
    )
    return answer


@cache
def _owner_from_environment() -> Owner:
    file = os.environ.get("FEDSEAL_PASSPHRASE_FILE")
    passphrase = read_passphrase(Path(file) if file else None, os.environ, None)
    return open_owner(Path(os.environ["FEDSEAL_HOME"]), passphrase)


app = make_app(lambda _context: _owner_from_environment())
