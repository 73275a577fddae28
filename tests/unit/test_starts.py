"""Questions for a task wait until a run was started, and never for longer than a moment."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from server.flower import starts
from server.flower.starts import Starts

ACQUIRE, START = "/v1/runtime/acquire-task", "/v1/control/start-run"


class Asked:
    """An ASGI app that remembers which paths reached it, and the wrappers of `Starts` around it."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.starts = Starts()
        self._runtime, self._control = self.starts.awaited(self._app), self.starts.noted(self._app)

    async def _app(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        self.paths.append(scope.get("path", scope["type"]))

    async def ask(self, path: str) -> None:
        await self._runtime({"type": "http", "path": path}, None, None)

    async def start(self, path: str = START) -> None:
        await self._control({"type": "http", "path": path}, None, None)

    async def lifespan(self) -> None:
        await self._runtime({"type": "lifespan"}, None, None)

    def question(self) -> asyncio.Task[None]:
        return asyncio.ensure_future(self.ask(ACQUIRE))


async def turns() -> None:
    """Let every task that can go on do so."""
    for _ in range(10):
        await asyncio.sleep(0)


def in_a_loop(scenario: Callable[[Asked], Awaitable[None]]) -> None:
    async def run() -> None:
        asked = Asked()
        # the first question is answered at once: a run may be there from before
        await asked.ask(ACQUIRE)
        asked.paths.clear()
        await scenario(asked)

    asyncio.run(asyncio.wait_for(run(), 60))


@pytest.fixture(autouse=True)
def nobody_waits_for_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starts, "_LONGEST_WAIT_S", 3_600.0)


def test_a_question_waits_and_a_start_answers_it() -> None:
    async def scenario(asked: Asked) -> None:
        question = asked.question()
        await turns()
        assert asked.paths == []
        await asked.start()
        await question
        assert asked.paths == [START, ACQUIRE]

    in_a_loop(scenario)


def test_a_start_between_two_questions_is_not_missed() -> None:
    async def scenario(asked: Asked) -> None:
        await asked.start()
        await asked.ask(ACQUIRE)
        assert asked.paths == [START, ACQUIRE]

    in_a_loop(scenario)


@pytest.mark.parametrize("runs", [1, 3])
def test_each_start_ends_one_wait(runs: int) -> None:
    async def scenario(asked: Asked) -> None:
        for _ in range(runs):
            await asked.start()
        for _ in range(runs):
            await asked.ask(ACQUIRE)
        question = asked.question()
        await turns()
        assert not question.done()
        question.cancel()

    in_a_loop(scenario)


@pytest.mark.parametrize("path", ["/v1/control/list-runs", "/v1/control/register-node"])
def test_other_acts_of_an_operator_end_no_wait(path: str) -> None:
    async def scenario(asked: Asked) -> None:
        question = asked.question()
        await asked.start(path)
        await turns()
        assert not question.done()
        question.cancel()

    in_a_loop(scenario)


def test_nothing_else_waits() -> None:
    async def scenario(asked: Asked) -> None:
        await asked.ask("/v1/runtime/send-task-heartbeat")
        await asked.lifespan()
        assert asked.paths == ["/v1/runtime/send-task-heartbeat", "lifespan"]

    in_a_loop(scenario)


def test_a_wait_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be a task that nobody started here."""
    monkeypatch.setattr(starts, "_LONGEST_WAIT_S", 0.01)

    async def scenario(asked: Asked) -> None:
        await asked.ask(ACQUIRE)
        await asked.ask(ACQUIRE)
        assert asked.paths == [ACQUIRE, ACQUIRE]

    in_a_loop(scenario)


def test_who_waits_does_not_keep_the_coordinator_from_ending() -> None:
    async def scenario(asked: Asked) -> None:
        question = asked.question()
        await turns()
        asked.starts.close()
        await question
        await asked.ask(ACQUIRE)
        assert asked.paths == [ACQUIRE, ACQUIRE]

    in_a_loop(scenario)
