"""The report's page of every kind of run: it renders, each branch of its templates, and stays readable."""

from __future__ import annotations

import copy
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from jinja2 import DictLoader, StrictUndefined

from audit.checks import experiments
from audit.checks.exposure import exposure
from audit.checks.next_steps import next_steps
from audit.checks.verdict import checks, verdict
from audit.evidence.run import RunEvidence
from audit.pages import render
from audit.pages.answer import answer, band_of, percent_at_most
from audit.pages.deployment import deployment
from audit.pages.listings import MOST_ATTEMPTS, listed_attempts
from audit.report import build_report
from audit.statistics.roc import ceiling
from protocol.exposure import detection_of_steps
from tests.unit.audit_evidence import NOW, OWNERS, evidence, evidence_fields
from tests.unit.audit_experiments import findings, findings_fields, lab, lab_fields
from tests.unit.audit_gallery import run_of, shipped
from tests.unit.template_branches import WatchedEnvironment

PLANS = Path(__file__).parents[2] / "scenarios" / "plans"
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
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
    "100 owners, no statements": {"owners": 100, "signed": False},
    "100 owners, shared noise": {"owners": 100, "noise": "distributed"},
    "simulated": {"kind": "simulation"},
    "nothing": {
        "state": "failed", "finished": 0, "owners": 1, "transcript": [], "keys": [], "certificates": [],
        "session": None,
    },
}  # fmt: skip


@cache
def bare(shape: str) -> dict[str, Any]:
    """A report of a run without experiments and without owners' findings."""
    return build_report(run_of(**SHAPES[shape]), NOW)


@cache
def audited() -> dict[str, Any]:
    return build_report(evidence(), NOW, KEY, lab(), findings())


def rejudged(report: dict[str, Any], kind: str = "deployment") -> dict[str, Any]:
    """The same sections, judged as they are now."""
    report["checks"] = checks(report)
    report["verdict"] = verdict(report["checks"], kind)
    return report


def odd() -> list[dict[str, Any]]:
    """Reports in which something is as it should never be."""
    signed = copy.deepcopy(audited())
    signed["server"]["has_secret_key"] = True
    signed["tls"] |= {"cipher": None, "client_certificate_required": False}
    signed["keys"][0] |= {"place": "sealed file", "encrypted_at_rest": False, "mode": None}
    signed["encryption"] |= {"exact": False, "frames": "seal"}
    for claim in signed["claims"]:
        claim["ledger_went_back"] = True
    lab_ = signed["laboratory"]
    lab_["mechanism"]["conformance"][0]["p_value"] = 0.0
    lab_["mechanism"]["bounds"][0] |= {"epsilon": 2.5}
    for bound in lab_["mechanism"]["bounds"]:
        if bound["observer"] == "exported model":
            bound["claimed"] = None
    lab_["markers"][0]["hits"], lab_["markers"][1]["control_hits"] = 1, None
    for attack in lab_["membership"]:
        attack["ceiling_at_1_percent"] = None
    for finding in signed["findings"]:
        for key in finding["body"]["custody"]:
            key |= {"place": "sealed file", "encrypted_at_rest": False}
    tables = [finding["body"]["ledger"] for finding in signed["findings"]]
    tables[0] |= {"cap_epsilon": None, "cap_delta": None}
    tables[1] |= {"spent_epsilon": None, "this_run_epsilon": None}
    tables[2] |= {"cap_epsilon": 0.0}
    tables[3] |= {"dataset": "records of 2026"}
    crowd = copy.deepcopy(bare("100 owners"))
    crowd["claims"][0]["ledger_went_back"] = True
    crowd["claims"][1]["disagreements"] = ["epsilon"]
    collusion = copy.deepcopy(bare("shared noise"))
    collusion["claims"][0]["spent"]["epsilon_worst"] = "inf"
    partly = build_report(evidence(), NOW, KEY, None, findings(mechanism=lab_fields()["mechanism"]))
    capless = findings(ledger=findings_fields(OWNERS[0])["ledger"] | {"cap_epsilon": None})[:1]
    unmeasured = lab(membership=[])
    forged, keyed = copy.deepcopy(audited()), copy.deepcopy(audited())
    forged["findings"][0]["valid"] = False
    keyed["server"]["has_secret_key"] = True
    return [
        rejudged(signed),
        rejudged(crowd),
        rejudged(collusion),
        rejudged(forged),
        rejudged(keyed),
        build_report(evidence("none"), NOW, None, lab("none"), findings("none")),
        build_report(evidence(deployment={"name": "readmission"}), NOW),
        partly,
        build_report(evidence(), NOW, KEY, None, capless),
        build_report(evidence(), NOW, KEY, unmeasured, findings()),
        build_report(evidence(kind="simulation"), NOW, KEY, lab()),
        build_report(evidence(), NOW, None, lab(), findings()),
    ]


