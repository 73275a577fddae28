"""What was built from a run's model, under names that people know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from audit.words import number, percent, size

_LABELS: dict[str, tuple[str, str]] = {
    "package": ("Package", "text"),
    "accuracy_before": ("Accuracy before compression, on public data", "share"),
    "accuracy_after": ("Accuracy after compression, on public data", "share"),
    "accuracy_drop": ("Accuracy lost by compression", "share"),
    "max_accuracy_drop": ("Most that the plan allows to be lost", "share"),
    "public_examples": ("Public examples it was measured on", "text"),
    "size_bytes_before": ("Size before", "bytes"),
    "size_bytes_after": ("Size after", "bytes"),
    "size_ratio": ("Times smaller", "number"),
    "speed_ratio_b1": ("Times faster, one example at a time", "number"),
    "baseline": ("Compared with", "text"),
    "prune_ratio_asked": ("Hidden units to remove, as planned", "share"),
    "prune_ratio_used": ("Hidden units removed", "share"),
    "parameter_ratio_removed": ("Parameters removed", "share"),
    "quantize_asked": ("Numbers, as planned", "text"),
    "quantize_used": ("Numbers", "text"),
    "public_data_use": ("What public data decided", "text"),
    "private_data_use": ("What owners' data decided", "text"),
    "model_sha256": ("Hash of the packaged model", "text"),
    "plan_sha256": ("Hash of the plan", "text"),
    "signer": ("Signing key of the package", "text"),
}
"""How the facts of a build are called, in the order in which they are shown."""


@dataclass(frozen=True)
class Deployment:
    """What was built, for people.

    Attributes:
        facts: Names and values.
        steps: Step, what was asked for, what came out, CPU seconds.
    """

    facts: list[tuple[str, str]]
    steps: list[tuple[str, str, str, str]]


def deployment(report: dict[str, Any]) -> Deployment:
    """Return the facts of a report's build under names that people know, those it knows first."""
    plain: dict[str, Any] = {}
    steps: dict[int, dict[str, Any]] = {}
    for fact in report["deployment"] or []:
        parts = [part.replace("~1", "/").replace("~0", "~") for part in fact["pointer"].split("/")[1:]]
        if len(parts) == 3 and parts[0] == "steps" and parts[1].isdigit():
            steps.setdefault(int(parts[1]), {})[parts[2]] = fact["value"]
        else:
            plain["/".join(parts)] = fact["value"]
    facts = [
        (name, _spelled(plain.pop(key), kind)) for key, (name, kind) in _LABELS.items() if key in plain
    ]
    facts += [(_readable(key), number(value)) for key, value in plain.items()]
    return Deployment(facts, [_step(steps[index]) for index in sorted(steps)])


def _step(step: dict[str, Any]) -> tuple[str, str, str, str]:
    seconds = step.get("cpu_s")
    return (
        number(step.get("step")).capitalize(),
        number(step.get("asked")),
        number(step.get("reached")),
        f"{seconds:.1f} s" if isinstance(seconds, float) else "-",
    )


def _spelled(value: Any, kind: str) -> str:
    if kind == "share" and isinstance(value, float):
        return percent(value)
    return size(value) if kind == "bytes" and isinstance(value, int) else number(value)


def _readable(key: str) -> str:
    """Return an unknown name in words: no underscores, and the parts of a path as a list."""
    words = ", ".join(part.replace("_", " ") for part in key.split("/"))
    return words[:1].upper() + words[1:]
