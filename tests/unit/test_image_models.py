"""Each image model gets the inputs it needs, starts from the plan alone, can be trained and exported."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.training import local_update
from deploy.build import build_package, compress
from deploy.gate import synthetic_inputs
from deploy.measure import run_session
from deploy.package import load_session, verify_package
from deploy.statement import PrivacyStatement
from protocol.errors import DataInvalid, DatasetMissing, PlanInvalid
from protocol.plan import Plan
from scenarios.simulate import Scenario
from tasks.images import flatten, unflatten
from tasks.inputs import input_form
from tasks.partition import DATA_VARIABLE, fashion_mnist
from tasks.registry import task_for
from tasks.resolve import resolve

RNG = np.random.default_rng(4)


def make_plan(name: str, shape: list[int], seed: int = 0, **privacy: Any) -> Plan:
    return Plan.from_fields(
        {
            "run": {"name": "unit", "rounds": 4},
            "task": {
                "name": "image-classification",
                "input_shape": shape,
                "value_range": [0.0, 255.0],
                "classes": 10,
            },
            "model": {"name": name, "initial_seed": seed},
            "cohort": {"minimum": 3, "maximum": 8},
            "training": {"local_steps": 2, "learning_rate": 0.5},
            "privacy": {"noise": "none", "sample_rate": 1.0, "expected_batch_size": 30.0} | privacy,
        }
    )


def images(rows: int, *shape: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Bright squares whose place is the label: any of the models can tell them apart."""
    y = np.arange(rows) % 10
    x = RNG.integers(0, 40, (rows, *shape)).astype(np.uint8)
    for row, label in enumerate(y):
        top, left = 6 * (label // 4) % (shape[0] - 5), 6 * (label % 4) % (shape[1] - 5)
        x[row, top : top + 6, left : left + 6] = 220
    return x, y


@pytest.mark.parametrize(
    ("name", "inputs", "parameters"),
    [("linear", (784,), 7850), ("cnn", (1, 28, 28), 26_010), ("scattering", (3969,), 39_700)],
)
@pytest.mark.parametrize("channels", [(), (1,)])
def test_inputs_fit_the_model(
    name: str, inputs: tuple[int, ...], parameters: int, channels: tuple[int, ...]
) -> None:
    plan = make_plan(name, [*channels, 28, 28])
    task = task_for(plan)
    grey, y = images(5, 28, 28)
    examples = task.check(grey.reshape(5, *channels, 28, 28), y)
    np.testing.assert_array_equal(examples.x, task_for(make_plan(name, [28, 28])).check(grey, y).x)
    assert examples.x.dtype == np.float32
    assert examples.x.shape == (5, *inputs)
    schema = task.input_schema(plan)
    assert schema["shape"] == list(inputs)
    assert schema["range"][0] <= examples.x.min() <= examples.x.max() <= schema["range"][1]
    model = task.build_model(plan)
    assert model(torch.from_numpy(examples.x)).shape == (5, 10)
    assert flatten(model).size == parameters
    assert task.check(np.zeros((0, *channels, 28, 28), np.uint8), y[:0]).x.shape == (0, *inputs)


def test_the_first_weights_of_the_network_follow_from_the_seed_alone() -> None:
    plan = make_plan("cnn", [28, 28], seed=3)
    before = torch.get_rng_state()
    first = task_for(plan).initial_weights(plan)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(9)
    np.testing.assert_array_equal(first, task_for(plan).initial_weights(plan))
    other = make_plan("cnn", [28, 28], seed=4)
    assert not np.array_equal(first, task_for(other).initial_weights(other))
    assert not task_for(plan).initial_weights(make_plan("scattering", [28, 28])).any()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("cnn", [15, 28]),
        ("cnn", [784]),
        ("cnn", [28, 28, 3]),
        ("cnn", [2, 28, 28]),
        ("cnn", [3, 15, 28]),
        ("cnn", [1, 3, 28, 28]),
        ("scattering", [28, 28, 3]),
        ("scattering", [4, 28, 28]),
        ("scattering", [3, 28, 30]),
        ("scattering", [28]),
        ("scattering", [28, 30]),
        ("scattering", [4, 28]),
    ],
)
def test_shapes_that_a_model_cannot_take_are_refused(name: str, shape: list[int]) -> None:
    plan = make_plan(name, shape)
    with pytest.raises(PlanInvalid, match=r"task\.input_shape"):
        task_for(plan).build_model(plan)


