"""Measuring SEAL's own form of a frame without loading code that handles secret keys."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

from crypto.layouts import Layout
from protocol.errors import EncryptionUnavailable
from protocol.plan import Plan

_ROOT: Final = Path(__file__).parents[1]
_LIMIT_S: Final = 60.0


def frame_layout(plan: Plan) -> Layout | None:
    """Return the layout of a plan's frames where they are in SEAL's own form; None where they are packed.

    A seeded ciphertext takes a secret key. A program of its own makes a throw-away one, and ends.

    Raises:
        EncryptionUnavailable: The program could not measure it.
    """
    if plan.encryption.frames == "packed":
        return None
    command = [sys.executable, "-m", "crypto.measuring"]
    command += [plan.encryption.preset, str(plan.cohort.maximum)]
    try:
        done = subprocess.run(  # noqa: S603  the arguments are our own
            command, cwd=_ROOT, stdin=subprocess.DEVNULL, capture_output=True, timeout=_LIMIT_S, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise EncryptionUnavailable("SEAL's own form of a frame could not be measured") from error
    return Layout.from_bytes(done.stdout)
