"""Sealed files, sealed values and passphrases: what they keep, and every way to break them."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from crypto import vault
from crypto.vault import (
    StorageBox,
    check_new_passphrase,
    derive_storage_key,
    open_secret,
    read_passphrase,
    seal_secret,
    storage_key,
    write_private,
    write_public,
)
from protocol.errors import PassphraseTooShort, SecretUnavailable

PASSPHRASE = b"correct horse"
SECRET = b"k"
NEW_SALT = vault.new_salt
"""The program's own: the tests at large take their salts from a few."""


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("vault") / "secret"
    seal_secret(path, SECRET, PASSPHRASE)
    return path.read_bytes()


def _put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    path.chmod(0o600)
    return path


def _altered(container: bytes, **fields: object) -> bytes:
    value = json.loads(container) | fields
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def test_secret_survives_and_its_file_is_private_and_movable(tmp_path: Path) -> None:
    secret = os.urandom(300)
    seal_secret(tmp_path / "a", secret, PASSPHRASE)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
    assert secret not in (tmp_path / "a").read_bytes()
    (tmp_path / "a").rename(tmp_path / "b")
    assert open_secret(tmp_path / "b", PASSPHRASE) == secret
    assert [item.name for item in tmp_path.iterdir()] == ["b"]


def test_container_opens_with_an_independent_program(container: bytes) -> None:
    value = json.loads(container)
    parts = {name: base64.b64decode(value[name]) for name in ("salt", "nonce", "ciphertext")}
    key = hashlib.scrypt(PASSPHRASE, salt=parts["salt"], n=2**15, r=8, p=1, maxmem=2**26, dklen=32)
    header = {name: item for name, item in value.items() if name != "ciphertext"}
    data = b"fedseal/vault/1\0" + json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    assert (value["n"], value["r"], value["p"], value["version"]) == (32768, 8, 1, 1)
    assert AESGCM(key).decrypt(parts["nonce"], parts["ciphertext"], data) == SECRET


def test_equal_secrets_have_unequal_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vault, "new_salt", NEW_SALT)
    for name in ("first", "again"):
        seal_secret(tmp_path / name, SECRET, PASSPHRASE)
    first, again = (json.loads((tmp_path / name).read_bytes()) for name in ("first", "again"))
    assert all(again[name] != first[name] for name in ("salt", "nonce", "ciphertext"))


def test_wrong_passphrase_is_refused_without_naming_the_folder(container: bytes, tmp_path: Path) -> None:
    path = _put(tmp_path / "secret", container)
    with pytest.raises(SecretUnavailable, match="wrong passphrase") as caught:
        open_secret(path, PASSPHRASE + b" ")
    assert str(tmp_path) not in str(caught.value)


def test_a_flipped_bit_in_any_byte_is_noticed(container: bytes, tmp_path: Path) -> None:
    for position in range(len(container)):
        damaged = bytearray(container)
        damaged[position] ^= 1 << (position % 7)
        path = _put(tmp_path / "secret", bytes(damaged))
        with pytest.raises(SecretUnavailable):
            open_secret(path, PASSPHRASE)


def test_every_truncation_and_extension_is_noticed(container: bytes, tmp_path: Path) -> None:
    for length in range(len(container)):
        with pytest.raises(SecretUnavailable):
            open_secret(_put(tmp_path / "secret", container[:length]), PASSPHRASE)
    with pytest.raises(SecretUnavailable):
        open_secret(_put(tmp_path / "secret", container + b"\n"), PASSPHRASE)


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2**30},
        {"n": 2**14},
        {"n": 40000},
        {"n": 32768.0},
        {"n": "32768"},
        {"r": 2**20},
        {"p": 2},
        {"p": True},
        {"version": True},
        {"version": 2},
        {"kdf": "none"},
        {"salt": ""},
        {"nonce": base64.b64encode(bytes(13)).decode()},
        {"ciphertext": base64.b64encode(bytes(15)).decode()},
        {"extra": 1},
    ],
)
def test_hostile_parameters_are_refused_before_any_work(
    container: bytes, tmp_path: Path, fields: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_work(*_: object) -> bytes:
        raise AssertionError("a key was derived for a hostile file")

    monkeypatch.setattr(vault, "_scrypt", no_work)
    with pytest.raises(SecretUnavailable, match="not a sealed file"):
        open_secret(_put(tmp_path / "secret", _altered(container, **fields)), PASSPHRASE)


def test_a_dearer_allowed_cost_still_belongs_to_the_sealed_header(container: bytes, tmp_path: Path) -> None:
    with pytest.raises(SecretUnavailable):
        open_secret(_put(tmp_path / "secret", _altered(container, n=2**16)), PASSPHRASE)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o610, 0o644])
