"""Secrets at rest: sealed files, sealed database values, and where a passphrase comes from.

A sealed file is canonical JSON that holds a scrypt salt, a nonce and an AES-256-GCM ciphertext. Every
other field is associated data of the ciphertext, so one changed byte anywhere makes the file unreadable.
The name of the file is not part of it; a sealed file may be moved.

Sources: RFC 7914 (scrypt), NIST SP 800-38D (GCM).
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from pydantic import Field

from protocol.encoding import MAX_BODY_BYTES, Blob, encode
from protocol.errors import (
    EncodingInvalid,
    FileDamaged,
    FileUnusable,
    PassphraseTooShort,
    SecretUnavailable,
)
from protocol.messages import Message
from protocol.storage import from_os, translated

ENVIRONMENT_VARIABLE = "FEDSEAL_PASSPHRASE"
"""Environment variable that `read_passphrase` looks at."""

MAX_SECRET_BYTES = 1024 * 1024
"""Longest secret that a sealed file holds."""

MAX_PASSPHRASE_BYTES = 4096
"""Longest accepted passphrase."""

NEW_PASSPHRASE_CHARACTERS = 15
"""Fewest characters of a passphrase for new keys.

A sealed file can be copied and guessed at without a limit, so that the passphrase stands alone. It is the
least that NIST SP 800-63B-4, section 3.1.1.2, lets stand alone. Rules about kinds of characters are not
imposed, as the same section asks.
"""

SALT_BYTES = 16
NONCE_BYTES = 12
KEY_BYTES = 32
TAG_BYTES = 16

_SCRYPT_N: Literal[32768] = 32768
_SEALED_DOMAIN = b"fedseal/vault/1\0"
_STORAGE_DOMAIN = b"fedseal/storage/1\0"
_INHERITED_DESCRIPTOR = re.compile(r"/dev/(?:fd/(\d{1,6})|stdin)")


class _Container(Message):
    """A sealed file; the listed costs are all that `open_secret` will ever spend (128 MiB at most)."""

    version: Literal[1] = 1
    kdf: Literal["scrypt"] = "scrypt"
    n: Literal[32768, 65536, 131072] = _SCRYPT_N
    r: Literal[8] = 8
    p: Literal[1] = 1
    salt: Annotated[Blob, Field(min_length=SALT_BYTES, max_length=SALT_BYTES)]
    nonce: Annotated[Blob, Field(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
    ciphertext: Annotated[Blob, Field(min_length=TAG_BYTES, max_length=MAX_SECRET_BYTES + TAG_BYTES)]

    def associated_data(self) -> bytes:
        return _SEALED_DOMAIN + encode(self.model_dump(mode="json", exclude={"ciphertext"}))


def seal_secret(path: Path, secret: bytes, passphrase: bytes) -> None:
    """Encrypt a secret under a passphrase and write it to a file of mode 0600.

    The file appears whole or not at all, also if the machine loses power; an older file at `path` is
    replaced. Whoever copies the file still has to guess the passphrase, at 32 MiB and about a tenth of a
    second a guess; that is only as good as the passphrase.

    Args:
        path: Where the sealed file goes; its folder must exist.
        secret: At most `MAX_SECRET_BYTES` bytes. Called by whoever owns the secret, nobody else.
        passphrase: 1 to `MAX_PASSPHRASE_BYTES` bytes.

    Raises:
        SecretUnavailable: The passphrase is empty or too long, or the secret is too long.
        OSError: The file cannot be written.
    """
    check_passphrase(passphrase)
    if len(secret) > MAX_SECRET_BYTES:
        raise SecretUnavailable(f"a secret has at most {MAX_SECRET_BYTES} bytes")
    header = _Container(
        salt=new_salt(),
        nonce=secrets.token_bytes(NONCE_BYTES),
        ciphertext=bytes(TAG_BYTES),
    )
    key = _scrypt(passphrase, header.salt, header.n)
    ciphertext = AESGCM(key).encrypt(header.nonce, secret, header.associated_data())
    write_private(path, header.model_copy(update={"ciphertext": ciphertext}).to_bytes())


def open_secret(path: Path, passphrase: bytes) -> bytes:
    """Return the secret that `seal_secret` wrote. For the owner of the secret only.

    Args:
        path: A regular file that group and others can neither read nor write.
        passphrase: The passphrase that it was sealed under.

    Raises:
        SecretUnavailable: The file is missing, open to others or damaged, asks for other costs than
            fedseal uses, or the passphrase is wrong. Damage in the encrypted part and a wrong
            passphrase look alike.
    """
    check_passphrase(passphrase)
    container = _parse_container(path.name, _read_private(path))
    key = _scrypt(passphrase, container.salt, container.n)
    try:
        return AESGCM(key).decrypt(container.nonce, container.ciphertext, container.associated_data())
    except InvalidTag:
        raise SecretUnavailable(f"{path.name}: wrong passphrase, or the file is damaged") from None


def is_sealed(path: Path) -> bool:
    """Tell whether a file has the form that `seal_secret` writes and is closed to group and others."""
    try:
        _parse_container(path.name, _read_private(path))
    except SecretUnavailable:
        return False
    return True


def write_private(path: Path, data: bytes) -> None:
    """Write a file of mode 0600 whole or not at all, durably.

    For data that is encrypted already, or that is private without being a secret.

    Raises:
        OSError: The file cannot be written; an older file at `path` is then unchanged.
    """
    _write_atomically(path, data, 0o600)


def write_public(path: Path, data: bytes) -> None:
    """Write a file of mode 0644 whole or not at all, durably; see `write_private`."""
    _write_atomically(path, data, 0o644)


def new_salt() -> bytes:
    """Return `SALT_BYTES` random bytes, so that equal passphrases have unequal keys."""
    return secrets.token_bytes(SALT_BYTES)


def storage_key(salt_file: Path, passphrase: bytes) -> bytes:
    """Return the key of the `StorageBox` whose salt lies in a file; a new salt is written where none is.

    Raises:
        SecretUnavailable: The passphrase is empty or too long.
        FileDamaged: The file does not hold a salt.
        DiskFull, AccessDenied, DiskFailed, FileUnusable, ResourcesShort: It cannot be read or written.
    """
    with translated(salt_file.name):
        if not salt_file.exists():
            write_private(salt_file, new_salt())
        salt = salt_file.read_bytes()
    if len(salt) != SALT_BYTES:
        raise FileDamaged(f"{salt_file.parent.name}/{salt_file.name} has not {SALT_BYTES} bytes")
    return derive_storage_key(passphrase, salt)


def derive_storage_key(passphrase: bytes, salt: bytes) -> bytes:
    """Return the 32-byte key of a `StorageBox`, by scrypt (n = 2**15, r = 8, p = 1).

    Args:
        passphrase: The owner's passphrase, not empty.
        salt: At least 16 random bytes, kept in clear beside the sealed values.

    Raises:
        SecretUnavailable: The passphrase is empty or too long, or the salt is too short.
    """
    check_passphrase(passphrase)
    if len(salt) < SALT_BYTES:
        raise SecretUnavailable(f"a salt has at least {SALT_BYTES} bytes")
    return _scrypt(passphrase, salt, _SCRYPT_N)


class StorageBox:
    """Seals the values that an owner keeps in its state database.

    Confidential and authentic under AES-256-GCM with random nonces, for up to 2**32 values under one key
    (NIST SP 800-38D, section 8.3). A value opens only under the context that it was sealed with; an old
    value put back under its own context is not noticed.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise SecretUnavailable(f"a storage key has {KEY_BYTES} bytes")
        self._cipher = AESGCM(key)

    def seal(self, data: bytes, context: bytes) -> bytes:
        """Return nonce (12 bytes) and ciphertext (28 bytes longer than `data` in all).

        Args:
            data: The value.
            context: What the value is and whom it belongs to, for example table, column and row.
        """
        nonce = secrets.token_bytes(NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, data, _STORAGE_DOMAIN + context)

    def open(self, sealed: bytes, context: bytes) -> bytes:
        """Return the value that was sealed under the same key and context.

        Raises:
            SecretUnavailable: Another key, another context, or a changed value.
        """
        nonce, ciphertext = sealed[:NONCE_BYTES], sealed[NONCE_BYTES:]
        if len(ciphertext) < TAG_BYTES:
            raise SecretUnavailable("a stored value is too short")
        try:
            return self._cipher.decrypt(nonce, ciphertext, _STORAGE_DOMAIN + context)
        except InvalidTag:
            raise SecretUnavailable("a stored value does not open under this key and context") from None


