"""Every kind of file that is stored or written by hand, cut, garbled or replaced: a code, and no harm."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import pytest
import tomli_w
import torch
from commands import Cli, Outcome, command_line
from real_federation import PASSPHRASE, plan_fields, small_plan

from audit.collecting.collect import collect
from audit.collecting.owner import owner_findings, write_findings
from audit.conclude import conclude
from audit.evidence.experiments import MechanismEvidence
from client.app import make_app
from client.owner import Owner, open_owner
from crypto.auditlog import FOLDER, AuditLog, KeptLog
from crypto.identity import load_server
from crypto.trust import load_trust
from protocol.errors import AccessDenied, FileDamaged, LedgerCorrupt, LedgerRollback, Unexpected
from scenarios.federation import Federation, make_federation
from scenarios.grid import LocalGrid
from server.addresses import Addresses, write_addresses
from server.app import run_plan
from server.home import IDENTITY, RUNS
from server.release import release_key
from server.runs import record_end
from server.store import RunStore
from server.submit import prepare_run
from tasks.partition import digits, write_examples

FLIPS: Final = 1
NOBODY: Final = 65534
VERDICTS: Final = {"audit": (0, 1, 2), "doctor": (0, 10)}
"""Exit statuses that say what a command found, and do not mean that it failed."""


@dataclass(frozen=True)
class World:
    """One of everything that fedseal keeps."""

    folder: Path
    run: str
    failed: str

    @property
    def owner(self) -> Path:
        return self.folder / "owners" / "owner-1"

    def arguments(self, verb: str) -> list[str]:
        return verb.format(world=self.folder, run=self.run, failed=self.failed).split()


KEYS: Final = "--passphrase-file {world}/passphrase"
OPERATOR: Final = "--operator-passphrase-file {world}/passphrase"
OWNER: Final = "--home {world}/owners/owner-1"
SERVER: Final = "--home {world}/server"
PKI: Final = "--pki {world}/pki"
SHOW: Final = f"ledger show {OWNER}"
VERIFY: Final = f"ledger verify {OWNER}"
OPEN: Final = f"{VERIFY} {KEYS}"
DOCTOR: Final = f"doctor {OWNER}"
SERVER_DOCTOR: Final = f"doctor {SERVER} --port 1"
LIST: Final = f"runs {SERVER} {OPERATOR}"
BEGIN: Final = f"run {{world}}/plan.toml {SERVER} {KEYS} {OPERATOR}"
RESUME: Final = f"run --resume {{failed}} {SERVER} --out {{world}}/again {KEYS} {OPERATOR}"
REPACK: Final = f"run --resume {{run}} {SERVER} --out {{world}}/again {KEYS} {OPERATOR}"
LOG: Final = f"log verify {SERVER}"
ACTS: Final = f"log show {SERVER}"
ISSUED: Final = f"pki list {PKI}"
RENEW: Final = f"pki renew owner-1 {PKI} --days 60 {KEYS}"
REVOKE: Final = f"pki revoke {PKI} {KEYS}"
PACKAGE: Final = "package verify {world}/result/small.fedseal --key {world}/server/release.pub"
REPORT: Final = "audit verify {world}/result/report.json"
PAGE: Final = "audit render {world}/result/report.json --out {world}/page.html"
FINDINGS: Final = (
    f"audit run {{run}} {SERVER} --out {{world}}/audited --owner {{world}}/owner-1.findings {KEYS}"
)
PLAN: Final = "plan check {world}/plan.toml"
CRL: Final = f"home crl {{world}}/pki/crl.pem {OWNER}"
PINS: Final = (
    "home owner --home {world}/fresh --data {world}/public.npz --dataset x --peers {world}/pki/members"
)
INSTALL: Final = "pki install {world}/pki/answers/owner-1.pem --identity {world}/owners/owner-1/identity"

KINDS: Final[dict[str, tuple[str, ...]]] = {
    "owners/owner-1/policy.toml": (SHOW, OPEN, DOCTOR),
    "owners/owner-1/ledger/ledger.db": (SHOW, VERIFY, DOCTOR),
    "owners/owner-1/state.db": (OPEN,),
    "owners/owner-1/identity/ledger.head": (SHOW, VERIFY, DOCTOR),
    "owners/owner-1/identity/storage.salt": (OPEN,),
    "owners/owner-1/identity/ca.crt": (OPEN, CRL, DOCTOR),
    "owners/owner-1/identity/crl.pem": (OPEN, CRL, DOCTOR),
    "owners/owner-1/identity/transport.crt": (OPEN, DOCTOR),
    "owners/owner-1/identity/signing.crt": (OPEN, DOCTOR),
    "owners/owner-1/identity/transport.key.sealed": (OPEN, DOCTOR),
    "owners/owner-1/identity/signing.key.sealed": (OPEN, DOCTOR),
    "owners/owner-1/identity/request.pem": (INSTALL,),
    "server/addresses.json": (BEGIN,),
    "server/release.key.sealed": (RESUME,),
    "server/release.pub": (PACKAGE,),
    "server/identity/server.crt": (RESUME, SERVER_DOCTOR),
    "server/identity/ca.crt": (LOG, SERVER_DOCTOR),
    "server/identity/crl.pem": (SERVER_DOCTOR,),
    "server/operator/operator.crt": (LIST,),
    "server/operator/operator.key.sealed": (LIST,),
    "server/operator/ca.crt": (LIST,),
    "server/operator/crl.pem": (LIST,),
    "server/members/owner-2.transport.crt": (RESUME, SERVER_DOCTOR),
    "server/control.sock": (LIST,),
    "server/log/acts.jsonl": (LOG, ACTS),
    "server/log/head.json": (LOG,),
    "server/runs/FAILED/run.db": (RESUME,),
    "server/runs/RUN/checkpoint-0001.safetensors": (REPACK,),
    "pki/ca.crt": (ISSUED, RENEW),
    "pki/ca.key.sealed": (REVOKE,),
    "pki/crl.pem": (ISSUED, CRL),
    "pki/issued.jsonl": (ISSUED,),
    "pki/answers/owner-1.pem": (RENEW, INSTALL),
    "pki/members/owner-2.signing.crt": (PINS,),
    "result/small.fedseal/model.onnx": (PACKAGE,),
    "result/small.fedseal/manifest.json": (PACKAGE,),
    "result/small.fedseal/manifest.sig": (PACKAGE,),
    "result/report.json": (REPORT, PAGE),
    "owner-1.findings": (FINDINGS,),
    "plan.toml": (PLAN,),
    "passphrase": (OPEN,),
}
"""Each kind of file, by an example, and the commands that read it."""


def fixed(owner: Owner, _context: object) -> Owner:
    return owner


def made(folder: Path) -> tuple[Federation, Path]:
    shards, public = digits(seed=0, owners=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scenarios.federation._passphrase", lambda: PASSPHRASE)
        federation = make_federation(folder, [(x[:60], y[:60]) for x, y in shards])
    write_examples(folder / "public.npz", *public)
    return federation, folder / "public.npz"


def carried_out(federation: Federation, public: Path) -> RunStore:
    """Run a plan of one round in this process, as a coordinator and three nodes would."""
    server = federation.server_home
    fields = plan_fields(run={"rounds": 1}, privacy={"expected_batch_size": 30.0})
    store = prepare_run(server, small_plan(run={"rounds": 1}, privacy=fields["privacy"]), public)
    (federation.folder / "plan.toml").write_text(tomli_w.dumps(fields), encoding="utf-8")
    owners = [open_owner(home.folder, home.passphrase) for home in federation.owners]
    grid = LocalGrid({100 + n: make_app(partial(fixed, one)) for n, one in enumerate(owners)}, 0)
    run_plan(grid, store, load_trust(server / IDENTITY))
    grid.close()
    evidence = collect(store, server, None)
    mechanism = MechanismEvidence(
        plan_hash=evidence.plan_hash,
        code_hash="a" * 64,
        depth="quick",
        made_at="2026-03-02T08:30:00+00:00",
        conformance=[],
        bounds=[],
    )
    first = federation.owners[0].folder
    write_findings(
        owners[0],
        owner_findings(first, owners[0], mechanism, evidence.run),
        federation.folder / "owner-1.findings",
    )
    for owner in owners:
        owner.close()
    return store


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("world") / "federation"
    federation, public = made(folder)
    server = federation.server_home
    credentials = load_server(server / IDENTITY, PASSPHRASE)
    log = KeptLog(AuditLog(server / FOLDER), "coordinator", credentials.key, credentials.certificate)
    log.record("server.start")
    log.record("server.stop")
    log.sign()
    store = carried_out(federation, public)
    conclude(store, server, release_key(server, PASSPHRASE), folder / "result", lambda _line: None)
    store.close()
    failed = store.folder.name[:-8] + "0" * 8
    shutil.copytree(store.folder, server / RUNS / failed)
    other = RunStore(server / RUNS / failed)
    record_end(other, LedgerCorrupt())
    other.set("state", "failed")
    other.close()
    write_addresses(server, Addresses(1, "127.0.0.1", 2))
    (server / "control.sock").touch()
    (folder / "passphrase").touch(0o600)
    (folder / "passphrase").write_bytes(PASSPHRASE + b"\n")
    return World(folder, store.folder.name, failed)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    return command_line(monkeypatch, capsys, {"COLUMNS": "200"})


def damages(file: Path) -> Iterator[str]:
    """Damage a file in one way after the other, and say how; it is put back after each."""
    content, mode = file.read_bytes(), file.stat().st_mode & 0o777
    places = random.Random(file.name).sample(range(max(len(content), 1)), min(FLIPS, max(len(content), 1)))
    flipped = [(f"flipped at {place}", _flipped(content, place)) for place in places if content]
    for how, data in [("emptied", b""), ("cut", content[: len(content) // 2]), *flipped]:
        file.write_bytes(data)
        yield how
        file.write_bytes(content)
    file.unlink()
    file.mkdir()
    yield "replaced by a folder"
    file.rmdir()
    file.touch(mode)
    file.write_bytes(content)


def _flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :]


def state(folder: Path, among: Collection[str] | None = None) -> dict[str, bytes]:
    """Return what must not change where a command refuses; side files of databases are no content."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.endswith(("-wal", "-shm", "lock"))
        if among is None or str(file.relative_to(folder)) in among
    }


