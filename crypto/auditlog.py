"""A hash-chained log of administrative and protocol acts: who did what, when, with which hashes.

One act is one line of canonical JSON that holds the hash of the line before it, so that no line can be
changed, removed from the middle, inserted or moved. Cutting off the end leaves a shorter chain that is
whole; against that, whoever keeps the log signs its head (sequence and hash), and heads may be copied
elsewhere. A line is on the disk before `append` returns. Nothing private stands in a line: names, codes,
numbers and hashes.

The construction is that of a linked log; Haber & Stornetta 1991, Schneier & Kelsey 1999.
"""

from __future__ import annotations

import logging
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from pydantic import Field, StringConstraints

from crypto.certificates import role_of
from crypto.issued import verify_issued
from crypto.locks import exclusive
from crypto.vault import sync_folder, write_public
from protocol.encoding import Blob, Digest, digest_bytes, encode
from protocol.errors import EncodingInvalid, LogBroken
from protocol.messages import Message
from protocol.storage import translated

FOLDER: Final = "log"
"""Name of the log's folder in a home, and in the folder of an authority."""

LOG_FILE: Final = "the log of acts"
LOG, HEAD, LOCK = "acts.jsonl", "head.json", "lock"
START: Final = "0" * 64
"""What the first line has in place of the hash of the line before it."""

MAX_LINE_BYTES = 256 * 1024

_LOGGER = logging.getLogger("fedseal.log")
_LINE_DOMAIN = b"fedseal/audit-line/1\0"
_HEAD_DOMAIN = b"fedseal/audit-head/1\0"

Fact = str | int | bool | None | list[str]
"""What a fact may be; a float has no place here, and a nested value stands as its hash."""


class Act(Message):
    """One line of the log."""

    sequence: Annotated[int, Field(ge=1)]
    time: Annotated[str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")]
    actor: Annotated[str, StringConstraints(pattern=r"^[ -~]{1,100}$")]
    act: Annotated[str, StringConstraints(pattern=r"^[a-z]+(\.[a-z_-]+)*$", max_length=60)]
    facts: dict[str, Fact]
    previous: Digest
    hash: Digest

    def expected_hash(self) -> str:
        """Return what the hash of this line must be."""
        return _line_hash(self.model_dump(mode="json", exclude={"hash"}))


class Head(Message):
    """Where a log stands: how many lines, and the hash of the last one."""

    sequence: Annotated[int, Field(ge=0)]
    hash: Digest


class SignedHead(Message):
    """A head, signed by whoever keeps the log, with the certificate (DER) of the signer."""

    head: Head
    certificate: Blob
    signature: Blob


class AuditLog:
    """The log in one folder. Several processes may append to it.

    Args:
        folder: Created if missing, for its owner only.
    """

    def __init__(self, folder: Path) -> None:
        with translated(LOG_FILE):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder
        self._seen = Head(sequence=0, hash=START)

    def append(self, actor: str, act: str, /, **facts: Fact) -> Head:
        """Record an act; it is durable when this returns.

        Args:
            actor: Who: a fingerprint, or the name of a role such as ``coordinator``.
            act: What, in dotted lower case, for example ``run.round``.
            facts: Small public facts: names, codes, numbers, hashes.

        Returns:
            The new head.

        Raises:
            LogBroken: The end of the log is not what this process has seen of it.
            DiskFull, AccessDenied, DiskFailed, FileUnusable, ResourcesShort: It cannot be written; what was
                recorded before is intact.
        """
        with exclusive(self._folder / LOCK):
            last = self._last()
            fields: dict[str, Any] = {
                "sequence": last.sequence + 1,
                "time": _now(),
                "actor": actor,
                "act": act,
                "facts": facts,
                "previous": last.hash,
            }
            line = Act.from_fields({**fields, "hash": _line_hash(fields)})
            data = line.to_bytes() + b"\n"
            if len(data) > MAX_LINE_BYTES:
                raise EncodingInvalid("an act has too many facts")
            with translated(LOG_FILE):
                self._write(data)
            self._seen = Head(sequence=line.sequence, hash=line.hash)
            return self._seen

    def acts(self) -> list[Act]:
        """Return all acts in order, after every hash.

        Half a line at the end is what a crash leaves: it was never acknowledged and does not count.

        Raises:
            LogBroken: A line is damaged, changed, missing or out of place.
        """
        found: list[Act] = []
        previous = START
        for number, line in enumerate(self._lines(), start=1):
            try:
                act = Act.from_bytes(line)
            except EncodingInvalid:
                raise LogBroken(f"line {number} is damaged") from None
            if act.sequence != number or act.previous != previous:
                raise LogBroken(f"line {number} does not follow the line before it")
            if act.hash != act.expected_hash():
                raise LogBroken(f"line {number} was changed")
            previous = act.hash
            found.append(act)
        return found

    def head(self) -> Head:
        """Return where the log stands now, by its last line alone.

        Raises:
            LogBroken: The last line is damaged or changed.
        """
        with exclusive(self._folder / LOCK):
            return self._last()

    def sign_head(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> Head:
        """Sign where the log stands, and return it. For whoever keeps the log only.

        Args:
            key: The key of `certificate`.
            certificate: The coordinator's or the authority's.
        """
        head = self.head()
        signature = key.sign(_HEAD_DOMAIN + head.to_bytes(), ec.ECDSA(hashes.SHA384()))
        der = certificate.public_bytes(Encoding.DER)
        signed = SignedHead(head=head, certificate=der, signature=signature)
        with translated(LOG_FILE):
            write_public(self._folder / HEAD, signed.to_bytes())
        return head

    def verify(self, authority: x509.Certificate, known: Head | None = None) -> list[Act]:
        """Return all acts, after every hash and the signed head.

        What is returned is what the keeper of the log recorded, up to the signed head at least, if its key
        is its own. A keeper can rewrite its own log up to the oldest head that nobody else has.

        Args:
            authority: Of the federation.
            known: A head that the reader kept from before.

        Raises:
            LogBroken: A line is wrong, the signed head is missing or wrong, or the log is shorter than the
                signed or the known head, or another one.
        """
        acts = self.acts()
        if acts:
            _require(acts, self._signed_head(authority), "signed")
        if known is not None:
            _require(acts, known, "known")
        return acts

    def _signed_head(self, authority: x509.Certificate) -> Head:
        with translated(HEAD, lambda _detail: LogBroken("the signed head is missing")):
            data = (self._folder / HEAD).read_bytes()
        try:
            signed = SignedHead.from_bytes(data)
            certificate = x509.load_der_x509_certificate(signed.certificate)
            if certificate != authority:
                verify_issued(certificate, authority)
            key = certificate.public_key()
            if role_of(certificate) not in ("authority", "server"):
                raise LogBroken("the head is signed by somebody else than the keeper of a log")
            if not isinstance(key, ec.EllipticCurvePublicKey):
                raise LogBroken("the head is signed by a key of another type")
            key.verify(signed.signature, _HEAD_DOMAIN + signed.head.to_bytes(), ec.ECDSA(hashes.SHA384()))
        except (ValueError, TypeError, EncodingInvalid, InvalidSignature):
            raise LogBroken("the signed head is damaged or forged") from None
        return signed.head

    def _lines(self) -> list[bytes]:
        with translated(LOG_FILE, LogBroken):
            try:
                data = (self._folder / LOG).read_bytes()
            except FileNotFoundError:
                return []
        return data.split(b"\n")[:-1]

    def _last(self) -> Head:
        """Return the head, by the last whole line; it must go on from what this process has seen."""
        line = self._last_line()
        head = Head(sequence=0, hash=START)
        if line:
            try:
                act = Act.from_bytes(line)
            except EncodingInvalid:
                raise LogBroken("the last line is damaged") from None
            if act.hash != act.expected_hash():
                raise LogBroken("the last line was changed")
            head = Head(sequence=act.sequence, hash=act.hash)
        same_place = head.sequence == self._seen.sequence and head != self._seen
        if head.sequence < self._seen.sequence or same_place:
            raise LogBroken("lines that were written are gone")
        return head

    def _last_line(self) -> bytes:
        with translated(LOG_FILE, LogBroken):
            try:
                with (self._folder / LOG).open("rb") as file:
                    file.seek(max(0, file.seek(0, os.SEEK_END) - 2 * MAX_LINE_BYTES))
                    whole = file.read().split(b"\n")[:-1]
            except FileNotFoundError:
                return b""
        return whole[-1] if whole else b""

    def _write(self, data: bytes) -> None:
        path = self._folder / LOG
        new = not path.exists()
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with open(descriptor, "r+b") as file:
            # What stands behind the last newline is half a line that a crash left.
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - MAX_LINE_BYTES))
            torn = len(file.read().rpartition(b"\n")[2])
            file.truncate(size - torn)
            file.seek(size - torn)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if new:
            sync_folder(self._folder)


