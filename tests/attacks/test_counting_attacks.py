"""What an owner's answers say of how many records it has, and of the generators of its libraries."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import HostileFederation, HostileRun

from client.owner import open_owner
from protocol.plan import Plan
from scenarios.federation import PolicySettings, make_federation
from tasks.partition import digits

COUNTS = (60, 61, 1, 60)
SETTINGS = PolicySettings(epsilon_total=1e6, epsilon_per_run=50.0, delta_total=0.5)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostileFederation]:
    splits, _ = digits(seed=0, owners=len(COUNTS))
    some = [(x[:count], y[:count]) for (x, y), count in zip(splits, COUNTS, strict=True)]
    folder: Path = tmp_path_factory.mktemp("uneven") / "federation"
    made = make_federation(folder, some, SETTINGS)
    hostile = HostileFederation([open_owner(home.folder, home.passphrase) for home in made.owners])
    yield hostile
    for owner in hostile.owners:
        owner.close()


def test_the_length_of_no_answer_depends_on_the_number_of_records(
    uneven: HostileFederation, plan: Plan
) -> None:
    run = uneven.run(plan).established()
    request, lengths = run.fit_request(1), dict[str, set[tuple[int, int]]]()
    for index in run.indices:
        answered = uneven.accepted(index, "train.fit", request)
        lengths.setdefault("fit", set()).add((len(answered.body), len(answered.blob)))
    # asked again, owners give the same answer
    ready = run.fit(1)
    request_seal = run.seal_request(1, ready)
    for index in run.indices:
        answered = uneven.accepted(index, "train.seal", request_seal)
        lengths.setdefault("seal", set()).add((len(answered.body), len(answered.blob)))
    assert {kind: len(found) for kind, found in lengths.items()} == {"fit": 1, "seal": 1}


def test_the_seeds_of_libraries_decide_nothing(session: HostileRun) -> None:
    """The same model and records twice, with all generators seeded alike: other noise, other batches."""
    updates = []
    for attempt in (1, 2):
        torch.manual_seed(42)
        np.random.seed(42)
        session.fit(attempt)
        pending = session.owner(session.indices[0]).pending[session.run]
        updates.append(pending.update.copy())
    assert not np.any(updates[0] == updates[1])
    assert abs(np.corrcoef(updates[0], updates[1])[0, 1]) < 0.9
