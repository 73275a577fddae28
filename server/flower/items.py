"""Items of batches on their way in and out: a large one goes to or from a file, piece by piece.

Many owners send a part of their update at the same time, and fetch the same sum at the same time. Each
part in memory as a whole would make the coordinator's memory grow with the number of owners.
"""

from __future__ import annotations

import asyncio
import logging
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

_LOG = logging.getLogger("fedseal.server")

PIECE_BYTES: Final = 64 * 1024
"""Longest stretch of an item that is in memory while it is received or sent; a shorter item is whole."""

SMALL_BYTES: Final = 4 * 1024 * 1024
"""Most bytes of what says who is asked what, and carries no update: the messages of 1,000 owners fit."""

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


def close(item: Item) -> None:
    """Close an item that nobody will read."""
    if not isinstance(item, bytes):
        item.close()


class ArrivingItems:
    """Iterates over the items of a request's batch as they arrive.

    Args:
        request: Its body was not read yet.
        spool: Makes a file of a length that nobody else can read, for one large item.

    Raises:
        EncodingInvalid: While iterating: the body is no batch, or has too many items.
        HTTPException: While iterating: the body is too long (413), or the disk takes no more (507).
    """

    def __init__(self, request: Request, spool: Callable[[int], BinaryIO]) -> None:
        self._chunks = request.stream()
        self._spool = spool
        self._waiting = bytearray()
        self._total = 0
        self._count = 0

    def __aiter__(self) -> AsyncIterator[Item]:
        return self

    async def __anext__(self) -> Item:
        """Return the next item when all of it is there."""
        length = await self._next_length()
        if length is None:
            raise StopAsyncIteration
        return await (self._taken(length) if length <= PIECE_BYTES else self._spooled(length))

    async def small(self) -> bytes:
        """Return the next item, which must be there and at most `SMALL_BYTES` long."""
        length = await self._next_length()
        if length is None:
            raise EncodingInvalid("a batch lacks an item")
        _require_small(length)
        return await self._taken(length)

    async def all_small(self) -> list[bytes]:
        """Return all items, which must be at most `SMALL_BYTES` long together."""
        found, total = list[bytes](), 0
        while (length := await self._next_length()) is not None:
            total += length
            _require_small(total)
            found.append(await self._taken(length))
        return found

    async def _next_length(self) -> int | None:
        if not await self._have(1):
            return None
        if self._count == MAX_ITEMS:
            raise EncodingInvalid("a batch has too many items")
        self._count += 1
        return item_length(await self._taken(ITEM_HEAD_BYTES))

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
        try:
            # where the disk is full, closing a file may fail as writing it does
            with ExitStack() as stack:
                file = stack.enter_context(closing(await asyncio.to_thread(self._spool, length)))
                for start in range(0, length, PIECE_BYTES):
                    piece = await self._taken(min(PIECE_BYTES, length - start))
                    await asyncio.to_thread(file.write, piece)
                file.seek(0)
                stack.pop_all()
        except OSError:
            _LOG.warning("the disk takes no large object any more")
            raise HTTPException(507, "Insufficient storage") from None
        return file


def _require_small(length: int) -> None:
    if length > SMALL_BYTES:
        raise HTTPException(413, "Batch too long")


async def pieces_of(items: Iterable[Item]) -> AsyncIterator[bytes]:
    """Yield a batch piece by piece; each is made in a thread, when the one before was sent."""
    remaining = iter(items)
    while (item := await asyncio.to_thread(next, remaining, None)) is not None:
        if isinstance(item, bytes):
            yield item_head(len(item))
            yield item
            continue
        with closing(item):
            yield item_head(length_of(item))
            while piece := await asyncio.to_thread(item.read, PIECE_BYTES):
                yield piece


def within_limit(identifiers: Iterable[str], content: Callable[[str], Item]) -> Iterator[Item]:
    """Yield the content of objects, and an empty one for each that is not there or does not fit."""
    left = INLINE_BYTES
    for identifier in identifiers:
        found = content(identifier) if left > 0 else b""
        left -= length_of(found)
        if left < 0:
            close(found)
        yield found if left >= 0 else b""
