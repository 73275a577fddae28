"""Requests, the authority's folder, identity folders, and revocation lists that are replaced."""

from __future__ import annotations

import base64
import os
import shutil
import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from client.membership import valid_keys
from crypto.auditlog import AuditLog
from crypto.authority import Authority, create_authority
from crypto.certificates import USAGES, LeafRole, check_certificate, key_sha256, named
from crypto.identity import (
    install,
    load_operator,
    load_owner,
    load_server,
    make_request,
    open_ec_key,
)
from crypto.pki import init_pki, list_pki, renew, revoke, sign_request
from crypto.requests import MAX_REQUEST_BYTES, ROLES, Party, build_request, read_request
from crypto.signing import sign
from crypto.trust import load_trust, replace_revocations
from protocol.errors import CertificateRefused, FedsealError, SecretUnavailable
from protocol.messages import Join, JoinReply, LedgerHead
from tests.credentials import enrol

CA, SERVER = b"passphrase of the authority", b"passphrase of the coordinator"
OWNER, OPERATOR = b"passphrase of an owner", b"passphrase of an operator"
KEYS: dict[LeafRole, Any] = {
    "server": ec.generate_private_key(ec.SECP384R1()),
    "owner-transport": ec.generate_private_key(ec.SECP384R1()),
    "owner-signing": Ed25519PrivateKey.generate(),
    "operator": ec.generate_private_key(ec.SECP384R1()),
}
HOSTS = {"coordinator": ["localhost", "127.0.0.1", "::1"]}


def request_of(party: Party, name: str = "ward-a") -> bytes:
    return build_request(name, party, KEYS, HOSTS.get(party, []))


def blocks_of(data: bytes) -> list[bytes]:
    end = b"-----END CERTIFICATE REQUEST-----\n"
    return [block + end for block in data.split(end)[:-1]]


# --- requests ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("party", list(ROLES))
def test_a_request_says_what_was_asked_for(party: Party) -> None:
    request = read_request(request_of(party))
    assert (request.name, request.party, request.hosts) == ("ward-a", party, tuple(HOSTS.get(party, ())))
    assert request.keys == {role: KEYS[role].public_key() for role in ROLES[party]}
    assert request.fingerprint == key_sha256(KEYS[ROLES[party][-1]].public_key())


def test_keys_of_two_requests_are_not_combined() -> None:
    """A thief of one request cannot have a key of his own certified beside a key of the victim's."""
    transport, signing = blocks_of(request_of("owner"))
    other: dict[LeafRole, Any] = KEYS | {"owner-signing": Ed25519PrivateKey.generate()}
    foreign_transport, foreign_signing = blocks_of(build_request("ward-a", "owner", other))
    assert read_request(transport + signing)
    for mixed in (transport + foreign_signing, foreign_transport + signing):
        with pytest.raises(CertificateRefused, match="belong together"):
            read_request(mixed)


def test_requests_of_other_shapes_are_refused() -> None:
    owner, server = request_of("owner"), request_of("coordinator")
    transport, signing = blocks_of(owner)
    other = blocks_of(request_of("owner", "ward-b"))
    for wrong in (
        b"",
        transport,
        signing,
        signing + transport,
        owner + transport,
        server + server,
        transport + other[1],
        transport + transport,
        owner[:-60],
        b"x" * (MAX_REQUEST_BYTES + 1),
    ):
        with pytest.raises(CertificateRefused):
            read_request(wrong)


def test_a_request_proves_possession_of_its_key() -> None:
    """Put another public key into a request that is signed by one's own."""
    (block,) = blocks_of(request_of("operator"))
    der = x509.load_pem_x509_csr(block).public_bytes(Encoding.DER)
    victim = ec.generate_private_key(ec.SECP384R1()).public_key()
    point = KEYS["operator"].public_key().public_numbers()
    own = point.x.to_bytes(48, "big") + point.y.to_bytes(48, "big")
    theirs = victim.public_numbers().x.to_bytes(48, "big") + victim.public_numbers().y.to_bytes(48, "big")
    assert der.count(own) == 1
    forged = x509.load_der_x509_csr(der.replace(own, theirs)).public_bytes(Encoding.PEM)
    with pytest.raises(CertificateRefused, match="signed by its own key"):
        read_request(forged)


