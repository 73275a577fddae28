"""An owner changes its policy or its data while its node runs: what it decided holds at once.

The coordinator goes on as if nothing had happened; the owner's real app answers it.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.owner import POLICY, Owner, open_owner
from client.sources import SETTLED_S
from protocol.messages import JoinRequest
from protocol.plan import Plan
from scenarios.federation import DATA, Federation, PolicySettings, make_federation
from tasks.partition import digits, write_examples
from tasks.resolve import resolve
from tests.attacks.hostile import HostileFederation, HostileRun

OWNER = 1
PLAN = {
    "run": {"name": "changed", "rounds": 4, "spare_attempts": 4},
    "task": {
        "name": "image-classification",
        "input_shape": [8, 8],
        "value_range": [0.0, 16.0],
        "classes": 10,
    },
    "model": {"name": "linear"},
    "cohort": {"minimum": 3, "maximum": 5},
    "training": {"local_steps": 1, "learning_rate": 0.5},
    "privacy": {
        "target_epsilon": 8.0,
        "delta": 1e-6,
        "sample_rate": 0.5,
        "expected_batch_size": 100.0,
    },
    "encryption": {"preset": "exact16", "quorum": 2},
}


@pytest.fixture(scope="module")
def plan() -> Plan:
    return resolve(Plan.from_fields(PLAN))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    splits, _ = digits(seed=0, owners=4)
    few = [(x[:40], y[:40]) for x, y in splits]
    settings = PolicySettings(epsilon_total=1e6, epsilon_per_run=50.0, delta_total=0.5)
    return make_federation(tmp_path_factory.mktemp("changed") / "made", few, settings)


@pytest.fixture
def hostile(made: Federation, tmp_path: Path) -> Iterator[HostileFederation]:
    """Owners with copies of the homes, which each test may change."""
    copies = [(shutil.copytree(home.folder, tmp_path / home.name), home.passphrase) for home in made.owners]
    hostile = HostileFederation([open_owner(*copy) for copy in copies])
    yield hostile
    for owner in hostile.owners:
        owner.close()


@pytest.fixture
def owner(hostile: HostileFederation) -> Owner:
    return hostile.owners[OWNER]


def edit(owner: Owner, old: str, new: str) -> None:
    """Change the policy's text, in place, as an editor does."""
    file = owner.home / POLICY
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


def records(owner: Owner) -> Path:
    return owner.home / DATA


def charged(owner: Owner) -> list[str]:
    return [str(record.body["kind"]) for record in owner.ledger.records()]


def refused_join(hostile: HostileFederation, plan: Plan) -> str:
    run = hostile.run(plan)
    return hostile.refused(OWNER, "query.join", JoinRequest(run=run.run, plan=plan.fields()))


def refused_fit(session: HostileRun, attempt: int = 1) -> str:
    return session.federation.refused(OWNER, "train.fit", session.fit_request(attempt))


# --- a changed policy --------------------------------------------------------------------------------


def test_a_policy_that_forbids_the_model_refuses_the_next_join(
    hostile: HostileFederation, owner: Owner, plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    hostile.run(plan).established()
    edit(owner, '"linear",', "")
    with caplog.at_level(logging.INFO, "fedseal.client"):
        assert refused_join(hostile, plan) == "FS-POLICY-02"
    assert "policy.toml changed" in caplog.text
    edit(owner, '"mlp",', '"linear", "mlp",')
    hostile.run(plan).established()


def test_a_repeated_join_is_not_answered_from_memory_when_the_policy_forbids_it(
    hostile: HostileFederation, owner: Owner, plan: Plan
) -> None:
    request = JoinRequest(run=hostile.run(plan).run, plan=plan.fields())
    first = hostile.accepted(OWNER, "query.join", request)
    assert hostile.accepted(OWNER, "query.join", request).body == first.body
    edit(owner, '"linear",', "")
    assert hostile.refused(OWNER, "query.join", request) == "FS-POLICY-02"


def test_a_running_run_is_left_before_anything_is_reserved(
    hostile: HostileFederation, owner: Owner, plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    session = hostile.run(plan).established()
    before = charged(owner)
    edit(owner, '"linear",', "")
    assert refused_fit(session) == "FS-POLICY-03"
    assert charged(owner) == before
    assert not owner.pending
    assert "plans.models does not hold 'linear'" in caplog.text
    edit(owner, '"mlp",', '"linear", "mlp",')
    session.fit(2, [OWNER])
    assert charged(owner) == [*before, "reserve"]


def test_what_was_trained_and_not_sealed_is_given_up_and_refunded(
    hostile: HostileFederation, owner: Owner, plan: Plan
) -> None:
    session = hostile.run(plan).established()
    session.fit(1, [OWNER])
    edit(owner, '"linear",', "")
    assert refused_fit(session, 2) == "FS-POLICY-03"
    assert not owner.pending
    assert charged(owner)[-2:] == ["reserve", "void"]


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("epsilon_per_run = 50.0", "epsilon_per_run = 7.0", "FS-POLICY-03"),
        ("delta_total = 0.5", "delta_total = 1e-7", "FS-POLICY-03"),
        ("min_known_peers = 2", "min_known_peers = 3", "FS-POLICY-03"),
        ("epsilon_total = 1000000.0", "epsilon_total = 50.0", None),
    ],
)
def test_a_tighter_cap_holds_from_the_next_reservation_on(
    hostile: HostileFederation, owner: Owner, plan: Plan, old: str, new: str, code: str | None
) -> None:
    session = hostile.run(plan).established()
    edit(owner, old, new)
    if code is None:
        session.fit(1, [OWNER])
    else:
        assert refused_fit(session) == code


