"""What the fuzzer feeds to the decoders of the protocol's messages, plain and signed."""

from __future__ import annotations

import inspect
import json
import random
from functools import partial
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from crypto.signing import sign, verify
from protocol import messages
from protocol.encoding import decode, encode
from protocol.errors import EncodingInvalid
from protocol.messages import Body, Message, Signed
from tests.fuzz.mutations import mutate_json
from tests.fuzz.target import Target, require
from tests.unit.test_messages import EXAMPLES, SIGNED

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
DIGESTS = ("a1" * 32, "b2" * 32, "c3" * 32)

_OTHERS: list[Message] = [
    messages.RosterRequest(
        run=DIGESTS[0], members=[messages.JoinReply(certificate=b"der", join=SIGNED) for _ in range(3)]
    ),
    messages.Stage(session=DIGESTS[0], first_round=2),
    messages.Start(
        roster=2,
        round=3,
        model_hash=DIGESTS[1],
        sessions=[messages.Stage(session=DIGESTS[0], first_round=0)],
    ),
    messages.KeysReply(session=SIGNED),
    messages.FitReply(ready=SIGNED),
    messages.SealRequest(session=DIGESTS[0], attempt=3, ready=[SIGNED, SIGNED]),
    messages.SealReply(header=SIGNED),
    messages.OpenReply(opening=SIGNED),
    messages.CloseRequest(session=DIGESTS[0], model_hash=DIGESTS[1], steps=[[SIGNED], [SIGNED, SIGNED]]),
    messages.CloseReply(statement=SIGNED),
]


def message_targets() -> list[Target]:
    seeds: dict[type[Message], list[bytes]] = {}
    for example in [*EXAMPLES, *_OTHERS]:
        seeds.setdefault(type(example), []).append(example.to_bytes())
    kinds = [kind for _, kind in inspect.getmembers(messages, inspect.isclass) if issubclass(kind, Message)]
    missing = set(kinds) - seeds.keys() - {Message, Body}
    if missing:
        raise AssertionError(f"no example of {sorted(kind.__name__ for kind in missing)}")
    every = [data for group in seeds.values() for data in group]
    return [
        Target(f"message {kind.__name__}", 4, partial(_message, group, every), partial(_feed_message, kind))
        for kind, group in seeds.items()
    ]


def _message(seeds: list[bytes], every: list[bytes], rng: random.Random) -> bytes:
    return mutate_json(rng.choice(seeds), rng, spelled, every)


def spelled(value: Any) -> bytes:
    """Return canonical bytes, or what is nearest to them for a value that has none."""
    try:
        return encode(value)
    except EncodingInvalid:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), skipkeys=True).encode()


def _feed_message(kind: type[Message], data: bytes) -> None:
    require(kind.from_bytes(data).to_bytes() == data, "a message does not encode to what was received")
    require(encode(decode(data)) == data, "two spellings of one value")


def signed_target() -> Target:
    bodies = [example for example in EXAMPLES if isinstance(example, Body)]
    signed = {sign(KEY, body).to_bytes(): type(body) for body in bodies}
    seeds = list(signed)

    def make(rng: random.Random) -> tuple[type[Body], bytes]:
        seed = rng.choice(seeds)
        kind = signed[seed] if rng.random() < 0.9 else rng.choice(list(signed.values()))
        return kind, mutate_json(seed, rng, spelled, seeds)

    def feed(item: tuple[type[Body], bytes]) -> None:
        kind, data = item
        message = Signed.from_bytes(data)
        verify(message, KEY.public_key(), kind)
        require(message.to_bytes() in signed, "a changed message verifies")

    return Target("signed messages", 20, make, feed)