def test_no_flipped_bit_of_a_request_changes_what_is_asked_for() -> None:
    (block,) = blocks_of(request_of("operator"))
    der = bytearray(x509.load_pem_x509_csr(block).public_bytes(Encoding.DER))
    wanted = read_request(block)
    for position in range(0, 8 * len(der), 3):
        damaged = bytearray(der)
        damaged[position // 8] ^= 1 << (position % 8)
        text = base64.encodebytes(bytes(damaged))
        try:
            seen = read_request(
                b"-----BEGIN CERTIFICATE REQUEST-----\n%s-----END CERTIFICATE REQUEST-----\n" % text
            )
        except CertificateRefused:
            continue
        assert seen == wanted


@pytest.mark.parametrize(
    ("role", "key"),
    [
        ("operator", ec.generate_private_key(ec.SECP256R1())),
        ("operator", Ed25519PrivateKey.generate()),
    ],
)
def test_keys_of_other_types_are_refused(role: LeafRole, key: Any) -> None:
    with pytest.raises(CertificateRefused, match="EC P-384"):
        read_request(build_request("ward-a", "operator", {role: key}))


def test_a_request_without_the_extension_of_its_keys_is_refused() -> None:
    builder = x509.CertificateSigningRequestBuilder().subject_name(named("ward-a"))
    builder = builder.add_extension(x509.ExtendedKeyUsage(USAGES["operator"]), critical=False)
    plain = builder.sign(KEYS["operator"], hashes.SHA384()).public_bytes(Encoding.PEM)
    with pytest.raises(CertificateRefused, match="belong together"):
        read_request(plain)


@pytest.mark.parametrize(
    ("party", "name", "hosts"),
    [
        ("owner", "../x", []),
        ("owner", "ward-a", ["localhost"]),
        ("coordinator", "ward-a", []),
        ("coordinator", "ward-a", ["a b"]),
    ],
)
def test_requests_are_not_made_with_bad_names(party: Party, name: str, hosts: list[str]) -> None:
    with pytest.raises(CertificateRefused):
        build_request(name, party, KEYS, hosts)


# --- the authority's folder ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority in pki/, and identities in coordinator/, operator/, ward-a/."""
    folder = tmp_path_factory.mktemp("made")
    init_pki(folder / "pki", "Test CA", CA, 100)
    enrol(folder / "pki", CA, folder / "coordinator", "coordinator", "coordinator", SERVER, ["localhost"])
    enrol(folder / "pki", CA, folder / "operator", "operator", "alice", OPERATOR)
    enrol(folder / "pki", CA, folder / "ward-a", "owner", "ward-a", OWNER)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "made"))


def files_in(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_folders_have_their_layout_and_modes(made: Path) -> None:
    assert set(files_in(made / "pki")) == {
        *("ca.crt", "ca.key.sealed", "crl.pem", "issued.jsonl"),
        *("members/ward-a.transport.crt", "members/ward-a.signing.crt"),
        *(f"answers/{name}.pem" for name in ("coordinator", "alice", "ward-a")),
        *("log/acts.jsonl", "log/head.json", "log/lock"),
    }
    trust = {"ca.crt", "crl.pem", "request.pem"}
    for name, uses in (
        ("coordinator", ["server"]),
        ("operator", ["operator"]),
        ("ward-a", ["transport", "signing"]),
    ):
        keys = {f"{use}.{end}" for use in uses for end in ("crt", "key.sealed")}
        assert set(files_in(made / name)) == trust | keys
    for file in made.rglob("*"):
        if file.is_file():
            private = file.name.endswith(".sealed") or file.name in ("acts.jsonl", "lock")
            assert stat.S_IMODE(file.stat().st_mode) == (0o600 if private else 0o644), file
    for private_folder in ("pki", "pki/log", "coordinator", "operator", "ward-a"):
        assert stat.S_IMODE((made / private_folder).stat().st_mode) == 0o700


def test_the_authority_never_holds_the_key_of_another_party(made: Path) -> None:
    """No private key lies in clear anywhere, and the only sealed one in pki/ is the authority's own."""
    owner = load_owner(made / "ward-a", OWNER)
    keys = [
        owner.transport_key,
        load_server(made / "coordinator", SERVER).key,
        load_operator(made / "operator", OPERATOR).key,
    ]
    scalars = [key.private_numbers().private_value.to_bytes(48, "big") for key in keys]
    scalars.append(owner.signing_key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption()))
    for name, content in files_in(made).items():
        assert b"PRIVATE KEY" not in content, name
        assert not any(secret in content for secret in scalars), name
    assert [name for name in files_in(made / "pki") if name.endswith(".sealed")] == ["ca.key.sealed"]
    for name, load in (("ward-a", load_owner), ("coordinator", load_server), ("operator", load_operator)):
        with pytest.raises(SecretUnavailable):
            load(made / name, CA)