def test_a_cap_on_all_runs_stops_a_run_that_would_go_beyond_it(
    hostile: HostileFederation, owner: Owner, plan: Plan
) -> None:
    session = hostile.run(plan).established()
    session.fit(1, [OWNER])
    spent = owner.ledger.totals().epsilon
    edit(owner, "epsilon_per_run = 50.0", f"epsilon_per_run = {8.0}")
    edit(owner, "epsilon_total = 1000000.0", f"epsilon_total = {8.0}")
    session.fit(2, [OWNER])
    other = hostile.run(plan)
    request = JoinRequest(run=other.run, plan=plan.fields())
    assert spent > 0
    assert hostile.refused(OWNER, "query.join", request) == "FS-BUDGET-01"


@pytest.mark.parametrize(
    "break_it",
    [
        lambda file: file.unlink(),
        lambda file: file.write_text("dataset = "),
        lambda file: file.write_text(file.read_text() + "\n[budgets]\n"),
        lambda file: file.write_bytes(b""),
    ],
)
def test_a_policy_that_cannot_be_used_refuses_everything_and_names_the_cause_here_only(
    hostile: HostileFederation, owner: Owner, plan: Plan, break_it: Any, caplog: pytest.LogCaptureFixture
) -> None:
    session = hostile.run(plan).established()
    text = (owner.home / POLICY).read_text(encoding="utf-8")
    break_it(owner.home / POLICY)
    for _ in range(2):
        assert refused_join(hostile, plan) == "FS-POLICY-01"
        assert refused_fit(session) == "FS-POLICY-01"
    assert "why:" in caplog.text
    (owner.home / POLICY).write_text(text, encoding="utf-8")
    session.fit(1, [OWNER])


def test_another_name_of_the_dataset_needs_another_home(
    hostile: HostileFederation, owner: Owner, plan: Plan
) -> None:
    session = hostile.run(plan).established()
    edit(owner, f'dataset = "{owner.policy.dataset}"', 'dataset = "others"')
    for _ in range(2):
        assert refused_join(hostile, plan) == "FS-POLICY-04"
        assert refused_fit(session) == "FS-POLICY-04"


# --- changed data ------------------------------------------------------------------------------------


def trained_rows(owner: Owner, plan: Plan) -> int:
    return len(owner.examples(plan))


