"""The report's page of every kind of run: it renders, each branch of its templates, and stays readable."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from audit.pages import render
from audit.report import build_report
from tests.unit.audit_evidence import NOW
from tests.unit.audit_gallery import run_of

SHAPES: dict[str, dict[str, Any]] = {
    "one round": {"rounds": 1},
    "24 rounds": {"rounds": 24},
    "25 rounds": {"rounds": 25},
    "1,000 rounds": {"rounds": 1000},
    "one owner": {"owners": 1},
    "100 owners": {"owners": 100},
    "no noise": {"noise": "none"},
    "shared noise": {"noise": "distributed"},
    "unit client": {"unit": "client"},
    "unit client, shared noise": {"unit": "client", "noise": "distributed"},
    "evaluated": {"evaluated": True},
    "evaluated without noise": {"evaluated": True, "noise": "none"},
    "evaluated, none opened": {"evaluated": True, "finished": 0, "state": "paused"},
    "1,000 rounds, evaluated": {"rounds": 1000, "evaluated": True},
    "paused": {"state": "paused", "finished": 3},
    "failed before a round": {"state": "failed", "finished": 0},
    "no public data": {"measured": False, "deployment": None},
    "no package": {"deployment": None},
    "no statements": {"signed": False},
    "simulated": {"kind": "simulation"},
    "nothing": {
        "state": "failed", "finished": 0, "owners": 1, "transcript": [], "keys": [], "certificates": [],
        "session": None,
    },
}  # fmt: skip


@cache
def bare(shape: str) -> dict[str, Any]:
    return build_report(run_of(**SHAPES[shape]), NOW)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_page_of_every_shape_of_run_is_rendered(shape: str) -> None:
    page = render.html(bare(shape))
    assert page.rstrip().endswith("</html>")
    assert "Undefined" not in page
