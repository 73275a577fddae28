"""What a plan will cost, before it runs: the figures, their cross-checks, the picture and the words."""

import logging
import math
import re
from dataclasses import replace
from functools import cache
from typing import Any
from xml.etree import ElementTree

import pytest

from audit.outlook import Outlook, Point, listed_rounds, outlook
from audit.statistics.crosscheck import CrossChecks, cross_checks, prv_epsilon
from console.privacychart import svg, text_chart
from console.privacywords import Passage, explain
from protocol.accounting import Mechanism, calibrate, epsilon_after, require_target, worst_epsilon_after
from protocol.evaluation import calibrate_evaluation
from protocol.exposure import detection_of_steps, epsilon_of_group
from protocol.plan import Plan
from protocol.privacy_loss import epsilon_of_steps, lower_bound_of_steps

PRIVACY: dict[str, dict[str, Any]] = {
    "example": {"target_epsilon": 3.0},
    "client": {"target_epsilon": 3.0, "unit": "client", "max_update_norm": 0.5},
    "distributed": {"target_epsilon": 3.0, "noise": "distributed"},
    "weak": {"target_epsilon": 60.0},
    "none": {"noise": "none"},
}
PROTECTED = pytest.mark.parametrize("kind", ["example", "client", "distributed"])


@cache
def plan_of(kind: str, rounds: int = 10, evaluated: bool = False) -> Plan:
    evaluation = {"evaluation": {"every": 5, "target_epsilon": 0.5}} if evaluated else {}
    plan = Plan.from_fields(
        {
            "run": {"name": "unit", "rounds": rounds},
            "task": {"name": "image-classification", "input_shape": [8, 8], "classes": 10},
            "model": {"name": "linear"},
            "cohort": {"minimum": 4, "maximum": 11},
            "training": {"local_steps": 1, "learning_rate": 0.5},
            "privacy": {"sample_rate": 0.1, "expected_batch_size": 48.0} | PRIVACY[kind],
            **evaluation,
        }
    )
    if plan.privacy.noise == "none":
        return plan
    fields = plan.fields()
    fields["privacy"]["noise_multiplier"] = calibrate(plan)
    if plan.evaluation is not None:
        fields["evaluation"]["noise_multiplier"] = calibrate_evaluation(plan)
    return Plan.from_fields(fields)


@cache
def view_of(kind: str, rounds: int = 10, evaluated: bool = False) -> Outlook:
    view = outlook(plan_of(kind, rounds, evaluated))
    assert view is not None
    return view


@cache
def passages_of(kind: str, evaluated: bool = False) -> list[Passage]:
    return explain(plan_of(kind, evaluated=evaluated))


def words_of(kind: str, evaluated: bool = False) -> str:
    return "\n".join("\n".join([one.heading, *one.paragraphs]) for one in passages_of(kind, evaluated))


class TestCrossChecks:
    @pytest.mark.parametrize(
        ("rate", "noise", "steps"),
        [(0.01, 1.0, 1000), (1 / 24, 2.167, 1200), (1 / 24, 1.0, 1200), (1.0, 6.0, 100), (0.5, 3.5, 130)],
    )
    def test_opacus_is_within_two_hundredths(self, rate: float, noise: float, steps: int) -> None:
        prv = prv_epsilon(rate, noise, steps, 1e-5)
        assert prv == pytest.approx(epsilon_of_steps(rate, noise, steps, 1e-5), abs=0.02)

    @PROTECTED
    def test_all_accountants_agree(self, kind: str) -> None:
        checks = view_of(kind).checks
        assert checks.agree
        assert checks.lower <= checks.pld <= checks.rdp

    @pytest.mark.parametrize(
        "wrong", [{"lower": 3.1}, {"rdp": 2.8}, {"prv": 3.2}, {"prv": 2.8}, {"pld": math.inf}]
    )
    def test_a_contradiction_is_noticed(self, wrong: dict[str, float]) -> None:
        checks = CrossChecks(lower=2.9, pld=3.0, prv=3.01, rdp=3.3)
        assert checks.agree
        assert not replace(checks, **wrong).agree

    def test_a_mesh_that_would_fill_the_memory_is_not_made(self) -> None:
        assert prv_epsilon(1.0, 40.0, 1_000_000, 1e-5) is None
        assert cross_checks(Mechanism(1.0, 40.0, 40.0, 1, 1e-5), 1_000_000).agree

    def test_the_gaussian_approximation_is_refused_for_good_reason(self) -> None:
        """Opacus' own figure is below what any correct accounting must say."""
        from opacus.accountants.analysis.gdp import compute_eps_poisson

        said = compute_eps_poisson(steps=1000, noise_multiplier=1.0, sample_rate=0.01, delta=1e-5)
        assert said < lower_bound_of_steps(0.01, 1.0, 1000, 1e-5) - 0.1

    def test_opacus_leaves_the_root_logger_alone(self) -> None:
        root = logging.getLogger()
        handlers, level = list(root.handlers), root.level
        prv_epsilon(0.1, 2.0, 3, 1e-5)
        assert (root.handlers, root.level) == (handlers, level)


