"""All experiments of an audit that are made at the auditor's place, with public and made-up records."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from audit.evidence.experiments import Depth, LabEvidence, MarkerScan
from audit.laboratory.inversion import attack_gradients
from audit.laboratory.mechanism import audit_mechanism
from audit.laboratory.membership import attack_membership
from protocol.plan import Plan
from tasks.images import Examples

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Observed:
    """What was observed of real and simulated runs before the experiments.

    Attributes:
        markers: Searches for planted markers.
        ciphertexts: Encrypted frames that the coordinator received.
        repeated: How many of them had been received before.
        since: `time.monotonic()` at the beginning of the audit.
    """

    markers: Sequence[MarkerScan]
    ciphertexts: int
    repeated: int
    since: float


def run_laboratory(
    plan: Plan, public: Examples, depth: Depth, progress: Progress, observed: Observed
) -> LabEvidence:
    """Test the installed mechanism and attack what it protects.

    Args:
        plan: Resolved.
        public: Public examples, preprocessed by the plan's task.
        depth: How much is tried.
        progress: Called with a line of text at each step.
        observed: What is known already.

    Raises:
        FedsealError: The installed code refuses this plan or this library; the code says why.
    """
    mechanism = audit_mechanism(plan, depth, progress)
    membership = attack_membership(plan, public, depth, progress)
    inversion = attack_gradients(plan, public, depth, progress)
    return LabEvidence(
        depth=depth,
        mechanism=mechanism,
        membership=membership,
        inversion=inversion,
        markers=list(observed.markers),
        ciphertexts=observed.ciphertexts,
        ciphertexts_repeated=observed.repeated,
        seconds=time.monotonic() - observed.since,
    )