def test_a_file_open_to_others_is_refused(container: bytes, tmp_path: Path, mode: int) -> None:
    path = _put(tmp_path / "secret", container)
    path.chmod(mode)
    with pytest.raises(SecretUnavailable, match="0600"):
        open_secret(path, PASSPHRASE)


def test_missing_folder_pipe_and_endless_file_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path in (tmp_path / "missing", tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(SecretUnavailable):
            open_secret(path, PASSPHRASE)
    with pytest.raises(SecretUnavailable):
        open_secret(_put(tmp_path / "long", bytes(5 * 1024 * 1024)), PASSPHRASE)


def test_what_cannot_be_sealed_leaves_no_file(tmp_path: Path) -> None:
    for secret, passphrase in ((b"x", b""), (b"x", bytes(5000)), (bytes(1024 * 1024 + 1), PASSPHRASE)):
        with pytest.raises(SecretUnavailable):
            seal_secret(tmp_path / "secret", secret, passphrase)
    assert list(tmp_path.iterdir()) == []


def test_writes_replace_whole_files_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        write_public(tmp_path / "public", b"1")
        os.umask(0)
        write_private(tmp_path / "private", b"1")
        write_private(tmp_path / "private", b"22")
    finally:
        os.umask(before)
    modes = {item.name: stat.S_IMODE(item.stat().st_mode) for item in tmp_path.iterdir()}
    assert modes == {"public": 0o644, "private": 0o600}
    assert (tmp_path / "private").read_bytes() == b"22"


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_private(tmp_path / "state", b"old")

    def disk_full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space"):
        write_private(tmp_path / "state", b"new")
    assert {item.name: item.read_bytes() for item in tmp_path.iterdir()} == {"state": b"old"}


def test_a_symbolic_link_is_replaced_and_its_target_kept(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"untouched")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_private(tmp_path / "link", b"secret")
    assert (tmp_path / "target").read_bytes() == b"untouched"
    assert not (tmp_path / "link").is_symlink()


def test_storage_key_is_scrypt_and_depends_on_salt() -> None:
    salt = bytes(range(16))
    expected = hashlib.scrypt(PASSPHRASE, salt=salt, n=2**15, r=8, p=1, maxmem=2**26, dklen=32)
    assert derive_storage_key(PASSPHRASE, salt) == expected
    assert derive_storage_key(PASSPHRASE, salt[::-1]) != expected
    for passphrase, short in ((b"", salt), (PASSPHRASE, salt[:15])):
        with pytest.raises(SecretUnavailable):
            derive_storage_key(passphrase, short)


def test_storage_keys_of_two_folders_differ_and_each_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vault, "new_salt", NEW_SALT)
    keys = [storage_key(tmp_path / name, PASSPHRASE) for name in ("first", "other", "first")]
    assert keys[0] == keys[2] != keys[1]
    assert stat.S_IMODE((tmp_path / "first").stat().st_mode) == 0o600
    assert keys[0] == derive_storage_key(PASSPHRASE, (tmp_path / "first").read_bytes())


@given(
    data=st.binary(max_size=200), context=st.binary(max_size=40), key=st.binary(min_size=32, max_size=32)
)
def test_stored_values_open_under_their_key_and_context_only(
    data: bytes, context: bytes, key: bytes
) -> None:
    box = StorageBox(key)
    sealed = box.seal(data, context)
    assert box.open(sealed, context) == data
    assert len(sealed) == len(data) + 28
    other = bytes([key[0] ^ 1]) + key[1:]
    with pytest.raises(SecretUnavailable):
        box.open(sealed, context + b"x")
    with pytest.raises(SecretUnavailable):
        StorageBox(other).open(sealed, context)