def everything() -> list[dict[str, Any]]:
    return [*map(bare, SHAPES), audited(), *odd()]


def test_every_branch_of_every_template_is_rendered() -> None:
    """A branch that no report here reaches would fail first in front of a reader."""
    templates = render.templates(WatchedEnvironment)
    assert isinstance(templates, WatchedEnvironment)
    for report in everything():
        page = render.html(report, templates)
        assert page.rstrip().endswith("</html>")
    assert len(templates.branches) > 300
    assert templates.unseen() == []
    compiled = {branch.split(":")[0] for branch in templates.branches}
    shipped = {name for name in templates.list_templates() if name.endswith(".j2")}
    assert shipped - compiled <= {"sections/glossary.html.j2"}, "a template that is never included"


def test_every_shipped_plan_ends_with_its_report() -> None:
    files = sorted(PLANS.glob("*.toml"))
    assert len(files) >= 7
    for file in files:
        run = shipped(file)
        report = build_report(run_of(owners=run.cohort.maximum, run=run), NOW)
        assert {check["status"] for check in report["checks"]} <= {"pass", "missing"}, file.name
        page = render.html(report)
        assert f"{run.run.rounds} of {run.run.rounds} rounds, finished" in page
        assert len(page) < 200_000


def test_a_branch_that_is_not_rendered_is_seen() -> None:
    source = "{% if x %}a{% elif y %}b{% else %}c{% endif %}{% for z in [] %}d{% endfor %}"
    source += "{{ 1 if x else 2 }}"
    environment = WatchedEnvironment(loader=DictLoader({"t": source}))
    assert environment.get_template("t").render(x=True, y=False) == "a1"
    kinds = [" ".join(branch.split()[1:2]) for branch in environment.unseen()]
    assert sorted(kinds) == ["else", "for", "if", "no"]


def test_names_without_a_value_are_errors() -> None:
    assert render.templates().undefined is StrictUndefined


def test_a_page_of_a_thousand_rounds_stays_readable() -> None:
    for shape in ("1,000 rounds", "1,000 rounds, evaluated"):
        report = bare(shape)
        page = render.html(report)
        assert len(page) < 150_000
        shown = listed_attempts(report)
        assert len(shown) == MOST_ATTEMPTS
        assert (shown[0]["round"], shown[-1]["round"]) == (1, 1000)
        assert page.count('<tr role="row">') < 150
        assert f"{MOST_ATTEMPTS} of {len(report['rounds'])} attempts are listed" in page
    assert len(render.html(bare("100 owners"))) < 400_000


def test_void_attempts_of_a_long_run_are_listed_among_others() -> None:
    report = copy.deepcopy(bare("1,000 rounds"))
    for number in (17, 404, 999):
        report["rounds"][number] |= {"void": True, "reason": "FS-RUN-01"}
    assert sum(entry["void"] for entry in listed_attempts(report)) == 3
    assert len(listed_attempts(report)) == MOST_ATTEMPTS


# --- can I sign this? --------------------------------------------------------------------------------


def first_screen(report: dict[str, Any]) -> str:
    page = render.html(report)
    inner = page[page.index('<div class="card verdict"') : page.index('<h3 class="checked">')]
    return " ".join(re.sub(r"<[^>]+>", " ", inner).replace("&nbsp;", "\u00a0").split())


def test_the_first_screen_answers_what_a_signer_asks() -> None:
    report = audited()
    text = first_screen(report)
    assert "Tabular classification: one of 2 classes, from 24 values." in text
    assert all(owner in text for owner in OWNERS)
    assert "87.7 % on public data" in text
    assert "Epsilon 1.998 delta 0.00001, for one record" in text
    assert "NIST SP 800-226" in text
    assert "Not small." in text
    assert "fedseal audit verify report.json --key release.pub" in text
    lost = exposure(report)
    right, found = (percent_at_most(share).replace("\u00a0", " ") for share in (lost.right, lost.found))
    assert f"is right in {right} of cases" in text
    assert f"{found} of those that were are found" in text


