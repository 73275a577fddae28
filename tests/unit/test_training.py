"""The private step: exact noise scale, a bound on every record, and nothing that data can change."""

import logging
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import chi2, ks_2samp
from torch import nn

import client.gradients
import client.training
from client.noise import SecureStream
from client.training import SecureDPOptimizer, clipped_sum, local_update, plain_update
from crypto.frames import SealContext
from crypto.masks import MaskContext, Masks
from crypto.packing import mean_update, quantize
from crypto.presets import packing_for
from crypto.sealing import open_frames, seal_frames
from crypto.secret import SealKey
from protocol.accounting import calibrate
from protocol.errors import ExamplesMixed, ModelMismatch, NoiseSeeded, TrainingFailed
from protocol.plan import Plan
from tasks.images import Examples, ImageClassification, unflatten
from tasks.partition import digits

LEARNING_RATE, CLIP, DIVISOR = 0.5, 0.7, 40.0
ALMOST_SILENT = 1e-9
"""A noise multiplier so small that the noise vanishes in float32; no plan that is read may name it."""


ENGINES = ["book-keeping", "hooks"]


def make_plan(
    hidden: list[int] | None = None,
    steps: int = 1,
    engine: str = "auto",
    noise_multiplier: float | None = None,
    **privacy: object,
) -> Plan:
    fields: dict[str, object] = {
        "target_epsilon": 8.0,
        "max_grad_norm": CLIP,
        "sample_rate": 1.0,
        "expected_batch_size": DIVISOR,
    }
    plan = Plan.from_fields(
        {
            "run": {"name": "unit", "rounds": 10},
            "task": {
                "name": "image-classification",
                "input_shape": [8, 8],
                "value_range": [0.0, 16.0],
                "classes": 10,
            },
            "model": {"name": "mlp", "hidden": hidden} if hidden else {"name": "linear"},
            "cohort": {"minimum": 3, "maximum": 8},
            "training": {
                "local_steps": steps,
                "learning_rate": LEARNING_RATE,
                "gradient_engine": engine,
            },
            "privacy": {k: v for k, v in (fields | privacy).items() if v is not None},
        }
    )
    noised = plan.privacy.model_copy(update={"noise_multiplier": noise_multiplier})
    return plan.model_copy(update={"privacy": noised})


TASK = ImageClassification(make_plan().task)


def make_examples(n: int, seed: int = 0) -> Examples:
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(n, 64)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True) + 1e-12
    return Examples(x.astype(np.float32), generator.integers(0, 10, n))


def start(plan: Plan) -> NDArray[np.float64]:
    return TASK.initial_weights(plan)


def update(plan: Plan, examples: Examples) -> NDArray[np.float64]:
    return local_update(TASK, plan, start(plan), examples)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("engine", ENGINES)
def test_noise_has_exactly_the_scale_that_is_accounted_for(steps: int, engine: str) -> None:
    plan = make_plan([512, 256], steps, engine, noise_multiplier=1.5)
    noise = update(plan, make_examples(0))
    expected = LEARNING_RATE * 1.5 * CLIP / DIVISOR * np.sqrt(steps)
    assert noise.size > 160_000
    assert noise.std() == pytest.approx(expected, rel=0.01)
    assert abs(noise.mean()) < 5 * expected / np.sqrt(noise.size)


def test_the_scale_does_not_depend_on_how_many_records_there_are() -> None:
    plan = make_plan([512, 256], noise_multiplier=1.5)
    silent = [Examples(np.full((n, 64), np.nan, np.float32), np.zeros(n, np.int64)) for n in (64, 65, 500)]
    expected = LEARNING_RATE * 1.5 * CLIP / DIVISOR
    for examples in silent:
        assert update(plan, examples).std() == pytest.approx(expected, rel=0.01)


