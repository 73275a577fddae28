"""A member is revoked in the middle of a round, and the parties hear of it one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from real_federation import PASSPHRASE
from scene import ROUNDS, Scene

from client import rounds
from crypto.pki import revoke
from crypto.trust import replace_revocations
from protocol.errors import CertificateRefused, QuorumNotMet
from server.app import run_plan
from server.store import RunStore

REVOKED = 3
MOMENTS = ["train.fit", "train.seal", "query.open"]


def tell(made: Scene, *owners: int, coordinator: bool = False) -> None:
    """Give parties a revocation list that names the revoked owner."""
    fresh = revoke(made.folder / "pki", PASSPHRASE, [f"owner-{REVOKED + 1}"])
    homes = [made.folder / "owners" / f"owner-{index + 1}" for index in owners]
    for home in [made.folder / "server"] * coordinator + homes:
        replace_revocations(home / "identity", fresh)


def before(
    made: Scene, monkeypatch: pytest.MonkeyPatch, kind: str, attempt: int, act: Callable[[], None]
) -> None:
    """Let something happen before the requests of one kind in one attempt are sent."""
    push, grid, seen = made.simulation.grid.push_messages, made.simulation.grid, list[str]()

    def push_messages(messages: Iterable[Any]) -> list[str]:
        asked = list(messages)
        if asked and asked[0].metadata.message_type == kind:
            seen.append(kind)
            if len(seen) == attempt:
                act()
        return push(asked)

    monkeypatch.setattr(grid, "push_messages", push_messages)


def on_event(monkeypatch: pytest.MonkeyPatch, kind: str, act: Callable[[], None]) -> None:
    """Let something happen when the coordinator first records an event."""
    record, waiting = RunStore.event, [act]

    def event(store: RunStore, named: str, **facts: Any) -> None:
        record(store, named, **facts)
        if named == kind and waiting:
            waiting.pop()()

    monkeypatch.setattr(RunStore, "event", event)


def events(made: Scene, kind: str) -> list[dict[str, Any]]:
    return [facts for _id, _time, named, facts in made.store.events() if named == kind]


def check_went_on(made: Scene, voids: int) -> None:
    """Check that the run finished without the revoked owner, and that nobody else is blamed."""
    assert made.contributors() == [[0, 1, 2, 3]] * 2 + [[0, 1, 2]] * (ROUNDS - 2)
    assert [one["owners"] for one in made.sessions()] == [4, 3]
    assert [one["owner"] for one in events(made, "excluded")] == ["owner-4"]
    assert not events(made, "absent")
    assert sum(facts["void"] for facts in made.store.attempts()) == voids
    for index in range(3):
        recorded = made.store.owners()[made.owner(index).fingerprint]["member"]
        assert (recorded["voided"], recorded["objects"], recorded["excluded"]) == (0, False, False)
    made.check_models(0, 1, 2)


@pytest.mark.parametrize("kind", MOMENTS)
def test_all_hear_of_it_in_the_middle_of_a_round(
    scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    made = scene(4)
    before(made, monkeypatch, kind, 3, lambda: tell(made, 0, 1, 2, coordinator=True))
    made.run(monkeypatch, {})
    check_went_on(made, voids=1)


@pytest.mark.parametrize("kind", MOMENTS)
def test_owners_hear_of_it_first_and_the_run_goes_on_with_the_coordinators_list(
    scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    made = scene(4, deadlines={"pause_s": 30.0})
    before(made, monkeypatch, kind, 3, lambda: tell(made, 0, 1, 2))
    on_event(monkeypatch, "waiting", lambda: tell(made, coordinator=True))
    made.run(monkeypatch, {})
    # an attempt that was sealed and not opened is followed by one that is not sealed
    check_went_on(made, voids=2 if kind == "query.open" else 1)
    assert {one["owner"] for one in events(made, "objects")} == {"owner-1", "owner-2", "owner-3"}


def test_one_owner_hears_of_it_first_and_the_others_go_on_until_they_do(
    scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = scene(4)
    before(made, monkeypatch, "train.seal", 2, lambda: tell(made, 0))
    made.run(monkeypatch, {3: lambda _round: tell(made, 1, 2, coordinator=True)})
    assert made.contributors() == [[0, 1, 2, 3], [1, 2, 3], [1, 2, 3], [0, 1, 2]]
    assert sum(facts["void"] for facts in made.store.attempts()) == 1
    made.check_models(0, 1, 2)


def test_a_run_whose_coordinator_hears_nothing_pauses_says_why_and_is_resumed_with_the_list(
    scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = scene(4, deadlines={"pause_s": 1.0})
    before(made, monkeypatch, "train.seal", 3, lambda: tell(made, 0, 1, 2))
    with pytest.raises(QuorumNotMet, match="give the coordinator the newest revocation list"):
        made.run(monkeypatch, {})
    assert made.store.get("state") == "paused"
    # to resume it without a list costs nobody anything
    with pytest.raises(QuorumNotMet, match="newest revocation list"):
        run_plan(made.simulation.grid, made.store, made.simulation.trust)
    run = made.store.get("run")
    assert [made.owner(index).ledger.spent(run).sealed for index in range(3)] == [2, 2, 2]
    tell(made, coordinator=True)
    run_plan(made.simulation.grid, made.store, made.simulation.trust)
    assert made.contributors() == [[0, 1, 2, 3]] * 2 + [[0, 1, 2]] * 2
    assert not any(facts["member"]["voided"] for facts in made.store.owners().values())
    made.check_models(0, 1, 2)


def test_an_owner_that_objects_again_and_again_is_not_asked_again_and_again(
    scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It costs the others one attempt for each list of the coordinator, however it comes back."""
    made = scene(4)

    def object_(*_: Any) -> None:
        raise CertificateRefused("said, and not true")

    def connect_anew(_round: int) -> None:
        made.go(0)
        made.come(0)

    hostile = made.owner(0).fingerprint
    honest = rounds.check_round_list
    monkeypatch.setattr(
        rounds,
        "check_round_list",
        lambda owner, *rest: object_() if owner.fingerprint == hostile else honest(owner, *rest),
    )
    made.run(monkeypatch, dict.fromkeys(range(1, ROUNDS), connect_anew))
    assert made.contributors() == [[1, 2, 3]] * ROUNDS
    assert [facts["void"] for facts in made.store.attempts()].count(True) == 1
    assert len(events(made, "objects")) == 1
