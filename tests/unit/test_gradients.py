"""Both gradient engines give the sum of the clipped gradients, for every layer, or refuse the model."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.layers import DPLSTM
from torch import Tensor, nn

from client.bookkeeping import BookKeeping, Untreatable, clip_factors
from client.gradients import Probe, batch_sums, engine_for
from client.hooks import Hooks
from client.layer_gradients import Layer, Positions
from client.safety import probe_for
from protocol.errors import LayerUnsupported
from protocol.plan import Plan
from scenarios.bench_models import BENCH_MODELS, BenchModel
from tasks.registry import task_for

CLASSES = 5


def loss(output: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, y, reduction="none")


class Mean(nn.Module):
    """The mean over all dimensions but the first and the one of the classes."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1, -2).mean(dim=1)


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Adapted(nn.Module):
    """A frozen layer with a trained low-rank adapter (Hu et al. 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 7).requires_grad_(False)
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Words(nn.Module):
    """Embeddings of tokens, of expanded positions, and of a transposed copy of the tokens."""

    def __init__(self, padding_idx: int | None = None) -> None:
        super().__init__()
        self.tokens = nn.Embedding(4, 6, padding_idx=padding_idx)
        self.places = nn.Embedding(9, 6)
        self.others = nn.Embedding(4, 6)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1]).expand(len(ids), -1)
        return (self.tokens(ids) + self.places(places)) * self.others(ids.T.contiguous().T)


def images(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(CLASSES))


def rows(*shape: int) -> Tensor:
    return torch.randn(6, *shape, dtype=torch.float64)


def ids() -> Tensor:
    return torch.randint(4, (6, 9))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = DPLSTM(3, 4, batch_first=True), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(torch.tanh(self.layer(x))))


class ReusedConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(torch.tanh(self.layer(x))).flatten(1))


class Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


KNOWN: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "rows": (
        lambda: nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5, bias=False)),
        lambda: rows(6),
    ),
    "few positions": (
        lambda: nn.Sequential(nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 5), Mean()),
        lambda: rows(2, 9),
    ),
    "many positions": (lambda: nn.Sequential(nn.Linear(3, 5, bias=False), Mean()), lambda: rows(20, 3)),
    "grid of positions": (lambda: nn.Sequential(nn.Linear(3, 5), Mean()), lambda: rows(2, 4, 3)),
    "convolution": (lambda: images(nn.Conv2d(2, 4, 3), nn.Tanh()), lambda: rows(2, 7, 6)),
    "strided": (
        lambda: images(nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0))),
        lambda: rows(2, 7, 6),
    ),
    "dilated": (lambda: images(nn.Conv2d(2, 4, 2, dilation=(2, 3), padding=2)), lambda: rows(2, 7, 6)),
    "grouped": (lambda: images(nn.Conv2d(4, 6, 3, groups=2, bias=False)), lambda: rows(4, 7, 6)),
    "depthwise": (lambda: images(nn.Conv2d(4, 4, 3, groups=4, padding=1)), lambda: rows(4, 5, 5)),
    "same": (
        lambda: images(nn.Conv2d(2, 3, (2, 4), padding="same", dilation=(1, 2))),
        lambda: rows(2, 7, 6),
    ),
    "valid": (lambda: images(nn.Conv2d(2, 3, 2, padding="valid")), lambda: rows(2, 4, 4)),
    "few patches": (lambda: images(nn.Conv2d(8, 12, 3)), lambda: rows(8, 4, 4)),
    "few grouped patches": (lambda: images(nn.Conv2d(16, 24, 3, groups=2)), lambda: rows(16, 4, 4)),
    "signal": (lambda: images(nn.Conv1d(2, 4, 3, stride=2, padding=1, dilation=2)), lambda: rows(2, 15)),
    "grouped signal": (lambda: images(nn.Conv1d(8, 12, 3, groups=2, padding="same")), lambda: rows(8, 4)),
    "embedding": (lambda: nn.Sequential(Words(), nn.Linear(6, 5), Mean()), ids),
    "padded embedding": (lambda: nn.Sequential(Words(padding_idx=0), nn.Linear(6, 5), Mean()), ids),
    "layer norm": (
        lambda: nn.Sequential(nn.LayerNorm(5), nn.Tanh(), nn.LayerNorm(5, bias=False), Mean()),
        lambda: rows(3, 5),
    ),
    "layer norm of two": (lambda: images(nn.LayerNorm([3, 5])), lambda: rows(2, 3, 5)),
    "group norm": (lambda: images(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4)), lambda: rows(2, 5, 5)),
    "group norm of rows": (lambda: nn.Sequential(nn.GroupNorm(2, 6), nn.Linear(6, 5)), lambda: rows(6)),
    "in place": (
        lambda: images(
            nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 2), nn.ReLU(inplace=True)
        ),
        lambda: rows(2, 6, 6),
    ),
    "residual": (
        lambda: nn.Sequential(Residual(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6))), nn.Linear(6, 5)),
        lambda: rows(6),
    ),
    "recurrent": (Recurrent, lambda: rows(4, 3)),
    "reused": (Reused, lambda: rows(6)),
    "adapter": (lambda: nn.Sequential(Adapted(), nn.Tanh(), nn.Linear(7, 5)), lambda: rows(6)),
    "bias alone": (
        lambda: nn.Sequential(frozen_weight(nn.Linear(6, 7)), nn.Tanh(), nn.Linear(7, 5)),
        lambda: rows(6),
    ),
}

OPACUS_CANNOT = {
    "padded embedding": "it gives the padding row a gradient",
    "layer norm": "it stops at a layer norm without bias",
    "in place": "its backward hooks forbid activations in place",
}


def frozen_weight(layer: nn.Linear) -> nn.Linear:
    layer.weight.requires_grad_(False)
    return layer


FOR_HOOKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "reused convolution": (ReusedConvolution, lambda: rows(2, 4, 4)),
    "raw parameter": (lambda: nn.Sequential(Raw(), nn.Linear(6, CLASSES)), lambda: rows(6)),
    "subclass": (lambda: nn.Sequential(Doubled(6, 6), nn.Linear(6, CLASSES)), lambda: rows(6)),
    "volume": (lambda: images(nn.Conv3d(1, 2, 2)), lambda: rows(1, 3, 3, 3)),
}


def made(
    build: Callable[[], nn.Module], batch: Callable[[], Tensor], dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(5)
    x = batch()
    x = x.to(dtype) if x.is_floating_point() else x
    model = build().to(dtype)
    model(x)  # gives lazy layers their width
    return model, x, torch.randint(CLASSES, (len(x),))


def separate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Norm and gradient of every example, each from a backward pass of its own."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = []
    for index in range(len(x)):
        total = loss(model(x[index : index + 1]), y[index : index + 1]).sum()
        parts = torch.autograd.grad(total, parameters)
        gradients.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack([gradient.norm() for gradient in gradients]), gradients


def flat(sums: list[Tensor]) -> Tensor:
    return torch.cat([total.flatten() for total in sums])


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def probe_of(x: Tensor, y: Tensor) -> Probe:
    return probe_for(x.numpy(), y.numpy())


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", KNOWN)
def test_book_keeping_treats_every_layer_exactly(name: str) -> None:
    model, x, y = made(*KNOWN[name])
    norms, gradients = separate(model, x, y)
    bound = float(norms.median())
    expected = sum(f * g for f, g in zip(clip_factors(norms, bound), gradients, strict=True))
    engine = BookKeeping(model, loss)
    assert relative(flat(engine.clipped_sums(x, y, bound)), torch.as_tensor(expected)) < 1e-12
    assert relative(flat(engine.clipped_sums(x, y, math.inf)), flat(engine.plain_sums(x, y))) < 1e-12
    assert engine_for(model, loss, "auto", probe_of(x, y)).name == "book-keeping"


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", sorted(KNOWN.keys() - OPACUS_CANNOT.keys()))
def test_book_keeping_agrees_with_opacus(name: str) -> None:
    model, x, y = made(*KNOWN[name])
    bound = float(separate(model, x, y)[0].median())
    own = flat(BookKeeping(model, loss).clipped_sums(x, y, bound))
    assert relative(own, flat(Hooks(model, loss).clipped_sums(x, y, bound))) < 1e-12


@pytest.mark.parametrize("name", FOR_HOOKS)
def test_hooks_treat_what_book_keeping_does_not(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model, x, y = made(*FOR_HOOKS[name])
    norms, gradients = separate(model, x, y)
    bound = float(norms.median())
    expected = sum(f * g for f, g in zip(clip_factors(norms, bound), gradients, strict=True))
    with caplog.at_level(logging.INFO, "fedseal.client"):
        engine = engine_for(model, loss, "auto", probe_of(x, y))
    assert engine.name == "hooks"
    assert "gradient engine: hooks (book-keeping: " in caplog.text
    assert relative(flat(engine.clipped_sums(x, y, bound)), torch.as_tensor(expected)) < 1e-10
    with pytest.raises(LayerUnsupported, match="book-keeping"):
        engine_for(made(*FOR_HOOKS[name])[0], loss, "book-keeping", probe_of(x, y))


@pytest.mark.parametrize("bench", BENCH_MODELS, ids=lambda bench: bench.name)
def test_engines_agree_on_the_models_of_the_benchmark(bench: BenchModel) -> None:
    torch.manual_seed(1)
    model = bench.build()
    x, y = (values[:3] for values in bench.batch())
    own = flat(BookKeeping(model, bench.loss).clipped_sums(x, y, 0.5))
    assert relative(own, flat(Hooks(model, bench.loss).clipped_sums(x, y, 0.5))) < 1e-5


@pytest.mark.parametrize(
    "model_fields",
    [{"name": "linear"}, {"name": "mlp", "hidden": [32, 16]}, {"name": "cnn"}, {"name": "scattering"}],
)
def test_engines_agree_on_the_models_of_the_tasks(model_fields: dict[str, object]) -> None:
    plan = Plan.from_fields(
        {
            "run": {"name": "unit", "rounds": 1},
            "task": {
                "name": "image-classification",
                "input_shape": [28, 28],
                "classes": 10,
                "value_range": [0.0, 255.0],
            },
            "model": model_fields,
            "cohort": {"minimum": 3, "maximum": 3},
            "training": {"local_steps": 1, "learning_rate": 1.0},
            "privacy": {"target_epsilon": 3.0, "sample_rate": 0.1, "expected_batch_size": 20.0},
        }
    )
    task = task_for(plan)
    generator = np.random.default_rng(0)
    raw = generator.integers(0, 256, (8, 28, 28)).astype(np.uint8)
    examples = task.check(raw, generator.integers(0, 10, 8))
    x, y = torch.from_numpy(examples.x), torch.from_numpy(examples.y)
    model = task.build_model(plan)
    own = flat(BookKeeping(model, task.loss).clipped_sums(x, y, 0.5))
    assert relative(own, flat(Hooks(model, task.loss).clipped_sums(x, y, 0.5))) < 1e-5
    assert engine_for(task.build_model(plan), task.loss, "auto", probe_of(x, y)).name == "book-keeping"


def test_an_example_that_is_not_finite_counts_as_nothing() -> None:
    for name in ("rows", "convolution", "many positions", "group norm"):
        model, x, y = made(*KNOWN[name])
        for engine in (BookKeeping(model, loss), Hooks(copy.deepcopy(model), loss)):
            clean = flat(engine.clipped_sums(x[1:], y[1:], 0.3))
            for bad in (math.nan, math.inf):
                dirty = x.clone()
                dirty[0].view(-1)[0] = bad
                assert relative(flat(engine.clipped_sums(dirty, y, 0.3)), clean) < 1e-12
                assert (
                    relative(flat(engine.plain_sums(dirty, y)), flat(engine.plain_sums(x[1:], y[1:])))
                    < 1e-12
                )
            assert not flat(engine.clipped_sums(torch.full_like(x, math.nan), y, 0.3)).any()


@given(
    sides=st.tuples(st.integers(5, 9), st.integers(5, 9)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.integers(1, 3),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    pieces=st.sampled_from([1, 50, 2**17]),
)
@settings(max_examples=40, deadline=None)
def test_any_convolution(
    sides: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    channels: tuple[int, int],
    pieces: int,
) -> None:
    layer = nn.Conv2d(
        groups * channels[0], groups * channels[1], kernel, stride, padding, dilation, groups
    ).double()
    model = nn.Sequential(layer, nn.Flatten())
    x = torch.randn(3, groups * channels[0], *sides, dtype=torch.float64)

    def energy(output: Tensor, _: Tensor) -> Tensor:
        return output.square().sum(dim=1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("client.convolution_gradients._PATCH_VALUES", pieces)
        own = flat(BookKeeping(model, energy).clipped_sums(x, torch.zeros(3), 0.5))
    expected = torch.zeros_like(own)
    for row in x:
        parts = torch.autograd.grad(energy(model(row[None]), row).sum(), list(model.parameters()))
        gradient = flat(list(parts))
        expected += gradient * clip_factors(gradient.norm(), 0.5)
    torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-12)


@given(scale=st.sampled_from([1.0, 1e-3, 1e3]), tilt=st.floats(1e-7, 1e-2), positions=st.integers(2, 12))
@settings(max_examples=60, deadline=None)
def test_rounding_hides_no_gradient_that_nearly_cancels(scale: float, tilt: float, positions: int) -> None:
    """The terms of a ghost norm can be far larger than the norm; an example must not look small by that."""
    torch.manual_seed(positions)
    a = torch.randn(1, 1, 40).expand(1, 2 * positions, 40) * (1 + tilt * torch.randn(1, 2 * positions, 1))
    b = torch.randn(1, 1, 30).expand(1, 2 * positions, 30) * scale
    b = b * torch.tensor([1.0, -1.0]).repeat(positions)[None, :, None]
    layer = nn.Linear(40, 30)
    shown = float(Positions(Layer(layer, layer.weight, None), a, b).squared_norms().sqrt())
    true = float((b.double().mT @ a.double()).norm())
    largest = float(a.double().norm() * b.double().norm())
    assert shown >= true * (1 - 1e-3) - 1e-6 * largest
    assert shown <= true * (1 + 1e-3) + 5e-6 * largest


@pytest.mark.parametrize("residue", [0.0, 1e-7, 1e-3])
@pytest.mark.parametrize("size", [1e3, 1e6, 1e9, 1e12])
@pytest.mark.parametrize("kind", [nn.Linear, nn.Embedding, nn.Conv2d])
def test_an_example_whose_terms_cancel_moves_the_sum_by_no_more_than_the_bound(
    kind: type[nn.Module], size: float, residue: float
) -> None:
    torch.manual_seed(0)
    signs = torch.tensor([1.0, -1.0]).repeat(3)
    layers: dict[type[nn.Module], tuple[nn.Module, Tensor]] = {
        nn.Linear: (nn.Linear(40, 30), torch.randn(8, 1, 40).expand(8, 6, 40)),
        nn.Embedding: (nn.Embedding(5, 30), torch.zeros(8, 6, dtype=torch.long)),
        nn.Conv2d: (nn.Conv2d(40, 30, 1), torch.randn(8, 40, 1, 1).expand(8, 40, 1, 6)),
    }
    model, x = layers[kind]
    x = x.clone()
    if x.is_floating_point():
        x[0] *= size

    def cancelling(output: Tensor, y: Tensor) -> Tensor:
        positions = output.flatten(2).mT if kind is nn.Conv2d else output
        weight = 1.0 + (size - 1.0) * (y == 1)
        return ((positions * (signs + residue * torch.arange(6))[None, :, None]).sum(dim=(1, 2))) * weight

    y = torch.zeros(8, dtype=torch.long)
    y[0] = 1
    engine = BookKeeping(model, cancelling)
    moved = flat(engine.clipped_sums(x, y, 1.0)) - flat(engine.clipped_sums(x[1:], y[1:], 1.0))
    assert float(moved.norm()) <= 1.01


def test_a_large_batch_is_added_up_in_pieces() -> None:
    model, x, y = made(*KNOWN["convolution"])
    for engine in (BookKeeping(model, loss), Hooks(copy.deepcopy(model), loss)):
        whole = flat(engine.clipped_sums(x, y, 0.3))
        sizes: list[int] = []

        def counted(
            a: Tensor, b: Tensor, engine: BookKeeping | Hooks = engine, sizes: list[int] = sizes
        ) -> list[Tensor]:
            sizes.append(len(a))
            return engine.clipped_sums(a, b, 0.3)

        engine.rows = 2
        assert relative(flat(batch_sums(engine, counted, x, y)), whole) < 1e-12
        assert sizes == [2, 2, 2]


@pytest.mark.parametrize("kind", [BookKeeping, Hooks])
def test_batches_of_none_and_of_one(kind: type[BookKeeping] | type[Hooks]) -> None:
    for name in ("rows", "convolution", "embedding", "few positions"):
        model, x, y = made(*KNOWN[name])
        engine = kind(model, loss)
        nothing = batch_sums(engine, lambda a, b, e=engine: e.clipped_sums(a, b, 0.3), x[:0], y[:0])
        assert [total.shape for total in nothing] == [parameter.shape for parameter in engine.parameters]
        assert not flat(nothing).any()
        assert float(flat(engine.clipped_sums(x[:1], y[:1], 1e-3)).norm()) == pytest.approx(1e-3, rel=0.01)


def test_only_trained_parameters_get_a_gradient() -> None:
    model, x, y = made(*KNOWN["adapter"])
    engine = BookKeeping(model, loss)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [names[id(parameter)] for parameter in engine.parameters] == [
        "0.down.weight", "0.up.weight", "2.weight", "2.bias",
    ]  # fmt: skip
    engine.clipped_sums(x, y, 1.0)
    assert [parameter.requires_grad for parameter in model[0].base.parameters()] == [False, False]
    assert all(parameter.requires_grad for parameter in engine.parameters)


class TiedByHand(nn.Module):
    """Uses an embedding's weight a second time, where no layer shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(CLASSES, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.words(x).mean(dim=1) @ self.words.weight.T


