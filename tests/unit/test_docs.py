"""The reference pages say what the code says."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from client.policy import Policy
from docs.generate import error_classes, pages
from protocol.errors import FedsealError
from protocol.plan import Plan

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", ["plan.md", "policy.md", "errors.md"])
def test_a_page_is_what_the_code_makes(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == pages()[name], "run python -m docs.generate"


def test_every_error_class_has_one_line() -> None:
    lines = (DOCS / "errors.md").read_text(encoding="utf-8").splitlines()
    for kind in error_classes():
        rows = [line for line in lines if f"| `{kind.code}` |" in line]
        assert len(rows) == 1
        assert kind.what in rows[0]
        assert kind.remedy in rows[0]
        assert rows[0].endswith(f"| {kind.exit_code} |")


def test_no_code_occurs_twice() -> None:
    codes = [kind.code for kind in error_classes()]
    assert len(codes) == len(set(codes))
    assert len(codes) == 1 + len(subclasses(FedsealError))


def subclasses(kind: type[FedsealError]) -> set[type[FedsealError]]:
    direct = {sub for sub in kind.__subclasses__() if sub.__module__ == "protocol.errors"}
    return direct.union(*(subclasses(sub) for sub in direct))


def field_names(model: type[BaseModel]) -> list[tuple[str, str]]:
    names = []
    for name, field in model.model_fields.items():
        given = [one for one in get_args(field.annotation) if one is not type(None)]
        inner: Any = given[0] if given else field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            names += [(name, own) for own in inner.model_fields]
        else:
            names.append(("", name))
    return names


@pytest.mark.parametrize(("model", "name"), [(Plan, "plan.md"), (Policy, "policy.md")])
def test_every_field_is_described(model: type[BaseModel], name: str) -> None:
    parts = re.split(r"^## \[(\w+)\]$", (DOCS / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
    tables = {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}
    for section, field in field_names(model):
        rows = re.findall(rf"^\| `{field}` \|.*\| (.+) \|$", tables[section], flags=re.MULTILINE)
        assert len(rows) == 1, (section, field)
        assert rows[0].endswith(".")


def test_every_error_that_names_a_page_names_one_that_exists() -> None:
    for kind in error_classes():
        for page in re.findall(r"docs/\w+\.md", kind.remedy):
            assert (DOCS.parent / page).is_file()


def test_every_act_of_the_log_is_listed() -> None:
    """Each kind of act that the code records stands in the table of docs/identity.md, and none besides."""
    written = set[str]()
    for file in (*(DOCS.parent / "server").rglob("*.py"), *(DOCS.parent / "crypto").glob("*.py")):
        text = file.read_text(encoding="utf-8")
        written |= {f"run.{kind}" for kind in re.findall(r"\.event\(\s*\"([a-z_]+)\"", text)}
        written |= {f"run.{kind}" for kind in re.findall(r"\._act\(\s*\"([a-z_]+)\"", text)}
        written |= set(re.findall(r"\"((?:operator|server|member|peer|revocations|pki)\.[a-z]+)\"", text))
    table = (DOCS / "identity.md").read_text(encoding="utf-8").partition("## The log of acts")[2]
    listed = set(re.findall(r"`([a-z]+\.[a-z_]+)`", table.partition("A line is synced")[0])) - {"run.db"}
    assert written - {"server.crt"} == listed
