"""Render a report as one self-contained HTML page for people who do not read JSON.

The page needs no network and no script, and its policy forbids both. Every value comes from the report
and is escaped; only explanations are part of the templates. Charts are computed as plain geometry by
`audit.pages.charts` and `audit.pages.experiment_charts`, and drawn by the templates as inline SVG.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from audit import words
from audit.checks.experiments import all_bounds
from audit.checks.owners import owner_findings
from audit.checks.verdict import grouped
from audit.pages.answer import SOURCES, answer, percent_at_most
from audit.pages.charts import accuracy_chart, bytes_chart, epsilon_chart
from audit.pages.deployment import deployment
from audit.pages.experiment_charts import bounds_chart, inversion_panels, roc_charts
from audit.pages.listings import listed_attempts, strongest_bounds

_TEMPLATES = Path(__file__).parent / "templates"

LAYERS: dict[str, tuple[str, ...]] = {
    "guarantee": (
        "noise-on",
        "noise-shares",
        "budget-kept",
        "evaluations-planned",
        "statements-agree",
        "ledger-forward",
        "owner-ledgers",
    ),
    "mechanism": (
        "mechanism-conformance",
        "owner-code",
        "plan-binding",
        "run-complete",
        "cohort-size",
        "openings-agree",
        "model-countersigned",
        "encryption-strength",
        "update-size",
    ),
    "attacks": ("lower-bounds", "membership-inference", "gradient-inversion"),
    "received": ("received-content", "marker-scan", "ciphertext-reuse", "no-server-key"),
    "keys": ("key-custody", "tls", "certificates"),
}
"""Which checks stand in which section of the page."""

FIRST_SCREEN: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Guarantee", ("guarantee",)),
    ("Mechanism", ("mechanism",)),
    ("Attacks and exposure", ("attacks", "received", "keys")),
)
"""Headings of the first screen, after the layers of NIST SP 800-226, and the sections under each."""

_ORDER = {"fail": 0, "missing": 1, "pass": 2, "not applicable": 3}


def html(report: dict[str, Any], environment: Environment | None = None) -> str:
    """Return the page of a report that fits the schema, as text of one HTML document.

    Args:
        report: As `audit.report.build_report` returns it.
        environment: Another one than `templates` returns, for a test that watches what is rendered.
    """
    results = {check["id"]: check for check in report["checks"]}
    grouped = {name: [results[i] for i in ids if i in results] for name, ids in LAYERS.items()}
    placed = {identifier for ids in LAYERS.values() for identifier in ids}
    grouped["mechanism"] += [check for name, check in results.items() if name not in placed]
    return (
        (environment or templates())
        .get_template("report.html.j2")
        .render(
            report=report,
            layers=grouped,
            first_screen=_first_screen(grouped),
            epsilon_chart=epsilon_chart(report),
            accuracy_chart=accuracy_chart(report),
            bytes_chart=bytes_chart(report),
            answer=answer(report),
            sources=SOURCES,
            deployment=deployment(report),
            attempts=listed_attempts(report),
            bounds=strongest_bounds(all_bounds(report)),
            bounds_chart=bounds_chart(report),
            roc_charts=roc_charts(report),
            inversion_panels=inversion_panels(report),
            groups=_reasons(report),
            owner_findings=owner_findings(report),
            owner_names={claim["fingerprint"]: claim["owner"] for claim in report["claims"]},
        )
    )


def _reasons(report: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Return the checks that keep the verdict from PASS, those of one reason together, failures first."""
    unmet = [check for check in report["checks"] if check["status"] not in ("pass", "not applicable")]
    failed = [check for check in unmet if check["status"] != "missing"]
    return grouped(failed) + grouped(check for check in unmet if check["status"] == "missing")


def _first_screen(grouped: dict[str, list[dict[str, Any]]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return each heading with its checks, those that need attention first."""
    return [
        (
            heading,
            sorted(
                (check for name in sections for check in grouped[name]),
                key=lambda check: _ORDER.get(check["status"], 0),
            ),
        )
        for heading, sections in FIRST_SCREEN
    ]


@lru_cache(maxsize=2)
def templates(kind: type[Environment] = Environment) -> Environment:
    """Return the environment of all templates, in which a name that nothing defines is an error."""
    environment = kind(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = ("size", "number", "factor", "moment", "odds", "path", "percent", "duration")
    environment.filters.update({name: getattr(words, name) for name in filters})
    environment.filters["at_most"] = percent_at_most
    return environment
