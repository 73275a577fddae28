"""Batches: what goes in comes out, and whatever else is refused."""

from collections.abc import Iterator

import hypothesis.strategies as st
import pytest
from hypothesis import given

from protocol import batches
from protocol.batches import INLINE_BYTES, fitting, join_batch, split_batch
from protocol.errors import EncodingInvalid


@given(st.lists(st.binary(max_size=64), max_size=8))
def test_a_batch_splits_into_what_it_was_made_of(items: list[bytes]) -> None:
    assert split_batch(join_batch(items)) == items


@given(st.binary(max_size=200))
def test_any_bytes_are_a_batch_or_refused(data: bytes) -> None:
    try:
        items = split_batch(data)
    except EncodingInvalid:
        return
    assert join_batch(items) == data


@given(st.lists(st.binary(min_size=1, max_size=20), min_size=1, max_size=4), st.data())
def test_a_batch_that_was_cut_is_refused(items: list[bytes], data: st.DataObject) -> None:
    whole = join_batch(items)
    ends, place = {0}, 0
    for item in items:
        place += 8 + len(item)
        ends.add(place)
    cut = data.draw(st.integers(1, len(whole) - 1).filter(lambda length: length not in ends))
    with pytest.raises(EncodingInvalid):
        split_batch(whole[:cut])


def test_a_length_that_no_memory_holds_is_refused() -> None:
    with pytest.raises(EncodingInvalid):
        split_batch(b"\xff" * 8 + b"x")


def test_limits_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "MAX_ITEMS", 2)
    assert split_batch(join_batch([b"", b""])) == [b"", b""]
    with pytest.raises(EncodingInvalid):
        split_batch(join_batch([b""] * 3))
    monkeypatch.setattr(batches, "MAX_BATCH_BYTES", 10)
    with pytest.raises(EncodingInvalid):
        split_batch(join_batch([b"abc"]))


def test_a_batch_carries_contents_up_to_its_room_and_makes_no_more() -> None:
    made: list[int] = []

    def contents() -> Iterator[bytes]:
        for place in range(4):
            made.append(place)
            yield bytes(INLINE_BYTES // 2)

    assert len(list(fitting(contents()))) == 2
    assert made == [0, 1, 2]
    assert list(fitting([bytes(INLINE_BYTES + 1), b"x"])) == []