class SharedPlaces(nn.Module):
    """Adds one set of position vectors to all examples, whose gradient then is one for the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(4, CLASSES), nn.Embedding(9, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return (self.words(x) + self.places(torch.arange(x.shape[1]))).mean(dim=1)


class OverwritesInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        y = self.first(x)
        x.mul_(0.5)
        return self.second(y)


@pytest.mark.parametrize(("build", "batch"), [(TiedByHand, ids), (SharedPlaces, ids)])
def test_a_model_that_no_engine_treats_is_refused(
    build: Callable[[], nn.Module], batch: Callable[[], Tensor]
) -> None:
    model, x, y = made(build, batch)
    with pytest.raises(LayerUnsupported) as caught:
        engine_for(model, loss, "auto", probe_of(x, y))
    assert "book-keeping" in caught.value.detail
    assert "hooks" in caught.value.detail


def test_an_input_that_is_overwritten_is_noticed() -> None:
    model, x, y = made(OverwritesInput, lambda: rows(6))
    with pytest.raises(Untreatable, match="overwritten"):
        BookKeeping(model, loss).clipped_sums(x, y, 1.0)


def test_the_check_leaves_the_model_as_it_was() -> None:
    model, x, y = made(*KNOWN["convolution"])
    model.append(nn.Dropout(0.5))
    before = {name: values.clone() for name, values in model.state_dict().items()}
    engine_for(model, loss, "auto", probe_of(x, y))
    for name, values in model.state_dict().items():
        assert torch.equal(values, before[name])
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
