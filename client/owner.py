"""An owner: its identity, its policy, its ledger, its data, and its state, as one object.

Home folder of an owner::

    identity/     certificates and sealed private keys, as issued
    policy.toml   what this owner allows
    ledger/       the privacy ledger
    state.db      protocol state, sealed
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from cryptography import x509
from numpy.typing import NDArray

from client.ledger import Ledger
from client.policy import Policy
from client.state import StateStore
from crypto.certificates import OwnerCredentials, common_name, fingerprint
from crypto.pki import load_owner, load_trust
from crypto.vault import StorageBox, derive_storage_key, write_private
from protocol.errors import PolicyInvalid
from protocol.plan import Plan
from tasks.images import Examples
from tasks.registry import Task, task_for

IDENTITY, POLICY, LEDGER, STATE = "identity", "policy.toml", "ledger", "state.db"


@dataclass
class PendingUpdate:
    """An update between `train.fit` and `train.seal`; it lives in memory only.

    Attributes:
        attempt: The attempt that paid for it.
        model_hash: The model it starts from.
        update: float64 (n,).
    """

    attempt: int
    model_hash: str
    update: NDArray[np.float64]


@dataclass
class Owner:
    """Everything that an owner's handlers need.

    Attributes:
        name: Name in the owner's certificates.
        credentials: Transport and signing keys with their certificates.
        authority: Certificate of the authority that says who is a member.
        revocations: The authority's revocation list.
        policy: What this owner allows.
        ledger: What this owner has spent.
        store: Protocol state.
        data_file: The owner's examples.
        pending: The updates in memory, by the run that paid for them.
    """

    name: str
    credentials: OwnerCredentials
    authority: x509.Certificate
    revocations: x509.CertificateRevocationList
    policy: Policy
    ledger: Ledger
    store: StateStore
    data_file: Path
    pending: dict[str, PendingUpdate] = field(default_factory=dict)
    _examples: dict[str, Examples] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the signing public key."""
        return fingerprint(self.credentials.signing_key.public_key())

    def task(self, plan: Plan) -> Task:
        """Return the task that a plan names."""
        return task_for(plan)

    def examples(self, plan: Plan) -> Examples:
        """Return this owner's examples, read once per task description."""
        key = plan.task.model_dump_json()
        if key not in self._examples:
            self._examples[key] = self.task(plan).read_private(self.data_file)
        return self._examples[key]

    def close(self) -> None:
        """Release files. Pending updates vanish with the process."""
        self.pending.clear()
        self.ledger.close()
        self.store.close()


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
    try:
        policy = Policy.from_toml((home / POLICY).read_text(encoding="utf-8"))
    except OSError:
        raise PolicyInvalid("policy.toml cannot be read") from None
    name = common_name(credentials.signing_certificate.subject)
    (home / LEDGER).mkdir(mode=0o700, exist_ok=True)
    return Owner(
        name=name,
        credentials=credentials,
        authority=trust.authority,
        revocations=trust.revocations,
        policy=policy,
        ledger=Ledger.open(home / LEDGER / "ledger.db", policy, identity / "ledger.head"),
        store=StateStore(home / STATE, StorageBox(_storage_key(home, passphrase))),
        data_file=home / policy.data_file,
    )


def _storage_key(home: Path, passphrase: bytes) -> bytes:
    salt_file = home / IDENTITY / "storage.salt"
    if not salt_file.exists():
        write_private(salt_file, secrets.token_bytes(16))
    return derive_storage_key(passphrase, salt_file.read_bytes())
