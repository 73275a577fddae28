"""A message is what its type says, in one spelling, or it is refused."""

import inspect
import json
from typing import Any, get_origin

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from protocol import messages
from protocol.encoding import decode, encode
from protocol.errors import EncodingInvalid
from protocol.messages import (
    Body,
    FitRequest,
    Header,
    Join,
    JoinReply,
    JoinRequest,
    KeysRequest,
    LedgerHead,
    Message,
    Opening,
    OpenRequest,
    Ready,
    RosterReply,
    Session,
    Signed,
    Stage,
    Start,
    Statement,
    Wraps,
)

A, B, C = "a" * 64, "b" * 64, "c" * 64
HEAD = LedgerHead(sequence=3, head=C)
SIGNED = Signed(kind="session", body={"session": A}, signer=B, signature=b"\x00\xff")
HEADER = Header(
    version=1,
    session=A,
    attempt=4,
    purpose="train",
    preset_hash=B,
    list_hash=A,
    model_hash=B,
    parameters=10,
    frames=1,
    frames_hash=C,
)
STATEMENT = Statement(
    session=A,
    sessions=[B, A],
    plan_hash=B,
    model_hash=C,
    unit="example",
    epsilon=2.0,
    epsilon_worst=4.5,
    delta=1e-5,
    evaluation_epsilon=0.5,
    evaluation_delta=1e-6,
    sealed_attempts=2,
    sealed_evaluations=1,
    void_attempts=0,
    ledger=HEAD,
)
START = Start(roster=2, round=1, model_hash=C, sessions=[Stage(session=A, first_round=0)])
JOIN = Join(
    version=1,
    run=A,
    plan_hash=B,
    start=None,
    vouches=True,
    nonce_commitment=C,
    hpke_key=b"key",
    ledger=HEAD,
)
EXAMPLES: list[Message] = [
    HEAD,
    SIGNED,
    HEADER,
    STATEMENT,
    STATEMENT.model_copy(update={"epsilon": None}),
    JOIN,
    JOIN.model_copy(update={"start": START, "vouches": False}),
    JoinRequest(run=A, plan={"run": {"name": "x"}}),
    JoinRequest(run=A, plan={"run": {"name": "x"}}, start=START, steps=[[SIGNED]]),
    JoinReply(certificate=b"der", join=SIGNED),
    Wraps(run=A, plan_hash=A, roster_hash=B, nonce=C, wraps_hash=C, key_commitment=None),
    RosterReply(wraps=SIGNED, seeds={A: b"1", B: b""}, keys={}, dealt=None, heads={B: SIGNED}),
    KeysRequest(run=A, wraps=[SIGNED], proofs={A: [C]}, seeds={}, key=None, dealt=None, heads=[]),
    Session(session=A),
    Ready(session=A, attempt=0, purpose="evaluate", model_hash=B, ledger=HEAD),
    FitRequest(
        session=A,
        attempt=1,
        purpose="train",
        round=1,
        model_hash=B,
        steps=[[SIGNED], []],
        newest=SIGNED,
    ),
    OpenRequest(session=A, attempt=1, ready=[SIGNED], headers=[]),
    Opening(
        session=A,
        attempt=1,
        purpose="train",
        list_hash=A,
        headers_hash=B,
        model_hash=C,
        contributors=3,
        total_weight=3.0,
        sums_hash=A,
    ),
]


def message_types() -> list[type[Message]]:
    return [
        kind
        for _, kind in inspect.getmembers(messages, inspect.isclass)
        if issubclass(kind, Message) and kind not in (Message, Body)
    ]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_every_message_survives_the_wire(message: Message) -> None:
    data = message.to_bytes()
    assert type(message).from_bytes(data) == message
    assert type(message).from_bytes(data).to_bytes() == data


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_an_extra_a_missing_or_a_foreign_field_is_refused(message: Message) -> None:
    kind, good = type(message), message.model_dump(mode="json")
    with pytest.raises(EncodingInvalid):
        kind.from_bytes(encode(good | {"extra": 1}))
    for field, value in good.items():
        with pytest.raises(EncodingInvalid):
            kind.from_bytes(encode({name: value for name, value in good.items() if name != field}))
        wrong: Any = 7 if isinstance(value, str | dict | list) or value is None else "7"
        with pytest.raises(EncodingInvalid):
            kind.from_bytes(encode(good | {field: wrong}))


@pytest.mark.parametrize("kind", message_types(), ids=lambda kind: kind.__name__)
def test_every_message_type_is_strict_and_closed(kind: type[Message]) -> None:
    config = kind.model_config
    assert config["strict"] is True
    assert config["extra"] == "forbid"
    assert config["frozen"] is True
    # what is not spelled out is refused all the same: it would not encode to its own bytes
    optional = {"start", "steps"} if kind is JoinRequest else {"part"}
    assert all(field.is_required() for name, field in kind.model_fields.items() if name not in optional)


