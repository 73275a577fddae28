"""Making a whole federation on one machine: authority, identities, policies, data files.

The demo, simulations and tests use it. On real machines each party makes its own part with
``fedseal pki`` and writes its own policy.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from numpy.typing import NDArray

from client.owner import IDENTITY, POLICY
from crypto.certificates import fingerprint
from crypto.pki import init_pki, issue_owner, issue_server
from crypto.vault import write_private
from protocol.errors import HomeExists
from server.submit import MEMBERS
from tasks.partition import write_examples

Split = tuple[NDArray[Any], NDArray[Any]]
DATA = "data.npz"


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
        owners: The owners' homes.
    """

    folder: Path
    server_home: Path
    server_passphrase: bytes
    owners: tuple[OwnerHome, ...]


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
    server_passphrase = _passphrase()
    issue_server(pki, authority_passphrase, server_passphrase, days=30)
    names = [f"owner-{index + 1}" for index in range(len(splits))]
    issued = {}
    for name in names:
        passphrase = _passphrase()
        credentials = issue_owner(pki, authority_passphrase, name, passphrase, days=30)
        issued[name] = (passphrase, fingerprint(credentials.signing_key.public_key()))
    pins = {name: print_ for name, (_, print_) in issued.items()}
    server_home = folder / "server"
    make_coordinator_home(server_home, pki / "server", pki / "members")
    owners = []
    for name, split in zip(names, splits, strict=True):
        passphrase, print_ = issued[name]
        home = folder / "owners" / name
        data = folder / f"{name}.npz"
        write_examples(data, *split)
        pinned = {peer: pin for peer, pin in pins.items() if peer != name}
        make_owner_home(home, pki / "owners" / name, data, f"{name}-records", pinned, settings)
        data.unlink()
        owners.append(OwnerHome(name, home, passphrase, print_))
    return Federation(folder, server_home, server_passphrase, tuple(owners))


def make_coordinator_home(home: Path, identity: Path, members: Path) -> None:
    """Lay out a coordinator's home.

    Args:
        home: New folder.
        identity: As issued by the authority: certificate, sealed key, authority, revocation list.
        members: Certificates of all members.

    Raises:
        HomeExists: The home is there already.
    """
    _new_home(home)
    shutil.copytree(identity, home / IDENTITY)
    shutil.copytree(members, home / MEMBERS)


def make_owner_home(
    home: Path,
    identity: Path,
    data: Path,
    dataset: str,
    pinned: Mapping[str, str],
    settings: PolicySettings | None = None,
) -> None:
    """Lay out an owner's home, with a copy of its data and a policy to edit.

    Args:
        home: New folder.
        identity: As issued by the authority.
        data: The owner's examples.
        dataset: Name under which the privacy budget is kept; never reused for other people.
        pinned: Names and fingerprints of the other owners that this owner knows.
        settings: Budget and conditions.

    Raises:
        HomeExists: The home is there already.
    """
    _new_home(home)
    shutil.copytree(identity, home / IDENTITY)
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
    mine = (own / "signing.crt").read_bytes()
    pins = {}
    for file in sorted(folder.glob("*.signing.crt")):
        if file.read_bytes() == mine:
            continue
        key = x509.load_pem_x509_certificate(file.read_bytes()).public_key()
        if isinstance(key, Ed25519PublicKey):
            pins[file.name.removesuffix(".signing.crt")] = fingerprint(key)
    return pins


def _new_home(home: Path) -> None:
    if home.exists():
        raise HomeExists
    home.mkdir(mode=0o700, parents=True)


def _passphrase() -> bytes:
    return secrets.token_urlsafe(32).encode()
