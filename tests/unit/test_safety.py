"""What must not be trained is refused, with its own code and a remedy, before any data is used."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from opacus.layers import DPLSTM
from torch import Tensor, nn

import client.noise
from client.noise import SecureStream
from client.safety import probe_for, require_own, require_safe, require_secret_randomness
from protocol.errors import (
    ExamplesMixed,
    LayerUnsupported,
    ModelUnsafe,
    NoiseSeeded,
    ParameterUnused,
    SamplerReplaced,
    StatisticsKept,
    WeightsTied,
)
from scenarios.bench_models import BENCH_MODELS


def loss(output: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, y, reduction="none")


PROBE = probe_for(np.zeros((0, 6), np.float32), np.zeros(0, np.int64))
WORDS = probe_for(np.zeros((0, 5), np.int64), np.zeros(0, np.int64))


class Apply(nn.Module):
    """A module of one function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def behind(function: Callable[[Tensor], Tensor]) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), Apply(function), nn.Linear(6, 3))


MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x - x.mean(dim=0),
    "small share of the mean": lambda x: x + 0.01 * x.mean(dim=0),
    "whole mean": lambda x: x / (1 + x.square().mean()),
    "largest": lambda x: x / x.abs().amax(dim=0, keepdim=True),
    "order": lambda x: x.sort(dim=0).values,
    "neighbour": lambda x: x + x.roll(1, dims=0),
    "similarity": lambda x: torch.softmax(x @ x.T, dim=1) @ x,
    "first": lambda x: x + x[:1],
    "last": lambda x: x + x[-1:],
    "count": lambda x: x * len(x),
    "count within": lambda x: x + 1 / len(x),
}


@pytest.mark.parametrize("name", MIXING)
def test_mixing_of_examples_is_refused(name: str) -> None:
    with pytest.raises(ExamplesMixed):
        require_safe(behind(MIXING[name]), loss, PROBE)


def test_mixing_in_training_alone_is_refused() -> None:
    class Hidden(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(dim=0) if self.training else x

    with pytest.raises(ExamplesMixed):
        require_safe(nn.Sequential(nn.Linear(6, 6), Hidden(), nn.Linear(6, 3)), loss, PROBE)


def test_mixing_behind_dropout_is_refused_and_dropout_alone_is_not() -> None:
    require_safe(nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 3)), loss, PROBE)
    with pytest.raises(ExamplesMixed):
        require_safe(nn.Sequential(nn.Dropout(0.5), behind(MIXING["mean"])), loss, PROBE)


def test_mixing_behind_weights_of_zero_is_refused() -> None:
    model = behind(MIXING["mean"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with pytest.raises(ExamplesMixed):
        require_safe(model, loss, PROBE)
    assert not any(bool(parameter.any()) for parameter in model.parameters())


def test_a_loss_that_mixes_is_refused() -> None:
    model = nn.Linear(6, 3)
    for mixing in (
        lambda output, y: loss(output, y) / len(y),
        lambda output, y: loss(output, y) - loss(output, y).mean(),
        lambda output, y: loss(output - output.mean(dim=0), y),
        lambda output, y: loss(output, y).mean()[None],
    ):
        with pytest.raises(ExamplesMixed):
            require_safe(model, mixing, PROBE)


def test_mixing_of_indices_is_refused() -> None:
    mixing = nn.Sequential(nn.Embedding(4, 6), Apply(lambda x: x.mean(dim=(0, 1)).expand(len(x), 6)))
    with pytest.raises(ExamplesMixed):
        require_safe(nn.Sequential(mixing, nn.Linear(6, 3)), loss, WORDS)
    apart = nn.Sequential(nn.Embedding(4, 6), Apply(lambda x: x.mean(dim=1)), nn.Linear(6, 3))
    require_safe(apart, loss, WORDS)


class WithBuffer(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 3)
        self.register_buffer("count", torch.zeros(1))


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)),
        nn.Sequential(nn.BatchNorm1d(6, affine=False), nn.Linear(6, 3)),
        nn.Sequential(nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 3)),
        nn.Sequential(nn.InstanceNorm1d(6, track_running_stats=True), nn.Linear(6, 3)),
        WithBuffer(),
    ],
)
def test_statistics_are_refused(model: nn.Module) -> None:
    with pytest.raises(StatisticsKept) as caught:
        require_safe(model, loss, PROBE)
    assert "GroupNorm" in caught.value.explain()


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.forgotten = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_an_unused_parameter_is_refused_by_name_and_allowed_when_frozen() -> None:
    model = Unused()
    with pytest.raises(ParameterUnused, match=r"forgotten\.weight"):
        require_safe(model, loss, PROBE)
    model.forgotten.requires_grad_(False)
    require_safe(model, loss, PROBE)


def test_tied_weights_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 3))
    model[2].weight = model[0].weight
    with pytest.raises(WeightsTied, match=r"0\.weight and 2\.weight"):
        require_safe(model, loss, PROBE)
    shared = nn.Linear(6, 6)
    with pytest.raises(WeightsTied):
        require_safe(nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(6, 3)), loss, PROBE)


def test_a_recurrent_layer_of_opacus_passes_unless_its_weights_are_tied() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = DPLSTM(1, 4, num_layers=2, batch_first=True), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x[..., None])[0][:, -1])

    require_safe(Recurrent(), loss, PROBE)
    tied = Recurrent()
    tied.lstm.cells[1].hh.weight = tied.lstm.cells[0].hh.weight
    with pytest.raises(WeightsTied):
        require_safe(tied, loss, PROBE)


