"""An owner's whole home is put back to an earlier day: its peers remember what it had signed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile import FIRST_NODE, HostileFederation, HostileRun
from typer.testing import CliRunner

import fedseal
import server.strategy
from client.heads import adopt
from client.owner import IDENTITY, LEDGER, STATE, open_owner
from crypto.signing import sign
from protocol.errors import FedsealError, LedgerConflict, LedgerOutrun
from protocol.messages import JoinRequest, KeysReply, KeysRequest, LedgerHead, Ready, Session, Signed
from protocol.plan import Plan
from scenarios.federation import PolicySettings, make_federation
from scenarios.grid import LocalGrid
from server.app import run_plan
from server.store import RunStore
from tasks.partition import digits

SETTINGS = PolicySettings(epsilon_total=1e6, epsilon_per_run=50.0, delta_total=0.5)
OUTRUN = "FS-LEDGER-04"
VICTIM = 2
ALL = (0, 1, 2, 3)


class Homes:
    """Four owners, one of whom has a home that is saved and put back as a backup of a disk would."""

    def __init__(self, folder: Path) -> None:
        splits, _ = digits(seed=2, owners=4)
        few = [(x[:60], y[:60]) for x, y in splits]
        made = make_federation(folder / "federation", few, SETTINGS)
        homes = sorted(made.owners, key=lambda home: home.fingerprint)
        self.folder, self.passphrase = homes[VICTIM].folder, homes[VICTIM].passphrase
        self.peer_folder, self._backups = homes[0].folder, folder / "backups"
        self.hostile = HostileFederation([open_owner(home.folder, home.passphrase) for home in homes])

    def restart(self, while_stopped: Callable[[], Any] = lambda: None) -> None:
        """Stop the victim's node, do something to its home, and start it again."""
        owners = self.hostile.owners
        owners[VICTIM].close()
        while_stopped()
        owners[VICTIM] = open_owner(self.folder, self.passphrase)
        self.hostile = HostileFederation(owners)

    def save(self, name: str) -> None:
        """Copy the home while its node has nothing to do; the logs of its databases are copied too."""
        shutil.copytree(self.folder, self._backups / name)

    def put_back(self, name: str, *parts: str) -> None:
        """Put a backup back, or only some parts of it."""

        def replace() -> None:
            for part in parts or (".",):
                source, target = self._backups / name / part, self.folder / part
                if target.is_dir():
                    shutil.rmtree(target)
                    shutil.copytree(source, target)
                else:
                    shutil.copy(source, target)

        self.restart(replace)

    def adopt(self, epsilon: float) -> None:
        self.restart(lambda: adopt(self.folder, self.passphrase, epsilon, 0.0))

    def forget(self) -> None:
        """Start afresh: the victim has its first home, and nobody remembers anything."""
        for owner in self.hostile.owners:
            owner.store._database.execute("DELETE FROM heads")
            owner.store._forget()
        self.put_back("first")
        for backup in set(self._backups.iterdir()) - {self._backups / "first"}:
            shutil.rmtree(backup)


@pytest.fixture(scope="module")
def module_homes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Homes]:
    homes = Homes(tmp_path_factory.mktemp("put-back"))
    homes.save("first")
    yield homes
    for owner in homes.hostile.owners:
        owner.close()


@pytest.fixture
def homes(module_homes: Homes) -> Iterator[Homes]:
    yield module_homes
    module_homes.forget()


def spend(homes: Homes, plan: Plan) -> HostileRun:
    """Let all owners finish a round, so that peers have seen the victim's newest head."""
    run = homes.hostile.run(plan, ALL).established()
    run.finished_round(1)
    return run


@pytest.fixture
def put_back(homes: Homes, plan: Plan) -> Homes:
    """The victim spent, then its whole home was put back to the time before."""
    homes.save("before")
    spend(homes, plan)
    homes.save("after")
    homes.put_back("before")
    return homes


def as_far_as_keys(homes: Homes, plan: Plan) -> HostileRun:
    return homes.hostile.run(plan, ALL).join().roster()


def refused_at_keys(homes: Homes, plan: Plan) -> HostileRun:
    run = as_far_as_keys(homes, plan)
    assert homes.hostile.refused(VICTIM, "query.keys", run.keys_request(VICTIM)) == OUTRUN
    return run


def refused_at_join(homes: Homes, plan: Plan) -> None:
    run = homes.hostile.run(plan, ALL)
    request = JoinRequest(run=run.run, plan=plan.fields())
    assert homes.hostile.refused(VICTIM, "query.join", request) == OUTRUN