def test_withdrawn_data_is_dropped_and_refused_before_anything_is_reserved(
    hostile: HostileFederation, owner: Owner, plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    session = hostile.run(plan).established()
    assert owner.holds_rows()
    before = charged(owner)
    records(owner).rename(records(owner).with_suffix(".kept"))
    assert refused_fit(session) == "FS-DATA-03"
    assert not owner.holds_rows()
    assert refused_join(hostile, plan) == "FS-DATA-03"
    assert charged(owner) == before
    assert "the data file" in caplog.text
    records(owner).with_suffix(".kept").rename(records(owner))
    session.fit(2, [OWNER])


@pytest.mark.parametrize(
    "content", [b"", b"age,sex\n", b"PK\x03\x04"], ids=["emptied", "text", "no archive"]
)
def test_a_file_that_became_unreadable_is_refused_before_anything_is_reserved(
    hostile: HostileFederation, owner: Owner, plan: Plan, content: bytes
) -> None:
    session = hostile.run(plan).established()
    before = charged(owner)
    records(owner).write_bytes(content)
    assert refused_fit(session) == "FS-DATA-01"
    assert not owner.holds_rows()
    assert refused_join(hostile, plan) == "FS-DATA-01"
    assert charged(owner) == before


@pytest.mark.parametrize("how", ["replaced", "written over", "with the old time"])
def test_new_data_counts_from_the_next_round_on(
    hostile: HostileFederation, owner: Owner, plan: Plan, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    session = hostile.run(plan).established()
    assert trained_rows(owner, plan) == 40
    session.fit(1, [OWNER])
    file = records(owner)
    before = file.stat()
    x, y = np.ones((40, 8, 8), dtype=np.float32), np.zeros(40, dtype=np.int64)
    if how == "replaced":
        write_examples(file, x, y)
    else:
        copy = file.with_suffix(".new")
        write_examples(copy, x, y)
        content = copy.read_bytes()
        assert len(content) == before.st_size
        with file.open("r+b") as opened:
            opened.write(content)
        if how == "with the old time":
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with caplog.at_level(logging.INFO, "fedseal.client"):
        session.fit(2, [OWNER])
    assert not owner.examples(plan).y.any()
    assert "the data file changed" in caplog.text
    assert "40 rows: 40 kept" in caplog.text


def test_all_rows_taken_away_take_part_with_noise_alone(
    hostile: HostileFederation, owner: Owner, plan: Plan
) -> None:
    """A refusal would tell the coordinator that there is no row, which is a fact about records."""
    session = hostile.run(plan).established()
    write_examples(records(owner), np.zeros((0, 8, 8), np.float32), np.zeros(0, np.int64))
    session.fit(1, [OWNER])
    assert trained_rows(owner, plan) == 0
    hostile.run(plan).established()


def test_data_of_another_shape_is_refused_before_anything_is_reserved(
    hostile: HostileFederation, owner: Owner, plan: Plan
) -> None:
    session = hostile.run(plan).established()
    before = charged(owner)
    write_examples(records(owner), np.zeros((5, 7, 8), np.float32), np.zeros(5, np.int64))
    assert refused_fit(session) == "FS-DATA-01"
    assert charged(owner) == before


def test_another_data_file_in_the_policy_is_read(
    hostile: HostileFederation, owner: Owner, plan: Plan
) -> None:
    session = hostile.run(plan).established()
    write_examples(owner.home / "newer.npz", np.ones((7, 8, 8), np.float32), np.zeros(7, np.int64))
    edit(owner, f'data_file = "{DATA}"', 'data_file = "newer.npz"')
    session.fit(1, [OWNER])
    assert trained_rows(owner, plan) == 7


def test_files_that_did_not_change_are_not_read_again(
    hostile: HostileFederation, owner: Owner, plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    session = hostile.run(plan).established()
    kept = owner.examples(plan)
    (owner.home / POLICY).touch()
    records(owner).touch()
    assert SETTLED_S > 0
    with caplog.at_level(logging.INFO, "fedseal.client"):
        session.fit(1, [OWNER])
        hostile.run(plan).established()
    assert owner.examples(plan) is kept
    assert "changed" not in caplog.text


# --- what the owner is told --------------------------------------------------------------------------


def test_a_join_tells_the_owner_alone_how_many_rows_there_are(
    hostile: HostileFederation, owner: Owner, plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    x, y = np.full((6, 8, 8), 3.0, dtype=np.float32), np.array([0, 0, 1, 1, 10, 2])
    x[0, 0, 0], x[5, 0, 0] = np.nan, 17.0
    write_examples(records(owner), x, y)
    with caplog.at_level(logging.INFO, "fedseal.client"):
        hostile.run(plan).established()
    assert (
        "6 rows: 3 kept, 3 left out (1 not finite, 1 outside task.value_range, 1 label outside 0 .. "
        "task.classes - 1); classes 0: 33.3%, 1: 66.7%" in caplog.text
    )
    warned = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert [record.getMessage() for record in warned if "3 usable" in record.getMessage()] == [
        "3 usable rows are fewer than the plan's expected batch of 100: this owner's rounds would cost "
        "budget for almost nothing but noise; see docs/tasks.md"
    ]
    assert "open_run" in charged(owner)
    assert "reserve" not in charged(owner)


def test_a_node_tells_at_its_start_what_its_file_holds(
    owner: Owner, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fedseal.client"):
        owner.describe_data()
        owner.describe_data()
    assert caplog.text.count("40 rows: 40 kept, 0 left out; classes 0: ") == 1
    records(owner).unlink()
    caplog.clear()
    owner.describe_data()
    assert "FS-DATA-03" in caplog.text