def test_what_opacus_cannot_treat_is_refused() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(1, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x[..., None])[0][:, -1])

    with pytest.raises(LayerUnsupported, match="Opacus"):
        require_safe(Recurrent(), loss, PROBE)


def test_a_model_without_trained_parameters_is_refused() -> None:
    with pytest.raises(ModelUnsafe, match="no parameter"):
        require_safe(nn.Linear(6, 3).requires_grad_(False), loss, PROBE)


@pytest.mark.parametrize("bench", BENCH_MODELS, ids=lambda bench: bench.name)
def test_sound_models_pass_and_are_left_as_they_were(bench: Any) -> None:
    model = bench.build()
    before = {name: values.clone() for name, values in model.state_dict().items()}
    state = torch.get_rng_state()
    x, y = bench.batch()
    after_batch = torch.get_rng_state()
    require_safe(model, bench.loss, probe_for(x.numpy(), y.numpy()))
    assert torch.equal(torch.get_rng_state(), after_batch)
    assert not torch.equal(state, after_batch)
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())
    assert model.training


def test_the_probe_looks_at_no_value() -> None:
    generator = np.random.default_rng(0)
    for x, y in (
        (generator.normal(size=(9, 2, 3)).astype(np.float32), generator.integers(0, 5, 9)),
        (generator.integers(0, 70, (9, 4)), generator.normal(size=(9, 2)).astype(np.float32)),
    ):
        for one, other in zip(probe_for(x, y), probe_for(np.zeros_like(x[:0]), y[:0]), strict=True):
            assert torch.equal(one, other)
            assert one.dtype == other.dtype


# --- the source of noise and coins -------------------------------------------------------------------


def planted(monkeypatch: pytest.MonkeyPatch, **methods: Any) -> Callable[[], SecureStream]:
    """Put a fault into the real stream, as a careless change of it would."""
    for name, method in methods.items():
        monkeypatch.setattr(SecureStream, name, method)
    return SecureStream


def seeded_uniform(self: SecureStream, n: int) -> NDArray[np.float64]:
    return np.random.random(n)


def first_records(self: SecureStream, n: int, probability: float) -> NDArray[np.bool_]:
    return np.arange(n) < n * probability


def shuffled_batch(self: SecureStream, n: int, probability: float) -> NDArray[np.bool_]:
    return np.argsort(np.argsort(self.uniform(n))) < round(n * probability)


def torch_coins(self: SecureStream, n: int, probability: float) -> NDArray[np.bool_]:
    return (torch.rand(n) < probability).numpy()


def five_percent_more(self: SecureStream, n: int, probability: float) -> NDArray[np.bool_]:
    return self.uniform(n) < probability * 1.05


def all_or_nothing(self: SecureStream, n: int, probability: float) -> NDArray[np.bool_]:
    return np.full(n, self.uniform(1)[0] < probability)


def words(self: SecureStream, n: int, probability: float) -> NDArray[Any]:
    return (self.uniform(n) < probability).astype(np.int64)


@pytest.mark.parametrize(
    "coins", [first_records, shuffled_batch, torch_coins, five_percent_more, all_or_nothing, words]
)
def test_a_replaced_sampler_is_refused(
    coins: Callable[[SecureStream, int, float], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SamplerReplaced):
        require_secret_randomness(planted(monkeypatch, coins=coins), 0.5)


@pytest.mark.parametrize(
    "gaussian",
    [
        lambda _, n: torch.randn(n).double().numpy(),
        lambda _, n: np.random.standard_normal(n),
        lambda _, n: np.array([random.gauss() for _ in range(n)]),
        lambda _, n: np.random.default_rng(7).standard_normal(n),
        lambda _, n: np.zeros(n),
    ],
)
def test_seeded_noise_is_refused(
    gaussian: Callable[[SecureStream, int], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NoiseSeeded):
        require_secret_randomness(planted(monkeypatch, gaussian=gaussian), 0.5)


def test_seeded_uniform_numbers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SamplerReplaced):
        require_secret_randomness(planted(monkeypatch, uniform=seeded_uniform), 0.5)


def test_a_key_that_repeats_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.noise.os, "urandom", lambda n: bytes(n))
    with pytest.raises(NoiseSeeded):
        require_secret_randomness(SecureStream, 0.5)


def test_a_stream_that_only_looks_like_the_own_one_is_refused() -> None:
    class Other:
        pass

    unkeyed = SecureStream.__new__(SecureStream)
    dressed = SecureStream()
    dressed.__dict__["gaussian"] = lambda n: np.zeros(n)
    for stream in (Other(), unkeyed, dressed, np.random.default_rng(), None):
        with pytest.raises(NoiseSeeded):
            require_own(stream)
    inherited: Any = type("Inherited", (SecureStream,), {})
    with pytest.raises(NoiseSeeded):
        require_own(inherited())
    with pytest.raises(NoiseSeeded):
        require_secret_randomness(inherited, 0.5)


@pytest.mark.parametrize("sample_rate", [1e-6, 0.003, 0.5, 1.0])
def test_the_own_stream_passes_and_global_generators_are_left_alone(sample_rate: float) -> None:
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    for _ in range(20):
        require_secret_randomness(SecureStream, sample_rate)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
