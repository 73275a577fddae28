"""Every refusal has its own code and says what happened, why, and what to do."""

import inspect
import re

import pytest

from protocol import errors
from protocol.errors import EXIT_STATUSES, FedsealError

ERRORS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, FedsealError)]


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_an_error_is_complete(kind: type[FedsealError]) -> None:
    assert re.fullmatch(r"FS-[A-Z]+-\d\d", kind.code)
    for sentence in (kind.what, kind.remedy):
        assert re.fullmatch(r"[A-Za-z].{8,140}\.", sentence)
    assert kind.exit_code in EXIT_STATUSES
    assert kind.exit_code not in (0, 130)
    assert (kind.__doc__ or "").strip()
    assert kind is FedsealError or {"code", "what", "remedy", "exit_code"} <= vars(kind).keys()


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_an_error_explains_itself(kind: type[FedsealError]) -> None:
    lines = kind("run.rounds is 0").explain().splitlines()
    assert lines[0] == f"{kind.code}  {kind.what}"
    assert lines[1].strip() == "why: run.rounds is 0"
    assert lines[2].split(":", 1)[1].strip() == kind.remedy
    assert len(kind().explain().splitlines()) == 2
    assert str(kind("why")) == f"{kind.code}: {kind.what} why"
    assert str(kind()) == f"{kind.code}: {kind.what}"


def test_no_code_has_two_meanings() -> None:
    codes = [kind.code for kind in ERRORS]
    assert len(codes) == len(set(codes))


def test_all_errors_are_caught_as_one() -> None:
    for kind in ERRORS:
        with pytest.raises(FedsealError):
            raise kind("detail")
