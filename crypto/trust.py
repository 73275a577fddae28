"""Whom a party trusts: its authority, and the newest revocation list that it has been given.

The list is a file that is replaced while processes run. Everybody who decides about certificates asks
`Trust.revocations` at the moment of the decision, so that a revocation takes effect without a restart.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding

from crypto.certificates import Role, check_revocations, role_of
from crypto.issued import issued_list
from crypto.vault import write_public
from protocol.errors import CertificateRefused, EncodingInvalid
from protocol.storage import translated

CA_CERTIFICATE, REVOCATIONS = "ca.crt", "crl.pem"

_Stamp = tuple[int, int, int]
T = TypeVar("T")


class Trust:
    """What a party needs to decide who is a member.

    Args:
        authority: The authority's certificate.
        revocations: Its revocation list; whether it is fresh is judged where it is used, see
            `crypto.certificates.check_revocations`.
        file: Where a newer list will appear; None for a list that stays as it is.
    """

    def __init__(
        self,
        authority: x509.Certificate,
        revocations: x509.CertificateRevocationList,
        file: Path | None = None,
    ) -> None:
        self.authority = authority
        self._revocations = revocations
        self._file = file
        self._stamp: _Stamp | None = None

    @property
    def revocations(self) -> x509.CertificateRevocationList:
        """The newest list of the authority; the file is read again when it has changed.

        A list that is older than one that was read before is not taken back.

        Raises:
            CertificateRefused: The file is gone, malformed, or not signed by the authority.
        """
        if self._file is None:
            return self._revocations
        stamp = _stamp(self._file)
        if stamp is None or stamp != self._stamp:
            fresh = read_revocations(self._file, self.authority)
            if list_number(fresh) >= list_number(self._revocations):
                self._revocations = fresh
            self._stamp = stamp
        return self._revocations


def load_trust(folder: Path) -> Trust:
    """Read ca.crt and crl.pem of an identity folder or of the authority's own, and follow crl.pem.

    Raises:
        CertificateRefused: A file is missing or malformed.
    """
    authority = read_certificate(folder / CA_CERTIFICATE, "authority")
    file = folder / REVOCATIONS
    return Trust(authority, parse(file, x509.load_pem_x509_crl), file)


def read_revocations(file: Path, authority: x509.Certificate) -> x509.CertificateRevocationList:
    """Read a revocation list of an authority, fresh or stale.

    Raises:
        CertificateRefused: Missing, malformed, or not signed by the authority.
    """
    revocations = parse(file, x509.load_pem_x509_crl)
    if not issued_list(revocations.public_bytes(Encoding.DER), authority):
        raise CertificateRefused("the revocation list is not signed by this authority")
    return revocations


def replace_revocations(folder: Path, file: Path) -> x509.CertificateRevocationList:
    """Put a newer revocation list into an identity folder, in one step.

    Args:
        folder: Holds ca.crt; its crl.pem is replaced.
        file: The list, as the authority handed it out.

    Raises:
        CertificateRefused: Not signed by the folder's authority, stale, or older than the list that is
            there.
    """
    trust = load_trust(folder)
    fresh = read_revocations(file, trust.authority)
    check_revocations(fresh, trust.authority, datetime.now(UTC))
    if list_number(fresh) < list_number(trust.revocations):
        raise CertificateRefused("the revocation list is older than the one that is there")
    write_public(folder / REVOCATIONS, file.read_bytes())
    return fresh


def list_number(revocations: x509.CertificateRevocationList) -> int:
    """Return the number of a revocation list; a later list has a larger one."""
    try:
        return revocations.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    except x509.ExtensionNotFound:
        return 0


def read_certificate(path: Path, role: Role) -> x509.Certificate:
    """Read a certificate (PEM) of one's own folder.

    Raises:
        CertificateRefused: Missing, malformed or for another role.
    """
    certificate = parse(path, x509.load_pem_x509_certificate)
    if role_of(certificate) != role:
        raise CertificateRefused(f"{path.name} is not a certificate for the role {role}")
    return certificate


def parse(path: Path, parser: Callable[[bytes], T]) -> T:
    """Parse a file of one's own folder.

    Raises:
        CertificateRefused: There is no such file, or the parser refuses it.
        AccessDenied, DiskFailed, ResourcesShort: It cannot be read.
    """
    with translated(path.name, lambda detail: CertificateRefused(f"{detail}; it cannot be read")):
        data = path.read_bytes()
    try:
        parsed = parser(data)
        # certificates are parsed piece by piece, as the pieces are asked for
        for one in parsed if isinstance(parsed, list) else [parsed]:
            if isinstance(one, x509.Certificate):
                one.public_key(), one.subject.rfc4514_string(), one.issuer.rfc4514_string()
        return parsed
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion, EncodingInvalid):
        raise CertificateRefused(f"{path.name} is malformed") from None


def _stamp(file: Path) -> _Stamp | None:
    try:
        facts = os.stat(file)
    except OSError:
        return None
    return facts.st_ino, facts.st_mtime_ns, facts.st_size
