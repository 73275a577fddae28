"""The deployable package: a folder whose every byte is covered by one signature.

``<name>.fedseal/`` holds the ONNX model, its input schema, its privacy statement, its compression record,
a model card made from these three, a CycloneDX list of library versions, the signer's public key, a
manifest with size and SHA-256 of each of them, and an Ed25519 signature over the manifest. No file is a
pickle. A reader trusts a key or its fingerprint, never the key that lies in the folder.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import stat
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import onnxruntime as ort
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from pydantic import Field

from crypto.certificates import fingerprint
from crypto.signing import sign_bytes, verify_bytes
from deploy.export import require_self_contained
from deploy.measure import AGREEMENT, Bytes, CompressionRecord, open_session
from deploy.statement import PrivacyStatement
from protocol.claims import UNITS
from protocol.encoding import Digest, decode, digest_bytes, encode
from protocol.errors import (
    CompressionRefused,
    EncodingInvalid,
    PackageInvalid,
    PackageNotWritten,
    SignatureInvalid,
)
from protocol.messages import Message
from protocol.sections import Name

SUFFIX = ".fedseal"
SIGNATURE_KIND = "package"
MODEL, SCHEMA, PRIVACY, COMPRESSION = "model.onnx", "schema.json", "privacy.json", "compression.json"
CARD, SBOM, SIGNER = "MODEL_CARD.md", "sbom.json", "signer.pub"
MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"
COVERED = frozenset({MODEL, SCHEMA, PRIVACY, COMPRESSION, CARD, SBOM, SIGNER})
"""Files that the manifest lists; with manifest and signature they are the whole package."""

SMALL_FILE_BYTES = 64 * 1024
SIGNATURE_BYTES = 64
LISTED_LIBRARIES = (
    *("flwr", "torch", "opacus", "tenseal", "cryptography", "dp-accounting", "numpy", "pydantic"),
    *("onnx", "onnxruntime", "onnxscript", "onnx-ir", "torch-pruning", "safetensors"),
)


class FileEntry(Message):
    """Size and SHA-256 of one file of a package."""

    size_bytes: Bytes
    sha256: Digest

    @classmethod
    def of(cls, data: bytes) -> FileEntry:
        """Return the entry of a file's bytes."""
        return cls(size_bytes=len(data), sha256=digest_bytes(data))


class Manifest(Message):
    """The signed list of a package's files."""

    format: Literal["fedseal/package"]
    version: Literal[1]
    name: Name
    created: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
    files: dict[str, FileEntry]


@dataclass(frozen=True)
class PackageParts:
    """What a package is made from; card, SBOM and manifest follow from it."""

    name: str
    model: bytes
    schema: dict[str, Any]
    privacy: PrivacyStatement
    compression: CompressionRecord


@dataclass(frozen=True)
class VerifiedPackage:
    """Content of a package whose signature, file set, sizes and digests were all checked."""

    name: str
    created: str
    signer: str
    model: bytes
    schema: dict[str, Any]
    privacy: PrivacyStatement
    compression: CompressionRecord


def write_package(folder: Path, parts: PackageParts, signing_key: Ed25519PrivateKey) -> None:
    """Write and sign a package; readers see all of it or nothing. For the holder of `signing_key` only.

    Args:
        folder: The package folder to create, ending in ``.fedseal``.
        parts: Content of the package.
        signing_key: Key of the signer.

    Raises:
        PackageNotWritten: Something stands at `folder` already, or its name does not end in ``.fedseal``.
        CompressionRefused: The model is not ONNX or needs other files.
        EncodingInvalid: The schema is not JSON.
    """
    refuse_existing(folder)
    require_self_contained(parts.model)
    files = _content(parts, signing_key.public_key())
    manifest = Manifest(
        format="fedseal/package",
        version=1,
        name=parts.name,
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        files={name: FileEntry.of(data) for name, data in files.items()},
    ).to_bytes()
    files |= {MANIFEST: manifest, SIGNATURE: sign_bytes(signing_key, SIGNATURE_KIND, manifest)}
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=folder.parent))
    try:
        for name, data in files.items():
            _write_durably(draft / name, data)
        draft.chmod(0o755)
        refuse_existing(folder)
        draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def refuse_existing(folder: Path) -> None:
    """Raise PackageNotWritten where something stands, even a dangling link, or for another suffix."""
    if folder.suffix != SUFFIX:
        raise PackageNotWritten(f"the folder's name must end in {SUFFIX}")
    if os.path.lexists(folder):
        raise PackageNotWritten(f"{folder.name} exists already in the output folder")


