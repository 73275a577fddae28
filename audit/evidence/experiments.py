"""What experiments found: tests of the mechanism, lower bounds, attacks and searches for planted markers.

Where `audit.evidence.run` holds what a run left behind, this holds what was tried on purpose: on the code
that owners run, with made-up or public records, never with an owner's own. The experiments are made in
`audit.laboratory` and by `audit.collecting.markers`; they are judged by the checks, from the report alone.
A privacy loss without bound is None here and ``"inf"`` in the report.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field

from audit.evidence.base import Evidence, Magnitude, Moment, Probability, Text
from audit.evidence.run import KeyCustody
from protocol.encoding import Digest
from protocol.messages import Count

Observer = Literal["update", "wire", "opened sum", "exported model"]
"""Who looks: the owner's update before encryption, the coordinator's wire, a holder of the key after
opening, or whoever gets the exported model."""

Depth = Literal["quick", "full"]
Place = Literal["wire", "disk", "logs", "reports", "coordinator memory"]
Fraction = Annotated[float, Field(ge=-1, le=1)]

CurvePoint = Annotated[tuple[Probability, Probability], Field(strict=False)]
"""False and true positive rate; JSON knows no tuples, so a list of two is taken for one."""

FINDINGS_KIND: Final = "owner-findings"
"""Kind under which an owner signs its `OwnerFindings`."""

FEWEST_OUTSIDERS: Final = 368
"""Of fewer outsiders it cannot be said with 97.5 % that a threshold which none of them exceeds accuses no
more than 1 % of all: 0.99 ** 367 is above 0.025. An attack judged on fewer could not fail."""

REQUIRED_TESTS: Final = {
    "always": (
        "participation-rate",
        "divisor",
        "rounding",
        "frames-uniform",
        "frames-fresh",
        "sum-exact",
        "foreign-key",
        "forged-signature",
        "changed-header",
        "export-independent",
    ),
    "noise": (
        "noise-scale",
        "noise-with-records",
        "noise-distribution",
        "noise-across-rounds",
        "noise-across-owners",
        "noise-across-coordinates",
        "record-count",
        "signal",
        "clip",
        "ledger-composition",
    ),
    "noise per example": ("clip-own-model",),
    "sampling": ("batch-dispersion", "record-dispersion"),
    "BFV": ("masked",),
    "own model": (
        "noise-scale-own-model",
        "noise-distribution-own-model",
        "noise-across-coordinates-own-model",
        "noise-across-rounds-own-model",
    ),
    "own model per example": ("clip-in-pieces",),
}
"""Tests without which the mechanism counts as untested: in any plan, and in plans with noise, with noise
per example, with a sample rate below 1, and with BFV; on the plan's own model, in plans with noise and with
noise per example. They are all that are made, so that none can be left out because it failed. The schema
names them too, for readers without this code."""


class ConformanceTest(Evidence):
    """One comparison of the mechanism with what the plan says; it fails below `threshold`.

    Attributes:
        test: Stable name, for example ``noise-scale``.
        what: What was compared, in plain words.
        statistic: What was measured.
        expected: What a correct mechanism gives, in the unit of `statistic`.
        samples: Numbers that the statistic rests on.
        p_value: Probability that a correct mechanism deviates at least as much.
        threshold: Probability of a false alarm that was decided on before.
    """

    test: Text
    what: Text
    statistic: float
    expected: float
    samples: Count
    p_value: Probability
    threshold: Probability


class LowerBound(Evidence):
    """One empirical lower bound on epsilon, valid with probability `confidence`, beside its control.

    Attributes:
        method: How the bound was computed.
        canaries: Made-up examples whose presence was guessed.
        guesses: Guesses that the bound rests on; `correct` of them were right.
        epsilon: The bound; an unbounded one is capped by what the method can show at most.
        claimed: What the same steps cost according to the accountant; None without a guarantee.
        control: The same bound with the noise off, capped by what so few canaries can show. A method whose
            control does not exceed `claimed` sees nothing; each observer needs one method that does. None
            where no control can be made (the wire, and plans without noise).
        detectable: Smallest true epsilon that this audit exposes with probability 0.8, or None.
        assumption: What the bound rests on, in plain words.
    """

    method: Literal["one run", "one run, f-DP", "Clopper-Pearson, Gaussian", "Clopper-Pearson, PLD"]
    observer: Observer
    canaries: Count
    guesses: Count
    correct: Count
    epsilon: Magnitude
    delta: Probability
    confidence: Probability
    claimed: Magnitude | None
    control: Magnitude | None
    detectable: Magnitude | None
    assumption: Text


class MechanismEvidence(Evidence):
    """What tests of the installed mechanism found, made with the plan's constants and made-up examples.

    Attributes:
        code_hash: Digest of the source files that the mechanism consists of.
    """

    plan_hash: Digest
    code_hash: Digest
    depth: Depth
    made_at: Moment
    conformance: list[ConformanceTest]
    bounds: list[LowerBound]


class Rate(Evidence):
    """A measured rate with its 95 % interval."""

    value: Probability
    low: Probability
    high: Probability


class MembershipAttack(Evidence):
    """One membership inference attack on one model.

    Attributes:
        model: What was attacked: trained without protection (the control), as the plan says, or the
            exported package's model.
        group: All records, or the most exposed ones.
        auc: Area under the ROC curve; one half is guessing.
        tpr_at_1_percent: True positive rate where one outsider in a hundred is taken for a member.
        ceiling_at_1_percent: Largest such rate that the promised guarantee allows; None without one.
        curve: Points (false positive rate, true positive rate), at most 200.
    """

    attack: Literal["LiRA", "RMIA", "loss threshold"]
    model: Literal["without protection", "as planned", "exported"]
    group: Literal["all records", "most exposed records"]
    members: Count
    outsiders: Count
    shadow_models: Count
    auc: Probability
    tpr_at_1_percent: Rate
    tpr_at_01_percent: Rate
    ceiling_at_1_percent: Probability | None
    curve: Annotated[list[CurvePoint], Field(max_length=200)]


class InversionAttack(Evidence):
    """One attempt to rebuild a record from what an observer holds.

    Attributes:
        attack: Analytic, by optimization, or by a model made for the purpose (imprint).
        observed: What the attacker was given.
        batch: Records in the attacked step.
        rebuilt: Records that came back recognizably: a PSNR of at least 20 dB, and 10 dB above that of one
            even grey.
        psnr_db: Peak signal-to-noise ratio of the best rebuilt record, at most 120; None if there is
            nothing to rebuild from. Where records are no pictures, the peak is their own deviation, so
            that a guess without knowledge has about 0.
        ssim: Structural similarity of the same record; None where records are no pictures.
        original_png, rebuilt_png: Small pictures, base64; empty where there is none.
    """

    attack: Literal["analytic", "optimization", "imprint"]
    observed: Literal["plain update", "private update", "received by the coordinator"]
    batch: Count
    rebuilt: Count
    psnr_db: Annotated[float, Field(le=120)] | None
    ssim: Fraction | None
    original_png: Annotated[str, Field(max_length=20_000)]
    rebuilt_png: Annotated[str, Field(max_length=20_000)]


class MarkerScan(Evidence):
    """A search for planted values and words in one place, beside the same search with encryption off.

    Attributes:
        place: Where was searched.
        searched_bytes: How much was searched.
        markers: Planted values and words that were searched for, each in several spellings.
        hits: Markers found; must be zero.
        control_hits: Markers found by the same search where they must be found, which must not be zero: on
            the wire, on disk and in memory after owners answered with plain updates; in logs and reports,
            where encryption plays no part, in a copy that quotes the markers. None where there is no
            control; such a search shows nothing.
    """

    place: Place
    searched_bytes: Count
    markers: Count
    hits: Count
    control_hits: Count | None


class LedgerTable(Evidence):
    """What an owner's ledger says about one data set: spent and left, over all runs.

    Attributes:
        dataset: The hash of the ledger's first record; the data set's own name stays with the owner.
        spent_epsilon, cap_epsilon: Sum over runs and the policy's cap on it; None without bound or cap.
        this_run_epsilon: What this run has cost so far.
        sequence, head: The chain's newest record, which the owner signs.
    """

    dataset: Text
    spent_epsilon: Magnitude | None
    spent_delta: Magnitude
    cap_epsilon: Magnitude | None
    cap_delta: Magnitude | None
    this_run_epsilon: Magnitude | None
    runs: Count
    sequence: Count
    head: Digest


class OwnerFindings(Evidence):
    """What an owner found at its own place and signed: nothing in it is made from its records.

    Attributes:
        run: The run that it speaks about; None where only a plan is audited.
        mechanism: Tests of the code that this owner has installed.
    """

    owner: Text
    run: Digest | None
    mechanism: MechanismEvidence
    custody: list[KeyCustody]
    ledger: LedgerTable | None


class LabEvidence(Evidence):
    """All experiments of one audit that were made at the auditor's place.

    Attributes:
        ciphertexts, ciphertexts_repeated: Encrypted frames that the coordinator received, and how many of
            them had been received before.
        seconds: Wall-clock seconds of the whole audit.
    """

    depth: Depth
    mechanism: MechanismEvidence
    membership: list[MembershipAttack]
    inversion: list[InversionAttack]
    markers: list[MarkerScan]
    ciphertexts: Count
    ciphertexts_repeated: Count
    seconds: Magnitude
