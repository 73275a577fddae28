"""The command line as a user meets it: help, refusals, certificates, ledgers, simulation, Ctrl-C."""

from __future__ import annotations

import json
import os
import secrets
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import pytest
import tomli_w
import typer
from cryptography.hazmat.primitives.serialization import Encoding
from real_federation import MARK, living, plan_fields, wait_until
from typer.testing import CliRunner

import fedseal
from crypto.authority import create_authority
from crypto.identity import seal_key
from protocol.errors import (
    CapacityExceeded,
    CertificateRefused,
    FedsealError,
    HomeMissing,
    HomeOfAnother,
    LedgerRollback,
    LogBroken,
    NameUnknown,
    NoiseTooSmall,
    PlanInvalid,
    ResultUndeliverable,
    SecretUnavailable,
    ServerUnavailable,
)
from tests.credentials import operator_of

ROOT = Path(__file__).parents[2]
SCENARIO = ROOT / "scenarios" / "ten_owners.toml"
PROMISED = {
    "demo",
    "simulate",
    "server",
    "client",
    "run",
    "doctor",
    "runs",
    "stop",
    "pki init",
    "pki request",
    "pki sign",
    "pki install",
    "pki renew",
    "pki list",
    "pki revoke",
    "home coordinator",
    "home owner",
    "home crl",
    "log show",
    "log verify",
    "data digits",
    "plan check",
    "privacy plan",
    "privacy explain",
    "ledger show",
    "ledger verify",
    "ledger adopt",
    "package verify",
    "audit run",
    "audit owner",
    "audit verify",
}
TERMINAL = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit status, standard output, standard error."""

    status: int
    out: str
    err: str


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run a command in this process, through the same `main` that the program starts with."""
    monkeypatch.setattr(os, "environ", os.environ.copy() | TERMINAL)

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["fedseal", *map(str, arguments)])
        try:
            fedseal.main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        else:
            status = 0
        return Outcome(status, *capsys.readouterr())

    return run


def refused(outcome: Outcome, error: type[FedsealError], *words: str) -> None:
    """Assert that a command ended with a code, a reason, a remedy and a documented status."""
    assert outcome.status == error.exit_code, outcome
    said = " ".join(outcome.err.split())
    assert error.code in said
    assert error.remedy in said
    for word in words:
        assert word in said
    assert "Traceback" not in outcome.err + outcome.out


def commands() -> dict[str, click.Command]:
    """Return every verb of the program by its words."""
    found: dict[str, click.Command] = {}

    def walk(command: Any, words: tuple[str, ...]) -> None:
        inner = getattr(command, "commands", None)
        if inner is None:
            found[" ".join(words)] = command
            return
        for name, one in inner.items():
            walk(one, (*words, name))

    walk(typer.main.get_command(fedseal.app), ())
    return found


def arguments_of(command: click.Command) -> list[click.Argument]:
    """Return a verb's positional parameters."""
    return [parameter for parameter in command.params if isinstance(parameter, click.Argument)]


COMMANDS = commands()


class TestHelp:
    def test_promised_verbs_are_there(self) -> None:
        assert set(COMMANDS) >= PROMISED

    @pytest.mark.parametrize("verb", sorted(COMMANDS))
    def test_help_lists_every_option_and_says_what_it_is_for(self, verb: str) -> None:
        result = CliRunner().invoke(fedseal.app, [*verb.split(), "--help"], env=TERMINAL)
        assert result.exit_code == 0
        for parameter in COMMANDS[verb].params:
            if isinstance(parameter, click.Option):
                assert all(name in result.output for name in parameter.opts)
                assert parameter.help, f"{verb}: {parameter.name} has no help"
        assert COMMANDS[verb].help

    @pytest.mark.parametrize("verb", sorted(verb for verb in COMMANDS if arguments_of(COMMANDS[verb])))
    def test_help_says_what_every_argument_is_for(self, verb: str) -> None:
        for argument in arguments_of(COMMANDS[verb]):
            assert getattr(argument, "help", None), f"{verb}: {argument.name} has no help"

    def test_no_arguments_show_the_verbs(self, cli: Cli) -> None:
        outcome = cli()
        assert all(verb.split()[0] in outcome.out + outcome.err for verb in PROMISED)

    def test_unknown_verb_is_refused(self, cli: Cli) -> None:
        outcome = cli("decrypt")
        assert outcome.status == 2
        assert "decrypt" in outcome.err


