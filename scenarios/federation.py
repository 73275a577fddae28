"""Making a whole federation on one machine: authority, identities, policies, data files.

The demo, simulations and tests use it. On real machines each party makes its own part with
``fedseal pki`` and writes its own policy.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from numpy.typing import NDArray

from client.owner import IDENTITY, POLICY
from crypto.certificates import fingerprint
from crypto.identity import REQUEST, install, load_operator, make_request
from crypto.pki import init_pki, sign_request
from crypto.requests import Party
from crypto.trust import parse
from crypto.vault import write_private
from protocol.errors import CertificateRefused, HomeExists
from server.home import MEMBERS, OPERATOR
from tasks.partition import write_examples

if TYPE_CHECKING:
    from server.listeners.control import ControlLink

Split = tuple[NDArray[Any], NDArray[Any]]
DATA = "data.npz"
LOCAL_HOSTS = ("localhost", "127.0.0.1")
"""Names of a coordinator's certificate that serves one machine."""


@dataclass(frozen=True)
class OwnerHome:
    """One owner of a made-up federation."""

    name: str
    folder: Path
    passphrase: bytes
    fingerprint: str


@dataclass(frozen=True)
class Federation:
    """A made-up federation.

    Attributes:
        folder: Holds ``pki/``, ``server/`` and ``owners/``.
        server_home: The coordinator's home.
        server_passphrase: Opens the coordinator's TLS key.
        operator_passphrase: Opens the key of the operator, whose identity lies in the coordinator's home.
        owners: The owners' homes.
    """

    folder: Path
    server_home: Path
    server_passphrase: bytes
    operator_passphrase: bytes
    owners: tuple[OwnerHome, ...]

    def link(self) -> ControlLink:
        """Return the operator's connection to the coordinator."""
        from server.listeners.control import ControlLink

        identity = self.server_home / OPERATOR
        return ControlLink(self.server_home, identity, load_operator(identity, self.operator_passphrase))


@dataclass(frozen=True)
class PolicySettings:
    """What every made-up owner allows.

    Attributes:
        epsilon_total: Cap over all runs.
        epsilon_per_run: Cap of one run.
        delta_total: Cap over all runs.
        min_cohort: Fewest owners of a sum.
        min_known_peers: Pinned owners that must be in every list.
        allow_ckks: Whether plans with the compatibility scheme are accepted.
        allow_seal_frames: Whether plans with frames in SEAL's own form are accepted.
        epsilon_worst: Cap if all others collude; None refuses distributed noise.
        units: Allowed units of privacy.
    """

    epsilon_total: float = 16.0
    epsilon_per_run: float = 8.0
    delta_total: float = 1e-4
    min_cohort: int = 3
    min_known_peers: int = 2
    allow_ckks: bool = False
    allow_seal_frames: bool = False
    epsilon_worst: float | None = None
    units: tuple[str, ...] = ("example",)


def make_federation(
    folder: Path, splits: Sequence[Split], settings: PolicySettings | None = None
) -> Federation:
    """Create an authority, a coordinator and one owner per split, each in a folder of its own.

    The authority's passphrase is forgotten on return, so that nobody can be added later.

    Args:
        folder: Empty or missing.
        splits: Raw (x, y) of each owner.
        settings: What every owner's policy allows.
    """
    pki, authority_passphrase = folder / "pki", _passphrase()
    init_pki(pki, "fedseal demo authority", authority_passphrase, days=30)
    server_home, server_passphrase, operator_passphrase = folder / "server", _passphrase(), _passphrase()
    enrol = partial(_enrol, pki, authority_passphrase)
    enrol(server_home / IDENTITY, "coordinator", "coordinator", server_passphrase, LOCAL_HOSTS)
    enrol(server_home / OPERATOR, "operator", "operator", operator_passphrase)
    owners = []
    for index in range(len(splits)):
        name, passphrase = f"owner-{index + 1}", _passphrase()
        home = folder / "owners" / name
        owners.append(OwnerHome(name, home, passphrase, enrol(home / IDENTITY, "owner", name, passphrase)))
    make_coordinator_home(server_home, pki / MEMBERS)
    for owner, split in zip(owners, splits, strict=True):
        data = folder / f"{owner.name}.npz"
        write_examples(data, *split)
        pinned = {peer.name: peer.fingerprint for peer in owners if peer is not owner}
        make_owner_home(owner.folder, data, f"{owner.name}-records", pinned, settings)
        data.unlink()
    return Federation(folder, server_home, server_passphrase, operator_passphrase, tuple(owners))


