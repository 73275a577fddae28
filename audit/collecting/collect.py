"""Collecting a run's evidence from the coordinator's run store and home folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from cryptography import x509

from audit.collecting.custody import coordinator_custody
from audit.evidence.inventory import environment
from audit.evidence.run import (
    CertificateEvidence,
    ClaimEvidence,
    EncryptionEvidence,
    OwnerEvidence,
    PhaseSeconds,
    Refusal,
    RoundEvidence,
    RunEvidence,
    Socket,
    TlsEvidence,
    TranscriptEntry,
)
from crypto.agreement import signed_hash
from crypto.certificates import describe
from crypto.trust import parse
from protocol.claims import adjacency, planned_worst
from protocol.encoding import digest_bytes
from protocol.errors import ReportInvalid
from protocol.evaluation import promised_loss
from protocol.messages import LedgerHead, Signed
from protocol.plan import Plan
from server.home import IDENTITY, MEMBERS
from server.store import RunStore


def collect(
    store: RunStore,
    home: Path,
    deployment: dict[str, Any] | None,
    kind: Literal["deployment", "simulation"] = "deployment",
) -> RunEvidence:
    """Read everything that the report needs; nothing is added that was not recorded.

    Args:
        store: The run.
        home: The coordinator's home folder.
        deployment: What building the package returned, if it was built.
        kind: Whether owners and records were real; only a laboratory says `simulation`.

    Raises:
        ReportInvalid: The run has not ended.
    """
    plan, state = store.plan(), store.get("state")
    if state not in ("finished", "failed", "paused"):
        raise ReportInvalid("the run has not ended")
    attempts = store.attempts()
    finished = store.finished_rounds()
    # a run that ended before its first round began has no other model than the plan's
    planned = None if finished or store.has_checkpoint(0) else plan.model.initial_sha256
    initial = planned or store.read_checkpoint(0).sha256()
    return RunEvidence(
        kind=kind,
        run=store.get("run", digest_bytes(store.folder.name.encode())),
        name=plan.run.name,
        plan=plan.fields(),
        plan_hash=store.get("plan_hash", plan.sha256()),
        session=store.get("session"),
        state=state,
        rounds_finished=finished,
        attempts_used=len(attempts),
        started_at=store.get("started_at"),
        finished_at=store.get("finished_at"),
        model_hash=store.read_checkpoint(finished).sha256() if finished else initial,
        initial_model_hash=initial,
        encryption=EncryptionEvidence.of_plan(plan, store.get("frame_bytes")),
        rounds=[_round(facts) for facts in attempts],
        owners=[
            _owner(fingerprint, facts, plan, presence(store, fingerprint))
            for fingerprint, facts in store.owners().items()
        ],
        transcript=[TranscriptEntry.from_fields(row) for row in store.transcript()],
        refusals=[Refusal.from_fields(row) for row in store.refusals()],
        keys=coordinator_custody(home),
        certificates=_certificates(home),
        tls=_tls(store),
        server_has_secret_key=bool(store.get("loaded_secret_modules", ["unknown"])),
        listening=[Socket.from_fields(row) for row in store.get("listening", [])],
        deployment=deployment,
        environment=environment(),
    )


def _round(facts: dict[str, Any]) -> RoundEvidence:
    openings = [Signed.from_fields(fields) for fields in facts["openings"]]
    headers = [Signed.from_fields(fields) for fields in facts["headers"]]
    seconds = facts["seconds"]
    return RoundEvidence(
        round=facts["round"],
        attempt=facts["attempt"],
        purpose=facts["purpose"],
        contributors=facts["contributors"],
        headers_hash=signed_hash(headers) if headers else None,
        sums_hash=facts["sums_hash"],
        openings=openings,
        accuracy=facts["accuracy"],
        sums=facts["sums"],
        seconds=PhaseSeconds(**{part: seconds.get(part, 0.0) for part in ("fit", "seal", "open")}),
        upload_bytes=facts["upload_bytes"],
        download_bytes=facts["download_bytes"],
        void=facts["void"],
        reason=facts["reason"],
    )


def presence(store: RunStore, fingerprint: str) -> tuple[str, str]:
    """Return when an owner came into the run and when it left it, as the run's events tell.

    It came with the first roster that it was in. It left, if it is not in the last one, with the last round
    that it contributed to.
    """
    start, end = str(store.get("started_at")), str(store.get("finished_at"))
    contributed = {one["attempt"] for one in store.attempts() if fingerprint in one["contributors"]}
    came, left, inside = None, None, True
    for _identifier, moment, kind, facts in store.events():
        if kind == "session":
            inside = fingerprint in facts["members"]
            came = came or (moment if inside else None)
        elif kind in ("round", "evaluation") and facts["attempt"] in contributed:
            left = moment
    came = came or start
    return came, end if inside else left or came


def _owner(fingerprint: str, facts: dict[str, Any], plan: Plan, present: tuple[str, str]) -> OwnerEvidence:
    statement, (epsilon, delta) = facts.get("statement"), promised_loss(plan)
    return OwnerEvidence.from_fields(
        {
            "name": facts["name"],
            "fingerprint": fingerprint,
            "signing_certificate": facts["certificate"],
            "claimed": ClaimEvidence(
                unit=plan.privacy.unit,
                adjacency=adjacency(plan),
                epsilon=epsilon,
                epsilon_worst=planned_worst(plan),
                delta=delta,
            ),
            "statement": None if statement is None else Signed.from_fields(statement),
            "ledger_first": LedgerHead.from_fields(facts["ledger_first"]),
            "ledger_last": LedgerHead.from_fields(facts["ledger_last"]),
            "sealed_attempts": facts["sealed"],
            "sealed_evaluations": facts["sealed_evaluations"],
            "present_from": present[0],
            "present_until": present[1],
        }
    )


def _certificates(home: Path) -> list[CertificateEvidence]:
    files = [home / IDENTITY / "ca.crt", home / IDENTITY / "server.crt"]
    files += sorted((home / MEMBERS).glob("*.crt"))
    certificates = [parse(file, x509.load_pem_x509_certificate) for file in files]
    return [CertificateEvidence.from_fields(describe(certificate)) for certificate in certificates]


def _tls(store: RunStore) -> TlsEvidence:
    facts = store.get("tls")
    if facts is None:
        return TlsEvidence(version="none", client_certificate_required=False, cipher=None)
    return TlsEvidence(
        version=facts["version"] if facts["older_versions_refused"] else "TLSv1.2",
        client_certificate_required=facts["client_certificate_required"],
        cipher=facts["cipher"],
    )
