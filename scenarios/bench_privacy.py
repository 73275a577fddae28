"""The benchmark `privacy`: what a private step, its noise and its accounting cost, beside Opacus.

A step is forward, backward, clipping and the optimizer's step, without noise, which is measured by itself.
The times are CPU times of one thread. As a module it is an arm: ``python -m scenarios.bench_privacy ARM``.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

from client.gradients import Choice, engine_for
from client.noise import SecureStream
from protocol.accounting import calibrate, epsilon_of_steps
from protocol.plan import Plan
from scenarios.bench_arms import Arm, Figures, Job, Metric
from scenarios.bench_models import BENCH_MODELS, BenchModel
from scenarios.bench_targets import Entry, Run, Target, evaluate, median_of, ratio_of
from scenarios.bench_worker import peak_rss_mib, serve_arm

NOISE_VALUES: Final = 1_000_000
MAX_GRAD_NORM: Final = 1.0
STEPS_PER_FIGURE: Final = 3
"""Steps whose median is one figure; the first after another model finds cold caches."""

SCHEDULE: Final = {"sample_rate": 0.01, "noise_multiplier": 1.0, "steps": 1000, "delta": 1e-5}
FINE_DISCRETIZATION: Final = 1e-4

CALIBRATED: Final = {"sample_rate": 1 / 24, "steps": 1200, "epsilon": 3.0, "delta": 1e-5}
"""50 rounds of 24 steps."""

LABELS: Final = {
    "plain": ("plain SGD", "PyTorch without privacy; noise from torch.normal in float32"),
    "book-keeping": ("fedseal book-keeping", "one backward pass; AES-256-CTR noise in float64; PLD"),
    "hooks": ("fedseal hooks", "Opacus' per-example gradients behind fedseal's interface"),
    "opacus": ("Opacus 1.6 hooks", "GradSampleModule and DPOptimizer as shipped; torch.normal; PRV"),
    "ghost": ("Opacus 1.6 ghost", "its fast gradient clipping with ghost norms, two backward passes"),
}
"""Short name and description of each arm, in the order in which they are measured."""

METRICS: Final = (
    *(
        Metric(f"step.{model.name}", f"step of {model.name}, CPU ms", ".1f", 1000.0)
        for model in BENCH_MODELS
    ),
    Metric("noise_s", "1,000,000 noise values, CPU ms", ".1f", 1000.0),
    Metric("calibrate_s", "calibrate 1,200 steps, CPU s", ".3f"),
    Metric("epsilon_s", "epsilon of 1,000 steps, CPU s", ".3f"),
    Metric(
        "epsilon_error",
        "epsilon's distance from PLD on a ten times finer grid",
        ".4f",
        compared=False,
        rehearsed=True,
    ),
    Metric("peak_rss_mib", "peak memory, MiB", ".0f"),
)

NOTES: Final = (
    "A step has no noise in any arm; the noise of a step costs its row per 1,000,000 parameters.",
    "-: the arm has no such part, or cannot do it (Opacus' ghost clipping stops at the transformer's"
    " position ids, which are an expanded tensor).",
)

Step = Callable[[Tensor, Tensor], None]


def build() -> Job:
    """Say what to measure."""
    arms = [
        Arm(key, *names, (sys.executable, "-m", "scenarios.bench_privacy", key))
        for key, names in LABELS.items()
    ]
    return Job(
        settings={},
        arms=arms,
        metrics=METRICS,
        request={},
        judge=dict,
        facts={"schedule": dict(SCHEDULE), "calibrated": dict(CALIBRATED)},
        references={},
        notes=NOTES,
    )


def evaluate_privacy(runs: Sequence[Run]) -> dict[str, Entry]:
    """Return all targets and reported ratios of the benchmark."""
    return evaluate(TARGETS, runs)


# --- steps -------------------------------------------------------------------------------------------


class Stepper(Protocol):
    """Makes the training step of one arm."""

    def __call__(self, model: nn.Module, bench: BenchModel) -> Step:
        """Return a function that takes one step on a batch."""


def plain_step(model: nn.Module, bench: BenchModel) -> Step:
    """Return a step of plain SGD on the mean loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        torch.autograd.backward(bench.loss(model(x), y).mean())
        optimizer.step()

    return step


