"""Write the reference pages that follow from the code: `plan.md`, `policy.md` and `errors.md`.

Run `python -m docs.generate` in the checkout after a change of a plan's or a policy's field or of an error
class; a test compares the pages with what this program makes.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel

from client.policy import Policy
from protocol import errors
from protocol.errors import FedsealError
from protocol.plan import Plan

FOLDER: Final = Path(__file__).parent
NOTICE: Final = "<!-- Made by `python -m docs.generate`; change the code and run it again. -->"

PLAN_INTRODUCTION: Final = """\
A plan is a TOML file with one table per section. A field without a default must be given. An unknown
section or field, a value of another type, and a number that is not finite are refused with `FS-PLAN-01`;
whole numbers may stand for fractions. Everything in a plan is public.

Across fields: `cohort.maximum` is at least `cohort.minimum`, and `cohort.minimum` is at least 3 unless
`cohort.allow_small` is true. `encryption.quorum` is at most `cohort.minimum`. `task.value_range` is
ascending. `privacy.target_epsilon` is required unless `privacy.noise` is `"none"`, which allows neither it
nor `privacy.noise_multiplier`. `privacy.max_update_norm` stands exactly with `privacy.unit = "client"`,
which needs noise. `privacy.noise = "distributed"` is EXPERIMENTAL; it needs `cohort.minimum` of at least
`privacy.tolerated_colluders` + 3, no `cohort.weights`, an exact preset, `training.local_steps = 1` unless
the unit is `client`, and a noise share of at least 8 steps of the quantization grid (`FS-PLAN-04`). The
section `evaluation` may be left out; there is no evaluation then. It needs the unit `example`;
`evaluation.noise` is `"none"` exactly if `privacy.noise` is, and `evaluation.target_epsilon` is required
otherwise."""

POLICY_INTRODUCTION: Final = """\
A policy is a TOML file that an owner writes for its own data; no message can change it. A field without a
default must be given. An unknown table or field and a value of another type are refused with
`FS-POLICY-01`; a plan outside the policy is refused with `FS-POLICY-02` before any data is read.

Across fields: `budget.epsilon_per_run` is at most `budget.epsilon_total`, and `budget.epsilon_worst` at
least that. `plans.allow_distributed_noise` needs `budget.epsilon_worst`, and a plan with distributed noise
needs a `peers.min_known_peers` above its `privacy.tolerated_colluders`. `plans.min_cohort` below 3 needs
`plans.allow_small`, and `peers.min_known_peers = 0` needs `peers.demo`.

A running node reads policy and data again whenever it is asked to join, and before each round that it
pays for; nothing has to be restarted. A changed policy holds from then on: the node's log says that it
changed, a plan that it forbids is refused (`FS-POLICY-02`), and a run that was joined before and is not
allowed any more is left before the next round is reserved (`FS-POLICY-03`). A tighter cap holds from the
next reservation on. A policy that is missing or wrong allows nothing until it is mended. `dataset` cannot
be changed: another name needs another home (`FS-POLICY-04`). When data is withdrawn or replaced, see
docs/operations.md."""

ERRORS_INTRODUCTION: Final = """\
Every refusal has a code that never changes its meaning. The message on the machine where it happened says
more; only the code travels to other parties. The exit status is that of the command line when the error
ends it."""

SIGNS: Final = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def pages() -> dict[str, str]:
    """Return the text of each page by its file name."""
    return {
        "plan.md": _schema_page("The plan: plan.toml", PLAN_INTRODUCTION, Plan),
        "policy.md": _schema_page("The policy: policy.toml", POLICY_INTRODUCTION, Policy),
        "errors.md": _errors_page(),
    }


def error_classes() -> list[type[FedsealError]]:
    """Return all error classes in ascending order of code, the base class first where codes are equal."""
    classes = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
    return sorted((kind for kind in classes if issubclass(kind, FedsealError)), key=lambda kind: kind.code)


def _errors_page() -> str:
    rows = [[f"`{kind.code}`", kind.what, kind.remedy, str(kind.exit_code)] for kind in error_classes()]
    table = _table(["code", "what happened", "what to do", "exit status"], rows)
    return _page("Errors and exit statuses", ERRORS_INTRODUCTION, [table])


def _schema_page(title: str, introduction: str, model: type[BaseModel]) -> str:
    schema = model.model_json_schema()
    sections = [
        _section(name, schema["$defs"][_given(field)["$ref"].rpartition("/")[2]])
        for name, field in schema["properties"].items()
        if "$ref" in _given(field)
    ]
    return _page(title, introduction, [_fields(schema), *sections])


def _page(title: str, introduction: str, parts: list[str]) -> str:
    return "\n\n".join([f"# {title}", NOTICE, introduction, *parts]) + "\n"


def _section(name: str, schema: dict[str, Any]) -> str:
    return f"## [{name}]\n\n{schema['description']}\n\n{_fields(schema)}"


def _fields(schema: dict[str, Any]) -> str:
    required = schema.get("required", [])
    rows = [
        [
            f"`{name}`",
            _type(field),
            "required" if name in required else _default(field),
            ", ".join(_limits(field)),
            field["description"],
        ]
        for name, field in schema["properties"].items()
        if "$ref" not in _given(field)
    ]
    return _table(["field", "type", "default", "range", "description"], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


def _given(field: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a value that is given, where leaving it out is an alternative."""
    alternatives = [one for one in field.get("anyOf", []) if one.get("type") != "null"]
    return alternatives[0] if alternatives else field


def _type(field: dict[str, Any]) -> str:
    given = _given(field)
    if given["type"] == "array":
        return f"list of {given['items']['type']}s"
    return "table" if given["type"] == "object" else str(given["type"])


def _default(field: dict[str, Any]) -> str:
    return "none" if field["default"] is None else f"`{json.dumps(field['default'])}`"


def _limits(field: dict[str, Any]) -> Iterator[str]:
    given = _given(field)
    if "const" in given or "enum" in given:
        yield " or ".join(f"`{json.dumps(value)}`" for value in given.get("enum", [given.get("const")]))
    for key, sign in SIGNS.items():
        if key in given:
            yield f"{sign} {given[key]}"
    if "pattern" in given:
        yield f"`{given['pattern']}`"
    if "minLength" in given:
        yield "not empty"
    if "minItems" in given or "maxItems" in given:
        yield _length(given.get("minItems", 0), given.get("maxItems"))
    for inner in _inner(given):
        yield from (f"each {limit}" for limit in _limits(inner))
    for pattern in given.get("patternProperties", {}):
        yield f"names `{pattern}`"


def _length(low: int, high: int | None) -> str:
    if high is None:
        return f"{low} or more entries"
    if low == high:
        return f"{low} entries"
    return f"{low} to {high} entries"


def _inner(given: dict[str, Any]) -> list[dict[str, Any]]:
    return [*([given["items"]] if "items" in given else []), *given.get("patternProperties", {}).values()]


def main() -> None:
    """Write all pages."""
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