def verify_package(folder: Path, trusted: Ed25519PublicKey | str) -> VerifiedPackage:
    """Return the content of a package, checked from the signature down.

    The signature over the manifest is checked before anything but a key of the trusted fingerprint is
    parsed. Every file is read once, without following links: what is returned is what was checked.

    Args:
        folder: The package.
        trusted: The signer's public key or its fingerprint, from elsewhere than the package.

    Raises:
        PackageInvalid: Says what does not fit.
    """
    try:
        directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        raise PackageInvalid("the package folder cannot be opened") from None
    try:
        key = _trusted_key(directory, trusted)
        data = _read(directory, MANIFEST, SMALL_FILE_BYTES)
        verify_bytes(key, SIGNATURE_KIND, data, _read(directory, SIGNATURE, SIGNATURE_BYTES))
        manifest = Manifest.from_bytes(data)
        if set(manifest.files) != COVERED:
            raise PackageInvalid("the manifest does not list the files of a package")
        if set(os.listdir(directory)) != COVERED | {MANIFEST, SIGNATURE}:
            raise PackageInvalid("the folder has a file too many or too few")
        return _verified(manifest, _covered(directory, manifest), key)
    except SignatureInvalid:
        raise PackageInvalid("the manifest is not signed by the trusted key") from None
    except EncodingInvalid as error:
        raise PackageInvalid(f"a record of the package is malformed: {error.detail}") from None
    finally:
        os.close(directory)


def load_session(verified: VerifiedPackage) -> ort.InferenceSession:
    """Open the model from the verified bytes; PackageInvalid if it needs other files or cannot load."""
    try:
        require_self_contained(verified.model)
        return open_session(verified.model)
    except CompressionRefused as error:
        raise PackageInvalid(error.detail) from None


def _content(parts: PackageParts, public_key: Ed25519PublicKey) -> dict[str, bytes]:
    return {
        MODEL: parts.model,
        SCHEMA: encode(parts.schema),
        PRIVACY: parts.privacy.to_bytes(),
        COMPRESSION: parts.compression.to_bytes(),
        CARD: _card(parts).encode(),
        SBOM: encode(_library_versions()),
        SIGNER: public_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
    }


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _verified(manifest: Manifest, files: dict[str, bytes], key: Ed25519PublicKey) -> VerifiedPackage:
    if files[SIGNER] != key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo):
        raise PackageInvalid("the key in the folder is not the one that signed")
    schema = decode(files[SCHEMA])
    if not isinstance(schema, dict):
        raise PackageInvalid("the schema is not an object")
    return VerifiedPackage(
        name=manifest.name,
        created=manifest.created,
        signer=fingerprint(key),
        model=files[MODEL],
        schema=schema,
        privacy=PrivacyStatement.from_bytes(files[PRIVACY]),
        compression=CompressionRecord.from_bytes(files[COMPRESSION]),
    )


def _trusted_key(directory: int, trusted: Ed25519PublicKey | str) -> Ed25519PublicKey:
    if isinstance(trusted, Ed25519PublicKey):
        return trusted
    try:
        key = load_pem_public_key(_read(directory, SIGNER, SMALL_FILE_BYTES))
    except (ValueError, UnsupportedAlgorithm):
        raise PackageInvalid("the key in the folder cannot be read") from None
    if not isinstance(key, Ed25519PublicKey) or fingerprint(key) != trusted:
        raise PackageInvalid("the key in the folder does not have the trusted fingerprint")
    return key