def _enrol(
    pki: Path,
    authority_passphrase: bytes,
    identity: Path,
    party: Party,
    name: str,
    passphrase: bytes,
    hosts: Sequence[str] = (),
) -> str:
    """Do what a holder and the authority do when a party is admitted; returns its fingerprint."""
    make_request(identity, party, name, passphrase, hosts)
    request, answer = sign_request(pki, authority_passphrase, (identity / REQUEST).read_bytes(), days=30)
    install(identity, answer.read_bytes())
    return request.fingerprint


def make_coordinator_home(home: Path, members: Path) -> None:
    """Lay out a coordinator's home around its identity.

    Args:
        home: Folder in which ``fedseal pki request`` and ``fedseal pki install`` made the identity.
        members: Certificates of all members.

    Raises:
        HomeExists: The home was laid out before.
        CertificateRefused: It has no identity yet.
    """
    _require_identity(home, "server.crt", MEMBERS)
    shutil.copytree(members, home / MEMBERS)


def make_owner_home(
    home: Path,
    data: Path,
    dataset: str,
    pinned: Mapping[str, str],
    settings: PolicySettings | None = None,
) -> None:
    """Lay out an owner's home around its identity, with a copy of its data and a policy to edit.

    Args:
        home: Folder in which ``fedseal pki request`` and ``fedseal pki install`` made the identity.
        data: The owner's examples.
        dataset: Name under which the privacy budget is kept; never reused for other people.
        pinned: Names and fingerprints of the other owners that this owner knows.
        settings: Budget and conditions.

    Raises:
        HomeExists: The home was laid out before.
        CertificateRefused: It has no identity yet.
    """
    _require_identity(home, "signing.crt", POLICY)
    shutil.copyfile(data, home / DATA)
    (home / DATA).chmod(0o600)
    fields = policy_fields(dataset, pinned, settings or PolicySettings())
    write_private(home / POLICY, tomli_w.dumps(fields).encode())


def policy_fields(dataset: str, pinned: Mapping[str, str], settings: PolicySettings) -> dict[str, Any]:
    """Return the fields of a policy.toml."""
    distributed = settings.epsilon_worst is not None
    worst = {"epsilon_worst": settings.epsilon_worst} if distributed else {}
    return {
        "dataset": dataset,
        "data_file": DATA,
        "budget": {
            "epsilon_total": settings.epsilon_total,
            "epsilon_per_run": settings.epsilon_per_run,
            "delta_total": settings.delta_total,
            **worst,
        },
        "plans": {
            "tasks": ["image-classification"],
            "models": ["linear", "mlp", "cnn", "scattering"],
            "min_cohort": settings.min_cohort,
            "allow_ckks": settings.allow_ckks,
            "allow_seal_frames": settings.allow_seal_frames,
            "units": list(settings.units),
            "allow_distributed_noise": distributed,
        },
        "peers": {"pinned": dict(pinned), "min_known_peers": settings.min_known_peers},
    }


def pins_of(folder: Path, own: Path) -> dict[str, str]:
    """Return names and fingerprints of the signing certificates in a folder, less the owner's own.

    Args:
        folder: Holds ``<name>.signing.crt`` files that the owners themselves handed over.
        own: The owner's identity folder.
    """
    mine = parse(own / "signing.crt", bytes)
    pins = {}
    for file in sorted(folder.glob("*.signing.crt")):
        if parse(file, bytes) == mine:
            continue
        key = parse(file, x509.load_pem_x509_certificate).public_key()
        if isinstance(key, Ed25519PublicKey):
            pins[file.name.removesuffix(".signing.crt")] = fingerprint(key)
    return pins


def _require_identity(home: Path, certificate: str, laid_out: str) -> None:
    if (home / laid_out).exists():
        raise HomeExists
    if not (home / IDENTITY / certificate).is_file():
        raise CertificateRefused(f"there is no {certificate} in {IDENTITY}/ of this home; install it first")
    home.chmod(0o700)


def _passphrase() -> bytes:
    return secrets.token_urlsafe(32).encode()
