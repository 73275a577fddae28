"""The image task reads only what fits, and every machine builds the same model from a plan."""

import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from protocol.errors import DataInvalid, ModelMismatch, PlanInvalid
from protocol.plan import Plan
from tasks.images import ImageClassification, flatten, layout_hash, unflatten
from tasks.inputs import unit_rows
from tasks.partition import digits, split, write_examples
from tasks.registry import task_for


def make_plan(hidden: list[int] | None = None, seed: int = 0, **task: object) -> Plan:
    model: dict[str, object] = {"name": "mlp", "hidden": hidden} if hidden else {"name": "linear"}
    described = {
        "name": "image-classification",
        "input_shape": [8, 8],
        "value_range": [0.0, 16.0],
        "classes": 10,
    }
    return Plan.from_fields(
        {
            "run": {"name": "unit", "rounds": 4},
            "task": described | task,
            "model": model | {"initial_seed": seed},
            "cohort": {"minimum": 3, "maximum": 8},
            "training": {"local_steps": 5, "learning_rate": 0.5},
            "privacy": {"noise": "none", "sample_rate": 0.2, "expected_batch_size": 48.0},
        }
    )


PLAN = make_plan([16])
TASK = task_for(PLAN)
X = np.random.default_rng(3).uniform(0, 16, (6, 8, 8)).astype(np.float32)
Y = np.array([0, 1, 2, 9, 8, 7])


def test_reads_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "records.npz"
    write_examples(path, X, Y)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    write_examples(path, X, Y.astype(np.uint8))
    assert [file.name for file in tmp_path.iterdir()] == ["records.npz"]
    examples = TASK.read(path)
    assert (examples.x.dtype, examples.x.shape) == (np.float32, (6, 64))
    assert (examples.y.dtype, examples.y.tolist()) == (np.int64, Y.tolist())


def test_bytes_are_read_like_floats() -> None:
    whole = np.round(X)
    np.testing.assert_array_equal(
        TASK.check(whole.astype(np.uint8), Y).x, TASK.check(whole.astype(np.float32), Y).x
    )


def changed(array: np.ndarray[Any, Any], value: float) -> np.ndarray[Any, Any]:
    copy = array.copy()
    copy.flat[3] = value
    return copy


@pytest.mark.parametrize(
    ("x", "y", "word"),
    [
        (X.astype(np.float64), Y, "float32 or uint8"),
        (X.astype(object), Y, "float32 or uint8"),
        (X[:, :7], Y, "shape"),
        (X.reshape(6, 64), Y, "shape"),
        (X[0], Y, "shape"),
        (np.float32(1.0).reshape(()), Y, "shape"),
        (changed(X, np.nan), Y, "finite"),
        (changed(X, np.inf), Y, "finite"),
        (changed(X, 16.5), Y, "value_range"),
        (changed(X, -0.5), Y, "value_range"),
        (X, Y.astype(np.float64), "integer"),
        (X, Y[:5], "integer"),
        (X, Y.reshape(1, 6), "integer"),
        (X, changed(Y, 10), "labels"),
        (X, changed(Y, -1), "labels"),
        (X, changed(Y.astype(np.uint64), 2**63), "labels"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], word: str
) -> None:
    with pytest.raises(DataInvalid, match=word):
        TASK.check(x, y)


def write_pickle(path: Path) -> None:
    np.savez(path, x=np.array([{"a": 1}], dtype=object), y=Y, allow_pickle=True)


def write_truncated(path: Path) -> None:
    write_examples(path, X, Y)
    path.write_bytes(path.read_bytes()[:-40])


def write_flipped(path: Path) -> None:
    write_examples(path, X, Y)
    data = bytearray(path.read_bytes())
    data[300] ^= 4
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "write",
    [
        Path.is_file,
        lambda path: path.mkdir(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PK\x03\x04 not a zip"),
        lambda path: path.write_bytes(b"\x80\x04]."),
        lambda path: np.savez(path, x=X),
        lambda path: path.write_bytes(X.tobytes()),
        write_pickle,
        write_truncated,
        write_flipped,
    ],
)
def test_files_that_are_not_examples_are_refused_without_their_path(tmp_path: Path, write: Any) -> None:
    path = tmp_path / "secret-ward.npz"
    write(path)
    with pytest.raises(DataInvalid) as caught:
        TASK.read(path)
    assert "secret-ward" not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_a_single_array_file_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "x.npz").open("wb") as file:
        np.save(file, X)
    with pytest.raises(DataInvalid):
        TASK.read(tmp_path / "x.npz")