class KeptLog:
    """A log together with its keeper, who signs the head. For the keeper only.

    Args:
        log: The log.
        keeper: The name under which the keeper's own acts are recorded.
        key: The keeper's key.
        certificate: Its certificate, the coordinator's or the authority's.
    """

    def __init__(
        self,
        log: AuditLog,
        keeper: str,
        key: ec.EllipticCurvePrivateKey,
        certificate: x509.Certificate,
    ) -> None:
        self._log = log
        self._keeper = keeper
        self._key = key
        self._certificate = certificate
        self._signed: Head | None = None

    @property
    def signed(self) -> Head:
        """The newest head that was signed since this object was made."""
        return self._signed or Head(sequence=0, hash=START)

    def begin(self, authority: x509.Certificate) -> None:
        """Verify what is there, and sign it.

        Raises:
            LogBroken: The log was changed, shortened or damaged; nothing is added to it then.
        """
        if self._log.verify(authority):
            _LOGGER.info("the log of acts was verified")
        self.sign()

    def record(self, act: str, actor: str | None = None, /, **facts: Fact) -> Head:
        """Append an act, of the keeper unless told otherwise; see `AuditLog.append`."""
        return self._log.append(actor or self._keeper, act, **facts)

    def sign(self) -> Head:
        """Sign the head if it has moved, whoever moved it; returns it."""
        head = self._log.head()
        if head != self._signed:
            self._signed = self._log.sign_head(self._key, self._certificate)
        return head


def short_facts(facts: dict[str, Any]) -> dict[str, Fact]:
    """Return the small facts of an event as they are, and one hash that stands for all of them."""
    small: dict[str, Fact] = {
        name: value for name, value in facts.items() if value is None or isinstance(value, str | int)
    }
    named = {
        name: value
        for name, value in facts.items()
        if isinstance(value, list) and all(isinstance(item, str) for item in value)
    }
    return {**small, **named, "facts_sha256": digest_bytes(encode(facts))}


def _require(acts: list[Act], head: Head, what: str) -> None:
    if head.sequence > len(acts):
        raise LogBroken(f"the log has {len(acts)} lines; the {what} head has {head.sequence}")
    if head.sequence and acts[head.sequence - 1].hash != head.hash:
        raise LogBroken(f"line {head.sequence} is not the one of the {what} head")


def _line_hash(fields: dict[str, Any]) -> str:
    return digest_bytes(_LINE_DOMAIN + encode(fields))


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
