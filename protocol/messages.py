"""Messages of the protocol, in the order in which a run uses them.

Requests come from the coordinator and are never trusted. Replies carry a `Signed` body. A signature
covers ``fedseal/<kind>/1`` plus a zero byte plus the canonical bytes of the body (see
`crypto.signing`). An owner is named by its *fingerprint*, the SHA-256 of its signing public key.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from protocol.encoding import Blob, Digest, decode, encode
from protocol.errors import EncodingInvalid
from protocol.plan import first_problem

Fingerprint = Digest
Purpose = Literal["train"]
Count = Annotated[int, Field(ge=0, le=2**53)]


class Message(BaseModel):
    """Base of all messages: strict, immutable, canonical on the wire."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def to_bytes(self) -> bytes:
        """Return the canonical bytes."""
        return encode(self.model_dump(mode="json"))

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Parse canonical bytes of a peer.

        Raises:
            EncodingInvalid: Not canonical, or not a message of this type.
        """
        return cls.from_fields(decode(data))

    @classmethod
    def from_fields(cls, fields: Any) -> Self:
        """Validate an already decoded value; see `from_bytes`.

        Raises:
            EncodingInvalid: Not a message of this type, or not spelled as this type writes it.
        """
        try:
            message = cls.model_validate(fields)
        except ValidationError as error:
            raise EncodingInvalid(first_problem(error)) from None
        # Literal fields take what equals them, such as true for 1, and float fields take integers.
        if message.to_bytes() != encode(fields):
            raise EncodingInvalid("a field is not spelled as its type writes it")
        return message


class Body(Message):
    """A message that is signed; `KIND` is its domain tag."""

    KIND: ClassVar[str]


class Signed(Message):
    """A signed body as it travels."""

    kind: str
    body: dict[str, Any]
    signer: Fingerprint
    signature: Blob


class LedgerHead(Message):
    """Where an owner's privacy ledger stands; discloses how many records it has, not what is in them."""

    sequence: Count
    head: Digest


# --- joining -----------------------------------------------------------------------------------------


class JoinRequest(Message):
    """`query.join`: the plan, in full."""

    run: Digest
    plan: dict[str, Any]


class Join(Body):
    """An owner's consent to one plan for one run, with its one-time key and a commitment to a nonce."""

    KIND = "join"
    version: Literal[1]
    run: Digest
    plan_hash: Digest
    nonce_commitment: Digest
    hpke_key: Blob
    ledger: LedgerHead


class JoinReply(Message):
    """Answer to `JoinRequest`."""

    certificate: Blob
    join: Signed


class RosterRequest(Message):
    """`query.roster`: all joins, in ascending order of fingerprint."""

    run: Digest
    members: list[JoinReply]


class Wraps(Body):
    """What an owner wrapped for its peers, and its nonce; the dealer also commits to the encryption key."""

    KIND = "wraps"
    run: Digest
    plan_hash: Digest
    roster_hash: Digest
    nonce: Digest
    wraps_hash: Digest
    key_commitment: Digest | None


class RosterReply(Message):
    """Answer to `RosterRequest`: one HPKE ciphertext per other owner, by fingerprint."""

    wraps: Signed
    seeds: dict[Fingerprint, Blob]
    keys: dict[Fingerprint, Blob]


class KeysRequest(Message):
    """`query.keys`: all signed wraps in roster order, all wrap digests, and the wraps for this owner."""

    run: Digest
    wraps: list[Signed]
    wrap_digests: dict[Fingerprint, dict[Fingerprint, list[Digest]]]
    seeds: dict[Fingerprint, Blob]
    key: Blob | None


class Session(Body):
    """An owner's word that it holds this session's keys."""

    KIND = "session"
    session: Digest


class KeysReply(Message):
    """Answer to `KeysRequest`."""

    session: Signed


# --- rounds ------------------------------------------------------------------------------------------


class Opening(Body):
    """An owner's word on what one encrypted sum opened to, and by which public weight to divide it."""

    KIND = "opening"
    session: Digest
    attempt: Count
    purpose: Purpose
    list_hash: Digest
    headers_hash: Digest
    model_hash: Digest
    contributors: Count
    total_weight: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    sums_hash: Digest


class FitRequest(Message):
    """`train.fit`: the openings that lead from the owner's model to this round's model.

    Each step is one finished round: the agreeing openings of at least a quorum. The blob beside the
    request holds the sums of all steps in their order, little-endian uint32, one per parameter.
    """

    session: Digest
    attempt: Count
    round: Count
    model_hash: Digest
    steps: list[list[Signed]]


class Ready(Body):
    """An owner's word that its update for this attempt is in memory."""

    KIND = "ready"
    session: Digest
    attempt: Count
    model_hash: Digest
    ledger: LedgerHead


class FitReply(Message):
    """Answer to `FitRequest`."""

    ready: Signed


class SealRequest(Message):
    """`train.seal`: the round's list, in ascending order of fingerprint."""

    session: Digest
    attempt: Count
    ready: list[Signed]


class Header(Body):
    """What an owner says of the frames that it sends."""

    KIND = "header"
    version: Literal[1]
    session: Digest
    attempt: Count
    purpose: Purpose
    preset_hash: Digest
    list_hash: Digest
    model_hash: Digest
    parameters: Count
    frames: Count
    frames_hash: Digest


class SealReply(Message):
    """Answer to `SealRequest`; the blob beside it holds the frames."""

    header: Signed


class OpenRequest(Message):
    """`query.open`: headers in list order; the blob beside it holds all frames in the same order."""

    session: Digest
    attempt: Count
    ready: list[Signed]
    headers: list[Signed]


class OpenReply(Message):
    """Answer to `OpenRequest`; the blob beside it holds the sums, little-endian uint32."""

    opening: Signed


class CloseRequest(Message):
    """`query.close`: the openings that lead to the final model; steps and blob as in `FitRequest`."""

    session: Digest
    model_hash: Digest
    steps: list[list[Signed]]


class Statement(Body):
    """An owner's closing statement: what this run cost it, and which model came out."""

    KIND = "statement"
    session: Digest
    plan_hash: Digest
    model_hash: Digest
    unit: Literal["example"]
    epsilon: float | None
    delta: float
    sealed_attempts: Count
    void_attempts: Count
    ledger: LedgerHead


class CloseReply(Message):
    """Answer to `CloseRequest`."""

    statement: Signed
