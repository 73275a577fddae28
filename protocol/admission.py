"""How a coordinator tells an owner's node why it is not let in.

A refusal is an HTTP status and the code of an error in a header; nothing else of it crosses the wire.
"""

from __future__ import annotations

from typing import Final

REFUSAL_HEADER: Final = "fedseal-refusal"
"""Holds the code of an error, such as ``FS-NET-09``."""

REFUSAL_STATUS: Final = 409
"""Of requests that are refused. To Flower's client 401 is an order to end its process, and 403 the end of
a run."""

ADMISSION_PATH: Final = "/v1/fleet/admission"
"""Answers 204 to an owner that is let in."""

CLOCK_TOLERANCE_S: Final = 300
"""By how much a node's clock may differ from its coordinator's; certificates are dated back by as much."""