def test_no_rows_are_fine_but_have_no_accuracy() -> None:
    empty = TASK.check(X[:0], Y[:0])
    assert empty.x.shape == (0, 64)
    with pytest.raises(DataInvalid):
        TASK.evaluate(TASK.build_model(PLAN), empty)


def test_preprocessing_looks_at_one_row_only() -> None:
    together = unit_rows(X, 0.0, 16.0)
    alone = np.concatenate([unit_rows(X[i : i + 1], 0.0, 16.0) for i in range(len(X))])
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, rtol=1e-6)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0), (-5.0, 0.0), (-1.0, 9.0)])
def test_zero_stays_zero_where_the_declared_range_holds_it(low: float, high: float) -> None:
    """A row of mostly zeros, as counts of words are, keeps its few values apart from the rest."""
    row = np.zeros((3, 8, 8), dtype=np.float32)
    row[0, 0, 0], row[1, 7, 7] = high or low, (high or low) / 2
    scaled = unit_rows(row, low, high)
    np.testing.assert_array_equal(scaled != 0, row.reshape(3, 64) != 0)
    np.testing.assert_allclose(np.linalg.norm(scaled, axis=1), [1.0, 1.0, 0.0])
    assert scaled[0] @ scaled[1] == 0.0
    assert np.sign(scaled[0, 0]) == np.sign(high or low)


def test_a_range_without_zero_is_centred() -> None:
    row = np.full((3, 8, 8), 6.0, dtype=np.float32)
    row[1, :4], row[2, 0, 0] = 5.0, 4.0
    scaled = unit_rows(row, 4.0, 8.0)
    assert not scaled[0].any()
    np.testing.assert_allclose(scaled[1], np.repeat([-1 / np.sqrt(32), 0.0], 32))
    np.testing.assert_allclose(np.linalg.norm(scaled, axis=1), [0.0, 1.0, 1.0])


def test_no_scale_of_values_makes_a_norm_overflow_or_vanish() -> None:
    for scale in (1e-38, 1e38):
        rows = np.linspace(-1, 1, 128).reshape(2, 8, 8).astype(np.float32) * np.float32(scale)
        norms = np.linalg.norm(unit_rows(rows, -1e39, 1e39), axis=1)
        np.testing.assert_allclose(norms, 1.0, rtol=1e-5)


def test_the_model_follows_from_the_plan_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = TASK.initial_weights(PLAN)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    np.testing.assert_array_equal(first, TASK.initial_weights(PLAN))
    assert not np.array_equal(first, TASK.initial_weights(make_plan([16], seed=1)))
    assert first.dtype == np.float64
    assert first.shape == (64 * 16 + 16 + 16 * 10 + 10,)
    assert 0.9 / 8 < np.abs(first[:1024]).max() <= 1 / 8


def test_the_linear_model_starts_at_zero() -> None:
    weights = TASK.initial_weights(make_plan())
    assert weights.shape == (650,)
    assert not weights.any()


@pytest.mark.parametrize(
    ("model", "word"),
    [
        ({"name": "mlp"}, "hidden"),
        ({"name": "linear", "hidden": [4]}, "hidden"),
        ({"name": "resnet"}, "model.name"),
    ],
)
def test_unknown_models_are_refused(model: dict[str, object], word: str) -> None:
    plan = Plan.from_fields(make_plan().fields() | {"model": model})
    with pytest.raises(PlanInvalid, match=word):
        TASK.build_model(plan)


def test_unknown_tasks_are_refused() -> None:
    with pytest.raises(PlanInvalid, match=r"task\.name"):
        task_for(make_plan(name="speech"))


def test_a_vector_goes_into_a_model_and_comes_out_again() -> None:
    model = TASK.build_model(PLAN)
    vector = np.linspace(-1, 1, flatten(model).size)
    unflatten(model, vector)
    np.testing.assert_array_equal(flatten(model), vector.astype(np.float32))
    vector[:] = 5.0
    assert flatten(model).max() == 1.0
    for wrong in (vector[:-1], np.append(vector, 0.0), vector.reshape(1, -1)):
        with pytest.raises(ModelMismatch, match="parameters"):
            unflatten(model, wrong)


