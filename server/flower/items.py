"""Items of batches on their way in and out: a large one goes to or from a file, piece by piece.

Many owners send a part of their update at the same time, and fetch the same sum at the same time. Each
part in memory as a whole would make the coordinator's memory grow with the number of owners.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from typing import BinaryIO, Final

from fastapi import HTTPException
from starlette.requests import Request

from protocol.batches import (
    INLINE_BYTES,
    ITEM_HEAD_BYTES,
    MAX_BATCH_BYTES,
    MAX_ITEMS,
    item_head,
    item_length,
)
from protocol.errors import EncodingInvalid

PIECE_BYTES: Final = 256 * 1024
"""Longest stretch of an item that is in memory while it is received or sent; a shorter item is whole."""

Item = bytes | BinaryIO
"""An item's content, or a file that holds it, at its beginning; who gets the file closes it."""


def length_of(item: Item) -> int:
    """Return the length of an item in bytes."""
    return len(item) if isinstance(item, bytes) else os.fstat(item.fileno()).st_size


def content_of(item: Item) -> bytes:
    """Return an item's content, and close the file that held it."""
    if isinstance(item, bytes):
        return item
    with item:
        return item.read()


async def content_in_memory(item: Item) -> bytes:
    """Return an item's content; a file is read in a thread, and closed."""
    return item if isinstance(item, bytes) else await asyncio.to_thread(content_of, item)


class ArrivingItems:
    """Iterates over the items of a request's batch as they arrive.

    Args:
        request: Its body was not read yet.
        spool: Makes an empty file that nobody else can read, for one large item.

    Raises:
        EncodingInvalid: While iterating: the body is no batch, or has too many items.
        HTTPException: While iterating: the body is too long, or the disk takes no more.
    """

    def __init__(self, request: Request, spool: Callable[[], BinaryIO]) -> None:
        self._chunks = request.stream()
        self._spool = spool
        self._waiting = bytearray()
        self._total = 0
        self._count = 0

    def __aiter__(self) -> AsyncIterator[Item]:
        return self

    async def __anext__(self) -> Item:
        """Return the next item when all of it is there."""
        if not await self._have(1):
            raise StopAsyncIteration
        if self._count == MAX_ITEMS:
            raise EncodingInvalid("a batch has too many items")
        self._count += 1
        length = item_length(await self._taken(ITEM_HEAD_BYTES))
        return await (self._taken(length) if length <= PIECE_BYTES else self._spooled(length))

    async def _have(self, length: int) -> bool:
        """Receive until some bytes are there; False if the body ends before."""
        while len(self._waiting) < length:
            chunk = await anext(self._chunks, None)
            if chunk is None:
                return False
            self._total += len(chunk)
            if self._total > MAX_BATCH_BYTES:
                raise HTTPException(413, "Batch too long")
            self._waiting += chunk
        return True

    async def _taken(self, length: int) -> bytes:
        if not await self._have(length):
            raise EncodingInvalid("a batch is cut off")
        taken = bytes(memoryview(self._waiting)[:length])
        del self._waiting[:length]
        return taken

    async def _spooled(self, length: int) -> BinaryIO:
        with ExitStack() as stack:
            try:
                file = stack.enter_context(closing(await asyncio.to_thread(self._spool)))
                for start in range(0, length, PIECE_BYTES):
                    piece = await self._taken(min(PIECE_BYTES, length - start))
                    await asyncio.to_thread(file.write, piece)
                file.seek(0)
            except OSError:
                raise HTTPException(507, "Insufficient storage") from None
            stack.pop_all()
        return file


async def pieces_of(items: Iterable[Item]) -> AsyncIterator[bytes]:
    """Yield a batch piece by piece; each is made in a thread, when the one before was sent."""
    remaining = iter(items)
    while (item := await asyncio.to_thread(next, remaining, None)) is not None:
        yield item_head(length_of(item))
        if isinstance(item, bytes):
            yield item
            continue
        with closing(item):
            while piece := await asyncio.to_thread(item.read, PIECE_BYTES):
                yield piece


def within_limit(identifiers: Iterable[str], content: Callable[[str], Item]) -> Iterator[Item]:
    """Yield the content of objects, and an empty one for each that is not there or does not fit."""
    left = INLINE_BYTES
    for identifier in identifiers:
        found = content(identifier) if left > 0 else b""
        left -= length_of(found)
        if left < 0 and not isinstance(found, bytes):
            found.close()
        yield found if left >= 0 else b""