def test_no_key_is_in_clear_on_the_disk_while_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Look at every file that is put in place, and at what it was renamed from."""
    seen: list[tuple[str, bytes, int]] = []
    replace = os.replace

    def watched(source: Any, target: Any) -> None:
        seen.append((str(target), Path(source).read_bytes(), Path(source).stat().st_mode))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    make_request(tmp_path / "identity", "owner", "ward-a", OWNER)
    sealed = [one for one in seen if one[0].endswith(".sealed")]
    assert len(sealed) == 2
    for name, content, mode in sealed:
        assert stat.S_IMODE(mode) == 0o600, name
        assert content.startswith(b'{"ciphertext":"')


def test_an_authority_is_never_overwritten(folder: Path) -> None:
    before = files_in(folder)
    for moved in ("ca.crt", "ca.key.sealed", "issued.jsonl"):
        for name in ("ca.crt", "ca.key.sealed", "issued.jsonl"):
            if name != moved:
                (folder / "pki" / name).rename(folder / "pki" / f"moved-{name}")
        with pytest.raises(CertificateRefused, match="already holds"):
            init_pki(folder / "pki", "Test CA", CA, 100)
        for file in (folder / "pki").glob("moved-*"):
            file.rename(file.with_name(file.name.removeprefix("moved-")))
    assert files_in(folder) == before


def test_keys_are_never_overwritten(folder: Path) -> None:
    before = files_in(folder)
    with pytest.raises(CertificateRefused, match="holds keys already"):
        make_request(folder / "ward-a", "owner", "ward-a", OWNER)
    with pytest.raises(CertificateRefused, match="holds keys already"):
        make_request(folder / "ward-a", "operator", "ward-a", OWNER)
    assert files_in(folder) == before


def test_refused_acts_leave_no_trace(folder: Path) -> None:
    pki, before = folder / "pki", files_in(folder)
    fresh = build_request("ward-b", "owner", KEYS)
    refusals: list[tuple[type[FedsealError], Callable[[], object]]] = [
        (SecretUnavailable, lambda: sign_request(pki, b"wrong", fresh)),
        (CertificateRefused, lambda: sign_request(pki, CA, fresh, days=0)),
        (CertificateRefused, lambda: sign_request(pki, CA, fresh, fingerprint="0" * 64)),
        (CertificateRefused, lambda: sign_request(pki, CA, build_request("ward-a", "owner", KEYS))),
        (CertificateRefused, lambda: sign_request(pki, CA, build_request("alice", "owner", KEYS))),
        (CertificateRefused, lambda: sign_request(pki, CA, (folder / "ward-a/request.pem").read_bytes())),
        (CertificateRefused, lambda: sign_request(pki / "missing", CA, fresh)),
        (CertificateRefused, lambda: renew(pki, CA, "ward-b")),
        (CertificateRefused, lambda: renew(pki, CA, "ward-a", days=5)),
        (SecretUnavailable, lambda: renew(pki, b"wrong", "ward-a", days=60)),
        (CertificateRefused, lambda: revoke(pki, CA, ["ward-a", "nobody"])),
        (CertificateRefused, lambda: revoke(pki, CA, ["Test CA"])),
        (SecretUnavailable, lambda: make_request(folder / "new", "owner", "ward-b", b"")),
        (CertificateRefused, lambda: make_request(folder / "new", "owner", "../b", OWNER)),
    ]
    for error, call in refusals:
        with pytest.raises(error):
            call()
    assert files_in(folder) == before


def test_signing_can_be_bound_to_a_fingerprint(folder: Path) -> None:
    request = make_request(folder / "ward-b", "owner", "ward-b", OWNER)
    data = (folder / "ward-b/request.pem").read_bytes()
    signed, _ = sign_request(folder / "pki", CA, data, fingerprint=request.fingerprint)
    assert signed == request


def test_renewing_keeps_name_and_keys_and_moves_the_end(folder: Path) -> None:
    before = load_owner(folder / "ward-a", OWNER)
    install(folder / "ward-a", renew(folder / "pki", CA, "ward-a", 60).read_bytes())
    after = load_owner(folder / "ward-a", OWNER)
    for old, new in (
        (before.transport_certificate, after.transport_certificate),
        (before.signing_certificate, after.signing_certificate),
    ):
        assert new.public_key() == old.public_key()
        assert new.subject == old.subject
        assert new.not_valid_after_utc - old.not_valid_after_utc > timedelta(days=29)
        assert new.serial_number != old.serial_number
    listed = [row for row in list_pki(folder / "pki") if row["name"] == "ward-a"]
    assert [row["superseded"] for row in listed] == [True, True, False, False]
    assert len({row["fingerprint"] for row in listed}) == 2
    install(folder / "coordinator", renew(folder / "pki", CA, "coordinator", 60).read_bytes())
    names = load_server(folder / "coordinator", SERVER).certificate.extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert names.value.get_values_for_type(x509.DNSName) == ["localhost"]


def test_a_revoked_party_comes_back_with_new_keys_only(folder: Path) -> None:
    pki = folder / "pki"
    revoke(pki, CA, ["ward-a"])
    with pytest.raises(CertificateRefused, match="not renewed"):
        renew(pki, CA, "ward-a", 60)
    with pytest.raises(CertificateRefused, match="make new keys"):
        sign_request(pki, CA, (folder / "ward-a/request.pem").read_bytes())
    enrol(pki, CA, folder / "again", "owner", "ward-a", OWNER)
    states = [(row["revoked"], row["superseded"]) for row in list_pki(pki) if row["name"] == "ward-a"]
    assert states == [(True, False), (True, False), (False, False), (False, False)]


def test_listing_says_what_a_person_wants_to_know(made: Path) -> None:
    listed = list_pki(made / "pki")
    assert [(row["name"], row["role"]) for row in listed] == [
        ("Test CA", "authority"),
        ("coordinator", "server"),
        ("alice", "operator"),
        ("ward-a", "owner-transport"),
        ("ward-a", "owner-signing"),
    ]
    server = load_server(made / "coordinator", SERVER).certificate
    assert listed[1]["serial"] == f"{server.serial_number:x}"
    assert listed[1]["fingerprint"] == key_sha256(server.public_key())
    assert [row["days_left"] for row in listed] == [99, 29, 29, 29, 29]
    assert not any(row["revoked"] or row["superseded"] for row in listed)


def test_a_damaged_list_of_certificates_is_refused(folder: Path) -> None:
    file = folder / "pki/issued.jsonl"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CertificateRefused, match="malformed"):
        list_pki(folder / "pki")


def test_the_authority_logs_what_it_did(folder: Path) -> None:
    pki = folder / "pki"
    renew(pki, CA, "ward-a", 60)
    revoke(pki, CA, ["ward-a"])
    acts = AuditLog(pki / "log").verify(load_trust(pki).authority)
    assert [act.act for act in acts] == ["pki.init", *["pki.sign"] * 3, "pki.renew", "pki.revoke"]
    assert acts[3].facts["fingerprint"] == key_sha256(
        load_owner(folder / "ward-a", OWNER).signing_key.public_key()
    )
    assert acts[5].facts["names"] == ["ward-a"]


# --- identity folders ----------------------------------------------------------------------------------


def test_only_the_answer_for_these_keys_is_installed(folder: Path, tmp_path: Path) -> None:
    pki = folder / "pki"
    enrol(pki, CA, folder / "ward-b", "owner", "ward-b", OWNER)
    make_request(tmp_path / "twin", "owner", "ward-a", OWNER)
    answers = {file.stem: file.read_bytes() for file in (pki / "answers").glob("*.pem")}
    before = files_in(tmp_path / "twin")
    for wrong in (answers["ward-a"], answers["ward-b"], answers["alice"], b"", answers["ward-a"][:900]):
        with pytest.raises(CertificateRefused):
            install(tmp_path / "twin", wrong)
    assert files_in(tmp_path / "twin") == before
    with pytest.raises(CertificateRefused):
        install(tmp_path / "nothing", answers["ward-a"])
    install(folder / "ward-b", answers["ward-b"])


def test_another_authority_does_not_take_over_a_folder(folder: Path, tmp_path: Path) -> None:
    init_pki(tmp_path / "evil", "Test CA", CA, 100)
    _, answer = sign_request(tmp_path / "evil", CA, (folder / "ward-a/request.pem").read_bytes())
    before = files_in(folder)
    with pytest.raises(CertificateRefused, match="another authority"):
        install(folder / "ward-a", answer.read_bytes())
    assert files_in(folder) == before


def test_certificates_of_one_authority_in_the_answer_of_another_are_refused(
    folder: Path, tmp_path: Path
) -> None:
    init_pki(tmp_path / "evil", "Test CA", CA, 100)
    make_request(tmp_path / "fresh", "owner", "ward-c", OWNER)
    _, answer = sign_request(tmp_path / "evil", CA, (tmp_path / "fresh/request.pem").read_bytes())
    parts = x509.load_pem_x509_certificates(answer.read_bytes())
    trust = load_trust(folder / "pki")
    mixed = [trust.authority, *parts[1:]]
    data = b"".join(one.public_bytes(Encoding.PEM) for one in mixed)
    with pytest.raises(CertificateRefused, match="not issued by"):
        install(tmp_path / "fresh", data + trust.revocations.public_bytes(Encoding.PEM))


def test_an_answer_does_not_bring_back_an_older_list(folder: Path) -> None:
    old = (folder / "pki/answers/ward-a.pem").read_bytes()
    replace_revocations(folder / "ward-a", revoke(folder / "pki", CA))
    newest = (folder / "ward-a/crl.pem").read_bytes()
    install(folder / "ward-a", old)
    assert (folder / "ward-a/crl.pem").read_bytes() == newest


def test_exchanged_keys_and_certificates_are_refused(folder: Path) -> None:
    enrol(folder / "pki", CA, folder / "ward-b", "owner", "ward-b", OWNER)
    home, other = folder / "ward-a", folder / "ward-b"
    for source, target, reason in (
        (home / "transport.crt", "signing.crt", "role owner-signing"),
        (other / "signing.crt", "signing.crt", "different owners"),
        (home / "signing.key.sealed", "transport.key.sealed", "not the key"),
        (other / "signing.key.sealed", "signing.key.sealed", "not the key"),
    ):
        kept = (home / target).read_bytes()
        shutil.copyfile(source, home / target)
        with pytest.raises(CertificateRefused, match=reason):
            load_owner(home, OWNER)
        (home / target).write_bytes(kept)
    assert load_owner(home, OWNER)


def test_missing_damaged_and_open_files_are_refused(folder: Path) -> None:
    home = folder / "ward-a"
    (home / "signing.key.sealed").chmod(0o640)
    with pytest.raises(SecretUnavailable, match="0600"):
        load_owner(home, OWNER)
    (home / "signing.crt").write_bytes(b"-----BEGIN CERTIFICATE-----\n")
    with pytest.raises(CertificateRefused, match="malformed"):
        load_owner(home, OWNER)
    (home / "signing.crt").unlink()
    with pytest.raises(CertificateRefused, match="cannot be read"):
        load_owner(home, OWNER)


# --- revocation lists ----------------------------------------------------------------------------------


def check(folder: Path, trust: Any) -> None:
    certificate = x509.load_pem_x509_certificate((folder / "ward-a/signing.crt").read_bytes())
    check_certificate(certificate, "owner-signing", trust.authority, trust.revocations, datetime.now(UTC))


def test_a_revocation_is_noticed_without_reading_trust_anew(folder: Path) -> None:
    trust = load_trust(folder / "coordinator")
    check(folder, trust)
    fresh = revoke(folder / "pki", CA, ["ward-a"])
    check(folder, trust)
    replace_revocations(folder / "coordinator", fresh)
    with pytest.raises(CertificateRefused, match="revoked"):
        check(folder, trust)
    revoke(folder / "pki", CA)
    with pytest.raises(CertificateRefused, match="revoked"):
        check(folder, load_trust(folder / "pki"))


def test_an_owner_refuses_a_revoked_peer_without_a_restart(folder: Path) -> None:
    """The list is asked for at every check of a roster or a round's list, by owners and coordinator."""
    enrol(folder / "pki", CA, folder / "ward-b", "owner", "ward-b", OWNER)
    peer = load_owner(folder / "ward-a", OWNER)
    body = Join(
        version=1,
        run="a" * 64,
        plan_hash="b" * 64,
        start=None,
        vouches=True,
        nonce_commitment="c" * 64,
        hpke_key=b"key",
        ledger=LedgerHead(sequence=0, head="d" * 64),
    )
    certificate = peer.signing_certificate.public_bytes(Encoding.DER)
    reply = JoinReply(certificate=certificate, join=sign(peer.signing_key, body))
    owner: Any = SimpleNamespace(trust=load_trust(folder / "ward-b"), fingerprint=reply.join.signer)
    assert list(valid_keys(owner, [reply])) == [reply.join.signer]
    replace_revocations(folder / "ward-b", revoke(folder / "pki", CA, ["ward-a"]))
    with pytest.raises(CertificateRefused, match="revoked"):
        valid_keys(owner, [reply])


