"""What a run leaves behind: the only input of the audit report.

The coordinator fills `RunEvidence` from its run store. Everything here is a fact that somebody recorded
while the run went on; nothing is a judgement. Judgements are made by `audit.checks.verdict` from the report
that `audit.report` builds, so that whoever holds a report can repeat them.

All values are strict, immutable and finite. A privacy loss without bound is None here and ``"inf"`` in
the report.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from itertools import pairwise
from typing import Annotated, Literal, Self

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import Field, model_validator

from audit.evidence.base import Evidence, Json, Magnitude, Moment, Probability, Sum, Text, parse_time
from crypto.certificates import common_name, fingerprint
from crypto.presets import packing_for
from crypto.signing import verify
from protocol.claims import Adjacency, Unit
from protocol.encoding import Blob, Digest, digest_bytes
from protocol.errors import EncodingInvalid, SignatureInvalid
from protocol.evaluation import COUNTS
from protocol.messages import Count, Fingerprint, LedgerHead, Opening, Purpose, Signed, Statement
from protocol.plan import Plan


class EncryptionEvidence(Evidence):
    """The homomorphic encryption that was in use, as the library reported it.

    Attributes:
        exact: Decryption returns the integer sum without any error.
        frames: Form of the frames; ``seal`` is SEAL's own, which is larger.
        frame_bytes: Length of a frame as the coordinator checked it; None if no round began.
        values_per_frame: Values that a full frame holds.
    """

    scheme: Literal["BFV", "CKKS"]
    preset: Text
    poly_modulus_degree: Count
    coefficient_modulus_bits: Count
    plain_modulus_bits: Count
    security_level_bits: Count
    exact: bool
    frames: Literal["packed", "seal"]
    frame_bytes: Count | None
    values_per_frame: Count

    @classmethod
    def of_plan(cls, plan: Plan, frame_bytes: int | None) -> Self:
        """Return what a plan orders, with the length of its frames as it was checked."""
        packing = packing_for(plan.encryption.preset, plan.cohort.maximum)
        return cls(
            scheme=packing.preset.scheme,
            preset=packing.preset.name,
            poly_modulus_degree=packing.preset.poly_modulus_degree,
            coefficient_modulus_bits=packing.preset.coefficient_modulus.bit_length(),
            plain_modulus_bits=packing.plain_modulus.bit_length(),
            security_level_bits=packing.preset.security_bits,
            exact=packing.preset.scheme == "BFV",
            frames=plan.encryption.frames,
            frame_bytes=frame_bytes,
            values_per_frame=packing.values_per_frame,
        )


class PhaseSeconds(Evidence):
    """Wall-clock seconds of the three exchanges of a round; zero for one that did not take place."""

    fit: Magnitude = 0.0
    seal: Magnitude = 0.0
    open: Magnitude = 0.0


class RoundEvidence(Evidence):
    """One attempt at a round, or at the evaluation of a finished one.

    Attributes:
        contributors: Owners whose sealed updates are in the sum.
        headers_hash: What the openers signed as the list of headers; None when nothing was sealed.
        sums_hash: Digest of the opened sums that a quorum agreed on; None when nothing was opened.
        openings: The signed openings as the coordinator received them.
        accuracy: Accuracy of the new model on public data; None when it was not measured.
        sums: Opened counts of an evaluation, as integers of the quantization grid; None otherwise.
        void: Nothing was opened and the model did not change.
        reason: Error code that says why the attempt is void.
    """

    round: Count
    attempt: Count
    purpose: Purpose
    contributors: list[Fingerprint]
    headers_hash: Digest | None
    sums_hash: Digest | None
    openings: list[Signed]
    accuracy: Probability | None
    sums: Annotated[list[Sum], Field(min_length=COUNTS, max_length=COUNTS)] | None
    seconds: PhaseSeconds
    upload_bytes: Count
    download_bytes: Count
    void: bool
    reason: Text | None

    @model_validator(mode="after")
    def _counts(self) -> Self:
        opened = self.purpose == "evaluate" and not self.void
        sums = b"".join(value.to_bytes(4, "little") for value in self.sums or ())
        if (self.sums is not None) != opened or (opened and digest_bytes(sums) != self.sums_hash):
            raise ValueError("sums stand exactly with an opened evaluation, and are the signed ones")
        return self

    def agreeing_openings(self, sessions: Collection[str], keys: dict[str, Ed25519PublicKey]) -> int:
        """Count the distinct owners whose valid signatures support this round's opened sum.

        Args:
            sessions: The run's sessions; the signatures must name one of them, all the same.
            keys: Public keys of the run's owners by fingerprint.
        """
        facts = (self.attempt, self.purpose, self.headers_hash, self.sums_hash)
        expected = (*facts, len(self.contributors))
        supporters: dict[str, tuple[str, str, str]] = {}
        for signed in self.openings:
            if signed.signer not in keys:
                continue
            try:
                body = verify(signed, keys[signed.signer], Opening)
            except (SignatureInvalid, EncodingInvalid):
                continue
            said = (body.attempt, body.purpose, body.headers_hash, body.sums_hash)
            if (*said, body.contributors) == expected and body.session in sessions:
                supporters[signed.signer] = (body.session, body.list_hash, body.model_hash)
        return max(Counter(supporters.values()).values(), default=0)


class ClaimEvidence(Evidence):
    """The privacy that the plan promised to one owner; an epsilon is None without a guarantee.

    Attributes:
        epsilon_worst: What a whole run costs if all other owners collude; None also where it is unbounded.
    """

    unit: Unit
    adjacency: Adjacency
    epsilon: Magnitude | None
    epsilon_worst: Magnitude | None
    delta: Probability


class OwnerEvidence(Evidence):
    """One owner as the coordinator knew it.

    Attributes:
        signing_certificate: DER of the certificate of the owner's Ed25519 signing key.
        statement: The owner's signed closing statement; None if it never arrived.
        ledger_first: Ledger head that the owner signed when it joined.
        ledger_last: Newest ledger head that the owner signed.
        sealed_attempts: Attempts for which the owner sealed an update; each of them costs privacy.
        sealed_evaluations: Evaluations for which it sealed its counts; each of them costs privacy.
        present_from: When the first roster that it was in stood.
        present_until: The end of the run, or of the last round that it took part in, if it left before.
    """

    name: Text
    fingerprint: Fingerprint
    signing_certificate: Blob
    claimed: ClaimEvidence
    statement: Signed | None
    ledger_first: LedgerHead
    ledger_last: LedgerHead
    sealed_attempts: Count
    sealed_evaluations: Count
    present_from: Moment
    present_until: Moment

    def certificate(self) -> x509.Certificate | None:
        """Return the signing certificate, or None if the bytes are not a certificate."""
        try:
            return x509.load_der_x509_certificate(self.signing_certificate)
        except (ValueError, UnsupportedAlgorithm):
            return None

    def certificate_covers_presence(self) -> bool:
        """Tell whether the signing certificate was valid while the owner was in the run."""
        start, end = parse_time(self.present_from), parse_time(self.present_until)
        certificate = self.certificate()
        return (
            certificate is not None
            and certificate.not_valid_before_utc <= start
            and end <= certificate.not_valid_after_utc
        )

    def public_key(self) -> Ed25519PublicKey | None:
        """Return the certificate's key, or None if it has another fingerprint or name than the owner."""
        certificate = self.certificate()
        try:
            key = None if certificate is None else certificate.public_key()
        except (ValueError, UnsupportedAlgorithm):
            return None
        if not isinstance(key, Ed25519PublicKey) or certificate is None:
            return None
        matches = fingerprint(key) == self.fingerprint and common_name(certificate.subject) == self.name
        return key if matches else None

    def verified_statement(self) -> Statement | None:
        """Return the closing statement if the owner truly signed it, else None."""
        key = self.public_key()
        if self.statement is None or key is None:
            return None
        try:
            return verify(self.statement, key, Statement)
        except (SignatureInvalid, EncodingInvalid):
            return None

    def ledger_went_back(self) -> bool:
        """Tell whether the signed ledger heads, in order of time, show a rollback or a rewrite."""
        statement = self.verified_statement()
        heads = [self.ledger_first, self.ledger_last] + ([statement.ledger] if statement else [])
        return any(
            new.sequence < old.sequence or (new.sequence == old.sequence and new.head != old.head)
            for old, new in pairwise(heads)
        )


