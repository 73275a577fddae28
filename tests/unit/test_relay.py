"""A node's loop: the next message comes in and the last reply leaves while one is answered."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from client.flower import FleetConnection
from client.node import relay
from protocol.errors import ServerUnavailable


class Line:
    """A connection whose three calls are scripted; what happens is noted in order."""

    def __init__(self, messages: list[Any], send: Callable[[Any], None] = lambda _reply: None) -> None:
        self.messages = messages
        self.happened: list[str] = []
        self.stop = threading.Event()
        self._send = send

    def receive(self) -> Any:
        if not self.messages:
            self.stop.wait(10)
            return None
        message = self.messages.pop(0)
        if isinstance(message, Exception):
            raise message
        return message

    def answer(self, message: Any, app: Callable[..., Any]) -> Any:
        self.happened.append(f"answer {message}")
        return app(message, None)

    def send(self, reply: Any) -> None:
        self._send(reply)
        self.happened.append(f"sent {reply}")
        if reply == "last":
            self.stop.set()

    def run(self, app: Callable[..., Any], check: Callable[[], None] = lambda: None) -> None:
        connection: Any = FleetConnection(1, self.receive, self.answer, self.send)
        relay(connection, app, self.stop, check)


def test_replies_leave_in_order_and_nothing_is_lost() -> None:
    line = Line(["a", None, "b", "last"])
    line.run(lambda message, _context: message)
    assert [one for one in line.happened if one.startswith("sent")] == ["sent a", "sent b", "sent last"]


def test_a_reply_leaves_while_the_next_message_is_answered() -> None:
    answering = threading.Event()

    def slow(reply: Any) -> None:
        if reply == "a":
            assert answering.wait(5), "the second message waits for the first reply"

    def app(message: Any, _context: Any) -> Any:
        if message == "last":
            answering.set()
        return message

    line = Line(["a", "last"], slow)
    line.run(app)
    assert line.happened == ["answer a", "answer last", "sent a", "sent last"]


@pytest.mark.parametrize("place", ["receive", "send", "check"])
def test_what_fails_ends_the_loop(place: str) -> None:
    def failing(*_arguments: Any) -> None:
        raise ServerUnavailable("gone")

    line = Line([ServerUnavailable("gone")] if place == "receive" else ["a", "b"])
    if place == "send":
        line._send = failing
    with pytest.raises(ServerUnavailable):
        line.run(lambda message, _context: message, failing if place == "check" else lambda: None)


def test_being_told_to_stop_does_not_wait_for_a_message() -> None:
    line = Line([])
    threading.Timer(0.1, line.stop.set).start()
    started = time.monotonic()
    line.run(lambda message, _context: message)
    assert time.monotonic() - started < 2