def test_a_home_that_was_put_back_is_refused_by_what_peers_return(put_back: Homes, plan: Plan) -> None:
    """Ledger and copy agree with each other, and both are old; one peer's memory is enough."""
    run = as_far_as_keys(put_back, plan)
    request = run.keys_request(VICTIM)
    assert len(request.heads) == 3
    before = run.owner(VICTIM).ledger.head()
    alone = request.model_copy(update={"heads": request.heads[1:2]})
    assert put_back.hostile.refused(VICTIM, "query.keys", alone) == OUTRUN
    assert run.state(VICTIM).stage == "rostered"
    assert run.owner(VICTIM).ledger.head() == before, "nothing was reserved"


def test_it_goes_on_refusing_whatever_the_coordinator_shows_next(put_back: Homes, plan: Plan) -> None:
    run = refused_at_keys(put_back, plan)
    silent = run.keys_request(VICTIM).model_copy(update={"heads": []})
    assert put_back.hostile.refused(VICTIM, "query.keys", silent) == OUTRUN
    put_back.restart()
    refused_at_join(put_back, plan)


def test_the_newest_home_is_accepted_again(put_back: Homes, plan: Plan) -> None:
    refused_at_keys(put_back, plan)
    put_back.put_back("after", LEDGER, f"{IDENTITY}/ledger.head")
    spend(put_back, plan)


def test_an_adoption_by_the_owner_lets_it_go_on(put_back: Homes, plan: Plan) -> None:
    refused_at_keys(put_back, plan)
    put_back.adopt(7.5)
    run = spend(put_back, plan)
    assert run.owner(VICTIM).ledger.totals().epsilon >= 7.5
    own = run.owner(VICTIM).fingerprint
    kept = run.owner(0).store.heads([own])[own]
    assert run.owner(VICTIM).ledger.holds(LedgerHead.of(kept)), "the peers' memory is of the new chain"


def test_the_commands_say_so_and_adopt_only_what_is_missing(
    put_back: Homes, plan: Plan, tmp_path: Path
) -> None:
    secret = tmp_path / "passphrase"
    secret.touch(mode=0o600)
    secret.write_bytes(put_back.passphrase)
    home = ["--home", str(put_back.folder), "--passphrase-file", str(secret)]

    def ran(verb: str, *options: str) -> Any:
        return CliRunner().invoke(fedseal.app, ["ledger", verb, *home, *options])

    assert ran("verify").exit_code == 0, "the old home is whole by itself"
    costs = ["--epsilon", "7.5", "--delta", "0"]
    assert isinstance(ran("adopt", *costs).exception, LedgerConflict)
    refused_at_keys(put_back, plan)
    assert isinstance(ran("verify").exception, LedgerOutrun)
    assert "7.5" in ran("adopt", *costs).output
    assert "that was returned is in it" in ran("verify").output


def test_a_ledger_and_copy_without_the_state_are_refused_by_the_owners_own_memory(
    homes: Homes, plan: Plan
) -> None:
    homes.save("before")
    spend(homes, plan)
    homes.put_back("before", LEDGER, f"{IDENTITY}/ledger.head")
    refused_at_join(homes, plan)


def test_a_home_that_was_put_back_within_a_run_is_refused_by_its_own_ready(
    homes: Homes, plan: Plan
) -> None:
    run = homes.hostile.run(plan, ALL).established()
    homes.save("before")
    run = _resumed(homes, run)
    newest = run.fit(1)[VICTIM]
    homes.put_back("before")
    run = _resumed(homes, run)
    request = run.fit_request(2)
    shown = request.model_copy(update={"newest": newest})
    before = run.owner(VICTIM).ledger.head()
    assert homes.hostile.refused(VICTIM, "train.fit", shown) == OUTRUN
    assert homes.hostile.refused(VICTIM, "train.fit", request) == OUTRUN, "it was kept"
    assert run.owner(VICTIM).ledger.head() == before


def _resumed(homes: Homes, run: HostileRun) -> HostileRun:
    run.federation = homes.hostile
    return run


def test_a_copied_home_is_refused_where_the_original_spent(homes: Homes, plan: Plan) -> None:
    """Two machines with one identity: of two heads with one number only one can be in a chain."""
    run = homes.hostile.run(plan, ALL).established()
    homes.save("clone")
    _resumed(homes, run).sealed_attempt(1)
    homes.put_back("clone")
    _resumed(homes, run).fit(1, [VICTIM])
    refused_at_keys(homes, plan)


