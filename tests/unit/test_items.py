"""Items of batches as they arrive and leave: the same bytes in any pieces, and few of them in memory."""

from __future__ import annotations

import asyncio
import tempfile
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, cast

import pytest
from fastapi import HTTPException
from flwr.supercore.inflatable.inflatable_object import get_object_id
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import ClientDisconnect, Request

from protocol.batches import INLINE_BYTES, MAX_BATCH_BYTES, MAX_ITEMS, item_head, join_batch, split_batch
from protocol.errors import EncodingInvalid
from server.flower import items
from server.flower.batches import Batches
from server.flower.items import (
    PIECE_BYTES,
    SMALL_BYTES,
    ArrivingItems,
    Item,
    close,
    content_of,
    length_of,
    pieces_of,
    within_limit,
)

MIB = 1024 * 1024


def spool(_length: int = 0) -> BinaryIO:
    return cast("BinaryIO", tempfile.TemporaryFile())


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


def request_of(chunks: Iterator[bytes], *, cut: bool = False) -> Request:
    """Return a request whose body comes in these chunks, or breaks off behind them."""

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0)
        chunk = next(chunks, None)
        if chunk is None and cut:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": chunk or b"", "more_body": chunk is not None}

    return Request({"type": "http", "method": "POST", "headers": []}, receive)


def chunked(body: bytes, length: int) -> Iterator[bytes]:
    return (body[start : start + length] for start in range(0, len(body), length))


async def arrived(request: Request, spool: Callable[[int], BinaryIO] = spool) -> list[bytes]:
    return [content_of(item) async for item in ArrivingItems(request, spool)]


async def sent(leaving: list[Item]) -> list[bytes]:
    return [piece async for piece in pieces_of(leaving)]


def filed(content: bytes) -> BinaryIO:
    file = spool()
    file.write(content)
    file.seek(0)
    return file


