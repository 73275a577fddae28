"""`fedseal seal plan`: what encrypting a plan's updates costs, and the proof that the sums fit."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from console.progress import format_bytes
from crypto.frames import SealContext
from crypto.measuring import plan_context
from crypto.packing import pack, quantize
from crypto.presets import FRESH_NOISE, PRESETS, Packing, broken_byte_promise, noise_limit
from crypto.secret import SealKey
from protocol.accounting import mechanism
from protocol.plan import Plan
from tasks.registry import task_for
from tasks.resolve import resolve

_TIMED_FRAMES = 8
_ROUNDING_RMS_STEPS = math.sqrt(1.0 / 6.0)
"""Stochastic rounding of a value at fraction f of a step has variance f (1 - f); its mean over f is 1/6."""


def seal_plan(plan: Plan, parameters: int | None = None) -> dict[str, Any]:
    """Return what sealing costs under a plan, every figure computed or measured now.

    Args:
        plan: As read; it is resolved here.
        parameters: Number of values of an update; the plan's model by default.
    """
    resolved = resolve(plan)
    count = parameters or task_for(resolved).initial_weights(resolved).size
    context = plan_context(resolved)
    packing = context.packing
    frames = packing.frames_for(count)
    upload = frames * context.frame_bytes
    each = context.frame_bytes / packing.values_per_frame
    return {
        "preset": packing.preset.name,
        "security_bits": packing.preset.security_bits,
        "parameters": count,
        "cohort": packing.cohort,
        "frames": frames,
        "frame_format": resolved.encryption.frames,
        "frame_bytes": context.frame_bytes,
        "frame_bytes_per_value": each,
        "broken_byte_promise": broken_byte_promise(packing.preset.name, each),
        "upload_bytes": upload,
        "upload_bytes_per_parameter": upload / count,
        "opener_download_bytes_per_parameter": packing.cohort * upload / count,
        "bits_per_value": math.log2(2 * packing.half_levels),
        "capacity": _capacity(packing),
        "rounding": _rounding(resolved, packing),
        "cpu_seconds": frames * _seconds_per_frame(context),
    }


def _capacity(packing: Packing) -> dict[str, float]:
    """Both inequalities of `crypto.presets.packing_for`, as the two sides that must be in this order."""
    return {
        "noise": packing.cohort * FRESH_NOISE,
        "noise_limit": noise_limit(packing),
        "twice_largest_sum": float(4 * packing.cohort * packing.half_levels),
        "field": float(packing.radix),
    }


def _rounding(plan: Plan, packing: Packing) -> dict[str, float | None]:
    """Root mean square error of the mean's values from rounding, beside that from privacy noise."""
    step = plan.update_range / packing.half_levels
    owners = math.sqrt(packing.cohort)
    priced = mechanism(plan)
    noise = None
    if priced is not None:
        each = plan.noise_deviation(packing.cohort) * plan.update_scale
        noise = each * math.sqrt(priced.steps) / owners
    return {"rounding_rms": _ROUNDING_RMS_STEPS * step / owners, "privacy_noise_rms": noise}


def _seconds_per_frame(context: SealContext) -> float:
    key, packing = SealKey.generate(context), context.packing
    update = np.zeros(packing.values_per_frame * _TIMED_FRAMES)
    started = time.process_time()
    for slots in pack(quantize(update, 1.0, packing, np.zeros(update.size)), packing):
        key.encrypt(slots)
    return (time.process_time() - started) / _TIMED_FRAMES


def _frames(facts: dict[str, Any]) -> str:
    form = "packed without gaps" if facts["frame_format"] == "packed" else "in SEAL's own form"
    broken = facts["broken_byte_promise"]
    return (
        f"{form}: {broken}" if broken else f"{form}, {facts['frame_bytes_per_value']:.2f} bytes per value"
    )


def show_seal_plan(console: Console, facts: dict[str, Any]) -> None:
    """Print the facts of `seal_plan` for a person."""
    capacity, rounding = facts["capacity"], facts["rounding"]
    scheme = PRESETS[facts["preset"]].scheme
    noise = rounding["privacy_noise_rms"]
    table = Table(show_header=False, box=None, padding=(0, 2))
    for name, value in (
        ("preset", f"{facts['preset']}, {scheme}, {facts['security_bits']}-bit security class"),
        ("update", f"{facts['parameters']} parameters in {facts['frames']} frames"),
        ("frames", _frames(facts)),
        (
            "an owner sends",
            f"{format_bytes(facts['upload_bytes'])}, "
            f"{facts['upload_bytes_per_parameter']:.3f} bytes per parameter (float32: 4)",
        ),
        ("an opener receives", f"{facts['opener_download_bytes_per_parameter']:.3f} bytes per parameter"),
        ("precision", f"{facts['bits_per_value']:.2f} bits per value"),
        (
            "decryption cannot fail",
            f"{capacity['noise']:.1f} < {capacity['noise_limit']:.1f} for {facts['cohort']} owners",
        ),
        (
            "fields cannot carry",
            f"{capacity['twice_largest_sum']:.0f} < {capacity['field']:.0f}",
        ),
        (
            "error of the mean",
            f"{rounding['rounding_rms']:.2e} from rounding, "
            + ("no privacy noise" if noise is None else f"{noise:.2e} from privacy noise"),
        ),
        ("encryption", f"{facts['cpu_seconds']:.3f} CPU seconds per round, measured now, without masks"),
    ):
        table.add_row(Text(name, style="dim"), Text(value))
    console.print(table)
