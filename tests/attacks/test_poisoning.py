"""What one owner can do to the mean: as much as the range over the number of contributors, and no more."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile import HostileFederation, nothing_released

from crypto.packing import mean_update, quantize
from crypto.presets import packing_for
from deploy.export import require_self_contained
from protocol.errors import CheckpointInvalid, CompressionRefused, DataInvalid, EncodingInvalid
from protocol.plan import Plan
from protocol.records import from_record
from server.store import RunStore
from tasks.registry import task_for

RANGE, VALUES = 0.25, 500


@pytest.mark.parametrize("owners", [3, 8])
@pytest.mark.parametrize("poison", [1e3, -1e3, 1e300, -1e300, RANGE])
def test_one_owner_moves_the_mean_by_its_share_of_the_range(owners: int, poison: float) -> None:
    """The honest pipeline: an update of any size is clamped before it is sealed."""
    rng, packing = np.random.default_rng(0), packing_for("exact16", owners)
    honest = [rng.uniform(-RANGE, RANGE, VALUES) for _ in range(owners)]

    def mean(updates: list[Any]) -> Any:
        sums = sum(quantize(one, RANGE, packing, np.full(VALUES, 0.5)).astype(np.uint64) for one in updates)
        return mean_update(sums, owners, RANGE, packing)

    shift = mean([np.full(VALUES, poison), *honest[1:]]) - mean(honest)
    assert np.max(np.abs(shift)) <= 2 * RANGE / owners + 1e-9


def test_a_thousandfold_update_that_skips_the_clamp_does_not_open(
    federation: HostileFederation, plan: Plan
) -> None:
    """A bought owner packs fields beyond the range by hand; the sum is refused by every honest owner."""
    run = federation.run(plan).established()
    ready = run.fit(1)
    chains = dict(run.state(1).chain_keys)
    sealed = run.seal(1, ready, run.indices)
    packing = run.packing()
    fields = np.zeros((1, packing.preset.slots), dtype=np.uint64)
    fields[:, :] = (packing.radix - 1) * packing.radix  # the largest high digit that a slot holds
    evil = run.sealed_by_hand(1, sealed[1].header, chains, fields)
    request, blob = run.open_request(1, ready, {**sealed, 1: evil})
    with nothing_released(run):
        for index in (0, 2, 3):
            assert run.federation.refused(index, "query.open", request, blob) == "FS-ROUND-03"


# --- files that would run code -----------------------------------------------------------------------


class Bomb:
    """Unpickling this writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.target, "executed"))


def test_a_pickle_runs_nowhere(plan: Plan, tmp_path: Path) -> None:
    """As a data file, as an array inside one, as a checkpoint, and as an array of a message."""
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    target = tmp_path / "executed"
    bomb = pickle.dumps(Bomb(target))
    pickle.loads(pickle.dumps(1))
    (tmp_path / "data.npz").write_bytes(bomb)
    np.savez(tmp_path / "objects.npz", x=np.array([Bomb(target)], dtype=object), y=np.zeros(1, np.int64))
    for name in ("data.npz", "objects.npz"):
        with pytest.raises(DataInvalid):
            task_for(plan).read_private(tmp_path / name)
    store = RunStore(tmp_path / "run")
    (tmp_path / "run" / "checkpoint-0001.safetensors").write_bytes(bomb)
    with pytest.raises(CheckpointInvalid):
        store.read_checkpoint(1)
    store.close()
    array = Array("uint8", (len(bomb),), "numpy.ndarray", bomb)
    record = RecordDict(
        {"fedseal": ConfigRecord({"body": b"{}"}), "fedseal-blob": ArrayRecord({"blob": array})}
    )
    with pytest.raises(EncodingInvalid):
        from_record(record)
    with pytest.raises(CompressionRefused):
        require_self_contained(bomb)
    assert not target.exists()
    pickle.loads(bomb)
    assert target.exists(), "the attack itself must work"