def test_dropped_heads_hide_a_rollback_only_until_peers_are_heard(put_back: Homes, plan: Plan) -> None:
    """The stated limit: who relays all messages can withhold. Peers keep their memory meanwhile."""
    run = as_far_as_keys(put_back, plan)
    for index in ALL:
        request = run.keys_request(index).model_copy(update={"heads": []})
        answered = put_back.hostile.accepted(index, "query.keys", request)
    run.session = KeysReply.from_bytes(answered.body).session.body["session"]
    run.sealed_attempt(1)
    refused_at_keys(put_back, plan)


def forgeries(run: HostileRun) -> list[Signed]:
    """What a coordinator and two bought owners can make of a victim's messages and their own keys."""
    own = run.print_(VICTIM)
    ready = run.owner(0).store.heads([own])[own]
    higher = {**ready.body, "ledger": {"sequence": 9999, "head": "ab" * 32}}
    bought = run.owner(0).credentials.signing_key
    by_another = sign(bought, Ready.from_fields(higher))
    return [
        ready.model_copy(update={"body": higher}),
        by_another,
        by_another.model_copy(update={"signer": own}),
        ready.model_copy(update={"kind": "statement"}),
        ready.model_copy(update={"body": {}}),
        sign(run.owner(VICTIM).credentials.signing_key, Session(session="ab" * 32)),
    ]


def test_forged_heads_change_nothing(homes: Homes, plan: Plan) -> None:
    spend(homes, plan)
    run = as_far_as_keys(homes, plan)
    request = run.keys_request(VICTIM)
    forged: KeysRequest = request.model_copy(update={"heads": [*forgeries(run), *request.heads]})
    homes.hostile.accepted(VICTIM, "query.keys", forged)
    assert run.owner(VICTIM).store.shown() == []


def test_old_heads_of_the_victim_are_harmless(homes: Homes, plan: Plan) -> None:
    run = homes.hostile.run(plan, ALL).established()
    old = [run.joins[VICTIM].join, run.fit(1)[VICTIM]]
    run = as_far_as_keys(homes, plan)
    homes.hostile.accepted(VICTIM, "query.keys", run.keys_request(VICTIM).model_copy(update={"heads": old}))


def test_only_messages_of_a_sealed_list_are_remembered_and_they_are_small(homes: Homes, plan: Plan) -> None:
    run = homes.hostile.run(plan, ALL).established()
    own = run.print_(VICTIM)
    ready = run.fit(1)
    known = run.owner(0).store.heads([own])
    assert known.get(own) != ready[VICTIM], "a list that was not accepted yet"
    run.seal(1, ready, ALL)
    assert run.owner(0).store.heads([own]) == {own: ready[VICTIM]}
    reply = as_far_as_keys(homes, plan).rosters[0]
    assert set(reply.heads) == {run.print_(index) for index in (1, 2, 3)}
    assert all(len(signed.to_bytes()) <= 600 for signed in reply.heads.values())


def test_peers_keep_heads_sealed(homes: Homes, plan: Plan) -> None:
    spend(homes, plan)
    stored = b"".join(
        path.read_bytes() for path in homes.peer_folder.glob(f"{STATE}*") if not path.name.endswith("-shm")
    )
    own = homes.hostile.owners[VICTIM]
    assert own.ledger.head().head.encode() not in stored
    assert homes.hostile.owners[0].store.heads([own.fingerprint])


def test_the_real_coordinator_goes_on_without_the_owner_that_was_put_back(
    put_back: Homes, make_plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.strategy, "_RETRY_PAUSE_S", 0.0)
    plan = make_plan(run={"rounds": 1, "spare_attempts": 2}, cohort={"minimum": 3, "maximum": 4})
    owners = put_back.hostile.owners
    grid = LocalGrid({FIRST_NODE + index: app for index, app in enumerate(put_back.hostile.apps)})
    store = RunStore(tmp_path / "run")
    store.set("plan", plan.fields())
    try:
        run_plan(grid, store, owners[0].trust)
    except FedsealError as error:
        pytest.fail(error.explain())
    assert store.get("state") == "finished"
    assert OUTRUN in {refusal["code"] for refusal in store.refusals()}
    (attempt,) = [one for one in store.attempts() if not one["void"]]
    assert sorted(attempt["contributors"]) == sorted(owners[index].fingerprint for index in (0, 1, 3))
    store.close()