def test_the_divisor_is_the_public_one() -> None:
    plan = make_plan(noise_multiplier=ALMOST_SILENT)
    one = make_examples(1)
    twice = Examples(np.repeat(one.x, 2, axis=0), np.repeat(one.y, 2))
    np.testing.assert_allclose(update(plan, twice), 2 * update(plan, one), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("hidden", [None, [32]])
@pytest.mark.parametrize("engine", ENGINES)
def test_one_record_never_moves_the_model_further_than_its_bound(
    hidden: list[int] | None, engine: str
) -> None:
    plan = make_plan(hidden, 6, engine, noise_multiplier=ALMOST_SILENT, max_grad_norm=0.01)
    moved = float(np.linalg.norm(update(plan, make_examples(1))))
    bound = LEARNING_RATE * 0.01 / DIVISOR * 6
    assert 0.5 * bound < moved <= bound * (1 + 1e-3)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_outlier_has_no_more_influence_than_anyone(engine: str) -> None:
    plan = make_plan(engine=engine, noise_multiplier=ALMOST_SILENT)
    crowd = make_examples(20)
    monster = Examples(np.concatenate([crowd.x, np.full((1, 64), 1e18, np.float32)]), np.append(crowd.y, 3))
    moved = float(np.linalg.norm(update(plan, monster) - update(plan, crowd)))
    assert moved <= LEARNING_RATE * CLIP / DIVISOR * (1 + 1e-3)


@pytest.mark.parametrize("hidden", [None, [16], [24, 12]])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_clipped_sum_agrees_with_an_independent_computation(
    hidden: list[int] | None, engine: str
) -> None:
    plan = make_plan(hidden, 1, engine, noise_multiplier=ALMOST_SILENT, max_grad_norm=0.3)
    examples = make_examples(50)
    model = TASK.build_model(plan).double()
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(values: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        logits = torch.func.functional_call(model, values, (x.unsqueeze(0),))
        return nn.functional.cross_entropy(logits, y.unsqueeze(0))

    gradient = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    parts = gradient(parameters, torch.from_numpy(examples.x).double(), torch.from_numpy(examples.y))
    rows = torch.cat([parts[name].flatten(1) for name in parameters], dim=1).numpy()
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    assert norms.max() > 0.3
    expected = -(rows * np.minimum(1.0, 0.3 / norms)).sum(axis=0) * LEARNING_RATE / DIVISOR
    difference = np.linalg.norm(update(plan, examples) - expected)
    assert difference <= 1e-5 * np.linalg.norm(expected)
    total = clipped_sum(TASK, plan, start(plan), examples)
    assert np.linalg.norm(total * LEARNING_RATE / DIVISOR + expected) <= 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("hidden", [None, [16]])
def test_a_record_that_is_not_finite_counts_as_nothing(bad: float, hidden: list[int] | None) -> None:
    plan = make_plan(hidden, noise_multiplier=ALMOST_SILENT)
    clean = make_examples(10)
    x = np.insert(clean.x, 4, bad, axis=0)
    x[4, 1:] = 0.1
    dirty = Examples(x, np.insert(clean.y, 4, 1))
    np.testing.assert_allclose(update(plan, dirty), update(plan, clean), rtol=1e-4, atol=1e-8)


def test_large_batches_are_added_up_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan([16], noise_multiplier=ALMOST_SILENT)
    examples = make_examples(45)
    whole = update(plan, examples)
    monkeypatch.setattr(client.gradients, "BATCH_VALUES", 10 * start(plan).size)
    np.testing.assert_allclose(update(plan, examples), whole, rtol=1e-4, atol=1e-8)


def test_pieces_get_the_noise_of_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan([512, 256], noise_multiplier=1.5)
    silent = Examples(np.full((30, 64), np.nan, np.float32), np.zeros(30, np.int64))
    monkeypatch.setattr(client.gradients, "BATCH_VALUES", 10 * start(plan).size)
    expected = LEARNING_RATE * 1.5 * CLIP / DIVISOR
    assert update(plan, silent).std() == pytest.approx(expected, rel=0.01)


def test_no_seed_repeats_an_update() -> None:
    plan = make_plan(noise_multiplier=1.0)
    examples = make_examples(10)
    updates = []
    for _ in range(2):
        torch.manual_seed(42)
        np.random.seed(42)
        updates.append(update(plan, examples))
    assert abs(np.corrcoef(updates[0], updates[1])[0, 1]) < 0.9
    assert not np.any(updates[0] == updates[1])


def test_every_step_has_a_key_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = client.training.SecureStream

    def counted() -> object:
        made.append(original())
        return made[-1]

    monkeypatch.setattr(client.training, "SecureStream", counted)
    update(make_plan(steps=5, noise_multiplier=1.0), make_examples(3))
    assert len(made) >= 5


def test_training_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    update(make_plan([16], noise_multiplier=1.0), make_examples(3))
    assert torch.equal(before, torch.get_rng_state())


def test_sampling_takes_each_record_with_the_plans_probability() -> None:
    plan = make_plan(noise_multiplier=ALMOST_SILENT, sample_rate=0.3)
    one = make_examples(1)
    everyone = Examples(np.repeat(one.x, 4000, axis=0), np.repeat(one.y, 4000))
    alone = update(make_plan(noise_multiplier=ALMOST_SILENT), one)
    chosen = np.linalg.norm(update(plan, everyone)) / np.linalg.norm(alone)
    assert abs(chosen - 1200) < 6 * np.sqrt(4000 * 0.21)


def test_without_privacy_the_step_is_the_plain_gradient() -> None:
    plan = make_plan([16], noise="none", target_epsilon=None, max_grad_norm=1e-6)
    examples = make_examples(30)
    model = TASK.build_model(plan)
    loss = TASK.loss(model(torch.from_numpy(examples.x)), torch.from_numpy(examples.y)).sum()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients]).numpy()
    expected = -flat * LEARNING_RATE / DIVISOR
    np.testing.assert_allclose(update(plan, examples), expected, rtol=1e-3, atol=1e-7)


