"""The environment of a process: what it is like while large packages are imported, and after that."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from protocol.environment import importing


@pytest.fixture(autouse=True)
def collecting() -> Iterator[None]:
    gc.enable()
    yield
    gc.enable()


def test_garbage_is_collected_again_after_an_import() -> None:
    with importing():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_garbage_is_collected_again_after_an_import_that_failed() -> None:
    with pytest.raises(ImportError), importing():
        raise ImportError
    assert gc.isenabled()


def test_an_import_within_an_import_does_not_end_it() -> None:
    with importing():
        with importing():
            pass
        assert not gc.isenabled()


def test_who_collects_no_garbage_does_not_begin_to() -> None:
    gc.disable()
    with importing():
        pass
    assert not gc.isenabled()