class TranscriptEntry(Evidence):
    """All messages of one kind and content in one direction, seen from the coordinator.

    ``unclassified`` is what the coordinator must record for bytes that it could not parse as one of
    the other classes; such bytes fail the audit.
    """

    direction: Literal["received", "sent"]
    kind: Text
    content: Literal[
        "ciphertext frames",
        "signed metadata",
        "opened sums",
        "global model",
        "error code",
        "unclassified",
    ]
    count: Count
    total_bytes: Count
    min_bytes: Count
    max_bytes: Count


class Refusal(Evidence):
    """A message of an owner that the coordinator refused, or an owner's refusal that it received."""

    owner: Fingerprint
    kind: Text
    code: Text


class KeyCustody(Evidence):
    """Where one secret of an owner or of the coordinator lives, as its holder found it; never the secret.

    Attributes:
        mode: Access bits of the file as four octal digits; None for what is in memory only.
        encrypted_at_rest: The file is encrypted; False for what is in memory only.
    """

    what: Text
    holder: Text
    place: Literal["memory", "sealed file"]
    mode: Annotated[str, Field(pattern=r"^0[0-7]{3}$")] | None
    encrypted_at_rest: bool


class CertificateEvidence(Evidence):
    """The public facts of one certificate, as `crypto.certificates.describe` returns them."""

    subject: Text
    issuer: Text
    role: Text
    key_type: Text
    sha256_fingerprint: Digest
    serial: Text
    not_before: Moment
    not_after: Moment
    days_left: int


