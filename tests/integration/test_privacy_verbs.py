"""`fedseal privacy` as a user meets it: the figures, the words, the picture, the refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import tomli_w
from real_federation import plan_fields

import fedseal
from protocol.accounting import epsilon_after
from protocol.errors import AccountantRefused, PlanInvalid
from tasks.resolve import resolve

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "scenarios" / "plans" / "digits.toml"
TERMINAL = {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def fedseal_says(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command in this process and return its status, its output and its errors."""
    monkeypatch.setattr(os, "environ", os.environ.copy() | TERMINAL)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedseal", *map(str, arguments)])
        status = 0
        try:
            fedseal.main()
        except SystemExit as end:
            status = int(end.code or 0)
        return status, *capsys.readouterr()

    return run


def write_plan(folder: Path, **sections: dict[str, Any]) -> Path:
    file = folder / "plan.toml"
    file.write_text(tomli_w.dumps(plan_fields(**sections)), encoding="utf-8")
    return file


def without_noise(folder: Path) -> Path:
    fields = plan_fields()
    fields["privacy"] = {
        name: value
        for name, value in fields["privacy"].items()
        if name not in ("target_epsilon", "noise_multiplier")
    } | {"noise": "none"}
    file = folder / "plan.toml"
    file.write_text(tomli_w.dumps(fields), encoding="utf-8")
    return file


def test_the_program_prints_tables_and_chart_and_writes_the_picture(tmp_path: Path) -> None:
    picture = tmp_path / "epsilon.svg"
    done = subprocess.run(
        [sys.executable, ROOT / "fedseal.py", "privacy", "plan", DIGITS, "--plot", picture],
        env=os.environ | TERMINAL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for words in (
        "example: one record of one owner; adjacency add/remove",
        "epsilon of one example",
        "13 (with spares)",
        "what would change it",
        "rounds x 2",
        "noise for epsilon 8",
        "lower bound",
        "PRV",
        "RDP",
    ):
        assert words in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert "one example" in " ".join(ElementTree.fromstring(picture.read_text(encoding="utf-8")).itertext())


def test_json_says_what_owners_will_charge(fedseal_says: Any, tmp_path: Path) -> None:
    file = write_plan(tmp_path)
    status, out, _ = fedseal_says("privacy", "plan", file, "--json")
    facts = json.loads(out)
    from console.options import read_plan

    plan = resolve(read_plan(file))
    assert status == 0
    assert facts["unit"] == "example"
    assert facts["accountant"] == "pld"
    assert facts["cross_checks"]["agree"] is True
    assert facts["epsilon"] == epsilon_after(plan, plan.paid_rounds)
    assert facts["epsilon_after"][-1] == {
        "rounds": plan.paid_rounds,
        "epsilon": facts["epsilon"],
        "epsilon_worst": facts["epsilon"],
    }


def test_explain_speaks_of_this_plan(fedseal_says: Any, tmp_path: Path) -> None:
    file = write_plan(tmp_path, privacy={"unit": "client", "max_update_norm": 0.25})
    status, out, _ = fedseal_says("privacy", "explain", file)
    said = " ".join(out.split())
    assert status == 0
    assert "for one client: everything that one owner contributes" in said
    assert "zero-out" in said
    assert "one record of one owner" not in said


def test_explain_as_json(fedseal_says: Any, tmp_path: Path) -> None:
    _, out, _ = fedseal_says("privacy", "explain", write_plan(tmp_path), "--json")
    assert json.loads(out)[0]["heading"] == "The promise"


@pytest.mark.parametrize("verb", ["plan", "explain"])
def test_no_noise_is_loud(fedseal_says: Any, tmp_path: Path, verb: str) -> None:
    status, out, _ = fedseal_says("privacy", verb, without_noise(tmp_path))
    assert status == 0
    assert "protects NO record" in out


def test_no_noise_has_no_number_and_no_picture(fedseal_says: Any, tmp_path: Path) -> None:
    file, picture = without_noise(tmp_path), tmp_path / "epsilon.svg"
    facts = json.loads(fedseal_says("privacy", "plan", file, "--json")[1])
    assert (facts["epsilon"], facts["epsilon_after"]) == ("inf", [])
    status, _, err = fedseal_says("privacy", "plan", file, "--plot", picture)
    assert status == PlanInvalid.exit_code
    assert PlanInvalid.code in err
    assert not picture.exists()


@pytest.mark.parametrize("verb", ["plan", "explain"])
def test_the_gaussian_accountant_is_refused_with_the_reason(
    fedseal_says: Any, tmp_path: Path, verb: str
) -> None:
    file = write_plan(tmp_path, privacy={"accountant": "gdp"})
    status, out, err = fedseal_says("privacy", verb, file)
    assert status == AccountantRefused.exit_code
    assert out == ""
    assert AccountantRefused.code in err
    assert "no bound" in " ".join(err.split())


def test_a_picture_that_cannot_be_written_is_an_error(fedseal_says: Any, tmp_path: Path) -> None:
    status, _, err = fedseal_says(
        "privacy", "plan", write_plan(tmp_path), "--plot", tmp_path / "no" / "x.svg"
    )
    assert status == PlanInvalid.exit_code
    assert "--plot" in err