def test_every_body_has_its_own_kind() -> None:
    kinds = [kind.KIND for kind in message_types() if issubclass(kind, Body)]
    assert len(kinds) == len(set(kinds)) == 7
    assert all(kind.isascii() and kind.islower() and kind.isalpha() for kind in kinds)


@pytest.mark.parametrize("body", [HEADER, JOIN], ids=["header", "join"])
@pytest.mark.parametrize("spelling", [True, 1.0, 2, "1", None, 0])
def test_a_version_is_the_integer_one_and_nothing_that_equals_it(body: Body, spelling: Any) -> None:
    fields = body.model_dump(mode="json") | {"version": spelling}
    with pytest.raises(EncodingInvalid):
        type(body).from_bytes(encode(fields))


@pytest.mark.parametrize(("field", "spelling"), [("epsilon", 2), ("delta", 0), ("sealed_attempts", 2.0)])
def test_a_number_of_the_other_type_is_refused(field: str, spelling: float) -> None:
    with pytest.raises(EncodingInvalid):
        Statement.from_bytes(encode(STATEMENT.model_dump(mode="json") | {field: spelling}))


@pytest.mark.parametrize("value", [-1, 2**53 + 1, True, 1.0, "1", None])
def test_a_count_is_a_small_natural_number(value: Any) -> None:
    with pytest.raises(EncodingInvalid):
        LedgerHead.from_bytes(encode({"sequence": value, "head": C}))


def test_a_purpose_or_unit_that_is_not_known_is_refused() -> None:
    with pytest.raises(EncodingInvalid):
        Header.from_bytes(encode(HEADER.model_dump(mode="json") | {"purpose": "release"}))
    with pytest.raises(EncodingInvalid):
        Statement.from_bytes(encode(STATEMENT.model_dump(mode="json") | {"unit": "person"}))


def test_a_key_of_a_mapping_is_a_fingerprint() -> None:
    fields = next(one for one in EXAMPLES if isinstance(one, RosterReply)).model_dump(mode="json")
    assert RosterReply.from_bytes(encode(fields))
    with pytest.raises(EncodingInvalid):
        RosterReply.from_bytes(encode(fields | {"seeds": {"short": ""}}))


def test_another_spelling_of_a_blob_is_refused() -> None:
    fields = SIGNED.model_dump(mode="json")
    for text in ("AP8", "AP9=", "AP8=\n", "-_8="):
        with pytest.raises(EncodingInvalid):
            Signed.from_bytes(encode(fields | {"signature": text}))


def test_python_bytes_are_not_a_wire_form() -> None:
    with pytest.raises(EncodingInvalid):
        Signed.from_fields(SIGNED.model_dump(mode="json") | {"signature": b"\x00\xff"})


def test_a_refusal_names_the_field_and_does_not_echo_the_value() -> None:
    fields = HEADER.model_dump(mode="json") | {"session": "patient 7731"}
    with pytest.raises(EncodingInvalid) as refused:
        Header.from_bytes(encode(fields))
    assert "session" in refused.value.detail
    assert "7731" not in refused.value.explain()


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"7", b'"x"', b"{", b'{"session": "x"}'])
def test_bytes_that_are_no_message_are_refused(data: bytes) -> None:
    with pytest.raises(EncodingInvalid):
        Session.from_bytes(data)


def test_a_message_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        HEADER.frames = 2  # type: ignore[misc]


def test_the_examples_cover_every_signed_body() -> None:
    covered = {type(message) for message in EXAMPLES}
    assert {kind for kind in message_types() if issubclass(kind, Body)} <= covered
    assert get_origin(Signed.model_fields["body"].annotation) is dict


SPELLINGS = (
    ("", ""),
    (",", ", "),
    (".0", ".00"),
    (".0", ""),
    ("e+", "E+"),
    ("1", "01"),
    ("\\u", "\\U"),
    ("null", "NaN"),
    ("true", "1"),
    ('"kind":"join"', '"kind":"other","kind":"join"'),
    ('"signature":""', '"signature":"AA"'),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@example(body={"": {"\U00014000": None}}, change=("1", "01"))
@given(body=st.dictionaries(st.text(), JSON, max_size=3), change=st.sampled_from(SPELLINGS))
def test_what_a_message_takes_is_canonical(body: dict[str, Any], change: tuple[str, str]) -> None:
    """Whatever a peer writes, it is refused by code or has one spelling; half a surrogate pair has none."""
    signed = {"body": body, "kind": "join", "signature": "", "signer": "a" * 64}
    text = json.dumps(signed, sort_keys=True, separators=(",", ":")).replace(*change)
    try:
        message = Signed.from_bytes(text.encode())
    except EncodingInvalid:
        return
    assert encode(decode(text.encode())) == text.encode() == message.to_bytes()