def require_coded(outcome: Outcome, verb: str, where: str) -> None:
    assert "Traceback" not in outcome.out + outcome.err, (where, outcome)
    assert Unexpected.code not in outcome.err + outcome.out, (where, outcome)
    if outcome.status not in VERDICTS.get(verb, (0,)):
        assert outcome.code, (where, outcome)


def example(world: World, kind: str) -> Path:
    return world.folder / kind.replace("FAILED", world.failed).replace("RUN", world.run)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_refused_with_a_code_and_nothing_is_changed(
    world: World, cli: Cli, kind: str, tmp_path: Path
) -> None:
    shutil.copytree(world.folder, tmp_path / "federation", copy_function=shutil.copy2)
    mine = World(tmp_path / "federation", world.run, world.failed)
    file, refusals, kept = example(mine, kind), 0, state(mine.folder).keys()
    for how in damages(file):
        for verb in KINDS[kind]:
            before, arguments = state(mine.folder, kept), mine.arguments(verb)
            outcome = cli(*arguments)
            where = f"{kind} {how}: {' '.join(arguments[:2])}"
            require_coded(outcome, arguments[0], where)
            refusals += outcome.status != 0
            if outcome.status not in (0, *VERDICTS.get(arguments[0], ())):
                assert state(mine.folder, kept) == before, where
    assert refusals > 0


