"""A member loses its certificate in the middle of a round, and the parties hear of it in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from real_federation import PASSPHRASE
from scene import ROUNDS, Scene

from client import rounds
from client.owner import Owner
from crypto.certificates import CertificateVerifier, Member
from crypto.pki import revoke
from crypto.trust import replace_revocations
from protocol.errors import CertificateRefused, MemberUncertified, QuorumNotMet
from server.app import run_plan
from server.cohort import standing
from server.store import RunStore

REVOKED = 3
MOMENTS = ["train.fit", "train.seal", "query.open"]


def moments(always: str) -> list[Any]:
    """Return every moment of a round; all but one are for the long tests."""
    return [pytest.param(kind, marks=() if kind == always else pytest.mark.long) for kind in MOMENTS]


def tell(made: Scene, *owners: int, coordinator: bool = False, gone: Iterable[int] = (REVOKED,)) -> None:
    """Give parties a revocation list that names owners, all before included."""
    fresh = revoke(made.folder / "pki", PASSPHRASE, [f"owner-{index + 1}" for index in gone])
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


def on_event(monkeypatch: pytest.MonkeyPatch, kind: str, *acts: Callable[[], None]) -> None:
    """Let something happen when the coordinator records an event, each thing once."""
    record, waiting = RunStore.event, list(acts)

    def event(store: RunStore, named: str, **facts: Any) -> None:
        record(store, named, **facts)
        if named == kind and waiting:
            waiting.pop(0)()

    monkeypatch.setattr(RunStore, "event", event)


def events(made: Scene, kind: str) -> list[dict[str, Any]]:
    return [facts for _id, _time, named, facts in made.store.events() if named == kind]


def check_went_on(made: Scene, voids: int) -> None:
    """Check that the run finished without the revoked owner, and that nobody else is blamed."""
    assert made.contributors() == [[0, 1, 2, 3]] * 2 + [[0, 1, 2]] * (ROUNDS - 2)
    assert [one["owners"] for one in made.sessions()] == [4, 3]
    assert [one["owner"] for one in events(made, "excluded")] == ["owner-4"]
    assert {one["owner"] for one in events(made, "absent")} <= {"owner-4"}
    assert sum(facts["void"] for facts in made.store.attempts()) == voids
    for index in range(3):
        recorded = made.store.owners()[made.owner(index).fingerprint]["member"]
        assert (recorded["voided"], recorded["objects"], recorded["excluded"]) == (0, False, False)
    made.check_models(0, 1, 2)


@pytest.mark.parametrize("kind", moments("query.open"))
def test_all_hear_of_it_in_the_middle_of_a_round(
    scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    made = scene(4)
    before(made, monkeypatch, kind, 3, lambda: tell(made, 0, 1, 2, coordinator=True))
    made.run(monkeypatch, {})
    check_went_on(made, voids=1)


@pytest.mark.parametrize("kind", moments("train.seal"))
def test_owners_hear_of_it_first_and_the_run_goes_on_with_the_coordinators_list(
    scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    made = scene(4, deadlines={"pause_s": 30.0})
    before(made, monkeypatch, kind, 3, lambda: tell(made, 0, 1, 2))
    on_event(monkeypatch, "awaiting_list", lambda: tell(made, coordinator=True))
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


def test_a_certificate_that_expires_in_the_middle_of_a_round(
    scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no other list; the coordinator sees for itself."""
    made, expired = scene(4), list[bool]()
    certificate = made.owner(REVOKED).credentials.signing_certificate.public_bytes(Encoding.DER)
    verify = CertificateVerifier.member

    def verified(verifier: CertificateVerifier, given: bytes) -> Member:
        if expired and given == certificate:
            raise CertificateRefused("the certificate has expired")
        return verify(verifier, given)

    monkeypatch.setattr(CertificateVerifier, "member", verified)
    before(made, monkeypatch, "train.seal", 3, lambda: expired.append(True))
    made.run(monkeypatch, {})
    check_went_on(made, voids=1)