def test_a_pass_does_not_say_that_epsilon_is_small() -> None:
    text = first_screen(audited())
    assert "PASS does not say that the promise is strong" in text
    assert [band_of(x) for x in (0.0, 1.0, 1.01, 10.0, 10.01, float("inf"))] == [
        "small", "small", "middle", "middle", "large", "none",
    ]  # fmt: skip


def test_a_pass_that_is_not_signed_and_one_of_a_simulation_look_different() -> None:
    real = build_report(evidence(), NOW, KEY, lab(), findings())
    unsigned = build_report(evidence(), NOW, None, lab(), findings())
    simulated = build_report(evidence(kind="simulation"), NOW, KEY, lab())
    heads = [re.search(r'<div class="verdict-head ([^"]+)">', render.html(one)) for one in (real, unsigned)]
    assert [head and head[1] for head in heads] == ["PASS signed", "PASS unsigned"]
    page = render.html(simulated)
    assert '<div class="verdict-head PASS simulation">' in page
    assert "PASS <small>of a simulation</small>" in page
    assert "<title>PASS of a simulation" in page


def test_what_was_not_tried_is_not_said_to_be_tried() -> None:
    page = render.html(bare("24 rounds"))
    assert "No attack was tried for this report." in page
    assert "was tried, on public" not in page
    assert "The attacks in this report" not in page
    assert "found and signed by the owners" not in page
    assert "The attacks tried here" not in first_screen(bare("24 rounds"))
    assert "What a skilled attacker could learn was tried" in render.html(audited())
    assert "The attacks tried here found" in first_screen(audited())


def test_equal_reasons_are_said_once_with_their_owners() -> None:
    for shape, names in (("24 rounds", 4), ("100 owners", 100)):
        reasons = bare(shape)["verdict"]["reasons"]
        assert len(reasons) == 2
        assert reasons[0].count("; ") == 5
        assert reasons[0].endswith(f": {experiments.REMEDY}")
        assert reasons[1].count("hospital-") == names
        assert reasons[1].count("fedseal audit owner") == 1
    report = copy.deepcopy(audited())
    for finding in report["findings"]:
        finding["body"]["ledger"]["cap_epsilon"] = 0.1
    gap = next(check["gap"] for check in checks(report) if check["id"] == "owner-ledgers")
    assert gap.count("more is spent than its cap allows") == 1
    assert all(owner in gap for owner in OWNERS)


def test_many_rounds_are_named_as_spans() -> None:
    report = copy.deepcopy(bare("1,000 rounds"))
    for entry in report["rounds"]:
        entry["agreeing_openings"] = 0
    gap = next(check["gap"] for check in checks(report) if check["id"] == "openings-agree")
    assert gap == "Too few valid, equal signatures in round 1 to 1000."


def test_a_deployment_is_told_in_words() -> None:
    facts = {
        "package": "digits.fedseal", "accuracy_after": 0.95, "size_bytes_after": 6904, "size_ratio": 2.83,
        "brand_new_fact": True, "files": {"model.onnx": {"size_bytes": 5}},
        "steps": [{"step": "prune", "asked": "half", "reached": "none", "cpu_s": 0.25}],
    }  # fmt: skip
    report = build_report(evidence(deployment=facts), NOW)
    told = deployment(report)
    names = [name for name, _ in told.facts]
    assert names[:2] == ["Package", "Accuracy after compression, on public data"]
    assert told.steps == [("Prune", "half", "none", "0.2 s")]
    page = render.html(report)
    section = page[page.index('<section id="deployment"') : page.index('<section id="dpia"')]
    assert "Brand new fact" in section
    assert "Files, model.onnx, size bytes" in section
    assert not re.search(r"steps|[a-z]+_[a-z]+|6904", section)
    assert "6.9 kB" in section


# --- what the best attack could do -------------------------------------------------------------------


def test_the_best_attack_is_that_of_the_whole_curve_and_never_above_the_promise() -> None:
    report = audited()
    promise, lost = report["promise"], exposure(audited())
    steps = promise["local_steps"] * max(claim["sealed_attempts"] for claim in report["claims"])
    assert lost.found == detection_of_steps(
        promise["sample_rate"], promise["noise_multiplier"], steps, 0.01
    )
    for shape in SHAPES:
        if "no noise" not in shape and "without noise" not in shape:
            lost = exposure(bare(shape))
            assert 0.5 <= lost.right <= 1.0
            assert 0.01 <= lost.found <= ceiling(lost.epsilon, lost.delta, 0.01) + 1e-9, shape
    for shape in ("no noise", "evaluated without noise"):
        assert exposure(bare(shape)).found == exposure(bare(shape)).right == 1.0