# --- the same bytes ----------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=40), max_size=8), st.integers(1, 50), st.integers(1, 20))
def test_items_arrive_as_they_were_joined_in_chunks_of_any_length(
    contents: list[bytes], length: int, piece: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(items, "PIECE_BYTES", piece)
        assert run(arrived(request_of(chunked(join_batch(contents), length)))) == contents


@given(st.binary(max_size=60), st.integers(1, 20))
def test_arriving_bytes_are_a_batch_exactly_where_they_are_one_as_a_whole(body: bytes, length: int) -> None:
    try:
        expected = split_batch(body)
    except EncodingInvalid:
        with pytest.raises(EncodingInvalid):
            run(arrived(request_of(chunked(body, length))))
    else:
        assert run(arrived(request_of(chunked(body, length)))) == expected


@given(st.lists(st.tuples(st.binary(max_size=40), st.booleans()), max_size=8), st.integers(1, 20))
def test_items_leave_as_one_batch_from_memory_and_from_files(
    contents: list[tuple[bytes, bool]], piece: int
) -> None:
    leaving: list[Item] = [filed(content) if on_disk else content for content, on_disk in contents]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(items, "PIECE_BYTES", piece)
        assert b"".join(run(sent(leaving))) == join_batch(content for content, _ in contents)
    assert all(item.closed for item in leaving if not isinstance(item, bytes))


@pytest.mark.parametrize("on_disk", [False, True])
def test_an_item_has_its_length_and_content_wherever_it_lies(on_disk: bool) -> None:
    item: Item = filed(b"content") if on_disk else b"content"
    assert length_of(item) == 7
    assert content_of(item) == b"content"
    assert isinstance(item, bytes) or item.closed
    close(item)


# --- limits ------------------------------------------------------------------------------------------


def test_a_body_that_is_too_long_is_given_up_before_its_end() -> None:
    body = join_batch([bytes(MAX_BATCH_BYTES // 2)] * 2)
    with pytest.raises(HTTPException) as error:
        run(arrived(request_of(chunked(body, 64 * 1024))))
    assert error.value.status_code == 413


def test_a_claim_beyond_any_batch_is_refused_before_anything_follows() -> None:
    with pytest.raises(EncodingInvalid, match="longer than"):
        run(arrived(request_of(iter([item_head(MAX_BATCH_BYTES + 1)]))))


def test_too_many_items_are_refused() -> None:
    assert len(run(arrived(request_of(chunked(join_batch([b""] * MAX_ITEMS), MIB))))) == MAX_ITEMS
    with pytest.raises(EncodingInvalid, match="too many"):
        run(arrived(request_of(chunked(join_batch([b""] * (MAX_ITEMS + 1)), MIB))))


def test_what_carries_no_update_is_small() -> None:
    async def small(lengths: list[int]) -> tuple[bytes, list[bytes]]:
        body = join_batch(map(bytes, lengths))
        arriving = ArrivingItems(request_of(chunked(body, MIB)), spool)
        return await arriving.small(), await arriving.all_small()

    first, others = run(small([SMALL_BYTES, SMALL_BYTES // 2, 0, SMALL_BYTES // 2]))
    assert [len(one) for one in (first, *others)] == [
        SMALL_BYTES,
        SMALL_BYTES // 2,
        0,
        SMALL_BYTES // 2,
    ]
    for lengths in ([SMALL_BYTES + 1], [0, SMALL_BYTES + 1], [0, SMALL_BYTES, 1]):
        with pytest.raises(HTTPException) as error:
            run(small(lengths))
        assert error.value.status_code == 413
    with pytest.raises(EncodingInvalid, match="lacks an item"):
        run(small([]))


def test_what_does_not_fit_into_a_batch_is_left_empty_and_its_file_is_closed() -> None:
    files: list[BinaryIO] = []

    def content(_identifier: str) -> BinaryIO:
        files.append(filed(bytes(INLINE_BYTES // 2 + 1)))
        return files[-1]

    first, second, third = within_limit(["a", "b", "c"], content)
    assert length_of(first) == INLINE_BYTES // 2 + 1
    assert (second, third) == (b"", b"")
    assert [file.closed for file in files] == [False, True]
    content_of(first)


# --- what goes wrong ---------------------------------------------------------------------------------


def test_a_peer_that_goes_away_in_the_middle_leaves_no_file_open() -> None:
    body = join_batch([bytes(4 * PIECE_BYTES)])
    seen: list[BinaryIO] = []

    def noted(length: int) -> BinaryIO:
        seen.append(spool(length))
        return seen[-1]

    with pytest.raises(ClientDisconnect):
        run(arrived(request_of(chunked(body[: 2 * PIECE_BYTES], 64 * 1024), cut=True), noted))
    with pytest.raises(EncodingInvalid, match="cut off"):
        run(arrived(request_of(chunked(body[: 2 * PIECE_BYTES], 64 * 1024)), noted))
    assert [file.closed for file in seen] == [True, True]


def test_a_full_disk_is_said_to_the_peer_and_no_path_with_it(tmp_path: Path) -> None:
    body = join_batch([bytes(2 * PIECE_BYTES)])

    def full(_length: int) -> BinaryIO:
        return Path("/dev/full").open("r+b", buffering=0)  # type: ignore[return-value]

    def full_at_its_end(_length: int) -> BinaryIO:
        """What is written stays in the buffer, and closing the file fails again."""
        return Path("/dev/full").open("r+b", buffering=4 * PIECE_BYTES)

    def missing(_length: int) -> BinaryIO:
        return cast("BinaryIO", tempfile.TemporaryFile(dir=tmp_path / "gone"))

    for make in (full, full_at_its_end, missing):
        with pytest.raises(HTTPException) as error:
            run(arrived(request_of(chunked(body, MIB)), make))
        assert (error.value.status_code, error.value.detail) == (507, "Insufficient storage")


def test_a_peer_that_goes_away_while_it_is_sent_something_leaves_no_file_open() -> None:
    async def given_up(taken: int) -> BinaryIO:
        file = filed(bytes(4 * PIECE_BYTES))
        leaving = pieces_of([file])
        for _ in range(taken):
            await anext(leaving)
        await leaving.aclose()  # type: ignore[attr-defined]
        return file

    assert run(given_up(1)).closed
    assert run(given_up(2)).closed


# --- memory ------------------------------------------------------------------------------------------


def traced_peak(work: Coroutine[Any, Any, Any]) -> int:
    tracemalloc.start()
    try:
        run(work)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_parts_of_thirty_owners_arrive_at_once_in_less_memory_than_one_of_them() -> None:
    length, chunk = 8 * MIB, bytes(64 * 1024)

    def body() -> Iterator[bytes]:
        yield item_head(length)
        yield from (chunk for _ in range(length // len(chunk)))

    async def one() -> None:
        async for item in ArrivingItems(request_of(body()), spool):
            assert length_of(item) == length
            assert not isinstance(item, bytes)
            item.close()

    async def all_at_once() -> None:
        await asyncio.gather(*(one() for _ in range(30)))

    assert traced_peak(all_at_once()) < length


def test_a_sum_leaves_for_thirty_owners_at_once_in_less_memory_than_one_of_it(tmp_path: Path) -> None:
    length = 8 * MIB
    file = tmp_path / "object"
    file.write_bytes(bytes(length))

    async def slowly(pieces: AsyncIterator[bytes]) -> int:
        total = 0
        async for piece in pieces:
            await asyncio.sleep(0)
            total += len(piece)
        return total

    async def all_at_once() -> None:
        totals = await asyncio.gather(*(slowly(pieces_of([file.open("rb")])) for _ in range(30)))
        assert totals == [length + 8] * 30

    assert traced_peak(all_at_once()) < length


def test_objects_of_thirty_requests_are_in_memory_two_at_a_time_while_flower_stores_them() -> None:
    content = bytes(2 * PIECE_BYTES)
    body, identifier = join_batch([content]), get_object_id(content)
    batches = Batches(SimpleNamespace())
    lock, now, most = threading.Lock(), [0], [0]

    def store(object_id: str, stored: bytes) -> bool:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.01)
        with lock:
            now[0] -= 1
        return object_id == identifier and stored == content

    async def one() -> list[str]:
        wanted = [identifier, "another"]
        await batches._store_wanted(wanted, ArrivingItems(request_of(chunked(body, MIB)), spool), store)
        return wanted

    async def all_at_once() -> list[list[str]]:
        return await asyncio.gather(*(one() for _ in range(30)))

    assert run(all_at_once()) == [["another"]] * 30
    assert most[0] == 2
