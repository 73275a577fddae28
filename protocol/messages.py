"""Messages of the protocol, in the order in which a run uses them.

Requests come from the coordinator and are never trusted. Replies carry a `Signed` body. A signature
covers ``fedseal/<kind>/1`` plus a zero byte plus the canonical bytes of the body (see
`crypto.signing`). An owner is named by its *fingerprint*, the SHA-256 of its signing public key.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from protocol.encoding import Blob, Digest, decode, encode
from protocol.errors import EncodingInvalid
from protocol.plan import first_problem

Fingerprint = Digest
Purpose = Literal["train", "evaluate"]
"""What an attempt is for: an update of the model, or counts of right and wrong answers."""

PURPOSES: Final[tuple[Purpose, ...]] = ("train", "evaluate")

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
        return cls.from_encoded(decode(data), data)

    @classmethod
    def from_fields(cls, fields: Any) -> Self:
        """Validate an already decoded value; see `from_bytes`.

        Raises:
            EncodingInvalid: Not a message of this type, or not spelled as this type writes it.
        """
        return cls.from_encoded(fields, encode(fields))

    @classmethod
    def from_encoded(cls, fields: Any, data: bytes) -> Self:
        """Validate a value whose canonical bytes are at hand; see `from_fields`.

        Args:
            fields: An already decoded value.
            data: What `encode` returns for it.

        Raises:
            EncodingInvalid: Not a message of this type, or not spelled as this type writes it.
        """
        try:
            message = cls.model_validate(fields)
        except ValidationError as error:
            raise EncodingInvalid(first_problem(error)) from None
        # Literal fields take what equals them, such as true for 1, float fields take integers, and what
        # is left out may have a default.
        if message.to_bytes() != data:
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

    @classmethod
    def of(cls, message: Signed) -> Self:
        """Return the head in a join, a ready message or a statement, of this or an earlier version.

        Raises:
            EncodingInvalid: The message has none.
        """
        return cls.from_fields(message.body.get("ledger"))


# --- joining -----------------------------------------------------------------------------------------


class Stage(Message):
    """One session of a run, and the finished rounds that it began with."""

    session: Digest
    first_round: Count


class Start(Message):
    """From where a later roster of a run goes on.

    Attributes:
        roster: Number of the roster; every try to make one gets a higher one. A run's first has none.
        round: Finished rounds behind it.
        model_hash: The model after them.
        sessions: The sessions of the run so far, oldest first.
    """

    roster: Annotated[int, Field(ge=2, le=2**53)]
    round: Count
    model_hash: Digest
    sessions: list[Stage]


class JoinRequest(Message):
    """`query.join`: the plan, in full, and for a later roster of the run where it goes on.

    The blob beside it holds the sums of `steps`, as in `FitRequest`, for who was in the roster before.
    Without steps it is empty, or the model itself for who was not (`GlobalModel.to_bytes`).
    """

    run: Digest
    plan: dict[str, Any]
    start: Start | None = None
    steps: list[list[Signed]] = Field(default_factory=list)


class Join(Body):
    """An owner's consent to one plan for one run, with its one-time key and a commitment to a nonce.

    `vouches` says that this owner computed the model that `start` names by itself, from the initial model
    and signed openings. Who was not there believes what a quorum of members vouches for.
    """

    KIND = "join"
    version: Literal[1]
    run: Digest
    plan_hash: Digest
    start: Start | None
    vouches: bool
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
    """Answer to `RosterRequest`: one HPKE ciphertext per other owner, by fingerprint.

    The dealer also seals the encryption key once, as `dealt`, and wraps the key that opens it for each.

    `heads` holds, for other owners of the roster, the message with the highest ledger head that this
    owner has seen them sign. Only its signer believes it, and only for its own signature.
    """

    wraps: Signed
    seeds: dict[Fingerprint, Blob]
    keys: dict[Fingerprint, Blob]
    dealt: Blob | None
    heads: dict[Fingerprint, Signed]


class KeysRequest(Message):
    """`query.keys`: all signed wraps in roster order, and the wraps for this owner with their proofs.

    `proofs` holds for each sender the hashes that lead from the wraps to the sender's signed `wraps_hash`
    (`crypto.wraps`). `heads` holds the receiver's own earlier messages that its peers returned.
    """

    run: Digest
    wraps: list[Signed]
    proofs: dict[Fingerprint, list[Digest]]
    seeds: dict[Fingerprint, Blob]
    key: Blob | None
    dealt: Blob | None
    heads: list[Signed]


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
    """`train.fit`: the openings that lead from the owner's model to the model of this attempt.

    For training, `round` is the round that the attempt shall finish; for evaluation, the finished round
    whose model is evaluated. Each step is one finished round: the agreeing openings of at least a quorum.
    The blob beside the request holds the sums of all steps in their order, little-endian uint32, one per
    parameter. `newest` is the receiver's newest ready message: a node whose home was put back meets its
    own ledger head.
    """

    session: Digest
    attempt: Count
    purpose: Purpose
    round: Count
    model_hash: Digest
    steps: list[list[Signed]]
    newest: Signed | None


class Ready(Body):
    """An owner's word that its contribution to this attempt is in memory."""

    KIND = "ready"
    session: Digest
    attempt: Count
    purpose: Purpose
    model_hash: Digest
    ledger: LedgerHead


