"""An owner: its identity, its policy, its ledger, its data, and its state, as one object.

Home folder of an owner::

    identity/     certificates and sealed private keys, as issued
    policy.toml   what this owner allows
    ledger/       the privacy ledger
    state.db      protocol state, sealed
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from client.holdout import Holdout
from client.ledger import Adoption, Ledger
from client.policy import Policy, admit
from client.sources import WatchedFile
from client.store import STATE_FILE, StateStore
from crypto.certificates import OwnerCredentials, common_name, fingerprint
from crypto.identity import load_owner
from crypto.sealing import RunningSum
from crypto.trust import Trust, load_trust
from crypto.vault import StorageBox, storage_key
from protocol.errors import FedsealError, FileDamaged, PolicyInvalid
from protocol.messages import Purpose
from protocol.plan import Plan
from protocol.storage import read_written, translated
from tasks.arrays import read_arrays
from tasks.registry import Task, task_for
from tasks.rows import fitting_rows

if TYPE_CHECKING:
    from tasks.images import Examples, RowFilter
    from tasks.rows import RowCounts

_LOG = logging.getLogger("fedseal.client")

IDENTITY, POLICY, LEDGER, STATE = "identity", "policy.toml", "ledger", "state.db"
SALT = f"{IDENTITY}/storage.salt"


@dataclass
class PendingUpdate:
    """What an owner contributes to an attempt, between `train.fit` and `train.seal`; in memory only.

    Attributes:
        attempt: The attempt that paid for it.
        purpose: What it is: an update, or noised counts.
        finished_rounds: Rounds that the model has behind it.
        model_hash: The model it starts from.
        update: float64 (n,).
    """

    attempt: int
    purpose: Purpose
    finished_rounds: int
    model_hash: str
    update: NDArray[np.float64]


@dataclass
class SealingUpdate:
    """An update between the first and the last part of `train.seal`; in memory only.

    Attributes:
        attempt: The attempt that paid for it.
        list_hash: The list that it is sealed for.
        parts: The frame positions of each part.
        frames: Gives the next frame; the values are erased behind the last one.
        digests: SHA-256 of the frames so far.
        done: Parts that were sealed, and whose answers are stored.
    """

    attempt: int
    list_hash: str
    parts: Sequence[range]
    frames: Generator[bytes, None, None]
    digests: list[str] = field(default_factory=list)
    done: int = 0


@dataclass
class OpeningSum:
    """A sum between the first and the last part of `query.open`; in memory only.

    Attributes:
        attempt: The attempt that it is the sum of.
        headers_hash: The headers whose frames are added.
        digests: For each owner of the list, the signed SHA-256 of each of its frames.
        total: What was added so far.
        missing: Parts that are still to come.
    """

    attempt: int
    headers_hash: str
    digests: Sequence[Sequence[bytes]]
    total: RunningSum
    missing: set[int]


@dataclass
class Owner:
    """Everything that an owner's handlers need.

    Attributes:
        home: The home folder.
        name: Name in the owner's certificates.
        credentials: Transport and signing keys with their certificates.
        trust: The authority that says who is a member, and its newest revocation list.
        policy: What this owner allows, as `refresh` read it last.
        ledger: What this owner has spent.
        store: Protocol state.
        data: The file with the owner's examples.
        pending: The updates in memory, by the run that paid for them.
        sealing: The updates that are being sealed part by part, by run.
        opening: The sums that are being added part by part, by run.
        written: The policy as it stood in its file.
    """

    home: Path
    name: str
    credentials: OwnerCredentials
    trust: Trust
    policy: Policy
    ledger: Ledger
    store: StateStore
    data: WatchedFile
    written: Policy
    pending: dict[str, PendingUpdate] = field(default_factory=dict)
    sealing: dict[str, SealingUpdate] = field(default_factory=dict)
    opening: dict[str, OpeningSum] = field(default_factory=dict)
    _examples: dict[str, Examples] = field(default_factory=dict)
    _described: bytes = b""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the signing public key."""
        return fingerprint(self.credentials.signing_key.public_key())

    @property
    def data_file(self) -> Path:
        """Path of the data, as the policy named it last."""
        return self.data.path

    def task(self, plan: Plan) -> Task:
        """Return the task that a plan names."""
        return task_for(plan)

    def refresh(self) -> None:
        """Read policy.toml again, and forget every row of a data file that changed since it was read.

        What changed is said in this node's log, its content never. It costs a look at two files where
        nothing changed.

        Raises:
            PolicyInvalid: The policy is missing or wrong; nothing is allowed then.
            DatasetRenamed: It names another dataset than the ledger.
            DataUnavailable: The data was withdrawn: its file is not there or cannot be opened.
            DataInvalid: The data file cannot be read.
        """
        policy = read_policy(self.home)
        if policy != self.written:
            self.ledger.follow(policy)
            self.policy = self.written = policy
            _LOG.warning("policy.toml changed; what it says now holds from here on")
        path = self.home / policy.data_file
        if path != self.data.path:
            self._drop_rows("policy.toml names another data file; what was read of the old one is dropped")
            self.data = WatchedFile(path)
        try:
            has_changed = self.data.look()
        except FedsealError:
            self._drop_rows("the data file is gone or cannot be read; what was read of it is dropped")
            raise
        if has_changed:
            self._drop_rows("the data file changed; what was read of it is dropped")

    def require_allowed(self, plan: Plan) -> None:
        """Check a plan against the policy as it is now.

        Raises:
            PolicyRefused: It is outside the policy.
            FedsealError: As `refresh`.
        """
        self.refresh()
        admit(self.policy, plan)

    def require_data(self, plan: Plan) -> None:
        """Check the data file's form, unless its rows are in memory; no value is read.

        Raises:
            DataUnavailable, DataInvalid: The file cannot be used for this plan.
        """
        if not self.holds_rows():
            self.task(plan).require_form(self.data.path)

    def holds_rows(self) -> bool:
        """Tell whether rows are in memory."""
        return bool(self._examples)

    def describe_data(self) -> None:
        """Say in this node's log how many rows the data file has, once for each content of it.

        Without a plan, only what fits no plan is counted as left out. What is wrong with policy or data is
        said and not raised: a node runs on, and refuses each plan until it is mended.
        """
        try:
            self.refresh()
            if self._described == self.data.digest:
                return
            counts = fitting_rows(*read_arrays(self.data.path), None).counts
        except FedsealError as error:
            _LOG.warning("no plan can be joined now: %s", error.explain())
            return
        self._described = self.data.digest
        _LOG.info("data file, for this owner alone: %s", counts.words())

    def _drop_rows(self, reason: str) -> None:
        if self.holds_rows() or self._described:
            _LOG.warning(reason)
        self._examples.clear()
        self._described = b""

    def examples(self, plan: Plan) -> Examples:
        """Return this owner's examples, read once per task description and model and kept in memory.

        Preprocessing is done then, once; a model with costly features pays for them in its first round.
        Where the plan has evaluation, they are the records that are not held out.
        """
        holdout = self._holdout(plan)
        return self._read(plan, "train", None if holdout is None else holdout.trained_on)

    def held_out(self, plan: Plan) -> Examples:
        """Return the records that evaluation counts and training never sees; none without evaluation."""
        holdout = self._holdout(plan)
        return self._read(plan, "evaluate", _none if holdout is None else holdout.held_out)

    def _holdout(self, plan: Plan) -> Holdout | None:
        if plan.evaluation is None:
            return None
        return Holdout(self.store.holdout_key(self.policy.dataset), plan.evaluation.holdout_share)

    def _read(self, plan: Plan, purpose: Purpose, among: RowFilter | None) -> Examples:
        share = plan.evaluation and plan.evaluation.holdout_share
        key = f"{purpose} {share} {plan.model.name} {plan.task.model_dump_json()}"
        if key not in self._examples:
            task = self.task(plan)
            rows = task.fitting(self.data.path)
            if purpose == "train":
                _tell(plan, rows.counts)
            self._examples[key] = task.prepare(rows, among)
        return self._examples[key]

    def close(self) -> None:
        """Release files. Pending updates vanish with the process."""
        self.pending.clear()
        self.sealing.clear()
        self.opening.clear()
        self.ledger.close()
        self.store.close()


