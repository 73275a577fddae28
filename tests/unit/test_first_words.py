"""What a person writes or types at the beginning: files of any editor, passphrases, homes, names."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli_w
from commands import Cli, command_line
from real_federation import plan_fields

from console.options import ask_new_passphrase, require_home
from crypto.locks import alone_in
from protocol.errors import (
    HomeBusy,
    HomeMissing,
    HomeOfAnother,
    NameAmbiguous,
    NameUnknown,
    PassphraseTooShort,
    PlanInvalid,
    PolicyInvalid,
    SecretUnavailable,
)
from scenarios.federation import PolicySettings, policy_fields
from scenarios.simulate import Scenario
from server.runs import run_named
from server.store import RunStore

MARK, LATIN = b"\xef\xbb\xbf", "# Universität Zürich\n".encode("latin-1")


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    return command_line(monkeypatch, capsys, {"COLUMNS": "200"})


def editors(text: str) -> list[bytes]:
    """Return a text as editors of several systems save it."""
    windows = text.replace("\n", "\r\n").encode()
    return [text.encode(), MARK + text.encode(), windows, MARK + windows]


def test_toml_of_any_editor_is_read(cli: Cli, tmp_path: Path) -> None:
    plan, scenario, home = tmp_path / "plan.toml", tmp_path / "scenario.toml", tmp_path / "home"
    home.mkdir()
    policy = tomli_w.dumps(policy_fields("ward-7", {"b": "a" * 64, "c": "b" * 64}, PolicySettings()))
    for content in editors(tomli_w.dumps(plan_fields())):
        plan.write_bytes(content)
        for simulated in editors('plan = "plan.toml"\nowners = 3\n'):
            scenario.write_bytes(simulated)
            assert Scenario.read(scenario)[0].owners == 3
    assert cli("plan", "check", plan).status == 0
    for content in editors(policy):
        (home / "policy.toml").write_bytes(content)
        assert cli("ledger", "show", "--home", home).status == 0


def test_toml_in_another_encoding_is_refused_with_the_line_and_a_hint(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    plan = tmp_path / "plan.toml"
    for file, verb, code in (
        (plan, ("plan", "check", plan), PlanInvalid.code),
        (plan, ("demo", "--plan", plan, "--out", tmp_path / "out"), PlanInvalid.code),
        (tmp_path / "s.toml", ("simulate", tmp_path / "s.toml"), PlanInvalid.code),
        (
            tmp_path / "home" / "policy.toml",
            ("ledger", "show", "--home", tmp_path / "home"),
            PolicyInvalid.code,
        ),
    ):
        for content in (b"\n\n" + LATIN, "\n\nrun = 'x'\n".encode("utf-16")):
            file.write_bytes(content)
            outcome = cli(*verb)
            assert outcome.code == code, outcome
            assert "UTF-8" in outcome.err
        assert "line 1" in outcome.err
    missing = cli("demo", "--plan", tmp_path / "none.toml", "--out", tmp_path / "out")
    assert (missing.code, "Traceback" in missing.err) == (PlanInvalid.code, False)


class Typed:
    """A person at a terminal."""

    def __init__(self, *answers: str) -> None:
        self.answers = list(answers)

    def __call__(self, _question: str) -> str:
        return self.answers.pop(0)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.delenv("FEDSEAL_PASSPHRASE", raising=False)
    monkeypatch.setattr("console.options._is_attended", lambda: True)
    return monkeypatch


def test_a_new_passphrase_is_typed_twice(terminal: pytest.MonkeyPatch) -> None:
    good = "five random words here"
    typed = Typed(good, good)
    terminal.setattr("getpass.getpass", typed)
    assert ask_new_passphrase(None, "New") == good.encode()
    assert typed.answers == []
    terminal.setattr("getpass.getpass", Typed(good, good + "x"))
    with pytest.raises(SecretUnavailable, match="differ"):
        ask_new_passphrase(None, "New")
    terminal.setattr("getpass.getpass", Typed("a"))
    with pytest.raises(PassphraseTooShort):
        ask_new_passphrase(None, "New")


def test_short_passphrases_of_files_and_the_environment_make_no_keys(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "passphrase"
    file.touch(0o600)
    file.write_bytes(b"short\n")
    monkeypatch.setenv("FEDSEAL_PASSPHRASE", "short too")
    for verb in (
        ("pki", "init", "--pki", tmp_path / "pki"),
        ("pki", "request", "owner", "--name", "a", "--identity", tmp_path / "identity"),
    ):
        for source in (("--passphrase-file", file), ()):
            assert cli(*verb, *source).code == PassphraseTooShort.code
    assert [one.name for one in tmp_path.iterdir()] == ["passphrase"]


def test_a_home_that_is_none_is_said_before_a_passphrase_is_asked(cli: Cli, tmp_path: Path) -> None:
    none, owner = tmp_path / "none", tmp_path / "owner"
    owner.mkdir()
    (owner / "policy.toml").touch()
    plan = tmp_path / "plan.toml"
    plan.write_text(tomli_w.dumps(plan_fields()), encoding="utf-8")
    for verb in (
        ("server", "--home"),
        ("run", plan, "--home"),
        ("runs", "--home"),
        ("stop", "x", "--home"),
        ("log", "show", "--home"),
        ("log", "verify", "--home"),
    ):
        assert cli(*verb, none).code == HomeMissing.code, verb
        assert cli(*verb, owner).code == HomeOfAnother.code, verb
    for verb in (
        ("client", "--server", "127.0.0.1:1", "--home"),
        ("ledger", "show", "--home"),
        ("ledger", "verify", "--home"),
        ("audit", "owner", "--run", "x", "--out", tmp_path / "x", "--home"),
        ("ledger", "adopt", "--epsilon", 1, "--delta", 0, "--home"),
    ):
        assert cli(*verb, none).code == HomeMissing.code, verb
        assert cli(*verb, tmp_path).code == HomeOfAnother.code, verb
    assert not none.exists()
    assert [file.name for file in owner.iterdir()] == ["policy.toml"]


def test_a_busy_home_is_refused(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").touch()
    require_home(tmp_path, "owner", free=True)
    with alone_in(tmp_path), pytest.raises(HomeBusy):
        require_home(tmp_path, "owner", free=True)


RUNS = ("digits-20261201-101500-3f9a2c1b", "digits-20261202-101500-3f9b0000", "heart-20261201-101500-ab12")


def test_one_name_of_a_run_is_good_everywhere(tmp_path: Path) -> None:
    for name in RUNS:
        store = RunStore(tmp_path / "runs" / name)
        store.set("run", (store.digits or "ab12" * 2) + "0" * 56)
        store.close()
    for name in (RUNS[0], "digits-20261201", "3f9a2c1b", "3f9a", "3f9a2c1b" + "0" * 56, f"x/{RUNS[0]}"):
        assert run_named(tmp_path, name) == RUNS[0]
    for name in ("heart", "ab12ab12", RUNS[2]):
        assert run_named(tmp_path, name) == RUNS[2]
    with pytest.raises(NameAmbiguous, match=RUNS[1]):
        run_named(tmp_path, "digits")
    for name in ("", "nothing", "3f9a2c1b1", "ffff"):
        with pytest.raises(NameUnknown, match=RUNS[2]):
            run_named(tmp_path, name)


def test_a_wrong_name_lists_those_of_the_authority(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "passphrase"
    file.touch(0o600)
    file.write_bytes(b"a passphrase of the tests")
    key, pki = ("--passphrase-file", file), tmp_path / "pki"
    cli("pki", "init", "--pki", pki, *key)
    identity = tmp_path / "ward-a"
    cli("pki", "request", "owner", "--name", "ward-a", "--identity", identity, *key)
    assert cli("pki", "sign", identity / "request.pem", "--pki", pki, *key).status == 0
    for verb in ("renew", "revoke"):
        assert "ward-a" in cli("pki", verb, "ward-b", "--pki", pki, *key).err
