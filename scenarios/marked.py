"""Owners of a laboratory: made-up records, and markers in everything that must not leave an owner.

Planted are neighbouring pixels of every record, names of people, files, folders and datasets, and update
values on the quantization grid, whose integers are therefore known. Noted besides are what really exists:
prepared inputs, the trained update, passphrases, signing and transport keys, and the session's encryption
and mask keys.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import tomli_w
from flwr.app import Context
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from audit.collecting.markers import Marker, integers, numbers, secret, words
from client.app import make_app
from client.owner import POLICY, Owner, open_owner, read_policy
from crypto.presets import Packing, packing_for
from crypto.vault import write_private
from protocol.plan import Plan
from scenarios.federation import Federation, OwnerHome, make_federation
from scenarios.simulate import policy_for
from tasks.registry import task_for

FIRST_NODE: Final = 100
ROWS: Final = 48
"""Records of each owner: enough to train on, few enough to be quick."""

MOST_OWNERS: Final = 5
"""A cohort that may be larger is played by its minimum of owners."""

_RUN: Final = 6
_PLANTED: Final = 16
_LABELS = ("hiv-positive", "bankruptcy", "dementia", "addiction", "miscarriage")
_NAMES = ("Wilhelmine Fahrenkrog", "Anselm Oberhuber", "Hedwig Zschiesche", "Ottokar Przybilla")


@dataclass
class MarkedOwner:
    """One owner and what must not be found of it.

    Attributes:
        owner: Open.
        app: Answers the coordinator's messages.
        markers: What was planted or noted so far.
        update: Plain values of the update that it sealed last, from the first planted one on.
    """

    owner: Owner
    app: ClientApp
    markers: list[Marker]
    update: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def plant(self, plan: Plan, run: str) -> None:
        """Plant values in the update that waits to be sealed, and note what is there besides.

        Args:
            plan: The run's plan.
            run: The run's identifier.
        """
        pending = self.owner.pending.get(run)
        if pending is None or pending.purpose != "train":
            return
        packing = packing_for(plan.encryption.preset, plan.cohort.maximum)
        levels, values = _grid_values(packing, min(_PLANTED, pending.update.size // 2))
        pending.update[: values.size] = values * plan.update_range / packing.half_levels
        self.update = pending.update.copy()
        label = f"{self.owner.name}, run {run[:16]}, attempt {pending.attempt}"
        trained = _distinct(self.update[values.size :])
        self.markers.append(numbers(f"{label}: planted update values", self.update[: values.size]))
        self.markers.append(integers(f"{label}: planted quantized values", levels))
        if trained.size == _RUN:
            self.markers.append(numbers(f"{label}: trained update values", trained))
        self._note_keys(label, run)

    def _note_keys(self, label: str, run: str) -> None:
        state = self.owner.store.find(run)
        if state is None:
            return
        if state.bfv_key is not None:
            self.markers.append(secret(f"{label}: encryption key", state.bfv_key))
        for peer, key in state.chain_keys.items():
            self.markers.append(secret(f"{label}: mask key shared with {peer[:16]}", key))


@dataclass
class Marked:
    """A made-up federation with markers.

    Attributes:
        plan: Resolved.
        federation: Homes and passphrases.
        owners: The open owners, by node id.
    """

    plan: Plan
    federation: Federation
    owners: dict[int, MarkedOwner]

    def markers(self) -> list[Marker]:
        """Return everything that was planted or noted so far."""
        return [marker for owner in self.owners.values() for marker in owner.markers]

    def close(self) -> None:
        """Release files."""
        for marked in self.owners.values():
            marked.owner.close()


def make_marked(plan: Plan, folder: Path) -> Marked:
    """Make a federation for a plan, whose records are drawn at random from the task's description.

    Args:
        plan: Resolved.
        folder: New or empty.

    Raises:
        PlanInvalid: The task's examples have fewer than two values.
    """
    count = plan.cohort.maximum if plan.cohort.maximum <= MOST_OWNERS else plan.cohort.minimum
    generator = np.random.default_rng(secrets.randbits(128))
    shards = [_records(plan, generator) for _ in range(count)]
    federation = make_federation(folder, shards, policy_for(plan))
    owners = {}
    for node, (home, shard) in enumerate(zip(federation.owners, shards, strict=True), start=FIRST_NODE):
        markers = [_hide_names(home, node - FIRST_NODE, *shard), *_raw(home.name, plan, *shard)]
        owner = open_owner(home.folder, home.passphrase)
        markers += _secrets(home, owner)
        owners[node] = MarkedOwner(owner, make_app(partial(_fixed, owner)), markers)
    return Marked(plan, federation, owners)


def _fixed(owner: Owner, _context: Context) -> Owner:
    return owner


def _records(plan: Plan, generator: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    low, high = plan.task.value_range
    shape = (ROWS, *plan.task.input_shape)
    x = (low + (high - low) * generator.uniform(0.05, 0.95, shape)).astype(np.float32)
    flat = x.reshape(ROWS, -1)
    flat[:, :_RUN] = flat[0, :_RUN]
    return x, generator.integers(0, plan.task.classes, ROWS)


def _raw(name: str, plan: Plan, x: NDArray[np.float32], y: NDArray[np.int64]) -> list[Marker]:
    """Return markers for pixels as they are stored, and for inputs as the model takes them."""
    pixels = [numbers(f"{name}: pixels of every record", x.reshape(ROWS, -1)[0, :_RUN])]
    inputs = _distinct(task_for(plan).check(x[:1], y[:1]).x.reshape(-1))
    return pixels + ([numbers(f"{name}: prepared inputs", inputs)] if inputs.size == _RUN else [])


def _hide_names(home: OwnerHome, index: int, x: NDArray[Any], y: NDArray[Any]) -> Marker:
    """Let the owner's folder, file, dataset and file content have names that tell something."""
    tag, label = secrets.token_hex(4), _LABELS[index % len(_LABELS)]
    person = f"{_NAMES[index % len(_NAMES)]} {tag}"
    folder, file, dataset = f"ward-{label}-{tag}", f"patients-{tag}.npz", f"cohort-{label}-{tag}"
    (home.folder / folder).mkdir(mode=0o700)
    (home.folder / "data.npz").unlink()
    with (home.folder / folder / file).open("wb") as stream:
        np.savez(stream, x=x, y=y, names=np.array([person] * len(y)))
    fields = read_policy(home.folder).model_dump(mode="json", exclude_none=True)
    fields |= {"data_file": f"{folder}/{file}", "dataset": dataset}
    write_private(home.folder / POLICY, tomli_w.dumps(fields).encode())
    names = f"{home.name}: names of a person, a file, a folder and a dataset"
    return words(names, person, folder, file, dataset)


def _secrets(home: OwnerHome, owner: Owner) -> list[Marker]:
    keys = owner.credentials
    transport = keys.transport_key.private_numbers().private_value.to_bytes(48, "big")
    return [
        secret(f"{home.name}: passphrase", home.passphrase),
        secret(f"{home.name}: signing key", keys.signing_key.private_bytes_raw()),
        secret(f"{home.name}: transport key", transport),
    ]


def _grid_values(packing: Packing, count: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Draw different levels of the grid, small beside its range: as quantized integers, and signed."""
    reach = max(2, packing.half_levels // 8)
    drawn = [secrets.randbelow(2 * reach) - reach or 1 for _ in range(count)]
    signed = np.array(drawn, dtype=np.int64)
    return signed + packing.half_levels, signed.astype(np.float64)


def _distinct(values: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Return the first run of neighbours that are all different and not zero; nothing if there is none."""
    for start in range(0, max(0, values.size - _RUN), _RUN):
        run = values[start : start + _RUN]
        if np.all(run != 0) and np.unique(run).size == _RUN:
            return run
    return values[:0]