def engine_step(name: Choice) -> Stepper:
    """Return the maker of fedseal's step with one of its gradient engines."""

    def make(model: nn.Module, bench: BenchModel) -> Step:
        x, y = bench.batch()
        engine = engine_for(model, bench.loss, name, (x[:4], y[:4]))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

        def step(x: Tensor, y: Tensor) -> None:
            sums = engine.clipped_sums(x, y, MAX_GRAD_NORM)
            for parameter, total in zip(engine.parameters, sums, strict=True):
                parameter.grad = total / len(x)
            optimizer.step()

        return step

    return make


def opacus_step(model: nn.Module, bench: BenchModel) -> Step:
    """Return Opacus' step as its engine makes it, with a noise multiplier of zero."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    sampled = GradSampleModule(model)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01),
        noise_multiplier=0.0,
        max_grad_norm=MAX_GRAD_NORM,
        expected_batch_size=1,
    )

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        torch.autograd.backward(bench.loss(sampled(x), y).mean())
        optimizer.step()

    return step


def ghost_step(model: nn.Module, bench: BenchModel) -> Step:
    """Return Opacus' step with fast gradient clipping: norms first, then a second backward pass."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    sampled = GradSampleModuleFastGradientClipping(
        model, max_grad_norm=MAX_GRAD_NORM, use_ghost_clipping=True
    )
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(model.parameters(), lr=0.01),
        noise_multiplier=0.0,
        max_grad_norm=MAX_GRAD_NORM,
        expected_batch_size=1,
    )

    def each(logits: Tensor, y: Tensor) -> Tensor:
        return bench.loss(logits, y)

    each.reduction = "mean"  # type: ignore[attr-defined]  # Opacus sets and reads it on the criterion
    criterion = DPLossFastGradientClipping(sampled, optimizer, each, loss_reduction="mean")

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        criterion(sampled(x), y).backward()
        optimizer.step()

    return step


STEPPERS: Final[Mapping[str, Stepper]] = {
    "plain": plain_step,
    "book-keeping": engine_step("book-keeping"),
    "hooks": engine_step("hooks"),
    "opacus": opacus_step,
    "ghost": ghost_step,
}


# --- noise and accounting ----------------------------------------------------------------------------


def fedseal_noise() -> None:
    """Draw the noise of a million parameters from a stream under a fresh key."""
    SecureStream().gaussian(NOISE_VALUES)


def torch_noise() -> None:
    """Draw the noise of a million parameters as Opacus does without its secure mode."""
    torch.normal(mean=0.0, std=1.0, size=(NOISE_VALUES,))


def fedseal_epsilon(discretization: float | None = None) -> float:
    """Price the schedule; nothing is remembered from earlier calls."""
    epsilon_of_steps.cache_clear()
    arguments = (
        SCHEDULE["sample_rate"],
        SCHEDULE["noise_multiplier"],
        int(SCHEDULE["steps"]),
        SCHEDULE["delta"],
    )
    return (
        epsilon_of_steps(*arguments)
        if discretization is None
        else epsilon_of_steps(*arguments, discretization)
    )


def opacus_epsilon() -> float:
    """Price the schedule by Opacus' PRV accountant, with its default precision."""
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(SCHEDULE["noise_multiplier"], SCHEDULE["sample_rate"], int(SCHEDULE["steps"]))]
    return float(accountant.get_epsilon(SCHEDULE["delta"]))


def fedseal_calibrate() -> None:
    """Find the noise multiplier of a plan with that schedule; nothing is remembered from earlier calls."""
    epsilon_of_steps.cache_clear()
    calibrate(_calibrated_plan())


def opacus_calibrate() -> None:
    """Find the noise multiplier by Opacus' own search with its PRV accountant."""
    from opacus.accountants.utils import get_noise_multiplier

    get_noise_multiplier(
        target_epsilon=CALIBRATED["epsilon"],
        target_delta=CALIBRATED["delta"],
        sample_rate=CALIBRATED["sample_rate"],
        steps=int(CALIBRATED["steps"]),
        accountant="prv",
    )