class TlsEvidence(Evidence):
    """The transport protection of the coordinator's public port."""

    version: Text
    client_certificate_required: bool
    cipher: Text | None


class Socket(Evidence):
    """A listening socket of the coordinator's processes."""

    address: Text
    port: Annotated[int, Field(ge=0, le=65_535)]
    purpose: Text


class Package(Evidence):
    """One installed distribution; `licence` is None where it does not name one."""

    name: Text
    version: Text
    licence: Text | None


class EnvironmentEvidence(Evidence):
    """Everything that was installed where the report's figures were made; a bill of materials."""

    python: Text
    platform: Text
    packages: list[Package]


class RunEvidence(Evidence):
    """Everything that a run leaves behind for its report.

    Attributes:
        run: Identifier of the run, 64 hex digits.
        plan: Canonical fields of the resolved plan, `protocol.plan.Plan.fields`.
        plan_hash: The plan hash that stands in the run's signatures.
        session: Hash of the last roster's signed joining messages; None when joining never finished.
        attempts_used: Attempts that were started, void ones included.
        model_hash: Hash of the model after the last finished round.
        server_has_secret_key: A decryption key was found in the coordinator's process.
        deployment: What building the deployable model returned; None when none was built.
        kind: Whether owners ran on machines of their own, or all in one simulated federation.
    """

    run: Digest
    name: Text
    plan: dict[str, Json]
    plan_hash: Digest
    session: Digest | None
    state: Literal["finished", "failed", "paused"]
    rounds_finished: Count
    attempts_used: Count
    started_at: Moment
    finished_at: Moment
    model_hash: Digest
    initial_model_hash: Digest
    encryption: EncryptionEvidence
    rounds: list[RoundEvidence]
    owners: list[OwnerEvidence]
    transcript: list[TranscriptEntry]
    refusals: list[Refusal]
    keys: list[KeyCustody]
    certificates: list[CertificateEvidence]
    tls: TlsEvidence
    server_has_secret_key: bool
    listening: list[Socket]
    deployment: dict[str, Json] | None
    environment: EnvironmentEvidence
    kind: Literal["deployment", "simulation"] = "deployment"