class Task(ImageClassification):
    """The image task with something wrong in it."""

    layers: list[nn.Module]

    def build_model(self, plan: Plan) -> nn.Module:
        return nn.Sequential(*self.layers)


class CentersBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(dim=0)


def test_models_that_mix_records_are_refused_before_data_is_used() -> None:
    layers: list[nn.Module] = [CentersBatch(), nn.Linear(64, 10)]
    task = Task(TASK.description)
    object.__setattr__(task, "layers", layers)
    for train in (local_update, plain_update, clipped_sum):
        with pytest.raises(ExamplesMixed):
            train(task, make_plan(noise_multiplier=1.0), np.zeros(650), make_examples(4))


class Leaky(ImageClassification):
    def build_model(self, plan: Plan) -> nn.Module:
        raise RuntimeError("the labels are in this text")


def test_no_text_about_data_leaves_with_an_error() -> None:
    with pytest.raises(TrainingFailed) as caught:
        local_update(
            Leaky(TASK.description), make_plan(noise_multiplier=1.0), np.zeros(650), make_examples(4)
        )
    assert caught.value.detail == ""
    assert caught.value.__suppress_context__
    assert "labels" not in str(caught.value)


def test_a_step_that_fails_sends_its_noise() -> None:
    """Labels outside the classes stop the loss; the answer looks like that of an empty batch."""
    examples = replace(make_examples(4), y=np.array([96, 97, 98, 99]))
    plan = make_plan(noise_multiplier=1.0)
    noisy = np.concatenate([update(plan, examples) for _ in range(40)])
    empty = np.concatenate([update(plan, make_examples(0)) for _ in range(40)])
    assert noisy.std() == pytest.approx(empty.std(), rel=0.05)