def test_every_change_of_a_stored_value_is_noticed() -> None:
    box = StorageBox(bytes(32))
    sealed = box.seal(b"value", b"table/row")
    damaged = [
        sealed[:position] + bytes([sealed[position] ^ 1]) + sealed[position + 1 :]
        for position in range(len(sealed))
    ]
    for value in (*damaged, sealed[:-1], sealed[:20], b"", sealed + b"\0"):
        with pytest.raises(SecretUnavailable):
            box.open(value, b"table/row")


def test_nonces_of_stored_values_are_fresh() -> None:
    box = StorageBox(bytes(32))
    assert len({box.seal(b"same", b"")[:12] for _ in range(500)}) == 500


def test_storage_box_wants_a_whole_key() -> None:
    for length in (0, 16, 31, 33):
        with pytest.raises(SecretUnavailable):
            StorageBox(bytes(length))


def test_passphrase_sources_in_order(tmp_path: Path) -> None:
    file = _put(tmp_path / "passphrase", b"from file\n")
    environment = {"FEDSEAL_PASSPHRASE": "from environment"}
    assert read_passphrase(file, environment, lambda: "typed") == b"from file"
    assert read_passphrase(None, environment, lambda: "typed") == b"from environment"
    assert read_passphrase(None, {}, lambda: "typed é") == "typed é".encode()
    with pytest.raises(SecretUnavailable, match="FEDSEAL_PASSPHRASE"):
        read_passphrase(None, {}, None)


def test_only_one_newline_is_stripped(tmp_path: Path) -> None:
    assert read_passphrase(_put(tmp_path / "p", b" a \n\n"), {}, None) == b" a \n"


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_what_an_editor_adds_to_a_passphrase_file_is_not_part_of_it(
    tmp_path: Path, mark: bytes, end: bytes
) -> None:
    assert read_passphrase(_put(tmp_path / "p", mark + b"a passphrase" + end), {}, None) == b"a passphrase"


def test_a_short_passphrase_makes_no_keys_and_opens_those_that_exist(tmp_path: Path) -> None:
    """Characters are counted, not bytes; a home from before there was a limit opens as it did."""
    for short in (b"a", b"x" * 14, "ü".encode() * 14):
        with pytest.raises(PassphraseTooShort):
            check_new_passphrase(short)
        seal_secret(tmp_path / "key.sealed", b"secret", short)
        assert open_secret(tmp_path / "key.sealed", short) == b"secret"
    for enough in (b"x" * 15, "ü".encode() * 15, b"\xff" * 15):
        check_new_passphrase(enough)


def test_an_empty_or_endless_source_is_refused_and_the_next_not_tried(tmp_path: Path) -> None:
    empty, long = _put(tmp_path / "empty", b"\n"), _put(tmp_path / "long", bytes(5000))
    for file in (empty, long, tmp_path / "missing", tmp_path, Path("/dev/zero")):
        with pytest.raises(SecretUnavailable):
            read_passphrase(file, {"FEDSEAL_PASSPHRASE": "other"}, lambda: "other")
    with pytest.raises(SecretUnavailable):
        read_passphrase(None, {"FEDSEAL_PASSPHRASE": ""}, lambda: "other")
    with pytest.raises(SecretUnavailable):
        read_passphrase(None, {}, lambda: "")


def test_a_passphrase_file_open_to_others_is_refused_also_through_a_descriptor(tmp_path: Path) -> None:
    file = _put(tmp_path / "p", b"secret")
    file.chmod(0o640)
    descriptor = os.open(file, os.O_RDONLY)
    try:
        for path in (file, Path(f"/dev/fd/{descriptor}")):
            with pytest.raises(SecretUnavailable, match="0600"):
                read_passphrase(path, {}, None)
    finally:
        os.close(descriptor)


def test_a_pipe_is_read_through_its_descriptor() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"piped\n")
    os.close(writer)
    try:
        assert read_passphrase(Path(f"/dev/fd/{reader}"), {}, None) == b"piped"
    finally:
        os.close(reader)
    with pytest.raises(SecretUnavailable):
        read_passphrase(Path("/dev/fd/999999"), {}, None)
