"""The named steps of a run at which a coordinator or an owner dies, as patches of the product's methods.

Only public methods that mean the step are patched. The steps of a round are those of the second round of a
run, so that one finished round is there to be lost.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

OWNERS = 4


class Setter(Protocol):
    """Replaces an attribute, as pytest's monkeypatch does."""

    def setattr(self, target: Any, name: str, value: Any) -> None:
        """Replace it."""


class Fault(Protocol):
    """What happens at the step."""

    def strike(self) -> None:
        """Die, if it is this step's turn."""


Patch = Callable[[Setter, Fault], None]


def at(owner: type, name: str, when: Callable[..., bool], *, after: bool = False) -> Patch:
    """Return a patch that lets a process die in a method, before or after its work, if `when` holds."""

    def patch(setter: Setter, fault: Fault) -> None:
        original = getattr(owner, name)

        def dying(self: Any, *arguments: Any, **options: Any) -> Any:
            hit = when(self, *arguments, **options)
            if hit and not after:
                fault.strike()
            result = original(self, *arguments, **options)
            if hit and after:
                fault.strike()
            return result

        setter.setattr(owner, name, dying)

    return patch


def _store() -> Any:
    from server.store import RunStore

    return RunStore


def _runner() -> Any:
    from server.rounds.runner import RoundRunner

    return RoundRunner


def counted(direction: str, kind: str, number: int) -> Patch:
    """Die when this message is sent or received for the n-th time."""
    count = 0

    def hit(_store: Any, *part: Any) -> bool:
        nonlocal count
        count += part[:3] == (direction, kind, "signed metadata")
        return count == number and part[:3] == (direction, kind, "signed metadata")

    return at(_store(), "transfer", hit, after=True)


def event(kind: str, *, after: bool = True) -> Patch:
    return at(_store(), "event", lambda _store, name, **_facts: bool(name == kind), after=after)


def checkpoint(*, after: bool) -> Patch:
    return at(_store(), "write_checkpoint", lambda _store, number, _model: bool(number == 2), after=after)


def temporary_file(setter: Setter, fault: Fault) -> None:
    import server.checkpoints

    original = server.checkpoints.save_file

    def dying(tensors: Any, file: Path, *rest: Any) -> None:
        original(tensors, file, *rest)
        if "0002" in file.name:
            fault.strike()

    setter.setattr(server.checkpoints, "save_file", dying)


SERVER_STEPS: dict[str, Callable[[], Patch]] = {
    "joined": lambda: event("joined"),
    "rostered": lambda: counted("received", "query.roster", OWNERS),
    "keyed": lambda: counted("received", "query.keys", OWNERS),
    "session not committed": lambda: event("session"),
    "session committed": lambda: at(_runner(), "__init__", lambda *_: True),
    "fit sent": lambda: counted("sent", "train.fit", 2 * OWNERS),
    "half the ready": lambda: counted("received", "train.fit", OWNERS + 2),
    "seal sent": lambda: counted("sent", "train.seal", 2 * OWNERS),
    "half sealed": lambda: counted("received", "train.seal", OWNERS + 2),
    "sealed": lambda: counted("received", "train.seal", 2 * OWNERS),
    "open sent": lambda: counted("sent", "query.open", 6),
    "opened": lambda: checkpoint(after=False),
    "temporary file written": lambda: temporary_file,
    "renamed": lambda: checkpoint(after=True),
    "not committed": lambda: event("round", after=False),
    "committed": lambda: at(_runner(), "run", lambda _self, attempt, _model: bool(attempt.round == 2)),
    "close sent": lambda: counted("sent", "query.close", OWNERS),
    "half closed": lambda: counted("received", "query.close", 2),
    "not finished": lambda: event("finished"),
}


def again(patched: Callable[[], Patch]) -> Patch:
    """Return a patch that passes the first arrival at a step and dies at the second."""

    def patch(setter: Setter, fault: Fault) -> None:
        class Second:
            passed = 0

            def strike(self) -> None:
                self.passed += 1
                if self.passed == 2:
                    fault.strike()

        patched()(setter, Second())

    return patch