def test_training_goes_on_after_a_step_that_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []
    honest = client.training.batch_sums

    def fails_once(*arguments: Any) -> list[torch.Tensor]:
        calls.append(None)
        if len(calls) == 1:
            raise RuntimeError("the labels are in this text")
        return honest(*arguments)

    monkeypatch.setattr(client.training, "batch_sums", fails_once)
    examples = make_examples(30)
    moved = update(make_plan(steps=3, noise_multiplier=ALMOST_SILENT), examples)
    assert len(calls) == 3
    assert "a training step failed" in caplog.text
    assert "labels" not in caplog.text
    two = update(make_plan(steps=2, noise_multiplier=ALMOST_SILENT), examples)
    np.testing.assert_allclose(moved, two, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("train", [plain_update, clipped_sum])
def test_without_noise_an_example_that_fails_counts_as_zero(train: Any) -> None:
    examples = replace(make_examples(4), y=np.array([0, 1, 2, 99]))
    plan = make_plan(noise_multiplier=1.0)
    others = Examples(examples.x[:3], examples.y[:3])
    expected = train(TASK, plan, start(plan), others)
    np.testing.assert_allclose(train(TASK, plan, start(plan), examples), expected, rtol=1e-4, atol=1e-8)
    nobody = replace(examples, y=np.full(4, 99))
    assert not train(TASK, plan, start(plan), nobody).any()


def test_the_plain_update_is_neither_clipped_nor_noised() -> None:
    examples = make_examples(30)
    private = make_plan([16], 3, noise_multiplier=5.0, max_grad_norm=1e-6)
    none = make_plan([16], 3, noise="none", target_epsilon=None)
    moved = plain_update(TASK, private, start(private), examples)
    np.testing.assert_array_equal(moved, update(none, examples))
    np.testing.assert_array_equal(moved, plain_update(TASK, private, start(private), examples))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_plain_update_leaves_out_what_is_not_finite(engine: str) -> None:
    plan = make_plan([16], 2, engine, noise="none", target_epsilon=None)
    clean = make_examples(10)
    dirty = Examples(np.insert(clean.x, 4, np.nan, axis=0), np.insert(clean.y, 4, 1))
    np.testing.assert_allclose(update(plan, dirty), update(plan, clean), rtol=1e-4, atol=1e-8)


class Frozen(ImageClassification):
    def build_model(self, plan: Plan) -> nn.Module:
        model = super().build_model(plan)
        assert isinstance(model, nn.Sequential)
        model[0].requires_grad_(False)
        return model


@pytest.mark.parametrize("engine", ENGINES)
def test_frozen_parameters_get_neither_gradient_nor_noise(engine: str) -> None:
    plan, examples = make_plan([16], 2, engine, noise_multiplier=1.0), make_examples(5)
    task, frozen = Frozen(TASK.description), 64 * 16 + 16
    for train in (local_update, plain_update, clipped_sum):
        moved = train(task, plan, start(plan), examples)
        assert moved.shape == start(plan).shape
        assert not moved[:frozen].any()
        assert moved[frozen:].all()


@pytest.mark.parametrize("engine", ENGINES)
def test_owners_of_none_and_of_one_record_take_part(engine: str) -> None:
    plan = make_plan([16], 3, engine, noise_multiplier=1.0, sample_rate=0.5)
    for records in (0, 1):
        assert np.all(update(plan, make_examples(records)) != 0)
    assert not clipped_sum(TASK, plan, start(plan), make_examples(0)).any()


def test_batches_are_poisson_samples() -> None:
    """Sizes vary as independent coins make them: a false alarm has a probability of 2e-6."""
    plan = make_plan(noise_multiplier=1.0, sample_rate=0.3)
    one, records, batches = make_examples(1), 500, 150
    everyone = Examples(np.repeat(one.x, records, axis=0), np.repeat(one.y, records))
    single = clipped_sum(TASK, make_plan(noise_multiplier=1.0), start(plan), one)
    sizes = [
        float(clipped_sum(TASK, plan, start(plan), everyone) @ single / (single @ single))
        for _ in range(batches)
    ]
    variance = records * 0.3 * 0.7
    statistic = float(np.sum((np.array(sizes) - records * 0.3) ** 2) / variance)
    assert chi2(batches).ppf(1e-6) < statistic < chi2(batches).isf(1e-6)


def test_the_engine_of_the_plan_runs_and_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fedseal.client"):
        for engine in ("auto", "book-keeping", "hooks"):
            update(make_plan(engine=engine, noise_multiplier=1.0), make_examples(3))
    named = [record.getMessage() for record in caplog.records if "engine" in record.getMessage()]
    assert named == [f"gradient engine: {name}" for name in ("book-keeping", "book-keeping", "hooks")]


def test_a_step_takes_no_stream_but_its_own() -> None:
    model = nn.Linear(3, 2)
    optimizer = SecureDPOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0), noise_multiplier=1.0, max_grad_norm=1.0, divisor=1.0
    )
    seeded: Any = np.random.default_rng(0)
    with pytest.raises(NoiseSeeded):
        optimizer.step_on([torch.zeros(2, 3), torch.zeros(2)], seeded)


