"""Membership: certificates that must be refused, and a real TLS handshake."""

from __future__ import annotations

import hashlib
import json
import os
import ssl
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from crypto.authority import Authority, create_authority
from crypto.certificates import (
    SIGNING_USAGE,
    OwnerCredentials,
    ServerCredentials,
    check_certificate,
    check_revocations,
    common_name,
    describe,
    fingerprint,
    verify_signing_certificate,
)
from crypto.identity import load_pair, ssl_key_file
from protocol.errors import CertificateRefused
from tests.credentials import operator_of, owner_of, server_of

NOW = datetime(2030, 1, 1, 12, tzinfo=UTC)
DAY = timedelta(days=1)

AUTHORITY = create_authority("Test CA", 100, NOW)
OWNER = owner_of(AUTHORITY, "ward-a", 30, NOW)
CRL = AUTHORITY.revocation_list([], 7, NOW)


def _der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.DER)


def _verify(
    certificate: x509.Certificate,
    authority: x509.Certificate = AUTHORITY.certificate,
    revocations: x509.CertificateRevocationList | None = CRL,
    now: datetime = NOW,
) -> str:
    return verify_signing_certificate(_der(certificate), authority, revocations, now).name


# --- who is a member -----------------------------------------------------------------------------------


def test_a_member_is_recognised() -> None:
    der = _der(OWNER.signing_certificate)
    member = verify_signing_certificate(der, AUTHORITY.certificate, CRL, NOW)
    public_key = OWNER.signing_key.public_key()
    assert (member.name, member.not_after) == ("ward-a", NOW + 30 * DAY)
    assert member.public_key == public_key
    spki = bytes.fromhex("302a300506032b6570032100") + public_key.public_bytes(
        Encoding.Raw, PublicFormat.Raw
    )
    assert member.fingerprint == fingerprint(public_key) == hashlib.sha256(spki).hexdigest()


def test_certificate_of_a_foreign_authority_is_refused_also_under_the_same_name() -> None:
    foreign = create_authority("Test CA", 100, NOW)
    with pytest.raises(CertificateRefused, match="not issued by this authority"):
        _verify(owner_of(foreign, "ward-a", 30, NOW).signing_certificate)
    renamed = create_authority("Other CA", 100, NOW).certificate
    with pytest.raises(CertificateRefused, match="not issued by this authority"):
        _verify(OWNER.signing_certificate, authority=renamed, revocations=None)


def test_an_owner_cannot_act_as_authority() -> None:
    fake = Authority(OWNER.transport_certificate, OWNER.transport_key)
    forged = owner_of(fake, "ward-b", 10, NOW).signing_certificate
    with pytest.raises(CertificateRefused, match="not issued"):
        _verify(forged)
    with pytest.raises(CertificateRefused, match="not an authority"):
        _verify(forged, authority=OWNER.transport_certificate)


@pytest.mark.parametrize(
    ("moment", "reason"),
    [
        (NOW - timedelta(minutes=6), "not yet valid"),
        (NOW + 30 * DAY + timedelta(seconds=1), "certificate has expired"),
        (NOW + 101 * DAY, "authority's certificate has expired"),
    ],
)
def test_dates_are_checked(moment: datetime, reason: str) -> None:
    with pytest.raises(CertificateRefused, match=reason):
        _verify(OWNER.signing_certificate, revocations=None, now=moment)


def test_a_clock_that_lags_a_little_is_forgiven() -> None:
    assert _verify(OWNER.signing_certificate, now=NOW - timedelta(minutes=4)) == "ward-a"


def test_certificates_for_other_uses_are_refused() -> None:
    server = server_of(AUTHORITY, ["localhost"], 30, NOW).certificate
    operator = operator_of(AUTHORITY, "ward-a", 30, NOW).certificate
    for certificate in (OWNER.transport_certificate, server, operator):
        with pytest.raises(CertificateRefused, match="not for signing"):
            _verify(certificate)
    with pytest.raises(CertificateRefused):
        _verify(AUTHORITY.certificate)