def test_evaluation_helps_the_attacker() -> None:
    plain, evaluated = exposure(bare("24 rounds")), copy.deepcopy(bare("24 rounds"))
    evaluated["promise"]["evaluation"] = {"epsilon": 1.0, "delta": 1e-6}
    for claim in evaluated["claims"]:
        claim["spent"] |= {"evaluation_epsilon": 1.0, "evaluation_delta": 1e-6}
    more = exposure(evaluated)
    assert more.found > plain.found
    assert more.right > plain.right


def test_a_run_that_can_go_on_is_judged_by_all_that_it_may_cost() -> None:
    paused, failed = exposure(bare("paused")), exposure(bare("failed before a round"))
    assert paused.planned
    assert failed.planned
    assert paused.epsilon == bare("paused")["promise"]["epsilon"]
    assert not exposure(bare("24 rounds")).planned


def test_bounds_in_percent_are_never_rounded_down() -> None:
    assert percent_at_most(0.50001) == "50.1\u00a0%"
    assert percent_at_most(0.5) == "50.0\u00a0%"
    assert percent_at_most(0.9995) == percent_at_most(1.0) == "100\u00a0%"


# --- next steps --------------------------------------------------------------------------------------


def commands(report: dict[str, Any]) -> list[str]:
    return [line for step in next_steps(report) for line in step.commands]


def test_what_is_missing_can_be_copied_as_commands() -> None:
    report = bare("24 rounds")
    owner, *others, run = commands(report)
    digits = report["subject"]["run"][:16]
    assert owner == f"fedseal audit owner --home HOME --run {digits} --out hospital-001.json"
    assert len(others) == 3
    assert run.startswith(f"fedseal audit run {digits} --home HOME --out DIR --owner hospital-001.json")
    assert run.count("--owner") == 4
    assert all(f"<code>{line}" in render.html(report).replace("\n", "<code>") for line in [owner, run])


def test_only_owners_that_are_silent_are_asked() -> None:
    report = build_report(evidence(), NOW, KEY, lab(), findings()[1:])
    owner, run = commands(report)
    assert OWNERS[0] in owner
    assert all(name in run for name in OWNERS)


def test_an_audit_without_public_data_asks_for_them() -> None:
    assert "--public FILE" in commands(bare("no public data"))[-1]
    assert "--public" not in commands(bare("24 rounds"))[-1]


def test_a_paused_run_is_resumed_first() -> None:
    first, *_ = commands(bare("paused"))
    assert first.startswith("fedseal run --home HOME --resume ")


def test_a_hundred_owners_need_no_hundred_lines() -> None:
    steps = next_steps(bare("100 owners"))
    assert [len(step.commands) for step in steps] == [1, 1]
    assert len(first_screen(bare("100 owners"))) < 3_000


def test_a_report_that_can_be_relied_on_asks_for_a_check_alone() -> None:
    assert commands(audited()) == ["fedseal audit verify report.json --key release.pub"]
    assert commands(build_report(evidence(), NOW, None, lab(), findings())) == []
    assert commands(build_report(evidence(kind="simulation"), NOW, KEY)) == [
        "fedseal audit run PLAN --out DIR"
    ]


def test_what_no_command_supplies_is_said() -> None:
    report = copy.deepcopy(audited())
    report["verdict"]["status"] = "INCONCLUSIVE"
    next(check for check in report["checks"] if check["id"] == "noise-shares")["status"] = "missing"
    (step,) = next_steps(report)
    assert "rests on each owner's own noise" in step.what
    assert step.commands == ()


def test_no_name_of_an_owner_reaches_a_shell() -> None:
    fields = evidence_fields()
    fields["owners"][0]["name"] = "x; rm -rf ~ #"
    fields["owners"][1]["name"] = "../../$(reboot)"
    fields["owners"][2]["name"] = "--home"
    for line in commands(build_report(RunEvidence.from_fields(fields), NOW)):
        words = shlex.split(line)
        assert not {";", "#", "--home.json"} & set(words)
        assert re.fullmatch(r"[A-Za-z0-9 ._-]+", line)


@pytest.mark.parametrize("failing", ["run-complete", "noise-on"])
def test_a_failure_says_not_to_sign_first(failing: str) -> None:
    shape = {"run-complete": "failed before a round", "noise-on": "no noise"}[failing]
    assert next_steps(bare(shape))[0].what.startswith("Do not sign.")
    assert answer(bare(shape)).failed
