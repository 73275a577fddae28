"""The doctor: every condition that it must notice is brought about, and none of them ends it."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import shutil
import socket
import ssl
import sys
import tomllib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from rich.console import Console

from client.owner import open_owner
from console.doctor import (
    FLOWER_MODULES,
    OLDEST_NOW,
    Finding,
    Status,
    check_clock,
    check_disk,
    check_flower,
    check_packages,
    check_port,
    check_python,
    check_tls,
    examine,
    guarded,
    show_findings,
)
from console.doctor_home import check_home
from crypto.authority import create_authority
from scenarios.federation import Federation, make_federation
from tests.credentials import owner_of

NOW = datetime.now(UTC) + timedelta(hours=1)
"""After everything that the tests make, though they are collected long before they run."""

DAY = timedelta(days=1)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    split = np.zeros((4, 8, 8), dtype=np.uint8), np.zeros(4, dtype=np.int64)
    federation = make_federation(tmp_path_factory.mktemp("federation") / "made", [split] * 3)
    owner = federation.owners[0]
    open_owner(owner.folder, owner.passphrase).close()
    return federation


@pytest.fixture
def owner(made: Federation, tmp_path: Path) -> Path:
    return shutil.copytree(made.owners[0].folder, tmp_path / "owner")


@pytest.fixture
def coordinator(made: Federation, tmp_path: Path) -> Path:
    return shutil.copytree(made.server_home, tmp_path / "coordinator")


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    return port


def statuses(findings: Sequence[Finding]) -> dict[str, Status]:
    return {finding.name: finding.status for finding in findings}


def one(findings: Sequence[Finding], name: str) -> Finding:
    (finding,) = [finding for finding in findings if finding.name == name]
    return finding


def failures(findings: Sequence[Finding]) -> set[str]:
    return {finding.name for finding in findings if finding.status == "fail"}


# --- a sound machine and sound homes -----------------------------------------------------------------


def test_a_sound_machine_has_no_failure(free_port: int) -> None:
    findings = [item for item in examine(None, free_port) if item.name != "packages"]
    assert failures(findings) == set()
    assert statuses(findings)["port"] == "ok"
    assert "ML-KEM-768" in one(findings, "key agreement").detail


def test_a_fresh_owner_has_no_failure_and_needs_no_port(owner: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        findings = examine(owner, taken.getsockname()[1])
    assert failures(findings) <= {"packages"}
    assert "port" not in statuses(findings)
    assert one(findings, "ledger").detail == "1 records verified"
    assert statuses(findings)["data file"] == "ok"


def test_a_fresh_coordinator_has_no_failure(coordinator: Path) -> None:
    findings = check_home(coordinator, NOW)
    assert set(statuses(findings).values()) == {"ok"}
    assert one(findings, "members").detail == "3 members"


def test_looking_changes_no_file_of_a_home(owner: Path) -> None:
    def content() -> dict[str, bytes]:
        return {str(file): file.read_bytes() for file in owner.rglob("*") if file.is_file()}

    check_home(owner, NOW)
    before = content()
    check_home(owner, NOW)
    assert content() == before


def test_an_owner_who_never_ran_has_no_ledger_made_for_it(made: Federation) -> None:
    home = made.owners[1].folder
    assert one(check_home(home, NOW), "ledger").detail == "not begun yet"
    assert not (home / "ledger").exists()


# --- the machine -------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [(3, 10, 14), (3, 12, 0), (4, 0, 0), (3, 1, 1)])
def test_another_python_fails(version: tuple[int, ...]) -> None:
    assert check_python(version).status == "fail"


def test_a_wrong_and_a_missing_package_are_named_with_the_command() -> None:
    finding = check_packages(["numpy==0.0.1", "no-such-thing==1.0", "rich==14.3.4"])
    assert finding.status == "fail"
    assert "needed 0.0.1" in finding.detail
    assert "no-such-thing 1.0 is missing" in finding.detail
    assert "rich" not in finding.detail
    assert "pip install -c constraints.txt -e ." in finding.remedy


@pytest.mark.parametrize("wrong", [["numpy>=2"], [], ['numpy==0.1; extra == "dev"']])
def test_packages_that_are_not_pinned_or_not_listed_fail(wrong: list[str]) -> None:
    assert check_packages(wrong).status == "fail"


def test_what_pyproject_pins_is_what_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    finding = check_packages(project["dependencies"])
    assert finding.status == "ok", finding.detail


@pytest.mark.parametrize(("version", "has_tls13"), [((1, 1), True), ((3, 0), False), ((2, 8), True)])
def test_old_tls_fails(version: tuple[int, ...], has_tls13: bool) -> None:
    assert check_tls(version, has_tls13).status == "fail"


def test_this_tls_passes() -> None:
    assert check_tls(ssl.OPENSSL_VERSION_INFO[:2], ssl.HAS_TLSv1_3).status == "ok"


@pytest.mark.parametrize("module", ["flwr.superlink.no_such_module", "flwr.gone.deeper", "no_such_flower"])
def test_a_missing_part_of_flower_is_named(module: str) -> None:
    finding = check_flower([*FLOWER_MODULES, module])
    assert finding.status == "fail"
    assert f"no {module}" in finding.detail


def test_every_private_module_of_flower_in_use_is_looked_for() -> None:
    used: set[str] = set()
    for file in (*ROOT.glob("server/flower/*.py"), *ROOT.glob("client/flower*.py")):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                used.add(node.module)
            elif isinstance(node, ast.Constant) and str(node.value).startswith("flwr."):
                used.add(str(node.value))
    public = {"flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.app.message"}
    private = {module for module in used if module.startswith("flwr.")} - public
    assert private <= set(FLOWER_MODULES)


def test_an_occupied_port_fails_and_a_released_one_passes() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        finding = check_port(port)
        assert finding.status == "fail"
        assert "EADDRINUSE" in finding.detail
        assert str(port) in finding.remedy
    assert check_port(port).status == "ok"


def test_a_port_left_by_a_finished_connection_is_free() -> None:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as caller, listener.accept()[0] as accepted:
            accepted.shutdown(socket.SHUT_RDWR)
            caller.recv(1)
    assert check_port(port).status == "ok"


def test_a_clock_before_this_code_or_before_the_certificates_fails(owner: Path) -> None:
    assert check_clock(None, OLDEST_NOW - DAY).status == "fail"
    assert check_clock(owner, NOW).status == "ok"
    later = (NOW + DAY).timestamp()
    os.utime(owner / "identity" / "crl.pem", (later, later))
    assert check_clock(owner, NOW).status == "fail"


def test_too_little_disk_fails() -> None:
    assert check_disk(None, 1).status == "ok"
    assert check_disk(Path("/no/such/home"), 2**62).status == "fail"


# --- homes that something is wrong with --------------------------------------------------------------


@pytest.mark.parametrize(
    "secret", ["identity/signing.key.sealed", "identity/storage.salt", "ledger/ledger.db", "state.db"]
)
def test_a_secret_that_others_can_read_fails(owner: Path, secret: str) -> None:
    (owner / secret).chmod(0o644)
    finding = one(check_home(owner, NOW), "secret files")
    assert finding.status == "fail"
    assert secret in finding.detail
    assert finding.remedy == f"Run: chmod 600 {owner / secret}"


def test_the_coordinators_release_key_is_looked_at_too(coordinator: Path) -> None:
    key = coordinator / "release.key.sealed"
    key.write_bytes(b"sealed")
    key.chmod(0o640)
    assert one(check_home(coordinator, NOW), "secret files").status == "fail"


def test_certificates_that_end_soon_warn_and_ended_ones_fail(owner: Path) -> None:
    soon = check_home(owner, NOW + 20 * DAY)
    assert statuses(soon)["signing.crt"] == statuses(soon)["transport.crt"] == "warn"
    ended = check_home(owner, NOW + 40 * DAY)
    assert {"signing.crt", "transport.crt", "ca.crt", "revocation list"} <= failures(ended)
    assert "expired at" in one(ended, "signing.crt").detail
    assert "stale" in one(ended, "revocation list").detail


def test_certificates_of_the_future_fail(owner: Path) -> None:
    findings = check_home(owner, NOW - 2 * DAY)
    assert {"signing.crt", "transport.crt", "revocation list"} <= failures(findings)


def put(identity: Path, **files: x509.Certificate | x509.CertificateRevocationList) -> None:
    for stem, item in files.items():
        suffix = "pem" if stem == "crl" else "crt"
        (identity / f"{stem}.{suffix}").write_bytes(item.public_bytes(Encoding.PEM))


def test_one_expired_certificate_among_valid_ones_is_the_only_failure(owner: Path) -> None:
    authority = create_authority("Test CA", 400, NOW - 300 * DAY)
    old = owner_of(authority, "ward-a", 30, NOW - 100 * DAY)
    put(
        owner / "identity",
        ca=authority.certificate,
        crl=authority.revocation_list([], 30, NOW),
        signing=old.signing_certificate,
        transport=owner_of(authority, "ward-a", 90, NOW).transport_certificate,
    )
    assert failures(check_home(owner, NOW)) == {"signing.crt"}


def test_a_revoked_certificate_fails(owner: Path) -> None:
    authority = create_authority("Test CA", 400, NOW)
    issued = owner_of(authority, "ward-a", 90, NOW)
    put(
        owner / "identity",
        ca=authority.certificate,
        crl=authority.revocation_list([issued.transport_certificate.serial_number], 30, NOW),
        signing=issued.signing_certificate,
        transport=issued.transport_certificate,
    )
    findings = check_home(owner, NOW)
    assert failures(findings) == {"transport.crt"}
    assert "revoked" in one(findings, "transport.crt").detail


def test_certificates_of_another_authority_fail(owner: Path) -> None:
    other = create_authority("Test CA", 30, NOW)
    put(owner / "identity", ca=other.certificate)
    findings = check_home(owner, NOW)
    assert {"signing.crt", "transport.crt", "revocation list"} <= failures(findings)
    assert "not issued by" in one(findings, "signing.crt").detail


def test_swapped_certificates_fail(owner: Path) -> None:
    identity = owner / "identity"
    shutil.copy(identity / "transport.crt", identity / "signing.crt")
    assert "role" in one(check_home(owner, NOW), "signing.crt").detail


@pytest.mark.parametrize("name", ["ca.crt", "crl.pem", "transport.crt"])
@pytest.mark.parametrize("damage", ["missing", "noise", "folder"])
def test_damaged_certificate_files_are_findings(owner: Path, name: str, damage: str) -> None:
    file = owner / "identity" / name
    file.unlink()
    if damage == "noise":
        file.write_bytes(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n\xff\x00")
    elif damage == "folder":
        file.mkdir()
    assert failures(check_home(owner, NOW))


def test_a_members_damaged_certificate_is_a_warning_for_the_coordinator(coordinator: Path) -> None:
    (coordinator / "members" / "owner-2.transport.crt").write_bytes(b"noise")
    finding = one(check_home(coordinator, NOW), "members")
    assert finding.status == "warn"
    assert "owner-2" in finding.detail
    assert "owner-1" not in finding.detail


def test_a_coordinator_without_members_is_warned(coordinator: Path) -> None:
    shutil.rmtree(coordinator / "members")
    (coordinator / "members").mkdir()
    assert one(check_home(coordinator, NOW), "members").status == "warn"


def test_a_wrong_policy_fails_with_its_code(owner: Path) -> None:
    (owner / "policy.toml").write_text("dataset = 3\n")
    finding = one(check_home(owner, NOW), "policy")
    assert finding.status == "fail"
    assert finding.detail.startswith("FS-POLICY-01")


def test_a_missing_data_file_fails_and_an_open_one_warns(owner: Path) -> None:
    (data,) = owner.glob("*.npz")
    data.chmod(0o644)
    assert one(check_home(owner, NOW), "data file").status == "warn"
    data.unlink()
    assert one(check_home(owner, NOW), "data file").status == "fail"


def test_a_damaged_ledger_fails_with_its_code(owner: Path) -> None:
    for file in (owner / "ledger").glob("ledger.db*"):
        file.write_bytes(b"\xff" * 8192)
    assert one(check_home(owner, NOW), "ledger").detail.startswith("FS-LEDGER-01")


def test_a_ledger_that_was_taken_away_fails(owner: Path) -> None:
    shutil.rmtree(owner / "ledger")
    assert one(check_home(owner, NOW), "ledger").detail.startswith("FS-LEDGER-02")
    assert not (owner / "ledger" / "ledger.db").exists()


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "odd"])
def test_what_is_not_a_home_is_a_finding(tmp_path: Path, free_port: int, kind: str) -> None:
    home = tmp_path / ("a[b]c\n" if kind == "odd" else kind)
    if kind == "file":
        home.write_text("")
    elif kind != "missing":
        home.mkdir()
    findings = examine(home, free_port)
    assert failures(findings) - {"packages"} == {"home"}
    show_findings(Console(file=io.StringIO()), findings, as_json=False)


# --- errors and output -------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("secret value"), KeyError("secret value"), RecursionError()])
def test_an_unexpected_error_is_a_failure_that_names_its_type_only(error: Exception) -> None:
    def check() -> Finding:
        raise error

    (finding,) = guarded("thing", check)
    assert finding.status == "fail"
    assert type(error).__name__ in finding.detail
    assert "secret" not in finding.detail


def test_a_package_that_cannot_be_imported_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "crypto.secret", None)
    finding = one(examine(None, 1), "encryption")
    assert finding.status == "fail"
    assert "crypto.secret" in finding.detail


@pytest.mark.parametrize("width", [20, 80, 200])
def test_json_is_parsable_at_any_width(width: int) -> None:
    findings = [Finding("disk", "warn", "[red]" * 60, "é ✓"), Finding("port", "ok", "fine")]
    out = io.StringIO()
    assert show_findings(Console(file=out, width=width), findings, as_json=True)
    assert json.loads(out.getvalue()) == [
        {"name": "disk", "status": "warn", "detail": "[red]" * 60, "remedy": "é ✓"},
        {"name": "port", "status": "ok", "detail": "fine", "remedy": ""},
    ]


def test_a_failure_shows_its_remedy_and_brackets_as_they_are() -> None:
    findings = [Finding("port", "fail", "[bold]8443", "Stop it."), Finding("disk", "ok", "fine", "unused")]
    out = io.StringIO()
    assert not show_findings(Console(file=out, width=120), findings, as_json=False)
    text = out.getvalue()
    assert "✗" in text
    assert "✓" in text
    assert "[bold]8443" in text
    assert "do: Stop it." in text
    assert "unused" not in text


def test_a_terminal_without_unicode_gets_plain_marks() -> None:
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding="ascii", errors="strict") as out:
        show_findings(
            Console(file=out, width=120), [Finding("port", "fail", "taken", "Stop it.")], as_json=False
        )
        out.flush()
        assert raw.getvalue().split()[:2] == [b"x", b"port"]


# --- the pinned set ----------------------------------------------------------------------------------


def test_every_direct_dependency_is_constrained_and_documented() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    constraints = (ROOT / "constraints.txt").read_text().lower().replace("_", "-").splitlines()
    documented = (ROOT / "docs" / "dependencies.md").read_text()
    for requirement in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        name, version = requirement.split("==")
        assert f"{name.lower().replace('_', '-')}=={version}" in constraints
        assert f"| {name.replace('_', '-')} | {version} |" in documented


def test_constraints_are_exact_and_without_local_builds() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line) for line in lines)
    assert lines == sorted(lines, key=lambda line: line.upper().encode())