def test_each_role_passes_for_itself_alone() -> None:
    certificates = {
        "server": server_of(AUTHORITY, ["localhost"], 30, NOW).certificate,
        "owner-transport": OWNER.transport_certificate,
        "owner-signing": OWNER.signing_certificate,
        "operator": operator_of(AUTHORITY, "alice", 30, NOW).certificate,
    }
    for role, certificate in certificates.items():
        for asked in certificates:
            if asked == role:
                check_certificate(certificate, role, AUTHORITY.certificate, CRL, NOW)
            else:
                with pytest.raises(CertificateRefused, match="not for"):
                    check_certificate(certificate, asked, AUTHORITY.certificate, CRL, NOW)


def test_revoked_member_is_refused_and_others_stay() -> None:
    revocations = AUTHORITY.revocation_list([OWNER.signing_certificate.serial_number], 7, NOW)
    with pytest.raises(CertificateRefused, match="revoked"):
        _verify(OWNER.signing_certificate, revocations=revocations)
    other = owner_of(AUTHORITY, "ward-b", 30, NOW).signing_certificate
    assert _verify(other, revocations=revocations) == "ward-b"
    assert _verify(OWNER.signing_certificate, revocations=None) == "ward-a"


def test_stale_early_and_foreign_revocation_lists_refuse_everybody() -> None:
    foreign = create_authority("Test CA", 100, NOW).revocation_list([], 7, NOW)
    renamed = create_authority("Other CA", 100, NOW).revocation_list([], 7, NOW)
    for revocations, now, reason in (
        (CRL, NOW + 7 * DAY + timedelta(seconds=1), "stale"),
        (AUTHORITY.revocation_list([], 7, NOW + DAY), NOW, "not yet valid"),
        (foreign, NOW, "not signed by this authority"),
        (renamed, NOW, "not signed by this authority"),
    ):
        with pytest.raises(CertificateRefused, match=reason):
            _verify(OWNER.signing_certificate, revocations=revocations, now=now)


def test_changed_revocation_lists_and_those_of_another_key_type_are_refused() -> None:
    builder = x509.CertificateRevocationListBuilder().issuer_name(AUTHORITY.certificate.subject)
    foreign = builder.last_update(NOW).next_update(NOW + DAY).sign(Ed25519PrivateKey.generate(), None)
    with pytest.raises(CertificateRefused, match="not signed"):
        check_revocations(foreign, AUTHORITY.certificate, NOW)
    changed = bytearray(CRL.public_bytes(Encoding.DER))
    changed[-1] ^= 1
    with pytest.raises(CertificateRefused, match="not signed"):
        check_revocations(x509.load_der_x509_crl(bytes(changed)), AUTHORITY.certificate, NOW)


def test_no_flipped_bit_of_a_certificate_changes_who_is_admitted() -> None:
    good = _der(OWNER.signing_certificate)
    start = good.index(OWNER.signing_certificate.tbs_certificate_bytes)
    signed_part = range(start, start + len(OWNER.signing_certificate.tbs_certificate_bytes))
    member = verify_signing_certificate(good, AUTHORITY.certificate, CRL, NOW)
    for position in range(8 * len(good)):
        damaged = bytearray(good)
        damaged[position // 8] ^= 1 << (position % 8)
        try:
            admitted = verify_signing_certificate(bytes(damaged), AUTHORITY.certificate, CRL, NOW)
        except CertificateRefused:
            continue
        assert position // 8 not in signed_part
        assert admitted == member


def test_bytes_that_are_no_certificate_are_refused() -> None:
    good = _der(OWNER.signing_certificate)
    for wrong in (b"", good[:-1], good + b"\0", bytes(20_000), good * 50):
        with pytest.raises(CertificateRefused):
            verify_signing_certificate(wrong, AUTHORITY.certificate, CRL, NOW)


def _crafted(
    key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey,
    name: str = "ward-a",
    usages: tuple[x509.ObjectIdentifier, ...] = (SIGNING_USAGE,),
    agreement: bool = False,
    critical: bool = False,
) -> x509.Certificate:
    usage = x509.KeyUsage(True, False, False, False, agreement, False, False, False, False)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(AUTHORITY.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW)
        .not_valid_after(NOW + DAY)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=True)
    )
    if critical:
        unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.59999.9"), b"\x05\x00")
        builder = builder.add_extension(unknown, critical=True)
    return builder.sign(AUTHORITY.private_key, hashes.SHA384())