@pytest.fixture
def nobodys(world: World) -> Iterator[World]:
    """A copy of everything for a user without rights, whom this process becomes."""
    if os.geteuid() != 0:
        pytest.skip("only root may become another user; to others the rights apply anyway")
    with tempfile.TemporaryDirectory() as folder:
        mine = World(Path(folder) / "federation", world.run, world.failed)
        shutil.copytree(world.folder, mine.folder)
        for one in (Path(folder), mine.folder, *mine.folder.rglob("*")):
            os.chown(one, NOBODY, NOBODY)
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
        try:
            yield mine
        finally:
            os.seteuid(0)
            os.setegid(0)


def test_a_file_that_may_not_be_read_is_not_called_damaged(nobodys: World, cli: Cli) -> None:
    """It is access denied, or what the file is for is refused; no ledger is said to need a backup."""
    denied = set()
    for kind, verbs in KINDS.items():
        file = example(nobodys, kind)
        mode = file.stat().st_mode & 0o777
        file.chmod(0)
        for verb in verbs:
            arguments = nobodys.arguments(verb)
            outcome, where = cli(*arguments), f"{kind}: {' '.join(arguments[:2])}"
            require_coded(outcome, arguments[0], where)
            assert outcome.code not in (LedgerCorrupt.code, LedgerRollback.code, FileDamaged.code), where
            if outcome.code == AccessDenied.code:
                denied.add(kind)
        file.chmod(mode)
    assert {"owners/owner-1/ledger/ledger.db", "owners/owner-1/policy.toml", "plan.toml"} <= denied
    assert len(denied) > len(KINDS) // 2


def test_a_damaged_ledger_alone_is_told_to_take_a_backup(world: World, cli: Cli, tmp_path: Path) -> None:
    """And with what must follow: the backup lacks what was spent since."""
    home = shutil.copytree(world.owner, tmp_path / "owner")
    database = home / "ledger" / "ledger.db"
    database.write_bytes(database.read_bytes()[:5000])
    outcome = cli("ledger", "show", "--home", home)
    assert outcome.code in (LedgerCorrupt.code, LedgerRollback.code)
    assert "ledger adopt" in outcome.err


def test_a_salt_that_is_gone_is_not_replaced_beside_a_state(world: World, cli: Cli, tmp_path: Path) -> None:
    """A new salt would make the state unreadable for ever, even where the old one is found again."""
    home = shutil.copytree(world.owner, tmp_path / "owner")
    salt = home / "identity" / "storage.salt"
    salt.unlink()
    outcome = cli("ledger", "verify", "--home", home, "--passphrase-file", world.folder / "passphrase")
    assert outcome.code == "FS-DISK-05"
    assert not salt.exists()
