"""The coordinator's home folder.

Layout::

    identity/        its certificate, its sealed key, the authority, the revocation list
    operator/        identity of the operator of this machine
    members/         transport and signing certificates of the owners
    runs/            one folder per run
    log/             the log of acts, see `crypto.auditlog`
    control.sock     where operators connect while it runs
    addresses.json   where owners connect while it runs
"""

import re
from typing import Final

IDENTITY: Final = "identity"
OPERATOR: Final = "operator"
MEMBERS: Final = "members"
RUNS: Final = "runs"
ADDRESSES: Final = "addresses.json"
PUBLIC_DATA: Final = "public.npz"
"""In a run's folder: examples that the coordinator may evaluate on."""

HOME_VARIABLE: Final = "FEDSEAL_SERVER_HOME"
"""Environment variable that tells a run's process where the home is."""


def digits_of(name: str) -> str:
    """Return the first digits of a run's identifier, which end the name of its folder; empty if none do."""
    found = re.search(r"-([0-9a-f]{8})$", name)
    return "" if found is None else found[1]