def test_a_revocation_is_not_taken_back_by_an_older_list(folder: Path) -> None:
    old = (folder / "coordinator/crl.pem").read_bytes()
    trust = load_trust(folder / "coordinator")
    replace_revocations(folder / "coordinator", revoke(folder / "pki", CA, ["ward-a"]))
    with pytest.raises(CertificateRefused, match="revoked"):
        check(folder, trust)
    (folder / "old.pem").write_bytes(old)
    with pytest.raises(CertificateRefused, match="older"):
        replace_revocations(folder / "coordinator", folder / "old.pem")
    (folder / "coordinator/crl.pem").write_bytes(old)
    with pytest.raises(CertificateRefused, match="revoked"):
        check(folder, trust)


@pytest.mark.parametrize("damage", ["forged", "cut", "gone"])
def test_without_a_good_list_everybody_is_refused(folder: Path, damage: str) -> None:
    file = folder / "coordinator/crl.pem"
    trust = load_trust(folder / "coordinator")
    check(folder, trust)
    forged = create_authority("Test CA", 100).revocation_list([], 30).public_bytes(Encoding.PEM)
    good = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(forged if damage == "forged" else good[:200])
    with pytest.raises(CertificateRefused):
        check(folder, trust)
    file.write_bytes(good)
    check(folder, trust)