def test_the_layout_hash_tells_shapes_apart_and_not_weights() -> None:
    def layout(plan: Plan) -> str:
        return layout_hash(TASK.build_model(plan))

    assert layout(PLAN) == layout(make_plan([16], seed=9))
    assert len({layout(PLAN), layout(make_plan([17])), layout(make_plan())}) == 3


def test_loss_is_one_number_for_each_example() -> None:
    logits = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    losses = TASK.loss(logits, torch.tensor([0, 1]))
    expected = torch.tensor([np.log(2.0), np.log1p(np.exp(2.0))], dtype=torch.float32)
    assert torch.allclose(losses, expected)


def test_accuracy_counts_right_answers() -> None:
    model = TASK.build_model(make_plan())
    assert TASK.evaluate(model, TASK.check(X, Y)) == pytest.approx(1 / 6)


def test_the_schema_describes_the_deployed_input() -> None:
    schema = TASK.input_schema(PLAN)
    assert (schema["name"], schema["shape"], schema["dtype"]) == ("input", [64], "float32")
    assert (schema["raw_shape"], schema["raw_range"]) == ([8, 8], [0.0, 16.0])
    assert "L2 norm" in schema["preprocessing"]
    assert "[-0.5, 0.5]" not in schema["preprocessing"]
    elsewhere = task_for(make_plan([16], value_range=[4.0, 8.0]))
    assert "middle of raw_range" in elsewhere.input_schema(PLAN)["preprocessing"]


@pytest.mark.parametrize("value_range", [[0.0, 16.0], [2.0, 16.0]])
def test_whoever_follows_the_schema_gets_the_inputs(value_range: list[float]) -> None:
    """The words of the schema, carried out by somebody who does not know the code."""
    plan = make_plan([16], value_range=value_range)
    x, (low, high) = X / 2 + 4, value_range
    words = task_for(plan).input_schema(plan)["preprocessing"]
    flat = [[float(value) for value in row.flatten()] for row in x]
    if "Subtract the middle of raw_range" in words:
        flat = [[value - (low + high) / 2 for value in row] for row in flat]
    expected = [[value / sum(one * one for one in row) ** 0.5 for value in row] for row in flat]
    np.testing.assert_allclose(task_for(plan).check(x, Y).x, expected, rtol=1e-5, atol=1e-7)


def test_digits_are_split_without_overlap() -> None:
    shards, public = digits(seed=1, owners=4)
    assert len(public[1]) == 360
    assert sum(len(y) for _, y in shards) == 1797 - 360
    task = ImageClassification(PLAN.task)
    for x, y in [*shards, public]:
        assert task.check(x, y).x.shape == (len(y), 64)
    other_shards, other_public = digits(seed=2, owners=4)
    assert not np.array_equal(public[0], other_public[0])
    again, _ = digits(seed=1, owners=4)
    np.testing.assert_array_equal(again[0][0], shards[0][0])
    assert not np.array_equal(other_shards[0][0], shards[0][0])


@pytest.mark.parametrize("alpha", [None, 0.1, 100.0])
@pytest.mark.parametrize("owners", [1, 3, 7])
def test_a_split_holds_every_row_once(alpha: float | None, owners: int) -> None:
    rows = np.arange(1000)
    shards, test = split(rows, rows % 10, owners, seed=5, test_share=0.2, alpha=alpha)
    assert len(test[0]) == 200
    assert sorted(np.concatenate([x for x, _ in shards] + [test[0]])) == rows.tolist()
    assert all(np.array_equal(x % 10, y) for x, y in shards)


def test_a_small_alpha_makes_owners_differ() -> None:
    rows = np.arange(5000)
    spread = []
    for alpha in (0.1, 1000.0):
        shards, _ = split(rows, rows % 10, 5, seed=5, test_share=0.0, alpha=alpha)
        shares = [np.bincount(y, minlength=10) / len(y) for _, y in shards]
        spread.append(np.std(shares, axis=0).mean())
    assert spread[0] > 5 * spread[1]


def test_more_owners_than_rows_are_refused() -> None:
    with pytest.raises(DataInvalid):
        split(X, Y, 7, seed=0, test_share=0.0)
