"""Audit the mechanism that is installed here, for one plan: conformance tests and lower bounds.

Everything is made with made-up records: no owner's data is read and no budget is spent. It can therefore be
run by an owner, who signs the result, and by an auditor, on the code that each has installed.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

import client.bookkeeping
import client.contribution
import client.convolution_gradients
import client.evaluation
import client.gradients
import client.holdout
import client.hooks
import client.layer_gradients
import client.ledger
import client.membership
import client.noise
import client.padding
import client.rounds
import client.safety
import client.spending
import client.training
import crypto.encoders
import crypto.frames
import crypto.masks
import crypto.packing
import crypto.presets
import crypto.residues
import crypto.sealing
import crypto.secret
import crypto.signing
import deploy.build
import deploy.export
import deploy.gate
import deploy.prune
import deploy.quantize
import protocol.accounting
import protocol.evaluation
import protocol.optimizers
import protocol.plan
import protocol.privacy_loss
import protocol.sections
import protocol.shares
import tasks.images
import tasks.inputs
from audit.evidence.experiments import Depth, MechanismEvidence
from audit.laboratory.conformance import training_tests
from audit.laboratory.lower_bounds import lower_bounds
from audit.laboratory.protections import export_test, protection_tests
from audit.laboratory.record_tests import Sample
from protocol.encoding import digest, digest_bytes
from protocol.plan import Plan

SAMPLES: dict[Depth, Sample] = {"quick": Sample(4096, 400, 16), "full": Sample(8192, 1000, 40)}

MOST_STEPS = 64
"""Local steps of a round that are made; more of them are the same loop again."""

AUDITED: tuple[ModuleType, ...] = (
    client.bookkeeping,
    client.contribution,
    client.convolution_gradients,
    client.evaluation,
    client.gradients,
    client.holdout,
    client.hooks,
    client.layer_gradients,
    client.ledger,
    client.membership,
    client.noise,
    client.padding,
    client.rounds,
    client.safety,
    client.spending,
    client.training,
    crypto.encoders,
    crypto.frames,
    crypto.masks,
    crypto.packing,
    crypto.presets,
    crypto.residues,
    crypto.sealing,
    crypto.secret,
    crypto.signing,
    deploy.build,
    deploy.export,
    deploy.gate,
    deploy.prune,
    deploy.quantize,
    protocol.accounting,
    protocol.evaluation,
    protocol.optimizers,
    protocol.plan,
    protocol.privacy_loss,
    protocol.sections,
    protocol.shares,
    tasks.images,
    tasks.inputs,
)
"""The modules whose source the evidence is about."""


def audit_mechanism(plan: Plan, depth: Depth, progress: Callable[[str], None]) -> MechanismEvidence:
    """Test the installed code against a plan and bound its privacy loss from below.

    Rounds of more than `MOST_STEPS` local steps are shortened to that; claims are those of the shortened
    rounds.

    Args:
        plan: A resolved plan.
        depth: ``quick`` takes about ten CPU seconds, ``full`` one or two minutes.
        progress: Told in one line what is tried next.

    Raises:
        PlanInvalid: The plan is not resolved.
        FedsealError: The code itself refuses to go on with this plan or this library; the code says why.
    """
    audited = _shortened(plan)
    progress("conformance: noise, clipping, sampling")
    tests = training_tests(audited, SAMPLES[depth])
    progress("conformance: masks, frames, signatures, ledger")
    tests += protection_tests(audited)
    progress("conformance: exported model")
    tests.append(export_test(audited))
    return MechanismEvidence(
        plan_hash=plan.sha256(),
        code_hash=code_hash(),
        depth=depth,
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        conformance=tests,
        bounds=lower_bounds(audited, depth, progress),
    )


def code_hash() -> str:
    """Return the digest of the source of all modules that the mechanism consists of."""
    return digest(
        {module.__name__: digest_bytes(Path(str(module.__file__)).read_bytes()) for module in AUDITED}
    )


def _shortened(plan: Plan) -> Plan:
    steps = min(plan.training.local_steps, MOST_STEPS)
    return plan.model_copy(update={"training": plan.training.model_copy(update={"local_steps": steps})})