def read_passphrase(
    file: Path | None, environment: Mapping[str, str], prompt: Callable[[], str] | None
) -> bytes:
    """Return the passphrase from the first source that is given: file, environment, prompt.

    A source that is given but holds nothing is an error; the next one is not tried in its place.

    Args:
        file: A file, `/dev/stdin` or `/dev/fd/N`. A regular file must be closed to group and others.
            One end of line at its end, and a mark of the encoding before it, as some editors write them,
            are not part of the passphrase.
        environment: Looked up for `FEDSEAL_PASSPHRASE`.
        prompt: Asks a person, without echo.

    Raises:
        SecretUnavailable: No source is given, the file cannot be read or is open to others, or the
            passphrase is empty or longer than `MAX_PASSPHRASE_BYTES`.
    """
    if file is not None:
        content = _read_passphrase_file(file).removeprefix(BOM_UTF8)
        passphrase = content[:-2] if content.endswith(b"\r\n") else content.removesuffix(b"\n")
    elif ENVIRONMENT_VARIABLE in environment:
        passphrase = environment[ENVIRONMENT_VARIABLE].encode("utf-8", "surrogateescape")
    elif prompt is not None:
        passphrase = prompt().encode("utf-8", "surrogateescape")
    else:
        raise SecretUnavailable(f"give a passphrase file, or set {ENVIRONMENT_VARIABLE}")
    check_passphrase(passphrase)
    return passphrase


