"""Where secrets live: key files of the coordinator and of owners, looked at by whoever holds them.

Only names, access bits and whether a file is encrypted are reported; no secret, no path and no passphrase.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

from audit.collecting.markers import Marker, Search, secret
from audit.evidence.run import KeyCustody
from client.owner import IDENTITY, STATE, Owner
from client.state import RunState
from crypto.vault import is_sealed
from server.home import OPERATOR
from server.release import PRIVATE

_COORDINATOR_KEYS = (
    ("TLS key", f"{IDENTITY}/server.key.sealed"),
    ("release signing key", PRIVATE),
    ("key of this machine's operator", f"{OPERATOR}/operator.key.sealed"),
)
_OWNER_KEYS = (
    ("transport key", f"{IDENTITY}/transport.key.sealed"),
    ("signing key", f"{IDENTITY}/signing.key.sealed"),
)


def coordinator_custody(home: Path) -> list[KeyCustody]:
    """Look at the coordinator's own key files; owners' keys are out of its sight, as they must be."""
    return list(_files(home, "coordinator", _COORDINATOR_KEYS))


def owner_custody(home: Path, owner: Owner) -> list[KeyCustody]:
    """Look at an owner's own secrets. For that owner only.

    That the state database is encrypted is tried: its keys are opened with the owner's passphrase, and
    looked for in the bytes of its files.

    Args:
        home: The owner's home.
        owner: The same, opened.
    """
    database = home / STATE
    files = [file for file in database.parent.glob(f"{database.name}*") if file.is_file()]
    plain = Search(list(_session_secrets(owner)))
    state = KeyCustody(
        what="encryption and mask keys of runs, in the state database",
        holder=owner.name,
        place="sealed file",
        mode=_mode(database),
        encrypted_at_rest=not any(plain.in_bytes(file.read_bytes()).found for file in files),
    )
    passphrase = KeyCustody(
        what="storage key, derived from the passphrase while the node runs",
        holder=owner.name,
        place="memory",
        mode=None,
        encrypted_at_rest=False,
    )
    return [*_files(home, owner.name, _OWNER_KEYS), state, passphrase]


def _files(home: Path, holder: str, files: tuple[tuple[str, str], ...]) -> Iterator[KeyCustody]:
    for what, name in files:
        path = home / name
        if path.exists():
            yield KeyCustody(
                what=what,
                holder=holder,
                place="sealed file",
                mode=_mode(path),
                encrypted_at_rest=is_sealed(path),
            )


def _mode(path: Path) -> str:
    return f"{stat.S_IMODE(path.stat().st_mode) & 0o777:04o}"


def _session_secrets(owner: Owner) -> Iterator[Marker]:
    """Yield what the state database must not hold in plain: the secrets of all runs."""
    for record in owner.ledger.records():
        state = owner.store.find(record.body["run"]) if record.body["kind"] == "open_run" else None
        for index, key in enumerate(() if state is None else _keys_of(state)):
            yield secret(f"{record.sequence}/{index}", key)


def _keys_of(state: RunState) -> list[bytes]:
    lone = [key for key in (state.bfv_key, state.hpke_secret) if key is not None]
    return [*lone, *state.halves.values(), *state.chain_keys.values()]