@pytest.mark.parametrize("name", ["cnn", "scattering"])
def test_hidden_widths_are_for_the_dense_network_only(name: str) -> None:
    fields = make_plan(name, [28, 28]).fields()
    plan = Plan.from_fields(fields | {"model": {"name": name, "hidden": [8]}})
    with pytest.raises(PlanInvalid, match="hidden"):
        task_for(plan).build_model(plan)


def test_rows_that_do_not_fit_are_left_out_for_every_model(tmp_path: Path) -> None:
    x, y = images(6, 28, 28)
    bad = x.astype(np.float32)
    bad[2, 0, 0], y[4] = 300.0, 10
    np.savez(tmp_path / "rows.npz", x=bad, y=y)
    for name in ("cnn", "scattering"):
        task = task_for(make_plan(name, [28, 28]))
        assert len(task.read_private(tmp_path / "rows.npz")) == 4
        with pytest.raises(DataInvalid):
            task.read(tmp_path / "rows.npz")


@pytest.mark.parametrize("name", ["cnn", "scattering"])
@pytest.mark.parametrize("noise", ["none", "local"])
def test_an_owner_trains_and_improves(name: str, noise: str) -> None:
    secret: dict[str, Any] = {"noise": "local", "target_epsilon": 1e3, "noise_multiplier": 0.3}
    plan = make_plan(name, [28, 28], **(secret if noise == "local" else {}))
    task = task_for(plan)
    examples = task.check(*images(30, 28, 28))
    start = task.initial_weights(plan)
    update = local_update(task, plan, start, examples)
    assert update.shape == start.shape
    if noise == "none" and name == "scattering":
        model = task.build_model(plan)
        unflatten(model, start + update)
        assert task.evaluate(model, examples) > 0.9


@pytest.mark.parametrize("name", ["cnn", "scattering"])
def test_a_model_is_exported_whole(name: str) -> None:
    plan = make_plan(name, [28, 28])
    task = task_for(plan)
    examples = task.check(*images(30, 28, 28))
    model = task.build_model(plan)
    stages: list[str] = []
    result = compress(plan, model, (examples.x, examples.y), synthetic_inputs(plan, 64), stages.append)
    exported = onnx.load_model_from_string(result.onnx_bytes)
    dimensions = exported.graph.input[0].type.tensor_type.shape.dim[1:]
    assert [dimension.dim_value for dimension in dimensions] == list(examples.x.shape[1:])
    if name == "scattering":
        assert "no hidden units" in result.steps[0].reached


# --- colour ------------------------------------------------------------------------------------------