def _tell(plan: Plan, counts: RowCounts) -> None:
    """Say in this node's log how many rows a plan uses, and warn where they are too few for it."""
    _LOG.info("data for plan %s, for this owner alone: %s", plan.run.name, counts.words())
    if counts.kept < plan.privacy.expected_batch_size:
        _LOG.warning(
            "%d usable rows are fewer than the plan's expected batch of %g: this owner's rounds would cost "
            "budget for almost nothing but noise; see docs/tasks.md",
            counts.kept,
            plan.privacy.expected_batch_size,
        )


def _none(_x: NDArray[Any], y: NDArray[Any]) -> NDArray[np.bool_]:
    return np.zeros(len(y), dtype=np.bool_)


def open_owner(home: Path, passphrase: bytes) -> Owner:
    """Open an owner's home folder.

    Args:
        home: The folder described above.
        passphrase: Opens the sealed private keys and the state database.

    Raises:
        SecretUnavailable: Wrong passphrase, or a secret file that others can read.
        PolicyInvalid: The policy file is missing or wrong.
        LedgerCorrupt, LedgerRollback: The ledger cannot be trusted.
    """
    identity = home / IDENTITY
    credentials, trust = load_owner(identity, passphrase), load_trust(identity)
    policy = read_policy(home)
    name = common_name(credentials.signing_certificate.subject)
    return Owner(
        home=home,
        name=name,
        credentials=credentials,
        trust=trust,
        policy=policy,
        ledger=open_ledger(home, policy),
        store=open_store(home, passphrase),
        data=WatchedFile(home / policy.data_file),
        written=policy,
    )


def read_policy(home: Path) -> Policy:
    """Read an owner's policy.

    Raises:
        PolicyInvalid: The file is missing or wrong.
        AccessDenied, DiskFailed, ResourcesShort: It cannot be read.
    """
    return Policy.from_toml(read_written(home / POLICY, PolicyInvalid))


def open_ledger(home: Path, policy: Policy, adoption: Adoption | None = None) -> Ledger:
    """Open the ledger of a home; see `Ledger.open`."""
    copy = home / IDENTITY / "ledger.head"
    return Ledger.open(home / LEDGER / "ledger.db", policy, copy, adoption=adoption)


def open_store(home: Path, passphrase: bytes) -> StateStore:
    """Open the protocol state of a home, which the passphrase unseals.

    Raises:
        FileDamaged: The state has no salt any more; a new one would not open it.
    """
    with translated(STATE_FILE):
        if (home / STATE).exists() and (home / STATE).stat().st_size and not (home / SALT).exists():
            raise FileDamaged(f"{SALT} is missing, without which state.db does not open")
    return StateStore(home / STATE, StorageBox(storage_key(home / SALT, passphrase)))