class TestOutlook:
    @pytest.mark.parametrize(
        ("rounds", "paid", "listed"),
        [
            (1, 1, [1]),
            (3, 5, [1, 2, 3, 4, 5]),
            (30, 31, [1, 2, 5, 10, 20, 30, 31]),
            (100, 100, [1, 2, 5, 10, 20, 50, 100]),
        ],
    )
    def test_long_runs_are_thinned(self, rounds: int, paid: int, listed: list[int]) -> None:
        assert listed_rounds(rounds, paid) == listed

    @PROTECTED
    def test_rows_are_what_owners_will_charge(self, kind: str) -> None:
        plan = plan_of(kind)
        view = view_of(kind)
        assert [row.rounds for row in view.rows] == list(range(1, plan.paid_rounds + 1))
        for row in view.rows:
            assert row.epsilon == epsilon_after(plan, row.rounds)
            assert row.worst == worst_epsilon_after(plan, row.rounds)
        assert view.curve[0] == Point(0, 0.0, 0.0)
        assert view.epsilon == view.rows[-1].epsilon <= 3.0

    def test_evaluation_is_added(self) -> None:
        plan = plan_of("example", evaluated=True)
        view = view_of("example", evaluated=True)
        assert view.evaluation is not None
        assert view.epsilon == pytest.approx(view.rows[-1].epsilon + view.evaluation.epsilon)
        assert view.delta == pytest.approx(plan.privacy.delta + view.evaluation.delta)
        assert view.checks.pld == view.rows[-1].epsilon

    def test_without_noise_there_is_nothing_to_say(self) -> None:
        assert outlook(plan_of("none")) is None

    def test_changes_go_the_way_they_must_and_their_noise_keeps_the_target(self) -> None:
        plan = plan_of("example")
        view = view_of("example")
        changes = {change.name: change for change in view.changes}
        for name in ("rounds / 2", "sample rate / 2", "noise x 2", "delta x 10"):
            assert changes[name].epsilon < view.epsilon
        for name in ("rounds x 2", "sample rate x 2", "noise / 2", "delta / 10"):
            assert changes[name].epsilon > view.epsilon
        longer = plan.model_copy(update={"run": plan.run.model_copy(update={"rounds": 20})})
        needed = {"noise_multiplier": changes["rounds x 2"].noise_multiplier}
        require_target(longer.model_copy(update={"privacy": plan.privacy.model_copy(update=needed)}))

    def test_a_client_has_no_sample_rate_to_change(self) -> None:
        assert not [one for one in view_of("client").changes if "rate" in one.name]


class TestExposure:
    def test_the_best_attack_on_an_unsampled_gaussian_is_the_likelihood_ratio_test(self) -> None:
        from scipy.stats import norm

        for alarms in (0.001, 0.1):
            exact = float(norm.cdf(norm.ppf(alarms) + math.sqrt(100) / 6.0))
            assert exact <= detection_of_steps(1.0, 6.0, 100, alarms) <= exact * 1.002

    def test_a_group_of_one_is_one(self) -> None:
        group = epsilon_of_group(1 / 24, 2.167, 1200, 1e-5, 1)
        assert group == pytest.approx(epsilon_of_steps(1 / 24, 2.167, 1200, 1e-5), abs=0.02)

    def test_an_unsampled_group_is_one_with_less_noise(self) -> None:
        assert epsilon_of_group(1.0, 6.0, 9, 1e-5, 3) == pytest.approx(epsilon_of_steps(1.0, 2.0, 9, 1e-5))


