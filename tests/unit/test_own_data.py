"""What an owner's own screen says of its data at `home owner` and in the doctor: counts, and no value."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from typer.testing import CliRunner, Result

from console.doctor_home import check_home
from console.findings import Finding
from fedseal import app
from protocol.errors import DataInvalid
from scenarios.federation import DATA, Federation, make_federation
from tasks.partition import write_examples

NOW = datetime.now(UTC) + timedelta(hours=1)
PLAN: dict[str, dict[str, Any]] = {
    "run": {"name": "wards", "rounds": 4},
    "task": {
        "name": "image-classification",
        "input_shape": [3],
        "value_range": [0.0, 100.0],
        "classes": 2,
    },
    "model": {"name": "linear"},
    "cohort": {"minimum": 3, "maximum": 8},
    "training": {"local_steps": 5, "learning_rate": 0.5},
    "privacy": {"noise": "none", "sample_rate": 0.5, "expected_batch_size": 8.0},
}
X = np.array([[61, 4, np.nan], [44, 1, 7], [52, 0, 900], [38, 2, 2], [70, 3, 3]], dtype=np.float32)
Y = np.array([[1], [0], [0], [0], [5]])
KEPT = "5 rows: 2 kept, 3 left out (1 not finite, 1 outside task.value_range, 1 label outside"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    split = np.zeros((4, 3), dtype=np.float32), np.zeros(4, dtype=np.int64)
    return make_federation(tmp_path_factory.mktemp("own") / "made", [split] * 3)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    file = tmp_path / "plan.toml"
    file.write_text(tomli_w.dumps(PLAN), encoding="utf-8")
    return file


@pytest.fixture
def bare(made: Federation, tmp_path: Path) -> Path:
    """A home with an identity and nothing else."""
    home = shutil.copytree(made.owners[0].folder, tmp_path / "home")
    for name in ("policy.toml", DATA):
        (home / name).unlink()
    return home


@pytest.fixture
def owner(made: Federation, tmp_path: Path) -> Path:
    return shutil.copytree(made.owners[0].folder, tmp_path / "owner")


def lay_out(made: Federation, home: Path, data: Path, *more: str) -> Result:
    peers = str(made.folder / "pki" / "members")
    options = ["--home", str(home), "--data", str(data), "--dataset", "wards", "--peers", peers, *more]
    return CliRunner().invoke(app, ["home", "owner", *options])


def of(home: Path, name: str) -> Finding:
    (finding,) = [finding for finding in check_home(home, NOW) if finding.name == name]
    return finding


# --- home owner --------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"age,sex,label\n61,1,0\n", b"", b"PK\x03\x04"])
def test_a_file_that_no_node_could_read_makes_no_home(
    made: Federation, bare: Path, tmp_path: Path, content: bytes
) -> None:
    data = tmp_path / "ward.csv"
    data.write_bytes(content)
    result = lay_out(made, bare, data)
    assert isinstance(result.exception, DataInvalid)
    assert result.exception.code == "FS-DATA-01"
    assert not (bare / DATA).exists()
    assert not (bare / "policy.toml").exists()
    data.unlink()
    result = lay_out(made, bare, data)
    assert isinstance(result.exception, DataInvalid)
    assert result.exception.code == "FS-DATA-03"
    assert not (bare / "policy.toml").exists()


def test_the_owner_is_told_what_is_used_and_what_is_not(
    made: Federation, bare: Path, tmp_path: Path, plan: Path
) -> None:
    data = tmp_path / "ward.npz"
    write_examples(data, X, Y)
    result = lay_out(made, bare, data, "--plan", str(plan))
    assert result.exit_code == 0, result.output
    assert KEPT in result.output
    assert "classes 0: 100.0%" in result.output
    assert "warning: 2 usable rows are fewer than the plan's expected batch of 8" in result.output
    assert (bare / DATA).read_bytes() == data.read_bytes()


def test_without_a_plan_the_owner_is_told_what_can_be_said(
    made: Federation, bare: Path, tmp_path: Path
) -> None:
    data = tmp_path / "ward.npz"
    write_examples(data, X, Y)
    result = lay_out(made, bare, data)
    assert result.exit_code == 0, result.output
    assert "5 rows: 4 kept, 1 left out (1 not finite); classes 0: 75.0%, 5: 25.0%" in result.output
    assert "--plan FILE" in result.output
    for value in ("61", "44", "52", "900", "38", "70"):
        assert value not in result.output


def test_a_plan_of_another_shape_makes_no_home(
    made: Federation, bare: Path, tmp_path: Path, plan: Path
) -> None:
    data = tmp_path / "ward.npz"
    write_examples(data, X[:, :2], Y)
    assert isinstance(lay_out(made, bare, data, "--plan", str(plan)).exception, DataInvalid)
    assert not (bare / "policy.toml").exists()


# --- doctor ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("content", "code"), [(b"age,sex\n", "FS-DATA-01"), (b"", "FS-DATA-01")])
def test_the_doctor_reads_the_file(owner: Path, content: bytes, code: str) -> None:
    (owner / DATA).write_bytes(content)
    finding = of(owner, "data file")
    assert (finding.status, finding.detail[: len(code)]) == ("fail", code)
    (owner / DATA).unlink()
    finding = of(owner, "data file")
    assert (finding.status, finding.detail[:10]) == ("fail", "FS-DATA-03")


def test_the_doctor_counts_rows_and_warns_of_too_few(owner: Path, plan: Path) -> None:
    write_examples(owner / DATA, X, Y)
    rows = of(owner, "rows")
    assert rows.status == "ok"
    assert "5 rows: 4 kept" in rows.detail
    result = CliRunner().invoke(app, ["doctor", "--home", str(owner), "--plan", str(plan), "--json"])
    (rows,) = [Finding(**one) for one in json.loads(result.stdout) if one["name"] == "rows"]
    assert rows.status == "warn"
    assert KEPT in rows.detail
    assert "fewer than the plan's expected batch of 8" in rows.detail
    write_examples(owner / DATA, X * np.nan, Y)
    rows = of(owner, "rows")
    assert (rows.status, rows.detail[:22]) == ("warn", "no row can be used; fo")