def test_odd_certificates_of_the_right_authority_are_refused() -> None:
    key = Ed25519PrivateKey.generate()
    assert _verify(_crafted(key)) == "ward-a"
    for certificate, reason in (
        (_crafted(ec.generate_private_key(ec.SECP384R1())), "Ed25519"),
        (_crafted(key, usages=(SIGNING_USAGE, ExtendedKeyUsageOID.CLIENT_AUTH)), "not for signing"),
        (_crafted(key, usages=(ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE,)), "not for signing"),
        (_crafted(key, agreement=True), "signatures alone"),
        (_crafted(key, critical=True), "unknown critical"),
        (_crafted(key, name="../ward"), "a name is"),
        (_crafted(key, name="ward\n"), "a name is"),
    ):
        with pytest.raises(CertificateRefused, match=reason) as caught:
            _verify(certificate)
        assert "ward" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "A", "-a", "a b", "a/b", "a\n", "é", "a" * 64, "..", "a.b"])
def test_names_are_restricted(name: str) -> None:
    with pytest.raises(CertificateRefused):
        owner_of(AUTHORITY, name, 1, NOW)


@pytest.mark.parametrize(
    "names", [[], [""], ["*.example.org"], ["-a"], ["a b"], ["é.example"], ["a" * 254]]
)
def test_server_names_are_restricted(names: list[str]) -> None:
    with pytest.raises(CertificateRefused):
        server_of(AUTHORITY, names, 1, NOW)


def test_validity_is_bounded_and_ends_with_the_authority() -> None:
    assert owner_of(AUTHORITY, "a", 365, NOW).signing_certificate.not_valid_after_utc == NOW + 100 * DAY
    for days in (0, -1, 36_501):
        with pytest.raises(CertificateRefused):
            create_authority("x", days, NOW)
    with pytest.raises(CertificateRefused, match="expired"):
        owner_of(AUTHORITY, "a", 1, NOW + 100 * DAY)


def test_description_for_people() -> None:
    shown = describe(OWNER.signing_certificate, NOW + DAY)
    assert shown == {
        "subject": "ward-a",
        "issuer": "Test CA",
        "role": "owner-signing",
        "key_type": "Ed25519",
        "sha256_fingerprint": fingerprint(OWNER.signing_key.public_key()),
        "serial": f"{OWNER.signing_certificate.serial_number:x}",
        "not_before": "2030-01-01T11:55:00Z",
        "not_after": "2030-01-31T12:00:00Z",
        "days_left": 29,
    }
    assert json.loads(json.dumps(shown)) == shown
    transport = describe(OWNER.transport_certificate, NOW + 31 * DAY)
    assert (transport["role"], transport["key_type"], transport["days_left"]) == (
        "owner-transport",
        "EC P-384",
        -1,
    )
    assert describe(AUTHORITY.certificate, NOW)["role"] == "authority"


def test_credentials_do_not_print_their_keys() -> None:
    server, operator = server_of(AUTHORITY, ["localhost"], 1, NOW), operator_of(AUTHORITY, "op", 1, NOW)
    assert not any("PrivateKey" in repr(item) for item in (OWNER, AUTHORITY, server, operator))


# --- TLS -----------------------------------------------------------------------------------------------


LIVE = create_authority("Live CA", 30)
SERVER = server_of(LIVE, ["localhost", "127.0.0.1", "::1"], 10)
MEMBER = owner_of(LIVE, "ward-a", 10)


def _context(
    side: ssl.Purpose, folder: Path, holder: ServerCredentials | OwnerCredentials, *revoked: int
) -> ssl.SSLContext:
    if isinstance(holder, ServerCredentials):
        key, shown = holder.key, holder.certificate
    else:
        key, shown = holder.transport_key, holder.transport_certificate
    certificate = folder / "shown.crt"
    certificate.write_bytes(shown.public_bytes(Encoding.PEM))
    context = ssl.create_default_context(side, cadata=_der(LIVE.certificate))
    (folder / "crl.pem").write_bytes(LIVE.revocation_list(revoked, 7).public_bytes(Encoding.PEM))
    context.load_verify_locations(cafile=str(folder / "crl.pem"))
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_CRL_CHECK_LEAF
    with ssl_key_file(key) as (path, password):
        context.load_cert_chain(certificate, path, password)
    return context