class TestPicture:
    @PROTECTED
    def test_it_is_well_formed_and_names_its_unit(self, kind: str) -> None:
        plan = plan_of(kind)
        drawn = svg(plan, view_of(kind))
        root = ElementTree.fromstring(drawn)
        said = " ".join(root.itertext())
        unit, other = ("client", "one example") if kind == "client" else ("example", "one client")
        assert f"one {unit}" in said
        assert other not in said
        assert ("EXPERIMENTAL" in said) == ("if all others collude" in said) == (kind == "distributed")
        assert "target 3" in said
        assert not re.search(r"<script|https?://(?!www\.w3\.org/2000/svg)", drawn)

    def test_curves_stay_inside_the_picture(self) -> None:
        plan = plan_of("distributed")
        for points in re.findall(r'points="([^"]+)"', svg(plan, view_of("distributed"))):
            places = [tuple(map(float, place.split(","))) for place in points.split()]
            assert all(64 <= x <= 696 and 92 <= y <= 356 for x, y in places)
            assert [x for x, _ in places] == sorted(x for x, _ in places)
            assert [y for _, y in places] == sorted((y for _, y in places), reverse=True)

    def test_a_terminal_without_blocks_gets_ascii(self) -> None:
        points = [Point(rounds, math.sqrt(rounds), 0.0) for rounds in range(11)]
        assert "█" in text_chart(points, ascii_only=False).plain
        plain = text_chart(points, ascii_only=True).plain
        assert plain.isascii()
        assert "#" in plain
        assert "round 10" in plain

    def test_a_loss_without_bound_has_no_chart(self) -> None:
        assert text_chart([Point(0, 0.0, 0.0), Point(1, math.inf, math.inf)], ascii_only=False).plain == ""


class TestWords:
    def test_an_example_is_never_called_a_client(self) -> None:
        text = words_of("example", evaluated=True)
        assert "for one example: one record of one owner" in text
        assert "add/remove" in text
        for wrong in ("one client", "zero-out", "everything that one owner contributes"):
            assert wrong not in text

    def test_a_client_is_never_called_an_example(self) -> None:
        text = words_of("client")
        assert "for one client: everything that one owner contributes" in text
        assert "zero-out" in text
        assert "must not be compared with an epsilon for one example" in text
        for wrong in ("add/remove", "one record of one owner", "this example"):
            assert wrong not in text

    def test_its_numbers_are_those_of_the_plan(self) -> None:
        plan = plan_of("example")
        epsilon = epsilon_after(plan, plan.paid_rounds)
        assert epsilon is not None
        text = words_of("example")
        assert f"epsilon {epsilon:.4g} at delta 1e-05" in text
        odds = math.exp(epsilon)
        assert f"1 percent becomes at most {100 * odds / (odds + 99):.3g} percent" in text
        two = epsilon_of_group(0.1, plan.privacy.noise_multiplier or 0.0, plan.paid_rounds, 1e-5, 2)
        assert f"k = 2: epsilon {two:.4g}" in text
        assert "Whom you must trust: nobody else" in text

    def test_distributed_noise_says_first_what_it_rests_on_and_what_is_left_without(self) -> None:
        plan = plan_of("distributed")
        passages = passages_of("distributed")
        assert passages[1].alarm
        assert "EXPERIMENTAL" in passages[1].heading
        worst = worst_epsilon_after(plan, plan.paid_rounds)
        assert any(f"epsilon {worst:.4g}" in paragraph for paragraph in passages[1].paragraphs)
        assert "nobody else" not in words_of("distributed")
        assert "as long as the assumption above holds" in words_of("distributed")

    def test_evaluation_is_a_part_of_the_promise_and_explained(self) -> None:
        plan = plan_of("example", evaluated=True)
        text = words_of("example", evaluated=True)
        assert f"epsilon {view_of('example', evaluated=True).epsilon:.4g} at delta 1.1e-05" in text
        assert "training and evaluation together" in text
        assert f"Up to {plan.paid_evaluations} times" in text
        assert "Up to" not in words_of("example")

    def test_no_noise_is_an_alarm_and_promises_nothing(self) -> None:
        (passage,) = passages_of("none")
        assert passage.alarm
        assert "protects NO record" in passage.heading
        assert not re.search(r"epsilon \d", " ".join(passage.paragraphs))

    def test_a_large_epsilon_is_not_made_to_look_good(self) -> None:
        text = words_of("weak")
        assert "50 percent becomes at most certainty" in text
        assert not re.search(r"\b0 percent|\binf\b|\bnan\b", text)