def test_a_list_that_is_older_than_that_of_owners_makes_a_roster_fail_and_the_next_one_stand(
    scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two are revoked, one after the other; the coordinator gets both lists while its run waits."""
    made = scene(5, deadlines={"pause_s": 30.0})

    def two_lists() -> None:
        tell(made)
        older = (made.folder / "pki" / "crl.pem").read_bytes()
        tell(made, 0, 1, 2, gone=(REVOKED, 4))
        on_event(
            monkeypatch,
            "awaiting_list",
            lambda: bring(made, older),
            lambda: tell(made, coordinator=True, gone=(REVOKED, 4)),
        )

    before(made, monkeypatch, "train.seal", 3, two_lists)
    made.run(monkeypatch, {})
    assert made.contributors() == [[0, 1, 2, 3, 4]] * 2 + [[0, 1, 2]] * 2
    assert [one["owners"] for one in made.sessions()] == [5, 3]
    assert sorted(one["owner"] for one in events(made, "excluded")) == ["owner-4", "owner-5"]
    assert not events(made, "absent")
    made.check_models(0, 1, 2)


def bring(made: Scene, pem: bytes) -> None:
    """Give the coordinator a list that is not the newest."""
    (made.folder / "older.pem").write_bytes(pem)
    replace_revocations(made.folder / "server" / "identity", made.folder / "older.pem")


def test_who_objected_and_was_right_too_late_closes_its_run_all_the_same(
    scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = scene(4)
    before(made, monkeypatch, "train.seal", ROUNDS, lambda: tell(made, 0))
    made.run(monkeypatch, {})
    assert made.contributors()[-1] == [1, 2, 3]
    assert all(facts["statement"] is not None for facts in made.store.owners().values())


def test_a_list_that_has_lapsed_ends_no_run_that_is_only_to_be_evaluated_and_closed(
    scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = {"every": 1, "target_epsilon": 1.0, "delta": 1e-7, "holdout_share": 0.3}
    made = scene(3, evaluation=evaluation)

    def lapse(_round: int) -> None:
        def lapsed(*_: Any) -> None:
            raise CertificateRefused("the revocation list is stale")

        monkeypatch.setattr(standing, "check_revocations", lapsed)

    made.run(monkeypatch, {ROUNDS: lapse})
    assert [one["round"] for one in events(made, "evaluation")] == [*range(1, ROUNDS)]
    assert made.store.get("state") == "finished"
    assert not events(made, "excluded")


@pytest.fixture
def hostile(scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch) -> Scene:
    """A federation whose first owner refuses every list, and connects anew after each round."""
    made, honest = (
        scene(4, run={"rounds": 6, "spare_attempts": 5, "paid_spares": 3}),
        rounds.check_round_list,
    )

    def check(owner: Owner, *rest: Any) -> rounds.RoundList:
        if owner.fingerprint == made.owner(0).fingerprint:
            raise MemberUncertified("said, and not true")
        return honest(owner, *rest)

    monkeypatch.setattr(rounds, "check_round_list", check)
    return made


def come_back(made: Scene) -> None:
    made.go(0)
    made.come(0)


def test_an_owner_that_objects_again_and_again_is_not_asked_again_and_again(
    hostile: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It costs the others one attempt for each list of the coordinator, however it comes back."""
    hostile.run(monkeypatch, dict.fromkeys(range(1, 5), lambda _round: come_back(hostile)))
    assert hostile.contributors() == [[1, 2, 3]] * 6
    assert [facts["void"] for facts in hostile.store.attempts()].count(True) == 1
    assert len(events(hostile, "objects")) == 1


def test_an_owner_whose_objections_no_list_confirms_is_left_out_of_the_run(
    hostile: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lists are renewed behind every round, and name nobody."""

    def renew(_round: int) -> None:
        come_back(hostile)
        tell(hostile, coordinator=True, gone=())

    hostile.run(monkeypatch, dict.fromkeys(range(1, 5), renew))
    assert hostile.contributors() == [[1, 2, 3]] * 6
    assert [facts["void"] for facts in hostile.store.attempts()].count(True) == 3
    assert [one["owner"] for one in events(hostile, "excluded")] == ["owner-1"]
