"""An owner's node: when it connects anew, when it ends, and what it says of why."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from client import node
from protocol.errors import CertificateRefused, EnvironmentUnfit, FedsealError, ServerUnavailable

FIRST, LAST = 0.5, 15.0


class Served:
    """What becomes of one connection after the other, in place of a coordinator; notes the pauses."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, outcomes: list[tuple[float | None, FedsealError | None]]
    ) -> None:
        self.pauses: list[float] = []
        self._outcomes = iter(outcomes)
        monkeypatch.setattr(node, "_stop_on_signals", self._watch)
        monkeypatch.setattr(node, "alone_in", self._nothing)
        monkeypatch.setattr(node, "open_owner", lambda *_arguments: SimpleNamespace(close=lambda: None))
        monkeypatch.setattr(node, "_serve", self._serve)

    def _watch(self, stop: Any) -> None:
        stop.wait = self.pauses.append
        self._stop = stop

    @contextmanager
    def _nothing(self, _home: Path) -> Iterator[None]:
        yield

    def _serve(self, *arguments: Any) -> None:
        lasted, failure = next(self._outcomes)
        if lasted is not None:
            arguments[-1].since = time.monotonic() - lasted
        if failure is None:
            self._stop.set()
        else:
            raise failure


def test_pauses_grow_while_nobody_is_there_and_begin_anew_after_a_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gone, broke = (None, ServerUnavailable("not there")), (5.0, ServerUnavailable("broke"))
    served = Served(monkeypatch, [*[gone] * 7, broke, gone, gone, (5.0, None)])
    node.run_node(Path("home"), b"", "127.0.0.1:1")
    assert served.pauses == [FIRST, 1.0, 2.0, 4.0, 8.0, LAST, LAST, 0.0, FIRST, 1.0]


def test_connections_that_break_at_once_are_not_tried_without_a_pause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    served = Served(monkeypatch, [*[(0.0, ServerUnavailable("broke"))] * 3, (0.0, None)])
    node.run_node(Path("home"), b"", "127.0.0.1:1")
    assert served.pauses == [FIRST] * 3


@pytest.mark.parametrize("error", [ServerUnavailable("not there"), CertificateRefused("stale")])
def test_once_means_until_nobody_is_there(monkeypatch: pytest.MonkeyPatch, error: FedsealError) -> None:
    """A connection that breaks is tried again; one that cannot be had is the end."""
    served = Served(monkeypatch, [(5.0, ServerUnavailable("broke")), (None, error)])
    with pytest.raises(type(error)):
        node.run_node(Path("home"), b"", "127.0.0.1:1", keep_trying=False)
    assert served.pauses == [0.0]


def test_a_machine_that_cannot_train_is_no_reason_to_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served(monkeypatch, [(None, EnvironmentUnfit("no torch")), (5.0, None)])
    with pytest.raises(EnvironmentUnfit):
        node.run_node(Path("home"), b"", "127.0.0.1:1")
    assert served.pauses == []


def test_an_import_that_fails_is_a_coded_error_without_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "client.app", None)
    owner: Any = None
    with pytest.raises(EnvironmentUnfit) as caught:
        node._app_of(owner)
    assert caught.value.detail == "what trains cannot be imported (ModuleNotFoundError)"
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