FIRST, LATER = 3, 6
"""Joins of a first roster of three owners, and with those of a second one in which one is replaced."""

ROSTER_STEPS: dict[str, Callable[[], Patch]] = {
    "newcomer asked": lambda: counted("sent", "query.join", FIRST + 1),
    "newcomer consented": lambda: counted("received", "query.join", FIRST + 1),
    "members asked": lambda: counted("sent", "query.join", LATER),
    "half joined again": lambda: counted("received", "query.join", LATER - 1),
    "all joined again": lambda: counted("received", "query.join", LATER),
    "rostered again": lambda: counted("received", "query.roster", LATER),
    "keyed again": lambda: counted("received", "query.keys", LATER),
    "second session not committed": lambda: again(lambda: event("session")),
    "second session committed": lambda: again(lambda: at(_runner(), "enter", lambda *_: True)),
}
"""The steps of a coordinator that gives a run its second roster."""


def owner_steps(is_victim: Callable[[Any], bool]) -> dict[str, Callable[[], Patch]]:
    """Return the steps of an owner's second attempt.

    Args:
        is_victim: Tells whether a state store or a ledger is that of the owner that dies.
    """
    from client.ledger import Ledger
    from client.store import StateStore

    def state(when: Callable[[Any], bool], *, after: bool) -> Patch:
        return at(
            StateStore,
            "save",
            lambda store, saved, **_options: is_victim(store) and when(saved),
            after=after,
        )

    def later(saved: Any, stage: str) -> bool:
        return saved.start is not None and saved.stage == stage

    def ledger(method: str, *, after: bool, attempt: int | None = 2) -> Patch:
        return at(
            Ledger,
            method,
            lambda one, _run, *rest: is_victim(one) and (attempt is None or rest[0] == attempt),
            after=after,
        )

    def training(setter: Setter, fault: Fault) -> None:
        import client.rounds

        reserved = False

        def note(one: Any, _run: str, attempt: int, *_rest: Any) -> bool:
            nonlocal reserved
            reserved = is_victim(one) and attempt == 2
            return False

        at(Ledger, "reserve", note)(setter, fault)
        original = client.rounds.contribute

        def dying(*arguments: Any) -> Any:
            result = original(*arguments)
            if reserved:
                fault.strike()
            return result

        setter.setattr(client.rounds, "contribute", dying)

    return {
        "join": lambda: ledger("open_run", after=False, attempt=None),
        "joined": lambda: state(lambda saved: saved.stage == "joined", after=True),
        "roster": lambda: state(lambda saved: saved.stage == "rostered", after=False),
        "rostered": lambda: state(lambda saved: saved.stage == "rostered", after=True),
        "keys": lambda: state(lambda saved: saved.stage == "keyed", after=False),
        "keyed": lambda: state(lambda saved: saved.stage == "keyed", after=True),
        "fit received": lambda: ledger("reserve", after=False),
        "reserved": lambda: ledger("reserve", after=True),
        "training": lambda: training,
        "ready": lambda: state(lambda saved: saved.round == 1 and "2" not in saved.sealed, after=True),
        "seal": lambda: ledger("commit", after=False),
        "paid": lambda: ledger("commit", after=True),
        "sealed": lambda: state(lambda saved: "2" in saved.sealed, after=True),
        "open": lambda: state(lambda saved: "2" in saved.opened, after=False),
        "opened": lambda: state(lambda saved: "2" in saved.opened, after=True),
        "join again": lambda: state(lambda saved: later(saved, "joined"), after=False),
        "joined again": lambda: state(lambda saved: later(saved, "joined"), after=True),
        "rostered again": lambda: state(lambda saved: later(saved, "rostered"), after=True),
        "keys again": lambda: state(lambda saved: later(saved, "keyed"), after=False),
        "keyed again": lambda: state(lambda saved: later(saved, "keyed"), after=True),
        "close": lambda: ledger("close_run", after=False, attempt=None),
        "closed": lambda: state(lambda saved: saved.stage == "closed", after=True),
    }
