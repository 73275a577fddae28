"""Where secrets live: sealed and closed files are told from open ones, and nothing secret is told."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from audit.collecting.custody import coordinator_custody, owner_custody
from audit.evidence.run import KeyCustody
from client.owner import Owner, open_owner
from protocol.encoding import encode
from scenarios.federation import Federation, make_federation
from tasks.partition import digits


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    shards, _ = digits(seed=0, owners=3)
    return make_federation(tmp_path_factory.mktemp("custody") / "federation", shards)


@pytest.fixture
def home(federation: Federation) -> Path:
    return federation.owners[0].folder


@pytest.fixture
def owner(federation: Federation) -> Iterator[Owner]:
    opened = open_owner(federation.owners[0].folder, federation.owners[0].passphrase)
    yield opened
    opened.close()


def stored(keys: list[KeyCustody]) -> list[KeyCustody]:
    return [key for key in keys if key.place == "sealed file"]


def test_an_owners_secrets_are_sealed_and_closed(home: Path, owner: Owner) -> None:
    keys = owner_custody(home, owner)
    assert {key.holder for key in keys} == {"owner-1"}
    assert len(stored(keys)) == 3
    for key in stored(keys):
        assert (key.mode, key.encrypted_at_rest) == ("0600", True), key.what
    (memory,) = (key for key in keys if key.place == "memory")
    assert memory.mode is None


def test_the_coordinators_files(federation: Federation) -> None:
    keys = coordinator_custody(federation.server_home)
    assert {key.what for key in keys} == {"TLS key", "key of this machine's operator"}
    assert all(key.encrypted_at_rest and key.mode == "0600" for key in keys)
    assert {key.holder for key in keys} == {"coordinator"}


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_file_that_others_can_read_is_told(home: Path, owner: Owner, mode: int) -> None:
    file = home / "identity" / "signing.key.sealed"
    file.chmod(mode)
    try:
        (key,) = (key for key in owner_custody(home, owner) if key.what == "signing key")
    finally:
        file.chmod(0o600)
    assert key.mode == f"{mode:04o}"
    assert not key.encrypted_at_rest, "an open file is not a sealed one"


def test_a_key_in_plain_is_told(home: Path, owner: Owner) -> None:
    file = home / "identity" / "signing.key.sealed"
    sealed = file.read_bytes()
    try:
        for plain in (owner.credentials.signing_key.private_bytes_raw(), b'{"ciphertext":"not really"}'):
            file.write_bytes(plain)
            (key,) = (key for key in owner_custody(home, owner) if key.what == "signing key")
            assert not key.encrypted_at_rest
    finally:
        file.write_bytes(sealed)


def test_no_secret_and_no_path_is_told(federation: Federation, home: Path, owner: Owner) -> None:
    told = encode([key.fields() for key in owner_custody(home, owner)])
    assert str(home).encode() not in told
    assert federation.owners[0].passphrase not in told
    assert owner.policy.dataset.encode() not in told


def test_looking_changes_nothing(home: Path, owner: Owner) -> None:
    def content() -> list[tuple[str, ...]]:
        with sqlite3.connect(home / "state.db") as database:
            rows = database.execute("SELECT dataset FROM holdout UNION SELECT run FROM runs").fetchall()
        database.close()
        return rows

    before = content(), owner.ledger.head()
    owner_custody(home, owner)
    assert (content(), owner.ledger.head()) == before
