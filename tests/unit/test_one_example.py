"""One example changes a step's sum by at most the clipping norm: however large, small or broken it is."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

import client.gradients
from client.bookkeeping import BookKeeping
from client.evaluation import noised_counts
from client.gradients import GradientEngine, batch_sums
from client.hooks import Hooks
from client.layer_gradients import squared
from client.training import clipped_sum
from protocol.plan import Plan
from tasks.images import Examples, ImageClassification
from tasks.registry import task_for
from tasks.resolve import resolve

CLIP = 0.7
ENGINES: list[Callable[..., GradientEngine]] = [BookKeeping, Hooks]


def flat(sums: list[Tensor]) -> Tensor:
    return torch.cat([total.double().flatten() for total in sums])


def summed(engine: GradientEngine, x: Tensor, y: Tensor, bound: float) -> Tensor:
    return flat(batch_sums(engine, lambda a, b: engine.clipped_sums(a, b, bound), x, y))


# --- examples that raise -----------------------------------------------------------------------------


class Fragile(ImageClassification):
    """A loss that stops at labels from 90 on, as an index out of range stops it."""

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        if bool((y >= 90).any()):
            raise RuntimeError("the labels are in this text")
        return super().loss(logits, y)


def fragile_plan(engine: str) -> Plan:
    return Plan.from_fields(
        {
            "run": {"name": "unit", "rounds": 2},
            "task": {"name": "image-classification", "input_shape": [8, 8], "classes": 10},
            "model": {"name": "mlp", "hidden": [12]},
            "cohort": {"minimum": 3, "maximum": 3},
            "training": {"local_steps": 1, "learning_rate": 0.5, "gradient_engine": engine},
            "privacy": {
                "target_epsilon": 8.0,
                "max_grad_norm": CLIP,
                "sample_rate": 1.0,
                "expected_batch_size": 40.0,
            },
        }
    )


def made_examples(n: int) -> Examples:
    generator = np.random.default_rng(0)
    return Examples(generator.normal(size=(n, 64)).astype(np.float32), generator.integers(0, 10, n))


def with_labels(examples: Examples, places: list[int]) -> Examples:
    y = examples.y.copy()
    y[places] = 99
    return replace(examples, y=y)


@pytest.mark.parametrize("engine", ["book-keeping", "hooks"])
@pytest.mark.parametrize("places", [[0], [36], [17], [0, 1, 20, 36]])
def test_an_example_that_raises_takes_nobody_with_it(
    engine: str, places: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    plan = fragile_plan(engine)
    task, examples = Fragile(plan.task, "mlp"), made_examples(37)
    start = task.initial_weights(plan)
    kept = np.delete(np.arange(37), places)
    others = Examples(examples.x[kept], examples.y[kept])
    with caplog.at_level(logging.WARNING, "fedseal.client"):
        broken = clipped_sum(task, plan, start, with_labels(examples, places))
    moved = np.linalg.norm(broken - clipped_sum(task, plan, start, others))
    assert moved <= 1e-5 * CLIP * len(others)
    assert "left out" in caplog.text
    assert "labels" not in caplog.text


def test_examples_that_raise_are_left_out_of_every_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = fragile_plan("book-keeping")
    task, examples = Fragile(plan.task, "mlp"), made_examples(100)
    start = task.initial_weights(plan)
    monkeypatch.setattr(client.gradients, "BATCH_VALUES", 2000)
    whole = clipped_sum(task, plan, start, Examples(examples.x[1:99], examples.y[1:99]))
    broken = clipped_sum(task, plan, start, with_labels(examples, [0, 99]))
    assert np.linalg.norm(whole - broken) <= 1e-5 * CLIP * 98


def test_where_every_example_raises_the_sum_is_zero_after_a_bounded_number_of_tries() -> None:
    calls = []

    def fails(x: Tensor, _: Tensor) -> list[Tensor]:
        calls.append(len(x))
        raise RuntimeError

    engine = BookKeeping(nn.Linear(3, 1), lambda output, _: output[:, 0])
    sums = batch_sums(engine, fails, torch.ones(50, 3), torch.zeros(50))
    assert not flat(sums).any()
    assert len(calls) <= 2 * 50
    assert sorted(calls)[:50] == [1] * 50


def test_a_sum_that_fails_for_its_size_alone_is_made_in_halves() -> None:
    """Memory that does not suffice for a piece loses nobody's gradient."""
    engine = BookKeeping(nn.Linear(3, 1), lambda output, _: output[:, 0])

    def small(x: Tensor, y: Tensor) -> list[Tensor]:
        if len(x) > 7:
            raise MemoryError
        return engine.clipped_sums(x, y, 1.0)

    x = torch.randn(50, 3)
    expected = summed(engine, x, torch.zeros(50), 1.0)
    found = flat(batch_sums(engine, small, x, torch.zeros(50)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


class Choosy(ImageClassification):
    """A metric that stops at one example."""

    def correct(self, model: nn.Module, examples: Examples) -> NDArray[np.bool_]:
        if bool((examples.x[:, 0] > 50).any()):
            raise RuntimeError("the values are in this text")
        return super().correct(model, examples)


def test_a_held_out_example_that_raises_changes_no_count_of_others() -> None:
    fields = fragile_plan("auto").fields()
    fields["evaluation"] = {"every": 1, "noise": "none"}
    fields["privacy"] |= {"noise": "none", "target_epsilon": None, "noise_multiplier": None}
    plan = resolve(Plan.from_fields(fields))
    task, plain = Choosy(plan.task, "mlp"), task_for(plan)
    examples, start = made_examples(41), plain.initial_weights(plan)
    kept = np.delete(np.arange(41), [0, 23])
    expected = noised_counts(plain, plan, start, Examples(examples.x[kept], examples.y[kept]))
    x = examples.x.copy()
    x[[0, 23], 0] = 99.0
    found = noised_counts(task, plan, start, replace(examples, x=x))
    assert found.tolist() == expected.tolist()
    assert expected.sum() == 39
    nobody = replace(examples, x=np.full_like(x, 99.0))
    assert noised_counts(task, plan, start, nobody).tolist() == [0.0, 0.0]


# --- rows and their number ---------------------------------------------------------------------------


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, y, reduction="none")


def silent_but_for(wanted: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss whose gradient is zero for all labels but one."""

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(logits, y) * (y == wanted)

    return loss


def nearly_tied() -> nn.Module:
    """A model whose outputs are large and nearly equal, so that a last digit decides the gradient."""
    model = nn.Linear(784, 10)
    with torch.no_grad():
        base = torch.randn(784) * 1e7
        model.weight.copy_(base + torch.randn(10, 784))
    return model


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("kind", ENGINES)
def test_no_example_changes_what_the_others_add_by_being_there(
    kind: Callable[..., GradientEngine], count: int
) -> None:
    torch.manual_seed(3)
    engine = kind(nearly_tied(), cross_entropy)
    x, y = torch.randn(20, 784), torch.randint(10, (20,))
    with threads(count):
        before = torch.zeros(7850).double()
        for n in range(1, 21):
            total = summed(engine, x[:n], y[:n], CLIP)
            assert float((total - before).norm()) <= CLIP * (1 + 1e-5) + 1e-6 * CLIP * n
            before = total


MODELS: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (nearly_tied, (784,)),
    (lambda: nn.Sequential(nn.Linear(784, 100), nn.Tanh(), nn.Linear(100, 7)), (784,)),
    (
        lambda: nn.Sequential(
            nn.Conv2d(1, 6, 5, stride=2), nn.Tanh(), nn.GroupNorm(2, 6), nn.Flatten(), nn.Linear(150, 7)
        ),
        (1, 13, 13),
    ),
]


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("count", [1, 2])
def test_a_gradient_is_the_same_to_the_last_bit_whoever_else_is_there(
    count: int, kind: Callable[..., GradientEngine]
) -> None:
    torch.manual_seed(4)
    for build, shape in MODELS if kind is BookKeeping else MODELS[:1]:
        engine = kind(build(), silent_but_for(6))
        x, y = torch.randn(48, *shape), torch.arange(48) % 6
        with threads(count):
            for rows in (16, 48):
                engine.rows = rows
                alone = summed(engine, x[:1], torch.tensor([6]), 1e-3)
                assert alone.any()
                for n in (2, 3, 4, 7, 8, 11, 12, 15, 16, 31, 48)[: 9 if rows == 16 else None]:
                    others, labels, place = x[:n].clone(), y[:n].clone(), (7 * n) % n if n % 3 else n - 1
                    others[place], labels[place] = x[0], 6
                    assert torch.equal(summed(engine, others, labels, 1e-3), alone)


# --- extreme sizes -----------------------------------------------------------------------------------


def layers(name: str) -> tuple[nn.Sequential, tuple[int, ...], bool]:
    """A model, the shape of an example, and whether that is of indices."""
    made: dict[str, tuple[list[nn.Module], tuple[int, ...], bool]] = {
        "rows": ([nn.Linear(6, 5)], (6,), False),
        "positions": ([nn.Linear(9, 30), nn.Flatten(1)], (3, 9), False),
        "instantiated": ([nn.Linear(3, 4), nn.Flatten(1)], (20, 3), False),
        "patches": ([nn.Conv2d(8, 12, 3), nn.Flatten(1)], (8, 4, 4), False),
        "convolution": ([nn.Conv2d(2, 4, 3), nn.Flatten(1)], (2, 7, 6), False),
        "embedding": ([nn.Embedding(4, 6), nn.Flatten(1)], (9,), True),
        "layer norm": ([nn.LayerNorm(5), nn.Flatten(1)], (3, 5), False),
        "group norm": ([nn.GroupNorm(2, 4), nn.Flatten(1)], (4, 5), False),
        "two": ([nn.Linear(6, 5, bias=False), nn.Linear(5, 4)], (6,), False),
    }
    modules, shape, indices = made[name]
    return nn.Sequential(*modules), shape, indices


NAMES = (
    "rows", "positions", "instantiated", "patches", "convolution", "embedding", "layer norm", "group norm",
    "two",
)  # fmt: skip


@given(
    name=st.sampled_from(NAMES),
    kind=st.sampled_from(ENGINES),
    size=st.floats(-38, 38),
    slope=st.floats(-44, 30),
    bound=st.sampled_from([1e-6, 1e-3, 1.0, 1e3]),
    seed=st.integers(0, 3),
)
@example(name="rows", kind=BookKeeping, size=17.7, slope=-23.3, bound=1e-6, seed=0)
@example(name="positions", kind=BookKeeping, size=17.7, slope=-23.3, bound=1e-6, seed=0)
@example(name="patches", kind=BookKeeping, size=17.7, slope=-22.5, bound=1e-6, seed=0)
@example(name="positions", kind=BookKeeping, size=25.0, slope=-22.6, bound=1e-6, seed=1)
@example(name="rows", kind=BookKeeping, size=37.0, slope=-43.0, bound=1e-6, seed=0)
@example(name="rows", kind=BookKeeping, size=38.0, slope=5.0, bound=1e-6, seed=2)
@settings(max_examples=300, deadline=None)
def test_no_size_of_values_hides_a_gradient(
    name: str, kind: Callable[..., GradientEngine], size: float, slope: float, bound: float, seed: int
) -> None:
    """Squares and products of extreme values leave float32's range; the bound holds all the same."""
    torch.manual_seed(seed)
    model, shape, indices = layers(name)
    x = torch.randint(4, (2, *shape)) if indices else torch.randn(2, *shape)
    if not indices:
        x[0] = (x[0].double() * 10.0**size).float()
    factor = torch.tensor([10.0**slope, 1.0], dtype=torch.float64).float()

    def steep(output: Tensor, y: Tensor) -> Tensor:
        return output.flatten(1).sum(dim=1) * factor[y]

    engine = kind(model, steep)
    first = flat(engine.clipped_sums(x[:1], torch.zeros(1, dtype=torch.long), bound))
    assert float(first.norm()) <= bound * (1 + 1e-5)
    # whatever the first one is, it does not spoil the second
    both = flat(engine.clipped_sums(x, torch.tensor([0, 1]), bound))
    assert float(both.norm()) <= 2 * bound * (1 + 1e-5)


@pytest.mark.parametrize("width", [1, 5, 1024, 1025, 5000])
def test_squares_are_those_of_a_wider_type(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    for exponent in (-44, -23, -10, 0, 10, 18, 37):
        rows = (torch.randn(3, 4, width, generator=generator).double() * 10.0**exponent).float()
        expected = rows.double().square().sum(dim=-1)
        torch.testing.assert_close(squared(rows), expected, rtol=1e-6, atol=0.0)
    assert not squared(torch.zeros(3, width)).any()
    assert not torch.isfinite(squared(torch.full((2, width), math.inf))).any()


def test_a_long_gradient_is_not_shortened_by_rounding() -> None:
    """Added up one by one in float32, ten million equal squares lose a hundredth."""
    engine = BookKeeping(nn.Linear(4_000_000, 1, bias=False), lambda output, _: output[:, 0])
    moved = flat(engine.clipped_sums(torch.full((1, 4_000_000), 0.1), torch.zeros(1), 1.0))
    assert float(moved.norm()) <= 1 + 1e-5