def coloured(rows: int, side: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """One of three channels is bright, and that is the label: brightness alone tells nothing."""
    y = np.arange(rows) % 3
    x = RNG.integers(0, 40, (rows, 3, side, side)).astype(np.uint8)
    x[np.arange(rows), y, 3 : side - 3, 3 : side - 3] += 180
    return x, y


@pytest.mark.parametrize(("name", "values"), [("cnn", (3, 16, 16)), ("scattering", (3 * 81 * 16,))])
def test_colours_are_channels_in_front(name: str, values: tuple[int, ...]) -> None:
    plan = make_plan(name, [3, 16, 16])
    task = task_for(plan)
    x, y = coloured(6, 16)
    examples = task.check(x, y)
    assert examples.x.shape == (6, *values)
    schema = task.input_schema(plan)
    assert (schema["shape"], schema["raw_shape"]) == (list(values), [3, 16, 16])
    assert "channel" in schema["preprocessing"]
    assert "add a channel axis" not in schema["preprocessing"]
    assert schema["range"][0] <= examples.x.min() <= examples.x.max() <= schema["range"][1]
    grey = task_for(make_plan(name, [16, 16]))
    alone = [grey.check(x[:, channel], y).x.reshape(6, 1, -1) for channel in range(3)]
    np.testing.assert_array_equal(examples.x.reshape(6, 3, -1), np.concatenate(alone, axis=1))
    again = task.check(x[2:3], y[2:3])
    np.testing.assert_array_equal(again.x[0], examples.x[2])


def test_a_shape_with_channels_behind_is_told_what_to_do() -> None:
    with pytest.raises(PlanInvalid, match=r"\[3, height, width\] \(channels come first\)"):
        input_form("cnn", make_plan("cnn", [28, 28, 3]).task)


@pytest.mark.parametrize("name", ["cnn", "scattering"])
@pytest.mark.parametrize("engine", ["book-keeping", "hooks"])
def test_a_model_of_colours_is_trained_by_either_engine(name: str, engine: str) -> None:
    """Each engine compares itself with gradients that are computed one by one."""
    plan = make_plan(name, [3, 16, 16], noise="local", target_epsilon=1e3, noise_multiplier=0.01)
    fields = plan.fields()
    fields["training"] |= {"gradient_engine": engine, "local_steps": 15, "learning_rate": 1.0}
    fields["privacy"] |= {"expected_batch_size": 12.0}
    plan = Plan.from_fields(fields)
    task = task_for(plan)
    examples = task.check(*coloured(24, 16))
    start = task.initial_weights(plan)
    model = task.build_model(plan)
    unflatten(model, start + local_update(task, plan, start, examples))
    assert task.evaluate(model, task.check(*coloured(30, 16))) > 0.9


@pytest.mark.parametrize("name", ["cnn", "scattering"])
def test_a_model_of_colours_is_packaged_and_answers(name: str, tmp_path: Path) -> None:
    plan = resolve(make_plan(name, [3, 16, 16]))
    task = task_for(plan)
    public = task.check(*coloured(30, 16))
    privacy = PrivacyStatement.for_plan(plan, None, None, None, None).model_dump(mode="json")
    key, model, stages = Ed25519PrivateKey.generate(), task.build_model(plan), list[str]()
    inputs = (public.x, public.y, synthetic_inputs(plan, 64))
    result = build_package(
        plan, model, *inputs, privacy, task.input_schema(plan), key, tmp_path, stages.append
    )
    verified = verify_package(result.folder, key.public_key())
    assert verified.schema["raw_shape"] == [3, 16, 16]
    logits = run_session(load_session(verified), public.x)
    assert logits.shape == (30, 10)
    with torch.inference_mode():
        expected = model(torch.from_numpy(public.x)).numpy()
    np.testing.assert_allclose(logits, expected, atol=0.3)


def test_a_missing_dataset_is_a_coded_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "secret-place"))
    with pytest.raises(DatasetMissing, match="FS-DATA-02") as caught:
        Scenario(plan="", owners=2, data="fashion-mnist").rows()
    assert "secret-place" not in str(caught.value)
    (tmp_path / "secret-place" / "fashion_mnist").mkdir(parents=True)
    (tmp_path / "secret-place" / "fashion_mnist" / "train.npz").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(DatasetMissing):
        fashion_mnist(0, 2)


def test_held_out_rows_replace_the_test_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "fashion_mnist"
    folder.mkdir()
    for part, first, rows in (("train", 0, 60), ("test", 1000, 20)):
        x = (first + np.arange(rows))[:, None, None] * np.ones((1, 28, 28), dtype=np.int64)
        np.savez(folder / f"{part}.npz", x=x, y=np.arange(rows) % 10)
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    shards, public = fashion_mnist(3, owners=4)
    assert public[0][:, 0, 0].tolist() == list(range(1000, 1020))
    assert sorted(np.concatenate([x[:, 0, 0] for x, _ in shards])) == list(range(60))
    shards, held = fashion_mnist(3, owners=4, holdout_rows=12)
    owned = np.concatenate([x[:, 0, 0] for x, _ in shards])
    assert len(held[1]) == 12
    assert sorted([*owned, *held[0][:, 0, 0]]) == list(range(60))
    with pytest.raises(ValueError, match="fashion-mnist"):
        Scenario(plan="", owners=2, holdout_rows=5)