class FitReply(Message):
    """Answer to `FitRequest`."""

    ready: Signed


class SealRequest(Message):
    """`train.seal`: the round's list, in ascending order of fingerprint, and the part that is asked for.

    Which frames a part holds is a public function of preset, parameters and cohort: `crypto.parts`.
    """

    session: Digest
    attempt: Count
    ready: list[Signed]
    part: Count = 0


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
    """Answer to `SealRequest`; the blob beside it holds the part's frames.

    The header is about all frames, so it comes with the last part.
    """

    header: Signed | None


class OpenRequest(Message):
    """`query.open`: headers in list order; the blob beside it holds frames in the same order.

    Where the frames of all owners fit into one part (`crypto.parts`), that is part 0. Else part 0 holds the
    SHA-256 of every frame, owner after owner, and parts 1, 2, ... hold the frames of consecutive positions,
    owner after owner within a part. Numbers above these ask for the parts of sums that were opened, where
    they do not fit into one; nothing is beside such a request.
    """

    session: Digest
    attempt: Count
    ready: list[Signed]
    headers: list[Signed]
    part: Count = 0


class OpenReply(Message):
    """Answer to `OpenRequest`.

    There is no opening before all parts are there. The blob beside it holds the sums, little-endian uint32;
    where they do not fit into one part it is empty, and each part of them is the blob of a later answer.
    """

    opening: Signed | None


class CloseRequest(Message):
    """`query.close`: the openings that lead to the final model; steps and blob as in `FitRequest`."""

    session: Digest
    model_hash: Digest
    steps: list[list[Signed]]


class Statement(Body):
    """An owner's closing statement: what this run cost it, and which model came out.

    `epsilon` and `delta` cover the whole run; `evaluation_epsilon` and `evaluation_delta` are the parts of
    them that evaluations cost. An epsilon of None bounds nothing. `sessions` names all sessions of the run,
    this one last, by the owner's own knowledge or the word of the roster's quorum.
    """

    KIND = "statement"
    session: Digest
    sessions: list[Digest]
    plan_hash: Digest
    model_hash: Digest
    unit: Literal["example", "client"]
    epsilon: float | None
    epsilon_worst: float | None
    delta: float
    evaluation_epsilon: float | None
    evaluation_delta: float
    sealed_attempts: Count
    sealed_evaluations: Count
    void_attempts: Count
    ledger: LedgerHead


class CloseReply(Message):
    """Answer to `CloseRequest`."""

    statement: Signed
