"""Post-training quantization of an ONNX model to 8-bit integers, calibrated without private data."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from deploy.export import INPUT_NAME, require_self_contained, strip_annotations
from deploy.measure import Floats
from protocol.errors import CompressionRefused

OPERATORS = ("Conv", "Gemm", "MatMul")
CALIBRATION_BATCH = 256


def quantize(onnx_bytes: bytes, calibration: Floats) -> bytes:
    """Return the model with unsigned 8-bit activations and signed 8-bit weights per output channel.

    Static quantization in operator form (`QuantFormat.QOperator`, min-max ranges). Measured on a
    64-64-10 network of 19.4 kB in float32: operator form 6.9 kB, dynamic quantization 7.5 kB, QDQ form
    8.9 kB; operator form and QDQ give the same outputs to the bit at the same speed, because ONNX Runtime
    fuses QDQ into the same kernels when it loads. The price is that `QGemm` is ONNX Runtime's own
    operator: other runtimes need the float32 export.

    Args:
        onnx_bytes: Float32 model from `deploy.export.export_onnx`.
        calibration: Preprocessed inputs that set the activation ranges, float32 (n, ...): synthetic ones
            from the declared input range, or public ones. Private ones would void the privacy guarantee,
            which this function cannot see.

    Raises:
        CompressionRefused: Calibration inputs are missing or not finite, or the quantizer fails.
    """
    if len(calibration) == 0 or not np.isfinite(calibration).all():
        raise CompressionRefused("quantization needs finite calibration inputs")
    with tempfile.TemporaryDirectory(prefix="fedseal-quantize-") as folder, _quiet_quantizer():
        source, prepared, target = (Path(folder) / name for name in ("a.onnx", "b.onnx", "c.onnx"))
        source.write_bytes(onnx_bytes)
        try:
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
            quantize_static(
                prepared,
                target,
                _Batches(calibration),
                quant_format=QuantFormat.QOperator,
                op_types_to_quantize=list(OPERATORS),
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
            )
        except Exception as error:
            raise CompressionRefused("the model cannot be quantized") from error
        model = onnx.load(target)
    quantized: bytes = strip_annotations(model).SerializeToString()
    require_self_contained(quantized)
    return quantized


class _Batches:
    """Feeds the calibration inputs in batches; a `CalibrationDataReader` by its `get_next`."""

    def __init__(self, x: Floats) -> None:
        self._batches = iter(np.split(x, range(CALIBRATION_BATCH, len(x), CALIBRATION_BATCH)))

    def get_next(self) -> dict[str, Floats] | None:
        batch = next(self._batches, None)
        return None if batch is None else {INPUT_NAME: batch}


@contextmanager
def _quiet_quantizer() -> Iterator[None]:
    """Drop the quantizer's advice, which it writes to the root logger and so configures it."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)
