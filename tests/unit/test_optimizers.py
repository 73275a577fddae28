"""The server optimizers are what the paper writes, in float64, and the hash covers every bit."""

from decimal import Decimal, localcontext

import numpy as np
import pytest
from numpy.typing import NDArray

from protocol.optimizers import GlobalModel, apply_update
from protocol.sections import ServerOptimizerSection

NAMES = ["fedavg", "fedavgm", "fedadam", "fedyogi"]
Column = tuple[Decimal, Decimal, Decimal]


def section(name: str, **changes: float) -> ServerOptimizerSection:
    return ServerOptimizerSection.model_validate({"name": name, **changes})


def reference(column: Column, mean: Decimal, optimizer: ServerOptimizerSection) -> Column:
    """One coordinate of Reddi et al. 2021, algorithms 1 and 2, in 60 decimal digits."""
    x, m, v = column
    eta, beta1, beta2, tau = (
        Decimal(value)
        for value in (
            optimizer.learning_rate,
            optimizer.momentum,
            optimizer.second_moment,
            optimizer.epsilon,
        )
    )
    if optimizer.name == "fedavg":
        return x + eta * mean, m, v
    if optimizer.name == "fedavgm":
        m = beta1 * m + mean
        return x + eta * m, m, v
    m = beta1 * m + (1 - beta1) * mean
    square = mean**2
    if optimizer.name == "fedadam":
        v = beta2 * v + (1 - beta2) * square
    elif v > square:
        v = v - (1 - beta2) * square
    elif v < square:
        v = v + (1 - beta2) * square
    return x + eta * m / (v.sqrt() + tau), m, v


def means(rounds: int, size: int) -> NDArray[np.float64]:
    return np.random.default_rng(11).normal(0, 0.3, (rounds, size))


@pytest.mark.parametrize("name", NAMES)
def test_five_rounds_follow_the_paper(name: str) -> None:
    optimizer = section(name, learning_rate=0.7, momentum=0.8, second_moment=0.95, epsilon=1e-3)
    start = np.random.default_rng(5).normal(0, 1, 40)
    model = GlobalModel.initial(start)
    columns: list[Column] = [(Decimal(value), Decimal(0), Decimal(0)) for value in start.tolist()]
    for mean in means(5, 40):
        model = apply_update(model, mean, optimizer)
        with localcontext(prec=60):
            columns = [
                reference(column, Decimal(value), optimizer)
                for column, value in zip(columns, mean.tolist(), strict=True)
            ]
    expected = np.array([[float(part) for part in column] for column in columns]).T
    np.testing.assert_allclose(model.weights, expected[0], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(model.first_moment, expected[1], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(model.second_moment, expected[2], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_everything_stays_float64_and_the_old_model_stays_as_it_was(name: str) -> None:
    model = GlobalModel.initial(np.linspace(-1, 1, 9))
    before = model.sha256()
    following = apply_update(model, np.full(9, 0.5), section(name))
    assert model.sha256() == before != following.sha256()
    for part in (following.weights, following.first_moment, following.second_moment):
        assert part.dtype == np.float64
        assert part.shape == (9,)


@pytest.mark.parametrize("name", NAMES)
def test_two_parties_get_the_same_bits(name: str) -> None:
    """Each value follows from its own column, so that vector length and memory layout do not matter."""
    mean = means(1, 101)[0]
    start = np.random.default_rng(2).normal(0, 1, 101)
    whole = apply_update(GlobalModel.initial(start), mean, section(name))
    single = [
        apply_update(GlobalModel.initial(start[i : i + 1]), mean[i : i + 1], section(name)).weights[0]
        for i in range(101)
    ]
    strided = apply_update(
        GlobalModel.initial(np.repeat(start, 3)[::3]), np.repeat(mean, 2)[::2], section(name)
    )
    assert whole.weights.tobytes() == np.array(single).tobytes() == strided.weights.tobytes()
    assert whole.sha256() == strided.sha256()


@pytest.mark.parametrize("name", ["fedadam", "fedyogi"])
def test_no_update_moves_nothing_at_the_start(name: str) -> None:
    model = GlobalModel.initial(np.ones(3))
    following = apply_update(model, np.zeros(3), section(name))
    assert np.array_equal(following.weights, model.weights)


def test_every_bit_of_weights_and_memory_is_in_the_hash() -> None:
    rng = np.random.default_rng(8)
    model = GlobalModel(rng.normal(size=2), rng.normal(size=2), rng.normal(size=2))
    data = model.to_bytes()
    hashes = {model.sha256()}
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        vectors = np.frombuffer(bytes(changed), dtype="<f8").reshape(3, 2)
        hashes.add(GlobalModel(*vectors).sha256())
    assert len(hashes) == 1 + 8 * len(data)


def test_the_hash_tells_weights_from_memory() -> None:
    a, b, c = np.array([1.0]), np.array([2.0]), np.array([3.0])
    orders = [(a, b, c), (b, a, c), (c, b, a), (a, c, b)]
    assert len({GlobalModel(*order).sha256() for order in orders}) == 4


def test_a_model_survives_its_bytes() -> None:
    model = apply_update(GlobalModel.initial(np.arange(7.0)), means(1, 7)[0], section("fedyogi"))
    copy = GlobalModel.from_bytes(model.to_bytes(), 7)
    assert copy.sha256() == model.sha256()
    assert copy.weights.dtype == np.float64
    assert copy.weights.flags.writeable
