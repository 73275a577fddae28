"""Membership: certificates that must be refused, the authority's folder, and a real TLS handshake."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import ssl
import stat
import tempfile
from collections.abc import Callable, Iterator
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
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from crypto.certificates import (
    SIGNING_USAGE,
    Authority,
    check_revocations,
    common_name,
    create_authority,
    describe,
    fingerprint,
    verify_signing_certificate,
)
from crypto.pki import (
    init_pki,
    issue_owner,
    issue_server,
    list_pki,
    load_owner,
    load_server,
    load_trust,
    revoke,
    ssl_key_file,
)
from protocol.errors import CertificateRefused, SecretUnavailable

NOW = datetime(2030, 1, 1, 12, tzinfo=UTC)
DAY = timedelta(days=1)
CA_PASS, SERVER_PASS, OWNER_PASS = b"authority", b"coordinator", b"owner"

AUTHORITY = create_authority("Test CA", 100, NOW)
OWNER = AUTHORITY.issue_owner("ward-a", 30, NOW)
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
        _verify(foreign.issue_owner("ward-a", 30, NOW).signing_certificate)
    renamed = create_authority("Other CA", 100, NOW).certificate
    with pytest.raises(CertificateRefused, match="not issued by this authority"):
        _verify(OWNER.signing_certificate, authority=renamed)


def test_an_owner_cannot_act_as_authority() -> None:
    fake = Authority(OWNER.transport_certificate, OWNER.transport_key)
    forged = fake.issue_owner("ward-b", 10, NOW).signing_certificate
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
    server = AUTHORITY.issue_server("coordinator", ["localhost"], 30, NOW).certificate
    for certificate in (OWNER.transport_certificate, server, AUTHORITY.certificate):
        with pytest.raises(CertificateRefused, match="not for signing"):
            _verify(certificate)


def test_revoked_member_is_refused_and_others_stay() -> None:
    revocations = AUTHORITY.revocation_list([OWNER.signing_certificate.serial_number], 7, NOW)
    with pytest.raises(CertificateRefused, match="revoked"):
        _verify(OWNER.signing_certificate, revocations=revocations)
    other = AUTHORITY.issue_owner("ward-b", 30, NOW).signing_certificate
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
        AUTHORITY.issue_owner(name, 1, NOW)


@pytest.mark.parametrize(
    "names", [[], [""], ["*.example.org"], ["-a"], ["a b"], ["é.example"], ["a" * 254]]
)
def test_server_names_are_restricted(names: list[str]) -> None:
    with pytest.raises(CertificateRefused):
        AUTHORITY.issue_server("coordinator", names, 1, NOW)


def test_validity_is_bounded_and_ends_with_the_authority() -> None:
    assert AUTHORITY.issue_owner("a", 365, NOW).signing_certificate.not_valid_after_utc == NOW + 100 * DAY
    for days in (0, -1, 36_501):
        with pytest.raises(CertificateRefused):
            create_authority("x", days, NOW)
    with pytest.raises(CertificateRefused, match="expired"):
        AUTHORITY.issue_owner("a", 1, NOW + 100 * DAY)


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
    server = AUTHORITY.issue_server("coordinator", ["localhost"], 1, NOW)
    assert not any("PrivateKey" in repr(item) for item in (OWNER, AUTHORITY, server))


# --- the authority's folder ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def issued(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("issued") / "PKI"
    init_pki(folder, "Test CA", CA_PASS, 100)
    issue_server(folder, CA_PASS, SERVER_PASS, ["localhost", "127.0.0.1", "::1"], 30)
    issue_owner(folder, CA_PASS, "ward-a", OWNER_PASS, 30)
    return folder


@pytest.fixture
def pki(issued: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(issued, tmp_path / "PKI"))


def test_folder_has_its_layout_and_modes(issued: Path) -> None:
    files = {str(item.relative_to(issued)): item for item in issued.rglob("*") if item.is_file()}
    owner = {
        f"owners/ward-a/{use}.{end}" for use in ("transport", "signing") for end in ("crt", "key.sealed")
    }
    trust = {
        f"{place}{file}" for place in ("", "server/", "owners/ward-a/") for file in ("ca.crt", "crl.pem")
    }
    assert set(files) == owner | trust | {
        "ca.key.sealed",
        "issued.jsonl",
        "members/ward-a.transport.crt",
        "members/ward-a.signing.crt",
        "server/server.crt",
        "server/server.key.sealed",
    }
    for name, path in files.items():
        assert stat.S_IMODE(path.stat().st_mode) == (0o600 if name.endswith(".sealed") else 0o644)
    for private in ("", "server", "owners/ward-a"):
        assert stat.S_IMODE((issued / private).stat().st_mode) == 0o700


def test_no_private_key_lies_in_clear(issued: Path) -> None:
    owner = load_owner(issued / "owners/ward-a", OWNER_PASS)
    server = load_server(issued / "server", SERVER_PASS)
    scalars = [
        key.private_numbers().private_value.to_bytes(48, "big") for key in (owner.transport_key, server.key)
    ]
    raw = owner.signing_key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
    for item in issued.rglob("*"):
        if item.is_file():
            content = item.read_bytes()
            assert b"PRIVATE KEY" not in content
            assert not any(secret in content for secret in (*scalars, raw))


def test_an_issued_owner_is_a_member_with_its_own_passphrase(issued: Path) -> None:
    home = issued / "owners/ward-a"
    trust, owner = load_trust(home), load_owner(home, OWNER_PASS)
    der = _der(owner.signing_certificate)
    member = verify_signing_certificate(der, trust.authority, trust.revocations, datetime.now(UTC))
    assert member.name == "ward-a"
    assert member.public_key == owner.signing_key.public_key()
    for folder, load in ((home, load_owner), (issued / "server", load_server)):
        with pytest.raises(SecretUnavailable):
            load(folder, CA_PASS)


def test_an_authority_is_never_overwritten(pki: Path) -> None:
    before = {item: item.read_bytes() for item in pki.rglob("*") if item.is_file()}
    with pytest.raises(CertificateRefused, match="already holds"):
        init_pki(pki, "Test CA", CA_PASS, 100)
    (pki / "ca.crt").rename(pki / "moved.crt")
    with pytest.raises(CertificateRefused, match="already holds"):
        init_pki(pki, "Test CA", CA_PASS, 100)
    (pki / "moved.crt").rename(pki / "ca.crt")
    assert {item: item.read_bytes() for item in pki.rglob("*") if item.is_file()} == before


def test_a_name_is_issued_once_unless_renewed(pki: Path) -> None:
    old = load_owner(pki / "owners/ward-a", OWNER_PASS)
    with pytest.raises(CertificateRefused, match="before"):
        issue_owner(pki, CA_PASS, "ward-a", OWNER_PASS, 30)
    with pytest.raises(CertificateRefused, match="before"):
        issue_server(pki, CA_PASS, SERVER_PASS)
    with pytest.raises(CertificateRefused, match="server's"):
        issue_owner(pki, CA_PASS, "coordinator", OWNER_PASS)
    fresh = issue_owner(pki, CA_PASS, "ward-a", b"another", 30, renew=True)
    loaded = load_owner(pki / "owners/ward-a", b"another")
    assert loaded.signing_certificate == fresh.signing_certificate != old.signing_certificate
    assert [entry["role"] for entry in list_pki(pki)] == [
        "authority",
        "server",
        *["owner-transport", "owner-signing"] * 2,
    ]


def test_refused_issues_leave_no_trace(pki: Path) -> None:
    before = {item: item.read_bytes() for item in pki.rglob("*") if item.is_file()}
    refusals: list[tuple[type[Exception], Callable[[], object]]] = [
        (SecretUnavailable, lambda: issue_owner(pki, b"wrong", "ward-b", OWNER_PASS)),
        (SecretUnavailable, lambda: issue_owner(pki, CA_PASS, "ward-b", b"")),
        (SecretUnavailable, lambda: issue_server(pki, CA_PASS, b"", renew=True)),
        (CertificateRefused, lambda: issue_owner(pki, CA_PASS, "../ward-b", OWNER_PASS)),
        (CertificateRefused, lambda: issue_server(pki, CA_PASS, SERVER_PASS, ["a b"], renew=True)),
        (CertificateRefused, lambda: revoke(pki, CA_PASS, ["ward-a", "nobody"])),
        (CertificateRefused, lambda: revoke(pki, CA_PASS, ["Test CA"])),
        (CertificateRefused, lambda: issue_owner(pki / "missing", CA_PASS, "ward-b", OWNER_PASS)),
    ]
    for error, call in refusals:
        with pytest.raises(error):
            call()
    assert {item: item.read_bytes() for item in pki.rglob("*") if item.is_file()} == before


def test_revocation_reaches_the_folders_and_outlives_later_issues(pki: Path) -> None:
    der = (pki / "members/ward-a.signing.crt").read_bytes()
    certificate = x509.load_pem_x509_certificate(der)
    revoke(pki, CA_PASS, ["ward-a"])
    issue_owner(pki, CA_PASS, "ward-b", OWNER_PASS)
    revoke(pki, CA_PASS)
    for folder in (pki, pki / "server", pki / "owners/ward-a", pki / "owners/ward-b"):
        trust = load_trust(folder)
        with pytest.raises(CertificateRefused, match="revoked"):
            verify_signing_certificate(
                _der(certificate), trust.authority, trust.revocations, datetime.now(UTC)
            )
    assert [entry["name"] for entry in list_pki(pki) if entry["revoked"]] == ["ward-a", "ward-a"]


def test_a_forged_revocation_list_does_not_wash_anybody_clean(pki: Path) -> None:
    revoke(pki, CA_PASS, ["ward-a"])
    forged = create_authority("Test CA", 100).revocation_list([], 30)
    (pki / "crl.pem").write_bytes(forged.public_bytes(Encoding.PEM))
    for call in (lambda: revoke(pki, CA_PASS), lambda: issue_owner(pki, CA_PASS, "ward-b", OWNER_PASS)):
        with pytest.raises(CertificateRefused, match="not signed"):
            call()
    with pytest.raises(CertificateRefused, match="not signed"):
        list_pki(pki)


def test_exchanged_keys_and_certificates_are_refused(pki: Path) -> None:
    issue_owner(pki, CA_PASS, "ward-b", OWNER_PASS)
    home, other = pki / "owners/ward-a", pki / "owners/ward-b"
    for source, target, reason in (
        (home / "transport.crt", "signing.crt", "role owner-signing"),
        (other / "signing.crt", "signing.crt", "different owners"),
        (home / "signing.key.sealed", "transport.key.sealed", "not the key"),
        (other / "signing.key.sealed", "signing.key.sealed", "not the key"),
    ):
        kept = (home / target).read_bytes()
        shutil.copyfile(source, home / target)
        with pytest.raises(CertificateRefused, match=reason):
            load_owner(home, OWNER_PASS)
        (home / target).write_bytes(kept)
    assert load_owner(home, OWNER_PASS)


def test_missing_damaged_and_open_files_are_refused(pki: Path) -> None:
    home = pki / "owners/ward-a"
    (home / "signing.key.sealed").chmod(0o640)
    with pytest.raises(SecretUnavailable, match="0600"):
        load_owner(home, OWNER_PASS)
    (home / "signing.crt").write_bytes(b"-----BEGIN CERTIFICATE-----\n")
    with pytest.raises(CertificateRefused, match="malformed"):
        load_owner(home, OWNER_PASS)
    (home / "signing.crt").unlink()
    with pytest.raises(CertificateRefused, match="cannot be read"):
        load_owner(home, OWNER_PASS)
    (pki / "issued.jsonl").write_bytes((pki / "issued.jsonl").read_bytes()[:-9])
    with pytest.raises(CertificateRefused, match="malformed"):
        list_pki(pki)


def test_listing_says_how_long(issued: Path) -> None:
    server = list_pki(issued)[1]
    assert (server["name"], server["days_left"], server["revoked"]) == ("coordinator", 29, False)
    assert server["serial"] == describe(load_server(issued / "server", SERVER_PASS).certificate)["serial"]


# --- TLS -----------------------------------------------------------------------------------------------


def _context(
    side: ssl.Purpose, trust: Path, certificate: Path, key: ec.EllipticCurvePrivateKey
) -> ssl.SSLContext:
    context = ssl.create_default_context(side, cafile=str(trust / "ca.crt"))
    context.load_verify_locations(cafile=str(trust / "crl.pem"))
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


@pytest.fixture(scope="module")
def server_context(issued: Path) -> ssl.SSLContext:
    folder = issued / "server"
    key = load_server(folder, SERVER_PASS).key
    return _context(ssl.Purpose.CLIENT_AUTH, folder, folder / "server.crt", key)


def test_mutual_tls_under_strict_verification(issued: Path, server_context: ssl.SSLContext) -> None:
    home = issued / "owners/ward-a"
    key = load_owner(home, OWNER_PASS).transport_key
    client = _context(ssl.Purpose.SERVER_AUTH, home, home / "transport.crt", key)
    for host in ("localhost", "127.0.0.1", "::1"):
        assert _handshake(server_context, client, host) == "ward-a"
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        _handshake(server_context, client, "example.org")


def test_server_refuses_revoked_and_other_certificates(pki: Path) -> None:
    home, server = pki / "owners/ward-a", pki / "server"
    owner, coordinator = load_owner(home, OWNER_PASS), load_server(server, SERVER_PASS)
    accepting = _context(ssl.Purpose.CLIENT_AUTH, server, server / "server.crt", coordinator.key)
    as_server = _context(ssl.Purpose.SERVER_AUTH, home, server / "server.crt", coordinator.key)
    with pytest.raises(ssl.SSLError, match="CERTIFICATE_VERIFY_FAILED"):
        _handshake(accepting, as_server, "localhost")
    honest = _context(ssl.Purpose.SERVER_AUTH, home, home / "transport.crt", owner.transport_key)
    assert _handshake(accepting, honest, "localhost") == "ward-a"
    revoke(pki, CA_PASS, ["ward-a"])
    informed = _context(ssl.Purpose.CLIENT_AUTH, server, server / "server.crt", coordinator.key)
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


def test_without_memory_files_a_lent_key_is_private_encrypted_and_gone_after(
    issued: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delattr(os, "memfd_create")
    home = issued / "owners/ward-a"
    key = load_owner(home, OWNER_PASS).transport_key
    with _lent_key(key) as (path, password):
        assert [str(item) for item in tmp_path.iterdir()] == [path]
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(home / "transport.crt", path, password)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), ssl_key_file(key):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