def write_plan(folder: Path, **sections: dict[str, Any]) -> Path:
    file = folder / "plan.toml"
    file.write_text(tomli_w.dumps(plan_fields(**sections)), encoding="utf-8")
    return file


class TestPlanCheck:
    @pytest.mark.parametrize("name", ["digits", "digits-ten"])
    def test_bundled_plan(self, cli: Cli, name: str) -> None:
        outcome = cli("plan", "check", ROOT / "scenarios" / "plans" / f"{name}.toml")
        assert outcome.status == 0
        for word in ("plan hash", "noise multiplier", "epsilon", "bytes per parameter", "largest cohort"):
            assert word in outcome.out

    def test_json_is_the_resolved_plan(self, cli: Cli, tmp_path: Path) -> None:
        outcome = cli("plan", "check", write_plan(tmp_path), "--json")
        resolved = json.loads(outcome.out)
        assert resolved["privacy"]["noise_multiplier"] > 0
        assert len(resolved["model"]["initial_sha256"]) == 64

    @pytest.mark.parametrize("epsilon", [0.0, -1.0])
    def test_impossible_epsilon(self, cli: Cli, tmp_path: Path, epsilon: float) -> None:
        file = write_plan(tmp_path, privacy={"target_epsilon": epsilon})
        refused(cli("plan", "check", file), PlanInvalid, "privacy.target_epsilon")

    def test_cohort_of_two(self, cli: Cli, tmp_path: Path) -> None:
        file = write_plan(tmp_path, cohort={"minimum": 2})
        refused(cli("plan", "check", file), PlanInvalid, "cohort.minimum", "cohort.allow_small")

    def test_cohort_of_two_by_name(self, cli: Cli, tmp_path: Path) -> None:
        file = write_plan(tmp_path, cohort={"minimum": 2, "allow_small": True})
        assert cli("plan", "check", file).status == 0

    def test_cohort_that_the_preset_cannot_hold(self, cli: Cli, tmp_path: Path) -> None:
        file = write_plan(tmp_path, cohort={"maximum": 300})
        refused(cli("plan", "check", file), CapacityExceeded, "cohort.maximum")

    def test_noise_too_small_for_the_target(self, cli: Cli, tmp_path: Path) -> None:
        file = write_plan(tmp_path, privacy={"noise_multiplier": 0.3})
        refused(cli("plan", "check", file), NoiseTooSmall, "privacy.noise_multiplier")

    @pytest.mark.parametrize(
        ("sections", "field"),
        [
            ({"privacy": {"epsilon": 1.0}}, "privacy.epsilon"),
            ({"surprise": {"x": 1}}, "surprise"),
            ({"run": {"rounds": "two"}}, "run.rounds"),
            ({"run": {"rounds": 0}}, "run.rounds"),
            ({"run": {"name": "../x"}}, "run.name"),
            ({"privacy": {"delta": 1.0}}, "privacy.delta"),
            ({"privacy": {"sample_rate": 1.5}}, "privacy.sample_rate"),
            ({"encryption": {"quorum": 4}}, "encryption.quorum"),
            ({"encryption": {"preset": "paillier"}}, "encryption.preset"),
            ({"task": {"value_range": [16.0, 0.0]}}, "task.value_range"),
        ],
    )
    def test_wrong_field_is_named(
        self, cli: Cli, tmp_path: Path, sections: dict[str, dict[str, Any]], field: str
    ) -> None:
        refused(cli("plan", "check", write_plan(tmp_path, **sections)), PlanInvalid, field)

    @pytest.mark.parametrize("content", [b"[run", b"\xff\xfe", None])
    def test_file_that_is_no_plan(self, cli: Cli, tmp_path: Path, content: bytes | None) -> None:
        file = tmp_path / "plan.toml"
        if content is not None:
            file.write_bytes(content)
        refused(cli("plan", "check", file), PlanInvalid)

    def test_as_a_process_of_its_own(self, tmp_path: Path) -> None:
        file = write_plan(tmp_path, privacy={"target_epsilon": -1.0})
        command = [sys.executable, "-m", "fedseal", "plan", "check", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        refused(Outcome(done.returncode, done.stdout, done.stderr), PlanInvalid, "privacy.target_epsilon")
        assert done.stdout == ""

    @pytest.mark.parametrize("verb", ["demo", "run"])
    def test_no_verb_starts_with_a_bad_plan(self, cli: Cli, tmp_path: Path, verb: str) -> None:
        file = write_plan(tmp_path, privacy={"target_epsilon": 0.0})
        passphrase = secret_file(tmp_path, "passphrase", "unused")
        arguments = {
            "demo": ("--plan", file, "--out", tmp_path / "out"),
            "run": (file, "--home", tmp_path / "home", "--passphrase-file", passphrase),
        }
        refused(cli(verb, *arguments[verb]), PlanInvalid, "privacy.target_epsilon")
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "home").exists()


