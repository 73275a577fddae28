"""Export of a PyTorch model to a small, self-contained ONNX model that gives the same answers."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import onnx
import torch
from torch import nn

from deploy.measure import open_session, run_session
from deploy.prune import require_finite
from protocol.errors import CompressionRefused

INPUT_NAME = "input"
OUTPUT_NAME = "logits"
CHECKED_BATCHES = (1, 2, 7)
MAX_DIFFERENCE = 1e-5

NOISY_LOGGER = "torch.onnx._internal.exporter._registration"


def export_onnx(model: nn.Module, input_shape: int | Sequence[int]) -> bytes:
    """Return the model as ONNX bytes with a free batch dimension, checked against PyTorch.

    PyTorch's exporter writes the source path of every operation into the model; these and all other
    annotations are removed, so that a package tells nothing of the machine that made it.

    Args:
        model: Model in float32 with one input and one output; it is not changed.
        input_shape: Shape of one example without the batch dimension.

    Raises:
        CompressionRefused: A weight is not finite, the exporter fails, or at batch 1, 2 or 7 an output
            differs from PyTorch's; see `require_same`.
    """
    require_finite(model)
    shape = (input_shape,) if isinstance(input_shape, int) else tuple(input_shape)
    model = copy.deepcopy(model).eval()
    with _quiet_exporter():
        try:
            program = torch.onnx.export(
                model,
                (torch.zeros(2, *shape),),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=[INPUT_NAME],
                output_names=[OUTPUT_NAME],
                verbose=False,
            )
        except Exception as error:
            raise CompressionRefused("the model cannot be exported to ONNX") from error
    if program is None:
        raise CompressionRefused("the exporter returned no model")
    exported: bytes = strip_annotations(program.model_proto).SerializeToString()
    require_self_contained(exported)
    require_same(model, exported, shape)
    return exported


def require_same(model: nn.Module, onnx_bytes: bytes, shape: Sequence[int]) -> None:
    """Refuse an ONNX model that differs from the PyTorch model on seeded inputs in [-1, 1].

    Raises:
        CompressionRefused: Names the first batch size at which an output differs by more than 1e-5, or
            by more than 1e-5 of the largest output where that is above 1 (float32 keeps 7 digits).
    """
    session, rng = open_session(onnx_bytes), np.random.default_rng(0)
    for batch in CHECKED_BATCHES:
        x = rng.uniform(-1, 1, (batch, *shape)).astype(np.float32)
        with torch.inference_mode():
            expected = model(torch.from_numpy(x)).numpy()
        got = run_session(session, x)
        scale = max(1.0, float(np.abs(expected).max()))
        if got.shape != expected.shape or not np.abs(got - expected).max() <= MAX_DIFFERENCE * scale:
            raise CompressionRefused(f"the ONNX model differs from PyTorch at batch size {batch}")


def strip_annotations(model: onnx.ModelProto) -> onnx.ModelProto:
    """Remove comments, metadata, shape notes and unused operator sets, in place; answers do not change."""
    graph = model.graph
    parts = [model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer]
    for part in parts:
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    graph.ClearField("value_info")
    if not model.functions:
        used = {node.domain for node in _nodes(graph.node)} | {""}
        kept = [opset for opset in model.opset_import if opset.domain in used]
        del model.opset_import[:]
        model.opset_import.extend(kept)
    return model


def require_self_contained(onnx_bytes: bytes) -> None:
    """Refuse a model that would read weights from other files, or that is not ONNX at all.

    Raises:
        CompressionRefused: Says which of the two.
    """
    try:
        model = onnx.load_model_from_string(onnx_bytes)
    except Exception as error:
        raise CompressionRefused("the bytes are not an ONNX model") from error
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in _tensors(model)):
        raise CompressionRefused("the ONNX model refers to weights in other files")


def _nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for graph in _subgraphs(node):
            yield from _nodes(graph.node)


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    roots = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    every = list(_nodes(roots))
    for graph in [model.graph, *(sub for node in every for sub in _subgraphs(node))]:
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for attribute in (attribute for node in every for attribute in node.attribute):
        yield attribute.t
        yield from attribute.tensors
        for sparse in [attribute.sparse_tensor, *attribute.sparse_tensors]:
            yield from (sparse.values, sparse.indices)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence two known remarks of torch 2.13's exporter that a user can do nothing about.

    It logs that torchvision is not installed, and torch.export deep-copies tree specifications, which
    raises torch's own FutureWarning about `isinstance(treespec, LeafSpec)`.
    """
    logger = logging.getLogger(NOISY_LOGGER)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
            yield
    finally:
        logger.setLevel(level)