def _covered(directory: int, manifest: Manifest) -> dict[str, bytes]:
    files = {name: _read(directory, name, entry.size_bytes) for name, entry in manifest.files.items()}
    for name, data in files.items():
        if FileEntry.of(data) != manifest.files[name]:
            raise PackageInvalid(f"{name} is not the file that was signed")
    return files


def _read(directory: int, name: str, limit_bytes: int) -> bytes:
    """Read one regular file without following a link, waiting on a pipe, or exceeding the limit."""
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise PackageInvalid(f"{name} is not a regular file")
            data = file.read(limit_bytes + 1)
    except OSError:
        raise PackageInvalid(f"{name} is missing, a link, or unreadable") from None
    if len(data) > limit_bytes:
        raise PackageInvalid(f"{name} is longer than it may be")
    return data


def _library_versions() -> dict[str, Any]:
    """Return a CycloneDX document with the installed versions of what trained and packed the model."""
    installed = {item.name.lower(): item.version for item in importlib.metadata.distributions()}
    components = [{"type": "platform", "name": "python", "version": platform.python_version()}]
    components += [
        {"type": "library", "name": name, "version": installed[name]}
        for name in LISTED_LIBRARIES
        if name in installed
    ]
    return {"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1, "components": components}


def _measured(record: CompressionRecord) -> str:
    """Say what the figures of a card were measured on."""
    if record.measure == AGREEMENT:
        text = (
            f"No accuracy was measured on public data. Agreement is the share of {record.measured_inputs} "
            "synthetic inputs to which a model gives the class of the unpruned model."
        )
    else:
        text = f"Measured on {record.public_examples} public examples."
    if record.federated_accuracy is None:
        return text
    return (
        f"{text} Federated evaluation of the unpruned model: accuracy {record.federated_accuracy:.3f}, "
        f"standard error {record.federated_standard_error:.3f}."
    )


def _card(parts: PackageParts) -> str:
    """Write the model card from the records of the package; nothing in it is typed in by hand."""
    privacy, record = parts.privacy, parts.compression
    word = "agreement" if record.measure == AGREEMENT else "accuracy"
    steps = "\n".join(f"| {s.step} | {s.asked} | {s.reached} |" for s in record.steps)
    loss = (
        "none" if privacy.epsilon is None else f"epsilon {privacy.epsilon:.4g}, delta {privacy.delta:.3g}"
    )
    worst = "none" if privacy.epsilon_worst is None else f"epsilon {privacy.epsilon_worst:.4g}"
    return f"""# {parts.name}

## Privacy

{privacy.statement}

| | |
|---|---|
| guarantee | {loss} |
| if all other owners collude | {worst} |
| it rests on | {privacy.assumption} |
| unit, adjacency | {privacy.unit}: {UNITS[privacy.unit]}, {privacy.adjacency} |
| noise, accountant | {privacy.noise}, {privacy.accountant or "none"} |
| noise multiplier | {privacy.noise_multiplier or "none"} |
| clipping norm | {privacy.max_update_norm or privacy.max_grad_norm} |
| sample rate | {privacy.sample_rate} |
| rounds, local steps per round | {privacy.rounds}, {privacy.local_steps} |
| private data used after training | {privacy.private_data_after_training} |

## Quality and cost

{_measured(record)} Baseline: {record.baseline}.
A ratio is before divided by after.

| | before | after | |
|---|---|---|---|
| {word} | {record.accuracy_before:.4f} | {record.accuracy_after:.4f} | drop {record.accuracy_drop:+.4f} |
| size, bytes | {record.size_bytes_before} | {record.size_bytes_after} | ratio {record.size_ratio:.2f} |
| CPU time, batch of one | | | ratio {record.speed_ratio_b1:.2f} |

## What was done after training

{record.public_data_use}

| step | asked | reached |
|---|---|---|
{steps}

## Limits

The guarantee covers the named unit, not facts that hold for the population as a whole. The signature
shows any change to the model or to this card; it does not keep the model secret from who holds it.

Plan: `{record.plan_sha256}`
"""