def test_a_stale_list_refuses_everybody_and_is_not_taken(folder: Path) -> None:
    pki = folder / "pki"
    authority = load_trust(pki).authority
    signer = Authority(authority, open_ec_key(pki / "ca.key.sealed", CA, authority))
    past = datetime.now(UTC) - timedelta(days=10)
    stale = folder / "stale.pem"
    stale.write_bytes(signer.revocation_list([], 7, past).public_bytes(Encoding.PEM))
    with pytest.raises(CertificateRefused, match="stale"):
        replace_revocations(folder / "coordinator", stale)
    shutil.copyfile(stale, folder / "coordinator/crl.pem")
    with pytest.raises(CertificateRefused, match="stale"):
        check(folder, load_trust(folder / "coordinator"))


def test_a_forged_list_does_not_wash_anybody_clean(folder: Path) -> None:
    pki = folder / "pki"
    revoke(pki, CA, ["ward-a"])
    forged = create_authority("Test CA", 100).revocation_list([], 30)
    (pki / "crl.pem").write_bytes(forged.public_bytes(Encoding.PEM))
    for call in (
        lambda: revoke(pki, CA),
        lambda: sign_request(pki, CA, build_request("ward-b", "owner", KEYS)),
        lambda: list_pki(pki),
    ):
        with pytest.raises(CertificateRefused, match="not signed"):
            call()
