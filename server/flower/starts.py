"""The program that carries runs out learns of a new one at once, and asks a sixth as often as without this.

Flower 1.41.0's SuperExec asks for a task, sleeps for `FLWR_SUPEREXEC_TASK_POLL_INTERVAL`, and asks again,
which was more than half of what an idle coordinator did. Here the question itself waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Final

_START_PATH: Final = "/v1/control/start-run"
_ACQUIRE_PATH: Final = "/v1/runtime/acquire-task"
_LONGEST_WAIT_S: Final = 1.0
"""A task that comes in another way than by a start, such as one that is given back, is found after this."""

App = Callable[[dict[str, Any], Any, Any], Awaitable[None]]


class Starts:
    """Lets requests for a task wait until a run was started. For one event loop."""

    def __init__(self) -> None:
        # a run may be there from before
        self._starts = asyncio.Semaphore(1)
        self._closing = False

    def noted(self, app: App) -> App:
        """Return an ASGI app with Flower's control API that notes when a run was started."""

        async def serve(scope: dict[str, Any], receive: Any, send: Any) -> None:
            await app(scope, receive, send)
            if scope["type"] == "http" and scope["path"] == _START_PATH:
                self._starts.release()

        return serve

    def awaited(self, app: App) -> App:
        """Return an ASGI app with Flower's runtime API in which a question for a task waits for a start.

        Each start ends one wait, be it before it or in it. A task that is there for another reason is found
        when the wait is over.
        """

        async def serve(scope: dict[str, Any], receive: Any, send: Any) -> None:
            if scope["type"] == "http" and scope["path"] == _ACQUIRE_PATH and not self._closing:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._starts.acquire(), _LONGEST_WAIT_S)
            await app(scope, receive, send)

        return serve

    def close(self) -> None:
        """Let nobody wait any longer."""
        self._closing = True
        self._starts.release()
