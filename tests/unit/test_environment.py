"""The environment of a process: what it is like while large packages are imported, and after that."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest

from protocol.environment import importing, prepare_environment


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


def test_proxies_of_the_environment_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("HTTP_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "No_Proxy", "grpc_proxy")
    for name in names:
        monkeypatch.setenv(name, "socks5://127.0.0.1:9")
    monkeypatch.setenv("FEDSEAL_PROXY", "http://127.0.0.1:9")
    monkeypatch.setattr(os, "environ", os.environ.copy())
    prepare_environment()
    assert not set(names) & set(os.environ)
    assert os.environ["FEDSEAL_PROXY"]
