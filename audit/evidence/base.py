"""What all evidence has in common: its types, its strictness, and how it spells a moment."""

from __future__ import annotations

import unicodedata
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from protocol.errors import ReportInvalid
from protocol.plan import first_problem


def _printable(text: str) -> str:
    if any(unicodedata.category(one) == "Cc" for one in text):
        raise ValueError("the text holds a control character, which could act on a reader's terminal")
    return text


Text = Annotated[str, Field(max_length=512), AfterValidator(_printable)]
Probability = Annotated[float, Field(ge=0, le=1)]
Magnitude = Annotated[float, Field(ge=0)]
Sum = Annotated[int, Field(ge=0, lt=2**32)]
Json = bool | int | float | str | list[Any] | dict[str, Any] | None


def parse_time(text: str) -> datetime:
    """Return the moment that an ISO 8601 text with the offset of UTC names.

    Raises:
        ValueError: Not ISO 8601, or not in UTC.
    """
    moment = datetime.fromisoformat(text)
    if moment.utcoffset() != timedelta(0):
        raise ValueError("the time is not in UTC")
    return moment.astimezone(UTC)


def _utc(text: str) -> str:
    parse_time(text)
    return text


Moment = Annotated[str, Field(max_length=40), AfterValidator(_utc)]
"""A moment as ISO 8601 text in UTC, for example ``2026-03-01T08:30:00+00:00``."""


class Evidence(BaseModel):
    """Base of all evidence: strict types, no unknown keys, immutable, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @classmethod
    def from_fields(cls, fields: Any) -> Self:
        """Validate evidence given as nested dicts, as JSON parses to.

        Raises:
            ReportInvalid: Names the first wrong field and why.
        """
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise ReportInvalid(first_problem(error)) from None

    def fields(self) -> dict[str, Any]:
        """Return the evidence as nested dicts of plain JSON values."""
        return self.model_dump(mode="json")
