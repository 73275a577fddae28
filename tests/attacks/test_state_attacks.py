"""The thief of a disk: what an owner's home and the coordinator's folder give away."""

from __future__ import annotations

import base64
import secrets
import shutil
import sqlite3
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hostile import HostileFederation, HostileRun, answers

import server.strategy
from client import contribution, rounds
from client.following import opened_mean
from client.owner import SALT, STATE, open_owner
from client.store import StateStore
from crypto.presets import packing_for
from crypto.trust import load_trust
from crypto.vault import StorageBox, storage_key
from protocol.encoding import encode
from protocol.errors import FileDamaged, SecretUnavailable
from protocol.optimizers import apply_update
from protocol.plan import Plan
from scenarios.federation import Federation, PolicySettings, make_federation
from server.app import run_plan
from server.store import RunStore
from tasks.partition import digits

SETTINGS = PolicySettings(epsilon_total=1e6, epsilon_per_run=50.0, delta_total=0.5)
MARKER = "patient-4711-has-a-marker"


@dataclass
class Homes:
    """A federation of three owners whose folders a test may read."""

    made: Federation
    hostile: HostileFederation
    folders: list[Path]
    passphrases: list[bytes]


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Homes]:
    splits, _ = digits(seed=1, owners=3)
    few = [(x[:60], y[:60]) for x, y in splits]
    made = make_federation(tmp_path_factory.mktemp("stolen") / "federation", few, SETTINGS)
    by_print = sorted(made.owners, key=lambda home: home.fingerprint)
    hostile = HostileFederation([open_owner(home.folder, home.passphrase) for home in by_print])
    yield Homes(made, hostile, [home.folder for home in by_print], [home.passphrase for home in by_print])
    for owner in hostile.owners:
        owner.close()


def three(homes: Homes, plan: Plan) -> HostileRun:
    return homes.hostile.run(plan, (0, 1, 2))


def content(folder: Path) -> bytes:
    """Return the bytes of all files below a folder, write-ahead logs included."""
    return b"\0".join(file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file())


