"""SECURITY.md names a test for every threat, and every named test is there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
THREATS = 30
_TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def rows() -> list[list[str]]:
    """Return number, threat, defence and tests of every row of the table."""
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    table = text.split("## Threats, defences, tests")[1].split("\n## ")[0]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if "|" in line
    ]
    return [row for row in cells if row[0].isdigit()]


@cache
def named_in(file: Path) -> frozenset[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, kinds))


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row[0]} {row[1][:30]}")
def test_every_threat_has_a_test_that_is_there(row: list[str]) -> None:
    named = _TEST.findall(row[3])
    assert named, "no test"
    assert row[2], "no defence"
    for file, name in named:
        assert (ROOT / file).is_file(), file
        assert name.startswith("test_")
        assert name in named_in(ROOT / file), f"{file} has no {name}"


def test_no_threat_is_left_out() -> None:
    assert {int(row[0]) for row in rows()} == set(range(1, THREATS + 1))


def test_every_file_of_attacks_is_named() -> None:
    named = {file for row in rows() for file, _ in _TEST.findall(row[3])}
    others = {"tests/attacks/test_threat_table.py"}
    files = {str(file.relative_to(ROOT)) for file in (ROOT / "tests" / "attacks").glob("test_*.py")}
    missing = files - named - others
    assert not missing, f"attacks that the table does not mention: {sorted(missing)}"
