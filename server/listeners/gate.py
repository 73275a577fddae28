"""What an owner must be, beside certified, before Flower sees a request of it: a member, with a clock.

Flower refuses both without a word to either side that says which it was.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

from protocol.admission import ADMISSION_PATH, CLOCK_TOLERANCE_S, REFUSAL_STATUS
from protocol.errors import ClocksDiffer, NotAMember
from server.flower.clock import TIMESTAMP_HEADER
from server.listeners.admission import CERTIFICATE, PEER, Admission
from server.listeners.limits import refuse

_FLEET: Final = "/v1/fleet/"


class Gate:
    """ASGI filter: refuses who is not registered or whose clock is too far away; both sides are told.

    Args:
        app: The app behind it.
        admission: Records refusals.
        is_member: Tells whether the owner of a key, by its fingerprint, is registered.
    """

    def __init__(self, app: Any, admission: Admission, is_member: Callable[[str], bool]) -> None:
        self._app = app
        self._admission = admission
        self._is_member = is_member

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Serve a request of the fleet API, or refuse it."""
        if scope["type"] == "http" and scope["path"].startswith(_FLEET):
            code = self._refusal(scope)
            if code is not None:
                await refuse(send, REFUSAL_STATUS, code)
                return
            if scope["path"] == ADMISSION_PATH:
                await refuse(send, 204)
                return
        await self._app(scope, receive, send)

    def _refusal(self, scope: dict[str, Any]) -> str | None:
        certificate = scope[CERTIFICATE]
        if not self._is_member(scope[PEER]):
            reason = "its certificate is the authority's, and it is not among the members"
            self._admission.note(certificate, NotAMember.code, reason)
            return NotAMember.code
        self._admission.forgive(certificate, NotAMember.code)
        ahead = _ahead_s(dict(scope["headers"]), datetime.now(UTC))
        if ahead is None:
            return None
        if abs(ahead) > CLOCK_TOLERANCE_S:
            direction = "ahead of" if ahead > 0 else "behind"
            reason = f"its clock is {abs(ahead):.0f} s {direction} this machine's"
            self._admission.note(certificate, ClocksDiffer.code, reason)
            return ClocksDiffer.code
        self._admission.forgive(certificate, ClocksDiffer.code)
        return None


def _ahead_s(headers: dict[bytes, bytes], now: datetime) -> float | None:
    """Return by how many seconds a signed request's time is ahead of now; None if it has none."""
    try:
        sent = datetime.fromisoformat(headers[TIMESTAMP_HEADER.encode()].decode("ascii"))
        return (sent - now).total_seconds()
    except (KeyError, ValueError, TypeError):
        return None
