"""A TCP proxy on 127.0.0.1 that delays, cuts and half-opens connections, as a seed decides."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

_CHUNK_BYTES = 16 * 1024


@dataclass(frozen=True)
class Weather:
    """What happens to a connection; shares are probabilities for each new one.

    Attributes:
        delay_s: Longest delay of a chunk, drawn anew for each one.
        cut: It is reset after up to `after_bytes`.
        half_open: It stays open, and nothing passes any more after up to `after_bytes`.
        refused: It is reset before anything has passed.
        half_open_s: How long a half-open connection lasts until it is reset.
        after_bytes: Bytes of both directions together, at most.
    """

    delay_s: float = 0.0
    cut: float = 0.0
    half_open: float = 0.0
    refused: float = 0.0
    half_open_s: float = 5.0
    after_bytes: int = 60_000


CALM = Weather()


class TcpProxy:
    """Passes bytes on to one port; use `running`.

    Attributes:
        port: Where it listens.
        weather: What happens to connections that are opened from now on.
        happened: How often each thing happened.
    """

    def __init__(self, target: int, seed: int) -> None:
        self.port = 0
        self.weather = CALM
        self.happened: Counter[str] = Counter()
        self._target = target
        self._rng = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @contextmanager
    def running(self) -> Iterator[TcpProxy]:
        """Listen in a thread until the end of the block."""
        started = threading.Event()
        thread = threading.Thread(target=self._run, args=(started,))
        thread.start()
        started.wait()
        try:
            yield self
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join()

    def cut_all(self) -> None:
        """Reset every connection that is open now."""
        self._loop.call_soon_threadsafe(self._reset_all)

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        self._loop.run_forever()
        server.close()
        self._reset_all()
        for task in list(self._tasks):
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*self._tasks, return_exceptions=True))
        self._loop.close()

    def _reset_all(self) -> None:
        self.happened["cut at once"] += len(self._open) // 2
        for writer in list(self._open):
            writer.transport.abort()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = self._loop.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, near_in: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
        weather, fate = self.weather, self._fate(self.weather)
        self.happened["connections"] += 1
        self.happened[fate] += 1
        if fate == "refused":
            near_out.transport.abort()
            return
        try:
            far_in, far_out = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            near_out.transport.abort()
            return
        ends = {near_out, far_out}
        self._open |= ends
        budget = [self._rng.randrange(weather.after_bytes) if fate != "calm" else -1]
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass(near_in, far_out, weather, budget))
                group.create_task(self._pass(far_in, near_out, weather, budget))
        except* (OSError, EOFError):
            if fate == "half_open":
                await asyncio.sleep(weather.half_open_s)
        finally:
            self._open -= ends
            for writer in ends:
                writer.transport.abort()

    def _fate(self, weather: Weather) -> str:
        draw = self._rng.random()
        for name in ("cut", "half_open", "refused"):
            draw -= getattr(weather, name)
            if draw < 0:
                return name
        return "calm"

    async def _pass(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        weather: Weather,
        budget: list[int],
    ) -> None:
        """Pass chunks on; raises when the connection ends, or when its budget of bytes is used up."""
        while chunk := await reader.read(_CHUNK_BYTES):
            if weather.delay_s:
                await asyncio.sleep(self._rng.uniform(0.0, weather.delay_s))
            if budget[0] >= 0:
                budget[0] -= len(chunk)
                if budget[0] < 0:
                    raise EOFError
            writer.write(chunk)
            await writer.drain()
        with suppress(OSError):
            writer.write_eof()
        raise EOFError


@contextmanager
def proxy_to(port: int, seed: int = 0) -> Iterator[TcpProxy]:
    """Run a proxy to a port of this machine."""
    with TcpProxy(port, seed).running() as proxy:
        yield proxy
