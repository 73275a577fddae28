"""Parts of an update: they cover every frame once, small models have one, and their number is public."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from crypto.parts import PART_BYTES, open_parts, seal_parts
from crypto.presets import PRESETS, packing_for

PACKING = packing_for("exact16", 8)


@given(st.sampled_from(sorted(PRESETS)), st.integers(1, 60_000_000), st.integers(1, 8))
def test_parts_cover_every_frame_once_and_in_order(name: str, parameters: int, owners: int) -> None:
    packing = packing_for(name, 8)
    for parts in (seal_parts(packing, parameters), open_parts(packing, parameters, owners)):
        covered = [position for part in parts for position in part]
        assert covered == list(range(packing.frames_for(parameters)))


@given(st.integers(1, 60_000_000), st.integers(1, 8))
def test_no_part_is_larger_than_it_may_be(parameters: int, owners: int) -> None:
    for parts, size in (
        (seal_parts(PACKING, parameters), PACKING.frame_bytes),
        (open_parts(PACKING, parameters, owners), PACKING.frame_bytes * owners),
    ):
        assert all(len(part) * size <= PART_BYTES or len(part) == 1 for part in parts)


@pytest.mark.parametrize(
    ("parameters", "parts"), [(650, 1), (1_000_000, 1), (10_000_000, 5), (50_000_000, 21)]
)
def test_only_large_models_have_several_parts(parameters: int, parts: int) -> None:
    assert len(seal_parts(PACKING, parameters)) == parts


def test_a_part_of_many_owners_holds_a_frame_of_each_at_least() -> None:
    assert [len(part) for part in open_parts(packing_for("wide", 1024), 30_000, 1024)] == [1] * 4