def _handshake(server: ssl.SSLContext, client: ssl.SSLContext, host: str) -> str:
    """Run both sides in memory; return the common name that the server saw."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=host),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    waiting = list(ends)
    for _ in range(20):
        for end in list(waiting):
            try:
                end.do_handshake()
                waiting.remove(end)
            except ssl.SSLWantReadError:
                pass
    assert not waiting
    ends[0].write(b"hello")
    assert ends[1].read(5) == b"hello"
    assert ends[0].version() == "TLSv1.3"
    der = ends[1].getpeercert(binary_form=True)
    assert der is not None
    return common_name(x509.load_der_x509_certificate(der).subject)


def test_mutual_tls_under_strict_verification(tmp_path: Path) -> None:
    server = _context(ssl.Purpose.CLIENT_AUTH, tmp_path, SERVER)
    client = _context(ssl.Purpose.SERVER_AUTH, tmp_path, MEMBER)
    for host in ("localhost", "127.0.0.1", "::1"):
        assert _handshake(server, client, host) == "ward-a"
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        _handshake(server, client, "example.org")


def test_server_refuses_revoked_and_other_certificates(tmp_path: Path) -> None:
    accepting = _context(ssl.Purpose.CLIENT_AUTH, tmp_path, SERVER)
    with pytest.raises(ssl.SSLError, match="CERTIFICATE_VERIFY_FAILED"):
        _handshake(accepting, _context(ssl.Purpose.SERVER_AUTH, tmp_path, SERVER), "localhost")
    honest = _context(ssl.Purpose.SERVER_AUTH, tmp_path, MEMBER)
    assert _handshake(accepting, honest, "localhost") == "ward-a"
    serial = MEMBER.transport_certificate.serial_number
    informed = _context(ssl.Purpose.CLIENT_AUTH, tmp_path, SERVER, serial)
    with pytest.raises(ssl.SSLError, match="revoked"):
        _handshake(informed, honest, "localhost")


@contextmanager
def _lent_key(key: ec.EllipticCurvePrivateKey) -> Iterator[tuple[str, str]]:
    with ssl_key_file(key) as (path, password):
        yield path, password
        content = Path(path).read_bytes()
        scalar = key.private_numbers().private_value.to_bytes(48, "big")
        assert content.startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----")
        assert scalar not in content
        with pytest.raises(ValueError, match="password"):
            load_pem_private_key(content, password[:-1].encode())
        assert load_pem_private_key(content, password.encode()).public_key() == key.public_key()


def test_a_lent_key_is_in_memory_encrypted_and_gone_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with _lent_key(OWNER.transport_key) as (path, password):
        assert os.readlink(path).startswith("/memfd:")
        assert list(tmp_path.iterdir()) == []
        with ssl_key_file(OWNER.transport_key) as (_, other):
            assert other != password
    left = [os.readlink(item) for item in Path("/proc/self/fd").iterdir() if item.is_symlink()]
    assert not any("fedseal-key" in link for link in left)


@pytest.mark.parametrize("shown", [b"", b"not a certificate", LIVE.certificate.public_bytes(Encoding.PEM)])
def test_a_certificate_that_does_not_go_with_its_key_is_refused_by_code(
    tmp_path: Path, shown: bytes
) -> None:
    """A node tries again then; an error of the TLS library ended its process."""
    (tmp_path / "transport.crt").write_bytes(shown)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for file in (tmp_path / "transport.crt", tmp_path / "nowhere.crt"):
        with pytest.raises(CertificateRefused, match=f"{file.name} and its key cannot be loaded"):
            load_pair(context, file, MEMBER.transport_key)


def test_without_memory_files_a_lent_key_is_private_encrypted_and_gone_after(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delattr(os, "memfd_create")
    key = MEMBER.transport_key
    shown = tmp_path_factory.mktemp("shown") / "transport.crt"
    shown.write_bytes(MEMBER.transport_certificate.public_bytes(Encoding.PEM))
    with _lent_key(key) as (path, password):
        assert [str(item) for item in tmp_path.iterdir()] == [path]
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(shown, path, password)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), ssl_key_file(key):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
