"""By how much the clocks of nodes may differ from the coordinator's, as Flower judges signed requests.

Flower 1.41.0 takes a node's signed time if it is less than 5 s ahead of its own, or 305 s behind. A machine
whose clock is 10 s ahead is never let in by that, while its certificates are good: an authority dates them
back by five minutes, so that clocks may differ by as much.
"""

from __future__ import annotations

import importlib
from typing import Any, Final

from protocol.admission import CLOCK_TOLERANCE_S
from protocol.errors import FlowerChanged

TIMESTAMP_HEADER: Final = "flwr-timestamp"

_FLOWERS_OWN: Final = {"SYSTEM_TIME_TOLERANCE": 5, "TIMESTAMP_TOLERANCE": 300}
_ON_THE_WAY_S: Final = 5


def tolerate_clocks() -> None:
    """Let signed requests be up to `CLOCK_TOLERANCE_S` ahead of this machine's clock, or behind it.

    How long a request takes on its way comes on top of what it may be behind; the end of Flower's own
    window, 305 s, stays. Assumes the two constants of `flwr.superlink.routers.fleet.node_auth`, of which
    ``-SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE`` is asked.

    Raises:
        FlowerChanged: Flower does not have them.
    """
    try:
        judge: Any = importlib.import_module("flwr.superlink.routers.fleet.node_auth")
        known = {name: getattr(judge, name) for name in _FLOWERS_OWN}
    except (ImportError, AttributeError) as error:
        raise FlowerChanged("the tolerance for clocks cannot be set") from error
    wanted = {"SYSTEM_TIME_TOLERANCE": CLOCK_TOLERANCE_S, "TIMESTAMP_TOLERANCE": _ON_THE_WAY_S}
    if known not in (_FLOWERS_OWN, wanted):
        raise FlowerChanged("the tolerance for clocks is another one")
    for name, seconds in wanted.items():
        setattr(judge, name, seconds)