def secret_file(folder: Path, name: str, text: str, mode: int = 0o600) -> Path:
    file = folder / name
    file.write_text(text + "\n", encoding="utf-8")
    file.chmod(mode)
    return file


class TestCertificates:
    def test_from_init_to_revoke(self, cli: Cli, tmp_path: Path) -> None:
        pki = tmp_path / "pki"
        authority = ("--passphrase-file", secret_file(tmp_path, "authority", "correct horse battery"))
        holder = ("--passphrase-file", secret_file(tmp_path, "holder", "another passphrase"))
        assert cli("pki", "init", "--pki", pki, *authority).status == 0
        fingerprints = {}
        for name, party in (
            ("coordinator", ("coordinator", "--host", "coordinator.example")),
            ("alice", ("operator", "--name", "alice")),
            ("clinic", ("owner", "--name", "clinic")),
            ("bank", ("owner", "--name", "bank")),
        ):
            identity = tmp_path / name / "identity"
            asked = cli("pki", "request", *party, "--identity", identity, *holder)
            fingerprints[name] = asked.out.split()[-1]
            request = identity / "request.pem"
            other = cli("pki", "sign", request, "--pki", pki, "--fingerprint", "0" * 64, *authority)
            refused(other, CertificateRefused, "another key")
            signed = cli(
                *("pki", "sign", request, "--pki", pki, "--fingerprint", fingerprints[name]), *authority
            )
            assert signed.status == 0, signed
            assert signed.out.split()[-1] == fingerprints[name]
            installed = cli("pki", "install", pki / "answers" / f"{name}.pem", "--identity", identity)
            assert installed.status == 0, installed
        assert installed.out.split()[-1] == fingerprints["bank"], "the fingerprint to pin comes last"
        shown = json.loads(cli("pki", "list", "--pki", pki, "--json").out)
        assert [row["name"] for row in shown].count("bank") == 2
        assert fingerprints["alice"] in {row["fingerprint"] for row in shown}
        assert not any(row["revoked"] for row in shown)
        assert cli("pki", "renew", "bank", "--pki", pki, "--days", 500, *authority).status == 0
        lists = ("--crl", tmp_path / "clinic" / "identity" / "crl.pem")
        assert cli("pki", "revoke", "bank", "--pki", pki, *lists, *authority).status == 0
        again = json.loads(cli("pki", "list", "--pki", pki, "--json").out)
        assert {row["name"] for row in again if row["revoked"]} == {"bank"}
        assert [row["superseded"] for row in again if row["name"] == "bank"] == [True, True, False, False]
        table = cli("pki", "list", "--pki", pki).out
        assert all(
            word in table for word in ("revoked", "superseded", "clinic", fingerprints["clinic"][:16])
        )
        for name in ("clinic", "coordinator"):
            taken = cli("home", "crl", pki / "crl.pem", "--home", tmp_path / name)
            assert taken.out.startswith("4 certificates are revoked"), taken
            assert (tmp_path / name / "identity" / "crl.pem").read_bytes() == (pki / "crl.pem").read_bytes()

    def test_log_of_the_authority(self, cli: Cli, tmp_path: Path) -> None:
        pki = tmp_path / "pki"
        authority = ("--passphrase-file", secret_file(tmp_path, "authority", "correct horse battery"))
        cli("pki", "init", "--pki", pki, *authority)
        first = cli("log", "verify", "--home", pki)
        head = first.out.split()[-1]
        cli("pki", "revoke", "--pki", pki, *authority)
        assert cli("log", "verify", "--home", pki, "--head", head).status == 0
        shown = json.loads(cli("log", "show", "--home", pki, "--json").out)
        assert [act["act"] for act in shown] == ["pki.init", "pki.revoke"]
        assert "pki.revoke" in cli("log", "show", "--home", pki).out
        log = pki / "log" / "acts.jsonl"
        log.write_bytes(log.read_bytes().replace(b"pki.revoke", b"pki.revoked"))
        refused(cli("log", "verify", "--home", pki), LogBroken)
        assert cli("log", "verify", "--home", pki, "--head", "nonsense").status == 2

    def test_home_is_laid_out_around_an_identity(self, cli: Cli, tmp_path: Path) -> None:
        for verb in (
            ("home", "coordinator", "--members", tmp_path),
            ("home", "owner", "--data", tmp_path / "x", "--dataset", "x", "--peers", tmp_path),
        ):
            refused(cli(*verb, "--home", tmp_path / "home"), CertificateRefused)
        refused(cli("home", "crl", tmp_path / "crl.pem", "--home", tmp_path), CertificateRefused)

    def test_wrong_passphrase(self, cli: Cli, tmp_path: Path) -> None:
        pki = tmp_path / "pki"
        right, wrong = (
            secret_file(tmp_path, "right", "the right passphrase"),
            secret_file(tmp_path, "wrong", "not it"),
        )
        cli("pki", "init", "--pki", pki, "--passphrase-file", right)
        outcome = cli("pki", "revoke", "--pki", pki, "--passphrase-file", wrong)
        refused(outcome, SecretUnavailable)
        assert "not it" not in outcome.err

    def test_passphrase_file_that_others_can_read(self, cli: Cli, tmp_path: Path) -> None:
        open_file = secret_file(tmp_path, "open", "everybody reads this", mode=0o644)
        outcome = cli("pki", "init", "--pki", tmp_path / "pki", "--passphrase-file", open_file)
        refused(outcome, SecretUnavailable, "0600")
        assert not (tmp_path / "pki").exists()

    def test_second_authority_in_one_folder(self, cli: Cli, tmp_path: Path) -> None:
        file = secret_file(tmp_path, "authority", "correct horse battery")
        assert cli("pki", "init", "--pki", tmp_path / "pki", "--passphrase-file", file).status == 0
        again = cli("pki", "init", "--pki", tmp_path / "pki", "--passphrase-file", file)
        refused(again, CertificateRefused, "already")

    def test_missing_folder(self, cli: Cli, tmp_path: Path) -> None:
        refused(cli("pki", "list", "--pki", tmp_path / "nothing"), CertificateRefused)

    @pytest.mark.parametrize("party", [("owner",), ("coordinator", "--name", "x"), ("nobody",)])
    def test_request_wants_a_party_and_its_name(
        self, cli: Cli, tmp_path: Path, party: tuple[str, ...]
    ) -> None:
        file = secret_file(tmp_path, "holder", "another passphrase")
        identity = ("--identity", tmp_path / "identity", "--passphrase-file", file)
        assert cli("pki", "request", *party, *identity).status == 2
        assert not (tmp_path / "identity").exists()


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    """The bundled scenario with two rounds, in a process of its own."""
    folder = tmp_path_factory.mktemp("simulated")
    (folder / "plans").mkdir()
    plan = (SCENARIO.parent / "plans" / "digits-ten.toml").read_text(encoding="utf-8")
    assert "\nrounds = 12\n" in plan
    shortened = plan.replace("\nrounds = 12\n", "\nrounds = 2\n")
    (folder / "plans" / "digits-ten.toml").write_text(shortened, encoding="utf-8")
    (folder / SCENARIO.name).write_bytes(SCENARIO.read_bytes())
    command = [sys.executable, "-m", "fedseal", "simulate", str(folder / SCENARIO.name)]
    command += ["--out", str(folder / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    return Outcome(done.returncode, done.stdout, done.stderr), folder / "out"


class TestSimulation:
    def test_ten_owners_finish(self, simulated: tuple[Outcome, Path]) -> None:
        outcome, _folder = simulated
        assert outcome.status == 0, outcome
        assert "Traceback" not in outcome.err
        assert "epsilon" in outcome.out

    def test_ledger_as_text_and_as_json(self, cli: Cli, simulated: tuple[Outcome, Path]) -> None:
        home = simulated[1] / "owners" / "owner-3"
        text, fields = (
            cli("ledger", "show", "--home", home),
            cli("ledger", "show", "--home", home, "--json"),
        )
        assert text.status == fields.status == 0
        shown = json.loads(fields.out)
        (run,) = shown["runs"].values()
        assert run["sealed"] == 2
        assert 0 < shown["epsilon"] == run["epsilon"] <= 8.0
        assert shown["dataset"] == "owner-3-records"
        for word in ("owner-3-records", f"{shown['epsilon']:.4f}", "chain verified", "remain"):
            assert word in text.out

    def test_changed_ledger_is_not_shown(self, cli: Cli, simulated: tuple[Outcome, Path]) -> None:
        home = simulated[1] / "owners" / "owner-4"
        database = sqlite3.connect(home / "ledger" / "ledger.db")
        refund = "CAST(replace(CAST(body AS TEXT), 'commit', 'void') AS BLOB)"
        changed = database.execute(
            f"UPDATE record SET body = {refund} WHERE CAST(body AS TEXT) LIKE '%commit%'"
        )
        assert changed.rowcount == 2
        database.commit()
        database.close()
        outcome = cli("ledger", "show", "--home", home)
        assert outcome.status == 3
        assert "FS-LEDGER-01" in outcome.err

    def test_ledger_is_verified_with_its_head_copy(self, cli: Cli, simulated: tuple[Outcome, Path]) -> None:
        home = simulated[1] / "owners" / "owner-5"
        text, fields = (
            cli("ledger", "verify", "--home", home),
            cli("ledger", "verify", "--home", home, "--json"),
        )
        assert text.status == fields.status == 0
        shown = json.loads(fields.out)
        assert f"{shown['records']} records form one chain" in text.out
        assert shown["head"]["head"] in text.out
        (home / "identity" / "ledger.head").unlink()
        refused(cli("ledger", "verify", "--home", home), LedgerRollback, "head copy is missing")

    def test_ledger_that_is_gone_is_not_begun_by_verifying(
        self, cli: Cli, simulated: tuple[Outcome, Path]
    ) -> None:
        home = simulated[1] / "owners" / "owner-6"
        (home / "ledger" / "ledger.db").unlink()
        refused(cli("ledger", "verify", "--home", home), LedgerRollback, "no ledger")
        assert not (home / "ledger" / "ledger.db").exists()

    def test_home_without_a_policy(self, cli: Cli, tmp_path: Path) -> None:
        refused(cli("ledger", "show", "--home", tmp_path), HomeOfAnother, "policy.toml")
        refused(cli("ledger", "show", "--home", tmp_path / "none"), HomeMissing, "none")

    def test_scenario_with_an_unknown_key(self, cli: Cli, tmp_path: Path) -> None:
        file = tmp_path / "scenario.toml"
        file.write_text('plan = "plan.toml"\nowners = 3\nspeed = 2\n', encoding="utf-8")
        refused(cli("simulate", file), PlanInvalid, "speed")


class TestParties:
    def test_run_without_a_coordinator(self, cli: Cli, tmp_path: Path) -> None:
        passphrase = secret_file(tmp_path, "passphrase", "unused")
        plan = write_plan(tmp_path)
        keys = ("--passphrase-file", passphrase, "--operator-passphrase-file", passphrase)
        refused(cli("run", plan, "--home", tmp_path, *keys), CertificateRefused, "operator.crt")
        (tmp_path / "operator").mkdir()
        authority = create_authority("Test CA", 2)
        operator, trust = operator_of(authority, "alice", 1), authority.revocation_list([], 1)
        for name, part in (
            ("operator.crt", operator.certificate),
            ("ca.crt", authority.certificate),
            ("crl.pem", trust),
        ):
            (tmp_path / "operator" / name).write_bytes(part.public_bytes(Encoding.PEM))
        seal_key(tmp_path / "operator" / "operator.key.sealed", operator.key, b"unused")
        refused(cli("run", plan, "--home", tmp_path, *keys), ServerUnavailable)
        refused(cli("runs", "--home", tmp_path, *keys[2:]), ServerUnavailable)
        refused(cli("stop", "small", "--home", tmp_path, *keys[2:]), NameUnknown, "there are: none")

    def test_no_passphrase_at_all(self, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "policy.toml").touch()
        monkeypatch.setattr("sys.stdin", open(os.devnull, encoding="utf-8"))  # noqa: SIM115
        try:
            outcome = cli("client", "--home", tmp_path, "--server", "127.0.0.1:1")
        finally:
            sys.stdin.close()
        refused(outcome, SecretUnavailable, "FEDSEAL_PASSPHRASE")

    def test_demo_into_a_folder_that_is_not_empty(self, cli: Cli, tmp_path: Path) -> None:
        (tmp_path / "mine.txt").write_text("keep", encoding="utf-8")
        refused(cli("demo", "--out", tmp_path), ResultUndeliverable, "--out")
        assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.long
def test_ctrl_c_stops_every_process_and_says_how_to_go_on(tmp_path: Path) -> None:
    mark, out = secrets.token_hex(8), tmp_path / "out"
    command = [sys.executable, "-m", "fedseal", "demo", "--out", str(out)]
    with (tmp_path / "output").open("wb") as output:
        child = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {MARK: mark, **TERMINAL},
            # A parent that runs in the background may ignore the signal, and children inherit that.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
    try:
        wait_until(lambda: _all_parties_talk(out), 120, "a running demo")
        started = living(mark)
        child.send_signal(signal.SIGINT)
        wait_until(lambda: child.poll() is not None, 60, "the end of the demo")
        # Flower's process for the run ends by itself once its parent has ended.
        wait_until(lambda: not living(mark), 10, lambda: f"the end of all processes: {living(mark)}")
    finally:
        child.kill()
        child.wait()
    said = (tmp_path / "output").read_text(encoding="utf-8")
    assert child.returncode == 130, said
    assert len(started) >= 6, "the demo, the coordinator, its executor and three owners"
    assert "To go on" in said
    assert "Traceback" not in said


def _all_parties_talk(out: Path) -> bool:
    """Tell whether all owners have joined the run."""
    logs = [out / "logs" / f"owner-{number}.log" for number in (1, 2, 3)]
    return all(log.exists() and "query.join answered" in log.read_text(encoding="utf-8") for log in logs)
