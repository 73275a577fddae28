"""Compression keeps its promises: nothing private, nothing silently lost, nothing silently skipped."""

from __future__ import annotations

import copy
import logging
from itertools import pairwise

import numpy as np
import onnx
import onnx.external_data_helper
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deploy.export import export_onnx, require_same, require_self_contained
from deploy.measure import accuracy, checkpoint_bytes, open_session, run_session, speed, torch_accuracy
from deploy.prune import RIDGE, count_parameters, prune, prune_within, rebuild
from deploy.quantize import quantize
from protocol.errors import CompressionRefused
from tasks.inputs import unit_rows
from tasks.partition import digits

EXAMPLE = torch.zeros(1, 64)


def dense(*widths: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def synthetic(count: int = 1024, seed: int = 0) -> np.ndarray:
    raw = np.random.default_rng(seed).uniform(0, 16, (count, 8, 8))
    return unit_rows(raw, 0, 16)


@pytest.fixture(scope="module")
def data():
    (train,), (x, y) = digits(seed=0, owners=1)
    return unit_rows(train[0], 0, 16), train[1], unit_rows(x, 0, 16), y


@pytest.fixture(scope="module")
def public(data):
    return data[2], data[3]


@pytest.fixture(scope="module")
def trained(data):
    """A 64-64-10 network, trained on digits for a second."""
    model, x, y = dense(64, 64, 10), torch.from_numpy(data[0]), torch.from_numpy(data[1])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.5)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        batch = torch.randint(0, len(y), (256,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def exported(trained):
    return export_onnx(trained, 64)


class TestPrune:
    @settings(max_examples=15, deadline=None)
    @given(
        hidden=st.lists(st.integers(2, 24), min_size=1, max_size=3),
        ratio=st.floats(0, 0.99),
        seed=st.integers(0, 100),
    )
    def test_smaller_same_outputs_original_untouched(self, hidden, ratio, seed):
        model = dense(12, *hidden, 5, seed=seed)
        before = copy.deepcopy(model.state_dict())
        pruned = prune(model, torch.zeros(1, 12), ratio)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert pruned.model(torch.zeros(3, 12)).shape == (3, 5)
        left = count_parameters(pruned.model) / count_parameters(model)
        assert pruned.reached_parameter_ratio == pytest.approx(1 - left)
        assert 0 <= pruned.reached_parameter_ratio < 1

    def test_kept_units_are_the_original_units(self, trained):
        pruned = prune(trained, EXAMPLE, 0.5)
        kept = list(pruned.kept["0"])
        assert len(kept) == 32
        assert torch.equal(pruned.model[0].weight, trained[0].weight[kept])
        assert torch.equal(pruned.model[2].weight, trained[2].weight[:, kept])

    def test_the_smallest_units_go(self):
        model = dense(4, 6, 3)
        with torch.no_grad():
            model[0].weight[[1, 4]] *= 1e-3
            model[2].weight[:, [1, 4]] *= 1e-3
        assert prune(model, torch.zeros(1, 4), 1 / 3).kept["0"] == (0, 2, 3, 5)

    def test_single_layer_reports_zero(self, public):
        outcome = prune_within(dense(64, 10), EXAMPLE, public, 0.5, 0.01, torch_accuracy, synthetic())
        assert outcome.pruned.reached_parameter_ratio == 0
        assert outcome.ratio_used == 0
        assert len(outcome.tries) == 1

    @pytest.mark.parametrize("ratio", [-0.1, 1.0, float("nan")])
    def test_impossible_ratio_is_refused(self, ratio):
        with pytest.raises(CompressionRefused, match="ratio"):
            prune(dense(4, 6, 3), torch.zeros(1, 4), ratio)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_weights_that_are_not_finite_are_refused(self, value):
        model = dense(4, 6, 3)
        with torch.no_grad():
            model[2].bias[1] = value
        with pytest.raises(CompressionRefused, match="finite"):
            prune(model, torch.zeros(1, 4), 0.5)
        with pytest.raises(CompressionRefused, match="finite"):
            export_onnx(model, 4)


class TestRebuild:
    @pytest.mark.parametrize(("ridge", "left"), [(1e-12, 1e-3), (RIDGE, 0.25)])
    def test_twins_of_removed_units_take_over(self, monkeypatch, ridge, left):
        """Exactly so without the ridge, and for the greater part with it."""
        monkeypatch.setattr("deploy.prune.RIDGE", ridge)
        model = dense(64, 16, 10)
        with torch.no_grad():
            model[0].weight[8:] = model[0].weight[:8]
            model[0].bias[8:] = model[0].bias[:8]
            model[2].weight[:, 8:] *= 0.5
        pruned = prune(model, EXAMPLE, 0.5)
        assert pruned.kept["0"] == tuple(range(8))
        x = torch.from_numpy(synthetic(seed=1))

        def error(candidate: nn.Module) -> float:
            with torch.no_grad():
                return float((candidate(x) - model(x)).abs().max())

        assert error(rebuild(pruned, model, synthetic()).model) < left * error(pruned.model)

    def test_recovers_accuracy_without_data(self, trained, public):
        pruned = prune(trained, EXAMPLE, 0.7)
        before, after = torch_accuracy(trained, *public), torch_accuracy(pruned.model, *public)
        rebuilt = torch_accuracy(rebuild(pruned, trained, synthetic()).model, *public)
        assert rebuilt > after
        assert before - rebuilt < 0.5 * (before - after)

    def test_deep_network_is_refitted_layer_by_layer(self):
        model, x = dense(64, 32, 24, 10), torch.from_numpy(synthetic(seed=1))
        pruned = prune(model, EXAMPLE, 0.4)
        rebuilt = rebuild(pruned, model, synthetic())
        with torch.no_grad():
            target, plain, better = model(x), pruned.model(x), rebuilt.model(x)
        assert (better - target).norm() < 0.75 * (plain - target).norm()
        assert torch.equal(rebuilt.model[0].weight, pruned.model[0].weight)

    def test_same_inputs_same_weights_and_argument_untouched(self, trained):
        pruned = prune(trained, EXAMPLE, 0.5)
        before = pruned.model[2].weight.clone()
        first, second = (rebuild(pruned, trained, synthetic()).model for _ in range(2))
        assert torch.equal(first[2].weight, second[2].weight)
        assert torch.equal(pruned.model[2].weight, before)

    @pytest.mark.parametrize("bad", [np.zeros((0, 64), np.float32), np.full((4, 64), np.nan, np.float32)])
    def test_useless_inputs_are_refused(self, trained, bad):
        with pytest.raises(CompressionRefused, match="synthetic"):
            rebuild(prune(trained, EXAMPLE, 0.5), trained, bad)


class TestPruneWithin:
    def test_steps_down_until_the_drop_is_accepted(self, trained, public):
        outcome = prune_within(trained, EXAMPLE, public, 0.95, 0.01, torch_accuracy)
        after = torch_accuracy(outcome.pruned.model, *public)
        assert outcome.accuracy_before - after <= 0.01
        assert len(outcome.tries) > 1
        assert [t.accepted for t in outcome.tries] == [False] * (len(outcome.tries) - 1) + [True]
        asked = [t.requested_ratio for t in outcome.tries]
        assert asked == sorted(asked, reverse=True)

    def test_an_unreachable_gate_leaves_the_model_as_it_was(self, trained, public):
        def counts_units(model: nn.Module, _x: np.ndarray, _y: np.ndarray) -> float:
            return model[0].out_features / 64

        outcome = prune_within(trained, EXAMPLE, public, 0.5, 0.0, counts_units, synthetic())
        assert outcome.ratio_used == 0
        assert torch.equal(outcome.pruned.model[0].weight, trained[0].weight)

    def test_a_rebuild_that_harms_is_not_kept(self, trained, public):
        constant = np.full((64, 64), 0.125, np.float32)
        outcome = prune_within(trained, EXAMPLE, public, 0.25, 1.0, torch_accuracy, constant)
        attempt = outcome.tries[0]
        kept = torch_accuracy(outcome.pruned.model, *public)
        assert kept == max(attempt.accuracy_pruned, attempt.accuracy_rebuilt)


class TestExport:
    def test_says_nothing_and_tells_nothing_of_the_machine(self, trained, capfd, caplog):
        exported = export_onnx(trained, 64)
        assert capfd.readouterr() == ("", "")
        assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []
        for trace in (b"site-packages", b".py", b"/home", b"stack_trace"):
            assert trace not in exported

    @pytest.mark.parametrize("batch", [1, 2, 3, 7, 64])
    def test_any_batch_size(self, trained, exported, batch):
        x = synthetic(batch, seed=5)
        with torch.no_grad():
            expected = trained(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(run_session(open_session(exported), x), expected, atol=1e-5)

    def test_another_model_is_refused(self, trained, exported):
        other = copy.deepcopy(trained)
        with torch.no_grad():
            other[2].bias[3] += 1e-3
        with pytest.raises(CompressionRefused, match="differs from PyTorch at batch size 1"):
            require_same(other, exported, (64,))

    def test_shape_of_several_axes(self):
        model = nn.Sequential(nn.Flatten(), *dense(64, 10)).eval()
        session = open_session(export_onnx(model, (8, 8)))
        assert run_session(session, np.zeros((3, 8, 8), np.float32)).shape == (3, 10)

    def test_leaves_training_mode_alone(self):
        model = dense(4, 3).train()
        export_onnx(model, 4)
        assert model.training

    def test_weights_in_other_files_are_refused(self, exported):
        model = onnx.load_model_from_string(exported)
        onnx.external_data_helper.set_external_data(model.graph.initializer[0], "/etc/hostname")
        with pytest.raises(CompressionRefused, match="other files"):
            require_self_contained(model.SerializeToString())

    def test_such_weights_inside_a_branch_are_found_too(self):
        tensor = onnx.numpy_helper.from_array(np.zeros(2, np.float32), "w")
        onnx.external_data_helper.set_external_data(tensor, "weights.bin")
        result = onnx.helper.make_tensor_value_info("r", onnx.TensorProto.FLOAT, [2])
        constant = onnx.helper.make_node("Constant", [], ["r"], value=tensor)
        branch = onnx.helper.make_graph([constant], "branch", [], [result])
        choice = onnx.helper.make_node("If", ["c"], ["r"], then_branch=branch, else_branch=branch)
        condition = onnx.helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, [])
        model = onnx.helper.make_model(onnx.helper.make_graph([choice], "g", [condition], [result]))
        with pytest.raises(CompressionRefused, match="other files"):
            require_self_contained(model.SerializeToString())

    def test_bytes_that_are_not_onnx_are_refused(self):
        with pytest.raises(CompressionRefused):
            require_self_contained(b"\xff" * 64)


class TestQuantize:
    def test_integer_kernels_smaller_and_as_accurate(self, exported, public):
        quantized = quantize(exported, synthetic())
        operators = {node.op_type for node in onnx.load_model_from_string(quantized).graph.node}
        assert "QGemm" in operators
        assert "Gemm" not in operators
        assert len(quantized) < 0.5 * len(exported)
        assert abs(accuracy(exported, *public) - accuracy(quantized, *public)) <= 0.01

    def test_every_weight_of_a_layer_is_8_bit(self, exported):
        graph = onnx.load_model_from_string(quantize(exported, synthetic())).graph
        matrices = [t for t in graph.initializer if len(t.dims) == 2]
        assert [t.data_type for t in matrices] == [onnx.TensorProto.INT8] * 2

    def test_same_inputs_same_bytes_and_silence(self, exported, capfd):
        assert quantize(exported, synthetic()) == quantize(exported, synthetic())
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize("bad", [np.zeros((0, 64), np.float32), np.full((4, 64), np.inf, np.float32)])
    def test_useless_calibration_is_refused(self, exported, bad):
        with pytest.raises(CompressionRefused, match="calibration"):
            quantize(exported, bad)

    def test_no_file_is_left_behind(self, exported, tmp_path, monkeypatch):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        quantize(exported, synthetic())
        assert list(tmp_path.iterdir()) == []


class TestMeasure:
    def test_accuracy_agrees_with_pytorch(self, trained, exported, public):
        assert accuracy(exported, *public) == torch_accuracy(trained, *public) > 0.9

    def test_no_examples_is_refused(self, exported):
        with pytest.raises(CompressionRefused, match="examples"):
            accuracy(exported, np.zeros((0, 64), np.float32), np.zeros(0, np.int64))

    def test_logits_that_are_not_finite_are_refused(self, public):
        model = dense(64, 10)
        with torch.no_grad():
            model[0].weight[0, 0] = float("nan")
        with pytest.raises(CompressionRefused, match="finite"):
            torch_accuracy(model, *public)

    def test_baseline_is_four_bytes_a_parameter_and_a_header(self, trained):
        assert 4 * 4810 < checkpoint_bytes(trained) < 4 * 4810 + 512

    def test_speed_restores_the_thread_count(self, trained, exported):
        threads = torch.get_num_threads()
        result = speed(trained, exported, synthetic(1), rounds=5)
        assert result.ratio == result.torch_us / result.onnx_us > 0
        assert torch.get_num_threads() == threads

    def test_too_few_rounds_are_refused(self, trained, exported):
        with pytest.raises(ValueError, match="five rounds"):
            speed(trained, exported, synthetic(1), rounds=4)
