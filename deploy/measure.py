"""Size, speed and accuracy of a model, measured the same way before and after compression."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, Self

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import safetensors.torch
import torch
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import nn

from protocol.encoding import Digest
from protocol.errors import CompressionRefused, ModelNotFinite
from protocol.messages import Message
from protocol.sections import Positive

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

BASELINE = "float32 checkpoint of the unpruned model as safetensors; float32 PyTorch on one CPU thread"
"""What every ratio is measured against."""

SPEED_ROUNDS = 7
CALLS_PER_ROUND = 200
FATAL_ONLY = 4

MAX_MODEL_BYTES = 2**31
"""Longest model: the limit of one ONNX protobuf."""

Share = Annotated[float, Field(ge=0, le=1)]
Bytes = Annotated[int, Field(ge=0, le=MAX_MODEL_BYTES)]


Measure = Literal["accuracy on public data", "agreement with the unpruned model on synthetic inputs"]
"""What decides whether a step of compression is kept."""

ACCURACY: Final[Measure] = "accuracy on public data"
AGREEMENT: Final[Measure] = "agreement with the unpruned model on synthetic inputs"


class StepRecord(Message):
    """One step of compression: what was asked, what came out, and its CPU time in seconds."""

    step: str
    asked: str
    reached: str
    cpu_s: Annotated[float, Field(ge=0)]


class CompressionRecord(Message):
    """What was done to the trained model, against the baseline that `baseline` names.

    A ratio is before divided by after; `accuracy_drop` is before minus after, below zero for a gain.
    Ratios of pruning are shares: of hidden units asked for and removed, and of parameters removed.

    `measure` says what the three accuracies are: without public data they are shares of synthetic inputs to
    which a model gives the class that the unpruned one gives, and say nothing about accuracy. The federated
    accuracy is that of the unpruned model, by noised counts of the owners. Packages from before these
    fields leave them out; theirs is accuracy.
    """

    baseline: str
    plan_sha256: Digest
    size_bytes_before: Bytes
    size_bytes_after: Bytes
    size_ratio: Positive
    speed_ratio_b1: Positive
    accuracy_before: Share
    accuracy_after: Share
    accuracy_drop: float
    max_accuracy_drop: Share
    public_examples: Annotated[int, Field(ge=0)]
    prune_ratio_asked: Share
    prune_ratio_used: Share
    parameter_ratio_removed: Share
    quantize_asked: Literal["int8", "none"]
    quantize_used: Literal["int8", "none"]
    steps: list[StepRecord]
    public_data_use: str
    private_data_use: Literal["nothing"]
    measure: Measure | None = None
    measured_inputs: Annotated[int, Field(ge=1)] | None = None
    federated_accuracy: Share | None = None
    federated_standard_error: Annotated[float, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _measured_on_what_it_says(self) -> Self:
        if (self.public_examples == 0) != (self.measure == AGREEMENT):
            raise ValueError("public_examples is 0 exactly where agreement was measured")
        return self

    @model_serializer(mode="wrap")
    def _without_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        return {name: value for name, value in fields.items() if value is not None}


@dataclass(frozen=True)
class Speed:
    """CPU time of one call with a batch of one example, in microseconds, medians of all rounds."""

    torch_us: float
    onnx_us: float

    @property
    def ratio(self) -> float:
        """How many times less CPU time the ONNX model takes; below 1 it is slower."""
        return self.torch_us / self.onnx_us


def open_session(onnx_bytes: bytes) -> ort.InferenceSession:
    """Open an ONNX model for CPU inference with one thread that never spins.

    Args:
        onnx_bytes: A self-contained ONNX model; see `deploy.export.require_self_contained`.

    Raises:
        CompressionRefused: ONNX Runtime cannot load the bytes.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = FATAL_ONLY
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(onnx_bytes, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise CompressionRefused("ONNX Runtime cannot load the model") from error


def run_session(session: ort.InferenceSession, x: Floats) -> Floats:
    """Return the logits, float32 (n, classes), of inputs float32 (n, ...)."""
    (logits,) = session.run(None, {session.get_inputs()[0].name: x})
    return np.asarray(logits, dtype=np.float32)


def accuracy(onnx_bytes: bytes, x: Floats, y: Labels) -> float:
    """Return the share of examples, 0 to 1, that the ONNX model classifies correctly.

    Args:
        onnx_bytes: Model with one input (batch, ...) and one output (batch, classes).
        x: Preprocessed inputs, float32 (n, ...), n at least 1.
        y: Class numbers, int64 (n,).

    Raises:
        CompressionRefused: No examples, unequal lengths, or logits that are not finite.
    """
    return _share_correct(run_session(open_session(onnx_bytes), x), y)


def torch_accuracy(model: nn.Module, x: Floats, y: Labels) -> float:
    """Return the share of examples that a PyTorch model classifies correctly; see `accuracy`."""
    with torch.inference_mode():
        logits = model(torch.from_numpy(x)).numpy()
    return _share_correct(logits, y)


def checkpoint_bytes(model: nn.Module) -> int:
    """Return the size in bytes of the model's safetensors checkpoint: the baseline of all size ratios."""
    return len(safetensors.torch.save({k: v.contiguous() for k, v in model.state_dict().items()}))


def speed(model: nn.Module, onnx_bytes: bytes, example: Floats, rounds: int = SPEED_ROUNDS) -> Speed:
    """Compare the CPU time of a PyTorch model and an ONNX model at batch size 1.

    Both run on one thread, in turns, so that other load on the machine falls on both. Process CPU time is
    counted, not wall time.

    Args:
        model: The unpruned PyTorch model, in evaluation mode.
        onnx_bytes: The compressed model.
        example: One preprocessed input, float32 (1, ...).
        rounds: Interleaved rounds, at least 5.

    Raises:
        ValueError: Fewer than five rounds.
    """
    if rounds < 5:
        raise ValueError("a median of fewer than five rounds says too little")
    session, tensor = open_session(onnx_bytes), torch.from_numpy(example)
    feed = {session.get_inputs()[0].name: example}
    torch_s, onnx_s = [], []
    with one_torch_thread(), torch.inference_mode():
        for turn in range(rounds + 1):
            seconds = _cpu_seconds(lambda: model(tensor)), _cpu_seconds(lambda: session.run(None, feed))
            if turn > 0:  # The first turn warms caches and allocators.
                torch_s.append(seconds[0])
                onnx_s.append(seconds[1])
    return Speed(torch_us=statistics.median(torch_s) * 1e6, onnx_us=statistics.median(onnx_s) * 1e6)


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Let PyTorch use one thread inside the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _cpu_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    for _ in range(CALLS_PER_ROUND):
        call()
    return (time.process_time() - start) / CALLS_PER_ROUND


def _share_correct(logits: npt.NDArray[np.float32], y: Labels) -> float:
    if len(y) == 0 or len(logits) != len(y):
        raise CompressionRefused("accuracy needs public examples, one label each")
    if not np.isfinite(logits).all():
        raise ModelNotFinite("its answers to inputs within the declared range")
    return float(np.mean(logits.argmax(axis=1) == y))