def _calibrated_plan() -> Plan:
    steps = int(CALIBRATED["steps"])
    return Plan.from_fields(
        {
            "run": {"name": "bench", "rounds": 50, "paid_spares": 0},
            "task": {"name": "image-classification", "input_shape": [8, 8], "classes": 10},
            "model": {"name": "linear"},
            "cohort": {"minimum": 3, "maximum": 3},
            "training": {"local_steps": steps // 50, "learning_rate": 1.0},
            "privacy": {
                "target_epsilon": CALIBRATED["epsilon"],
                "delta": CALIBRATED["delta"],
                "sample_rate": CALIBRATED["sample_rate"],
                "expected_batch_size": 100.0,
            },
        }
    )


ACCOUNTING: Final[Mapping[str, tuple[Callable[[], Any], Callable[[], float]]]] = {
    "book-keeping": (fedseal_calibrate, fedseal_epsilon),
    "opacus": (opacus_calibrate, opacus_epsilon),
}
"""Calibration and epsilon, for the arms that have their own."""

NOISE: Final = {"plain": torch_noise, "book-keeping": fedseal_noise, "opacus": torch_noise}


# --- arm ---------------------------------------------------------------------------------------------


class PrivacyArm:
    """Measures one arm; models and steps are made once.

    Args:
        name: Key of `LABELS`.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        torch.manual_seed(0)
        self._batches = {bench.name: bench.batch() for bench in BENCH_MODELS}
        self._steps: dict[str, Step] = {}
        for bench in BENCH_MODELS:
            self._steps[bench.name] = STEPPERS[name](bench.build(), bench)

    def measure(self, request: Mapping[str, Any]) -> Figures:
        """Return one figure of each metric, in CPU seconds where it is a time."""
        figures: Figures = {f"step.{name}": self._step_s(name) for name in self._steps}
        noise = NOISE.get(self._name)
        figures["noise_s"] = None if noise is None else _cpu_s(noise)
        calibrating, pricing = ACCOUNTING.get(self._name, (None, None))
        figures["calibrate_s"] = None if calibrating is None else _cpu_s(calibrating)
        figures["epsilon_s"] = None if pricing is None else _cpu_s(pricing)
        if pricing is not None and request.get("rehearsal"):
            figures["epsilon_error"] = abs(pricing() - fedseal_epsilon(FINE_DISCRETIZATION))
        return figures | {"peak_rss_mib": peak_rss_mib()}

    def _step_s(self, name: str) -> float | None:
        x, y = self._batches[name]
        try:
            return statistics.median(
                _cpu_s(lambda: self._steps[name](x, y)) for _ in range(STEPS_PER_FIGURE)
            )
        except Exception:
            # ours must not fail; a peer that cannot do a model has no figure
            if self._name in ("book-keeping", "hooks"):
                raise
            return None


def _cpu_s(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def _make(name: str) -> Callable[[Mapping[str, Any]], Figures]:
    torch.set_num_threads(1)
    return PrivacyArm(name).measure


# --- targets -----------------------------------------------------------------------------------------


def _step_target(model: str, arm: str, most: float | None) -> Target:
    label = f"a step of {LABELS[arm][0]} to plain SGD's"
    return Target(f"step_ratio.{model}.{arm}", label, most, ratio_of(arm, "plain", f"step.{model}"))


TARGETS: Final = (
    *(
        _step_target(model.name, arm, 1.7 if arm == "book-keeping" else None)
        for model in BENCH_MODELS
        for arm in STEPPERS
        if arm != "plain"
    ),
    Target(
        "noise_ratio", "secure noise to torch.normal", 2.5, ratio_of("book-keeping", "plain", "noise_s")
    ),
    Target("calibrate_s", "CPU seconds to calibrate", 0.5, median_of("book-keeping", "calibrate_s")),
    Target("calibrate_s.opacus", "the same, Opacus PRV", None, median_of("opacus", "calibrate_s")),
    Target("epsilon_error", "distance of epsilon", 0.01, median_of("book-keeping", "epsilon_error")),
    Target("epsilon_error.opacus", "the same, Opacus PRV", None, median_of("opacus", "epsilon_error")),
)
"""Limits where the project has set itself one; the peers' figures stand beside them."""

if __name__ == "__main__":
    serve_arm(partial(_make, sys.argv[1]), ("torch", "opacus", "dp-accounting"))