def spellings(secret: bytes) -> list[bytes]:
    """Return how a secret could stand in a file; a third of it is enough to recognize it."""
    part = secret[len(secret) // 3 : len(secret) // 3 + 24]
    texts = [base64.b64encode(secret)[8:40], part.hex().encode(), part.hex().upper().encode()]
    return [part, *texts]


def secrets_of(run: HostileRun, index: int) -> dict[str, bytes]:
    state, key = run.state(index), run.owner(index).credentials
    raw = (Encoding.Raw, PrivateFormat.Raw, NoEncryption())
    number = key.transport_key.private_numbers().private_value
    held = {
        "signing key": key.signing_key.private_bytes(*raw),
        "transport key": number.to_bytes(48, "big"),
        "one-time key": bytes(state.hpke_secret or b""),
        "encryption key": bytes(state.bfv_key or b""),
    }
    held |= {f"half {peer}": bytes(half) for peer, half in state.halves.items()}
    held |= {f"chain {peer}": bytes(chain) for peer, chain in state.chain_keys.items()}
    return {name: secret for name, secret in held.items() if secret}


def readable(held: dict[str, bytes], stolen: bytes) -> list[str]:
    return [name for name, secret in held.items() if any(text in stolen for text in spellings(secret))]


def test_no_key_can_be_read_from_an_owners_disk_at_any_stage(homes: Homes, plan: Plan) -> None:
    run = three(homes, plan)
    ready: list[Any] = []
    for step in (run.join, run.roster, run.keys, lambda: ready.extend(run.fit(1)), None):
        if step is None:
            run.seal(1, ready, run.indices)
        else:
            step()
        for index in run.indices:
            held = secrets_of(run, index)
            assert {"signing key", "transport key"} < held.keys()
            assert readable(held, content(homes.folders[index])) == []
    kinds = {name.split()[0] for name in secrets_of(run, 0)}
    assert kinds == {"signing", "transport", "encryption", "chain"}


def test_the_search_above_finds_what_is_there(homes: Homes, tmp_path: Path) -> None:
    secret = secrets.token_bytes(96)
    for spelled in (secret, base64.b64encode(secret), secret.hex().encode()):
        (tmp_path / "file").write_bytes(b"before" + spelled + b"after")
        assert readable({"key": secret}, content(tmp_path)) == ["key"]


def test_a_stolen_home_does_not_open_without_the_passphrase(homes: Homes, tmp_path: Path) -> None:
    shutil.copytree(homes.folders[0], tmp_path / "stolen")
    with pytest.raises(SecretUnavailable):
        open_owner(tmp_path / "stolen", b"guessed")


def test_a_state_that_stands_under_another_run_is_refused(homes: Homes, plan: Plan) -> None:
    """Whoever writes to the disk of a running node puts one run's sealed state in another one's place."""
    first, second = (three(homes, plan).established() for _ in range(2))
    store, names = first.owner(0).store, [run.state(0).run for run in (first, second)]
    rows = "SELECT state FROM runs WHERE run = ?"
    kept = [store._database.execute(rows, (name,)).fetchone()[0] for name in names]
    # the state at hand is the second one's, and its own bytes must not pass for the first one's
    assert store.find(names[1]) is not None
    write = "UPDATE runs SET state = ? WHERE run = ?"
    store._database.execute(write, (kept[1], names[0]))
    with pytest.raises(FileDamaged):
        store.find(names[0])
    store._database.execute(write, (kept[0], names[0]))
    assert store.find(names[0]) == first.state(0)
    # a change on disk counts, whatever is at hand
    store._database.execute(write, (kept[0][:-1] + bytes([kept[0][-1] ^ 1]), names[0]))
    with pytest.raises(FileDamaged):
        store.find(names[0])
    store._database.execute(write, (kept[0], names[0]))


def test_members_of_another_moment_beside_a_state_are_refused(
    homes: Homes, plan: Plan, tmp_path: Path
) -> None:
    """Whoever writes to the disk of a stopped node puts the members' row of another state back."""
    run = three(homes, plan)
    run.join()
    early = content_of_members(run)
    run.roster()
    state, late = run.state(0), content_of_members(run)
    assert state.members
    assert early != late
    changed = late[:-1] + bytes([late[-1] ^ 1])
    for row, opens in ((late, True), (early, False), (changed, False), (None, False)):
        with copied(homes, 0, tmp_path) as store:
            if row is None:
                store._database.execute("DELETE FROM members")
            else:
                store._database.execute("UPDATE members SET content = ? WHERE run = ?", (row, run.run))
            if opens:
                assert store.find(run.run) == state
            else:
                with pytest.raises(FileDamaged):
                    store.find(run.run)


def content_of_members(run: HostileRun) -> bytes:
    rows = "SELECT content FROM members WHERE run = ?"
    return bytes(run.owner(0).store._database.execute(rows, (run.run,)).fetchone()[0])


@contextmanager
def copied(homes: Homes, index: int, folder: Path) -> Iterator[StateStore]:
    """Open a copy of an owner's database, as after a restart."""
    folder = Path(tempfile.mkdtemp(dir=folder))
    with sqlite3.connect(homes.folders[index] / STATE) as origin:
        origin.execute("VACUUM INTO ?", (str(folder / STATE),))
    box = StorageBox(storage_key(homes.folders[index] / SALT, homes.passphrases[index]))
    store = StateStore(folder / STATE, box)
    try:
        yield store
    finally:
        store.close()


def test_a_state_of_an_earlier_version_opens_and_is_kept_in_two_rows(
    homes: Homes, plan: Plan, tmp_path: Path
) -> None:
    run = three(homes, plan).established()
    state, context = run.state(0), b"state/" + run.run.encode()
    with copied(homes, 0, tmp_path) as store:
        old = store._box.seal(encode(state.model_dump(mode="json")), context)
        store._database.execute("UPDATE runs SET state = ? WHERE run = ?", (old, run.run))
        store._database.execute("DELETE FROM members")
        assert store.find(run.run) == state
        store.save(state)
        assert store._database.execute("SELECT COUNT(*) FROM members").fetchone() == (1,)
        assert store.find(run.run) == state
        store._newest = None  # as after a restart
        assert store.find(run.run) == state


def test_an_unsealed_update_is_nowhere_on_disk(homes: Homes, plan: Plan) -> None:
    run = three(homes, plan)
    run.established().fit(1)
    for index in run.indices:
        pending = run.owner(index).pending.get(run.run)
        assert pending is not None
        assert pending.update[100:104].tobytes() not in content(homes.folders[index])


def stolen_states(homes: Homes, index: int, run: str, folder: Path) -> list[Any]:
    """Return every state of a run that a thief with the passphrase finds in a copy of the disk.

    SQLite accepts any prefix of a write-ahead log that ends with a commit, so the thief cuts the log.
    """
    home = homes.folders[index]
    box = StorageBox(storage_key(home / SALT, homes.passphrases[index]))
    log = (home / f"{STATE}-wal").read_bytes() if (home / f"{STATE}-wal").exists() else b""
    page = struct.unpack(">I", log[8:12])[0] if log else 4096
    ends = [0] + [
        end + 24 + page
        for end in range(32, len(log) - page - 23, 24 + page)
        if struct.unpack(">I", log[end + 4 : end + 8])[0]
    ]
    states = []
    for number, end in enumerate(ends):
        copy = folder / f"{index}-{number}"
        copy.mkdir()
        shutil.copy(home / STATE, copy / STATE)
        (copy / f"{STATE}-wal").write_bytes(log[:end])
        store = StateStore(copy / STATE, box)
        try:
            state = store.find(run)
        except sqlite3.Error:
            state = None
        store.close()
        if state is not None:
            states.append(state)
    return states


def test_a_thief_with_the_passphrase_finds_no_masks_of_sealed_attempts(
    homes: Homes, plan: Plan, tmp_path: Path
) -> None:
    """The newest state holds a later chain key only, from which there is no way back."""
    run = three(homes, plan).established()
    old = run.state(2).chain_keys
    run.sealed_attempt(1)
    state = run.state(2)
    assert state.chain_attempt == 2
    assert not set(state.chain_keys.values()) & set(old.values())
    found = stolen_states(homes, 2, run.run, tmp_path)
    assert found, "the attack itself must work"


def test_a_thief_with_the_passphrase_finds_no_erased_key_in_the_log(
    homes: Homes, plan: Plan, tmp_path: Path
) -> None:
    run = three(homes, plan).established()
    run.sealed_attempt(1)
    found = stolen_states(homes, 2, run.run, tmp_path)
    assert not any(state.hpke_secret or state.halves for state in found), "keys of joining"
    assert not any(state.chain_attempt < 2 and state.chain_keys for state in found), "masks of attempt 1"


def test_close_erases_all_keys_of_the_session(homes: Homes, plan: Plan) -> None:
    run = three(homes, plan).established()
    openings, sums = run.finished_round(1)
    mean = opened_mean(plan, np.frombuffer(sums, "<u4").astype(np.uint64), 3)
    final = apply_update(run.model(0), mean, plan.server_optimizer).sha256()
    run.close(2, [openings], sums, final)
    state = run.state(2)
    assert (state.stage, state.chain_keys, state.bfv_key) == ("closed", {}, None)
    assert (state.hpke_secret, state.halves) == (None, {})
    request, code = run.fit_request(2), "FS-ROSTER-02"
    assert run.federation.refused(2, "train.fit", request) == code
    assert run.federation.refused(2, "query.keys", run.keys_request(2).model_copy(update={"key": None}))


def test_answers_on_disk_are_frames_and_sums_only(homes: Homes, plan: Plan) -> None:
    run = three(homes, plan).established()
    ready = run.fit(1)
    pending = run.owner(2).pending.get(run.run)
    assert pending is not None
    update = pending.update.copy()
    run.seal(1, ready, [2])
    stored = b"".join(part for row in answers(run.owner(2), run.run) for part in row[2:])
    for shape in (update, update.astype(np.float32), update.astype("<u4"), update.astype("<u8")):
        assert shape[90:94].tobytes() not in stored


# --- the coordinator's folder ------------------------------------------------------------------------


def test_the_coordinators_folder_holds_no_secret_and_no_update(
    homes: Homes, make_plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole run by the real coordinator; every update and every key is looked for in its folder."""
    monkeypatch.setattr(server.strategy, "_RETRY_PAUSE_S", 0.0)
    updates, held = [], dict[str, bytes]()
    honest_update, honest_seal = contribution.local_update, rounds.seal_frames

    def watched_update(*arguments: Any) -> Any:
        if len(updates) == 4:
            raise RuntimeError(MARKER)
        updates.append(honest_update(*arguments).copy())
        return updates[-1].copy()

    def watched_seal(update: Any, update_range: float, uniforms: Any, masks: Any, key: Any) -> Any:
        held["encryption key"] = key.residues()
        return honest_seal(update, update_range, uniforms, masks, key)

    monkeypatch.setattr(contribution, "local_update", watched_update)
    monkeypatch.setattr(rounds, "seal_frames", watched_seal)
    plan = make_plan(cohort={"minimum": 3, "maximum": 3}, run={"rounds": 1, "spare_attempts": 4})
    store = RunStore(tmp_path / "run")
    store.set("plan", plan.fields())
    homes.hostile.run(plan, ())
    run_plan(homes.hostile.grid, store, load_trust(homes.made.server_home / "identity"))
    assert store.get("state") == "finished"
    stolen = content(tmp_path / "run") + content(homes.made.server_home)
    store.close()
    for owner in homes.hostile.owners:
        raw = (Encoding.Raw, PrivateFormat.Raw, NoEncryption())
        held[owner.name] = owner.credentials.signing_key.private_bytes(*raw)
    assert readable(held, stolen) == []
    assert MARKER.encode() not in stolen
    assert len(updates) >= 3
    levels = packing_for("exact16", 3).half_levels / plan.update_range
    for update in updates:
        grid = np.rint(update * levels)
        for shape in (update, update.astype(np.float32), grid.astype("<i4"), grid.astype("<i8")):
            assert shape[90:94].tobytes() not in stolen