def check_passphrase(passphrase: bytes) -> None:
    """Return if a passphrase has 1 to `MAX_PASSPHRASE_BYTES` bytes, else raise `SecretUnavailable`."""
    if not passphrase:
        raise SecretUnavailable("the passphrase is empty")
    if len(passphrase) > MAX_PASSPHRASE_BYTES:
        raise SecretUnavailable(f"a passphrase has at most {MAX_PASSPHRASE_BYTES} bytes")


def check_new_passphrase(passphrase: bytes) -> None:
    """Refuse a passphrase that is not good enough for a new key; keys that exist are opened by theirs.

    Raises:
        SecretUnavailable: It is empty or too long.
        PassphraseTooShort: It has fewer than `NEW_PASSPHRASE_CHARACTERS` characters.
    """
    check_passphrase(passphrase)
    if len(passphrase.decode("utf-8", "surrogateescape")) < NEW_PASSPHRASE_CHARACTERS:
        raise PassphraseTooShort


def _scrypt(passphrase: bytes, salt: bytes, n: int) -> bytes:
    return Scrypt(salt=salt, length=KEY_BYTES, n=n, r=8, p=1).derive(passphrase)


def _parse_container(name: str, data: bytes) -> _Container:
    refusal = SecretUnavailable(f"{name} is not a sealed file, or it is damaged")
    try:
        container = _Container.from_bytes(data)
    except EncodingInvalid:
        raise refusal from None
    if container.to_bytes() != data:
        # Literal fields take what equals them, such as true for 1; a sealed file has one spelling.
        raise refusal
    return container


def _read_private(path: Path) -> bytes:
    # Non-blocking, so that a named pipe in place of the file is refused rather than waited for.
    with _reading(
        path.name, lambda: os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    ) as descriptor:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise SecretUnavailable(f"{path.name} is not a regular file")
        return _read_closed(descriptor, path.name, MAX_BODY_BYTES + 1)


def _read_passphrase_file(path: Path) -> bytes:
    inherited = _INHERITED_DESCRIPTOR.fullmatch(str(path))

    def opened() -> int:
        # An inherited descriptor is read as it is: opening its name again fails for sockets, and for
        # pipes that another user made.
        return os.dup(int(inherited[1] or 0)) if inherited else os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    with _reading(path.name, opened) as descriptor:
        # Room for marks and an end of line, and for one byte that shows that the passphrase is too long.
        return _read_closed(descriptor, path.name, MAX_PASSPHRASE_BYTES + 6)


@contextmanager
def _reading(name: str, opened: Callable[[], int]) -> Iterator[int]:
    try:
        descriptor = opened()
        try:
            yield descriptor
        finally:
            os.close(descriptor)
    except OSError as error:
        coded = from_os(error, name)
        if coded is None or isinstance(coded, FileUnusable):
            raise SecretUnavailable(f"{name} cannot be read: {error.strerror}") from None
        raise coded from None


def _read_closed(descriptor: int, name: str, limit_bytes: int) -> bytes:
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode) and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise SecretUnavailable(f"{name} is open to group or others; its mode must be 0600")
    with open(descriptor, "rb", closefd=False) as stream:
        return stream.read(limit_bytes)


def _write_atomically(path: Path, data: bytes, mode: int) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, 0o600)
    try:
        with open(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            # Set here, because the umask of the process would take bits away from the mode at creation.
            os.fchmod(descriptor, mode)
            os.fsync(descriptor)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make new and renamed entries of a folder outlast a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
