"""From a trained model to a signed package: prune, rebuild, export, quantize, pack, verify, run.

Everything here is post-processing of a finished model. Its inputs are the model, the public plan,
synthetic inputs, and public examples that decide one thing: whether a step keeps enough accuracy.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import nn

from crypto.certificates import fingerprint
from deploy.export import INPUT_NAME, OUTPUT_NAME, export_onnx
from deploy.gate import FederatedAccuracy, Gate, agreement_gate
from deploy.measure import (
    ACCURACY,
    BASELINE,
    CompressionRecord,
    Floats,
    Labels,
    StepRecord,
    accuracy,
    checkpoint_bytes,
    run_session,
    speed,
    torch_accuracy,
)
from deploy.package import (
    SUFFIX,
    PackageParts,
    load_session,
    refuse_existing,
    verify_package,
    write_package,
)
from deploy.prune import PruneOutcome, prune_within, within
from deploy.quantize import quantize
from deploy.statement import PLAN_CONSTANTS, PrivacyStatement
from protocol.encoding import digest_bytes
from protocol.errors import CompressionRefused, PackageInvalid, PackageNotWritten
from protocol.plan import Plan
from protocol.sections import CompressionSection


@dataclass(frozen=True)
class DeployResult:
    """A package that was written, verified and run.

    Attributes:
        folder: The package.
        signer: Fingerprint of the key that signed it.
        model_sha256: Digest of the packaged ONNX model.
        record: What compression did, asked against reached.
    """

    folder: Path
    signer: str
    model_sha256: str
    record: CompressionRecord

    def to_fields(self) -> dict[str, Any]:
        """Return the result as JSON values; the folder by its name alone."""
        return {
            "package": self.folder.name,
            "signer": self.signer,
            "model_sha256": self.model_sha256,
            **self.record.model_dump(mode="json"),
        }


def build_package(
    plan: Plan,
    model: nn.Module,
    public_x: Floats | None,
    public_y: Labels | None,
    synthetic_x: Floats,
    privacy: dict[str, Any],
    schema: dict[str, Any],
    signing_key: Ed25519PrivateKey,
    out: Path,
    progress: Callable[[str], None],
    federated: FederatedAccuracy | None = None,
) -> DeployResult:
    """Compress, pack, sign, verify and run a trained model. For the holder of `signing_key` only.

    Guarantee: the result adds no privacy loss to the model's own, given that `public_x`, `public_y`
    and `synthetic_x` hold no private data, which this function cannot see.

    Args:
        plan: The resolved plan of the run; its compression section says what to try.
        model: The trained model; it is not changed.
        public_x: Preprocessed public inputs, float32 (n, ...), n at least 1; without public data None, and
            then steps are kept by agreement with the unpruned model on synthetic inputs.
        public_y: Their labels, int64 (n,), or None.
        synthetic_x: Inputs from `synthetic_inputs`, for rebuilding and calibration.
        privacy: Fields of a `PrivacyStatement`; its constants must be the plan's.
        schema: What the model takes and gives, from the task.
        signing_key: Key of the signer.
        out: Folder in which ``<run name>.fedseal`` is made.
        progress: Called with one line of text before each stage.
        federated: Federated evaluation of this model, if the plan has it; it is only told.

    Raises:
        ModelNotFinite: A weight or an answer is not finite.
        CompressionRefused: An export differs from the model.
        PackageNotWritten: The package exists, or `privacy` contradicts `plan`.
        EncodingInvalid: `privacy` or `schema` is malformed.
        PackageInvalid: The written package does not verify or does not repeat its accuracy.
    """
    folder = out / f"{plan.run.name}{SUFFIX}"
    refuse_existing(folder)
    statement = PrivacyStatement.from_fields(privacy)
    require_same_constants(statement, plan)
    original = copy.deepcopy(model).eval()
    if public_x is None or public_y is None:
        gate = agreement_gate(plan, original)
    else:
        gate = Gate(ACCURACY, public_x, public_y)
    compressed = compress(plan, original, (gate.x, gate.y), synthetic_x, progress, gate.word)
    progress("measure: CPU time against PyTorch")
    record = _record(plan, original, compressed, gate, federated)
    progress("package: write and sign")
    graph = {"input": INPUT_NAME, "output": OUTPUT_NAME, "classes": plan.task.classes}
    parts = PackageParts(
        plan.run.name, compressed.onnx_bytes, {**schema, "graph": graph}, statement, record
    )
    write_package(folder, parts, signing_key)
    progress("verify: check the signature and run the packaged model")
    _require_repeated(folder, signing_key, record, gate.x, gate.y)
    signer = fingerprint(signing_key.public_key())
    return DeployResult(folder, signer, digest_bytes(compressed.onnx_bytes), record)


def require_same_constants(statement: PrivacyStatement, plan: Plan) -> None:
    """Refuse a privacy statement whose constants are not those of the plan.

    Raises:
        PackageNotWritten: Names the first constant that differs.
    """
    expected = {name: getattr(plan.privacy, name) for name in PLAN_CONSTANTS}
    expected |= {"rounds": plan.run.rounds, "local_steps": plan.training.local_steps}
    for name, value in expected.items():
        if getattr(statement, name) != value:
            raise PackageNotWritten(f"the privacy statement contradicts the plan: {name}")


@dataclass(frozen=True)
class Compressed:
    """The smallest model within the accuracy gate, and how it came about."""

    onnx_bytes: bytes
    accuracy: float
    quantized: Literal["int8", "none"]
    pruning: PruneOutcome
    steps: tuple[StepRecord, ...]


def compress(
    plan: Plan,
    original: nn.Module,
    public: tuple[Floats, Labels],
    synthetic: Floats,
    progress: Callable[[str], None],
    word: str = "accuracy",
) -> Compressed:
    """Prune, rebuild, export and quantize a model; see `build_package` for the arguments.

    Each step is measured against the original on `public` (`word` is what the share of right answers is
    called) and must stay within the plan's
    `max_accuracy_drop`: pruning steps down until it does, quantization falls back to float32.

    Raises:
        CompressionRefused: A weight is not finite, or an export differs from the model.
    """
    settings, shape = plan.compression, public[0].shape[1:]
    progress(f"prune: remove hidden units, rebuild, check {word}")
    clock = time.process_time()
    pruning = prune_within(
        original,
        torch.zeros(1, *shape),
        public,
        settings.prune_ratio,
        settings.max_accuracy_drop,
        torch_accuracy,
        synthetic,
    )
    asked = f"remove {settings.prune_ratio:.1%} of hidden units"
    steps = [_step("prune", asked, _pruning_in_words(pruning, word), clock)]
    progress("export: write ONNX and compare it with PyTorch")
    clock = time.process_time()
    exported = export_onnx(pruning.pruned.model, shape)
    plain = Compressed(exported, accuracy(exported, *public), "none", pruning, ())
    if not within(pruning.accuracy_before, plain.accuracy, settings.max_accuracy_drop):
        raise CompressionRefused(f"the exported model loses more {word} than the plan accepts")
    steps.append(_step("export", "float32 ONNX", f"same outputs; {len(exported)} bytes", clock))
    progress(f"quantize: 8-bit integers, check {word}")
    clock = time.process_time()
    compressed, reached = _quantize_within(plain, settings, public, synthetic, word)
    steps.append(_step("quantize", settings.quantize, reached, clock))
    return replace(compressed, steps=tuple(steps))


def _quantize_within(
    plain: Compressed,
    settings: CompressionSection,
    public: tuple[Floats, Labels],
    synthetic: Floats,
    word: str,
) -> tuple[Compressed, str]:
    """Return the int8 model, or the float32 one where int8 gains nothing or costs too much; and why."""
    if settings.quantize == "none":
        return plain, "float32, as asked"
    candidate = quantize(plain.onnx_bytes, synthetic)
    score = accuracy(candidate, *public)
    if not within(plain.pruning.accuracy_before, score, settings.max_accuracy_drop):
        return plain, f"float32 kept: int8 has {word} {score:.4f}, outside the gate"
    if len(candidate) >= len(plain.onnx_bytes):
        return plain, f"float32 kept: int8 is not smaller, {len(candidate)} bytes"
    reached = f"int8; {len(candidate)} bytes; {word} {score:.4f}"
    return replace(plain, onnx_bytes=candidate, accuracy=score, quantized="int8"), reached


def _record(
    plan: Plan,
    original: nn.Module,
    compressed: Compressed,
    gate: Gate,
    federated: FederatedAccuracy | None,
) -> CompressionRecord:
    """Return the whole record, with size and speed of the packed model against the original."""
    before, after = checkpoint_bytes(original), len(compressed.onnx_bytes)
    pruning = compressed.pruning
    return CompressionRecord(
        baseline=BASELINE,
        plan_sha256=plan.sha256(),
        size_bytes_before=before,
        size_bytes_after=after,
        size_ratio=before / after,
        speed_ratio_b1=speed(original, compressed.onnx_bytes, gate.x[:1]).ratio,
        accuracy_before=pruning.accuracy_before,
        accuracy_after=compressed.accuracy,
        accuracy_drop=pruning.accuracy_before - compressed.accuracy,
        max_accuracy_drop=plan.compression.max_accuracy_drop,
        public_examples=gate.public_examples,
        prune_ratio_asked=plan.compression.prune_ratio,
        prune_ratio_used=pruning.ratio_used,
        parameter_ratio_removed=pruning.pruned.reached_parameter_ratio,
        quantize_asked=plan.compression.quantize,
        quantize_used=compressed.quantized,
        steps=list(compressed.steps),
        public_data_use=gate.use,
        private_data_use="nothing",
        measure=gate.measure,
        measured_inputs=len(gate.x),
        federated_accuracy=None if federated is None else federated.accuracy,
        federated_standard_error=None if federated is None else federated.standard_error,
    )


def _step(step: str, asked: str, reached: str, started_s: float) -> StepRecord:
    return StepRecord(step=step, asked=asked, reached=reached, cpu_s=time.process_time() - started_s)


def _pruning_in_words(outcome: PruneOutcome, word: str) -> str:
    first = outcome.tries[0]
    if first.reached_parameter_ratio == 0:
        reason = (
            "none was asked for"
            if first.requested_ratio == 0
            else "the model has none to remove at this ratio"
        )
        return f"no hidden units: {reason}"
    tries = "; ".join(
        f"at {attempt.requested_ratio:.1%} {word} {attempt.accuracy_pruned:.4f}"
        + ("" if attempt.accuracy_rebuilt is None else f", rebuilt {attempt.accuracy_rebuilt:.4f}")
        for attempt in outcome.tries
    )
    removed = outcome.pruned.reached_parameter_ratio
    return f"{outcome.ratio_used:.1%} of hidden units, {removed:.1%} of parameters ({tries})"


def _require_repeated(
    folder: Path, signing_key: Ed25519PrivateKey, record: CompressionRecord, x: Floats, y: Labels
) -> None:
    """Verify the package as a stranger would, and refuse it if it does not repeat its accuracy."""
    verified = verify_package(folder, signing_key.public_key())
    logits = run_session(load_session(verified), x)
    if float(np.mean(logits.argmax(axis=1) == y)) != record.accuracy_after:
        raise PackageInvalid(f"the packaged model does not repeat its measured {record.measure}")