class Seeded:
    """Noise that a seed repeats, behind the face of the project's stream."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(torch.randint(2**31, (1,)).item())

    def gaussian(self, n: int) -> NDArray[np.float64]:
        return self.generator.standard_normal(n)

    def coins(self, n: int, probability: float) -> NDArray[np.bool_]:
        return self.generator.random(n) < probability


@pytest.mark.parametrize("train", [local_update, plain_update, clipped_sum])
def test_training_refuses_a_planted_stream(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.training, "SecureStream", Seeded)
    plan = make_plan(noise_multiplier=1.0)
    with pytest.raises(NoiseSeeded):
        train(TASK, plan, start(plan), make_examples(4))


def sealed_bytes(plan: Plan, records: int) -> tuple[list[int], NDArray[np.uint64]]:
    """Seal an owner's update for three owners; returns the frames' sizes and the quantized update."""
    packing = packing_for("exact16", 3)
    silent = Examples(np.full((records, 64), np.nan, np.float32), np.zeros(records, np.int64))
    moved = update(plan, silent)
    key = SealKey.generate(SealContext(packing))
    context = MaskContext("s", 1, "train", "l", "m", packing.plain_modulus)
    masks = Masks("a" * 64, {}, context)
    frames = list(seal_frames(moved, plan.update_range, SecureStream().uniform, masks, key))
    opened = open_frames([(frame,) for frame in frames], moved.size, key)
    return [len(frame) for frame in frames], opened


def test_one_record_more_is_seen_neither_in_sizes_nor_in_the_noise() -> None:
    """Two samples of 17,000 values each: a noise of 5 % more or less would show, a false alarm 1e-6."""
    plan = make_plan([128, 64], noise_multiplier=1.5)
    (sizes, few), (more_sizes, more), (none_sizes, none) = (sealed_bytes(plan, n) for n in (64, 65, 0))
    assert sizes == more_sizes == none_sizes
    assert few.dtype == more.dtype
    expected = LEARNING_RATE * 1.5 * CLIP / DIVISOR / plan.update_range
    levels = packing_for("exact16", 3).half_levels
    for opened in (few, more, none):
        centred = (opened.astype(np.float64) - levels) / levels
        assert centred.std() == pytest.approx(expected, rel=5 / np.sqrt(2 * centred.size))
        assert ks_2samp(centred, (few.astype(np.float64) - levels) / levels).pvalue > 1e-6


def test_what_is_released_lies_on_the_grid() -> None:
    plan = make_plan([16], 2, noise_multiplier=1.0)
    packing = packing_for("exact16", 3)
    moved = update(plan, make_examples(20))
    released = mean_update(
        quantize(moved, plan.update_range, packing, SecureStream().uniform(moved.size)), 1,
        plan.update_range, packing,
    )  # fmt: skip
    step = plan.update_range / packing.half_levels
    steps = released / step
    np.testing.assert_allclose(steps, np.round(steps), rtol=0, atol=1e-6)
    assert np.abs(steps).max() <= packing.half_levels
    assert np.abs(released - moved).max() <= step * (1 + 1e-9)
    deviation = LEARNING_RATE * 1.0 * CLIP / DIVISOR
    assert step < deviation


def test_a_model_that_is_not_finite_raises_nothing() -> None:
    plan = make_plan(noise_multiplier=1.0)
    assert local_update(TASK, plan, np.full(650, np.nan), make_examples(4)).shape == (650,)


def test_a_vector_of_another_model_is_refused() -> None:
    with pytest.raises(ModelMismatch):
        local_update(TASK, make_plan(noise_multiplier=1.0), np.zeros(651), make_examples(4))


def test_an_unresolved_plan_never_trains_without_noise() -> None:
    with pytest.raises(TrainingFailed):
        update(make_plan(), make_examples(4))


def test_importing_does_not_touch_the_root_logger() -> None:
    code = (
        "import logging; root = logging.getLogger(); import client.training; "
        "assert not root.handlers and root.level == logging.WARNING, root.handlers"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert logging.getLogger("client").handlers == []


def test_digits_are_learned_with_privacy() -> None:
    shards, public = digits(seed=0, owners=1)
    draft = make_plan(
        None, 4, sample_rate=0.2, expected_batch_size=287.0, max_grad_norm=1.0, target_epsilon=8.0
    )
    fields = draft.fields()
    fields["privacy"]["noise_multiplier"] = calibrate(draft)
    fields["training"]["learning_rate"] = 2.0
    plan = Plan.from_fields(fields)
    examples, test = TASK.check(*shards[0]), TASK.check(*public)
    weights = TASK.initial_weights(plan)
    for _ in range(plan.run.rounds):
        weights += local_update(TASK, plan, weights, examples)
    model = TASK.build_model(plan)
    unflatten(model, weights)
    # 0.77 to 0.86 in sixty tries with fresh noise; a tenth is guessing
    assert TASK.evaluate(model, test) > 0.7
