"""Decoders of messages, signatures, certificates, plans, policies, wraps, records, batches and reports."""

from __future__ import annotations

import json
import random
import tempfile
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from audit.report import build_report, verify_report
from client.policy import Policy
from crypto.agreement import HpkeKey, WrapContext, wrap
from crypto.authority import create_authority
from crypto.certificates import fingerprint, key_sha256, verify_signing_certificate
from crypto.requests import build_request, read_request
from crypto.trust import read_revocations
from protocol.batches import join_batch, split_batch
from protocol.errors import EncodingInvalid
from protocol.plan import Plan
from protocol.records import from_record, to_record
from tests.credentials import owner_of
from tests.fuzz.message_targets import DIGESTS, KEY, message_targets, signed_target
from tests.fuzz.mutations import HUGE_NUMBERS, mutate_bytes, mutate_json, mutate_value
from tests.fuzz.relay_targets import relay_targets
from tests.fuzz.target import Target, require
from tests.unit.audit_evidence import NOW, evidence

PLAN: dict[str, Any] = {
    "run": {"name": "fuzzed", "rounds": 4},
    "task": {
        "name": "image-classification",
        "input_shape": [8, 8],
        "value_range": [0.0, 16.0],
        "classes": 10,
    },
    "model": {"name": "mlp", "hidden": [32], "initial_sha256": DIGESTS[0]},
    "cohort": {"minimum": 3, "maximum": 8, "weights": {DIGESTS[1]: 0.5}},
    "training": {"local_steps": 2, "learning_rate": 0.5},
    "privacy": {
        "target_epsilon": 3.0,
        "sample_rate": 0.1,
        "expected_batch_size": 64.0,
        "noise_multiplier": 1.1,
    },
    "evaluation": {"every": 2, "target_epsilon": 1.0, "noise_multiplier": 3.0},
}
POLICY: dict[str, Any] = {
    "dataset": "ward-a",
    "data_file": "data.npz",
    "budget": {"epsilon_total": 8.0, "epsilon_per_run": 4.0, "delta_total": 1e-4},
    "plans": {"tasks": ["image-classification"], "models": ["linear", "mlp"], "min_cohort": 3},
    "peers": {"pinned": {"ward-b": DIGESTS[1], "ward-c": DIGESTS[2]}, "min_known_peers": 2},
}


def wire_targets() -> list[Target]:
    """Return all targets of this group."""
    return [
        *message_targets(),
        signed_target(),
        *_certificate_targets(),
        *_toml_targets(),
        *_wrap_targets(),
        *_record_targets(),
        Target("batches", 4, lambda rng: mutate_bytes(_BATCH, rng), _feed_batch),
        *relay_targets(),
        _report_target(),
    ]


# --- certificates ------------------------------------------------------------------------------------


def _certificate_targets() -> list[Target]:
    authority, other = create_authority("Fuzzed CA", 100, NOW), create_authority("Other CA", 100, NOW)
    owners = [owner_of(authority, name, 30, NOW) for name in ("ward-a", "ward-b")]
    certificates = [
        *(owner.signing_certificate for owner in owners),
        *(owner.transport_certificate for owner in owners),
        *(owner_of(other, "ward-a", 30, NOW).signing_certificate, authority.certificate),
    ]
    ders = [certificate.public_bytes(Encoding.DER) for certificate in certificates]
    members = {owner.signing_certificate.tbs_certificate_bytes for owner in owners}
    crl = authority.revocation_list([12345, owners[1].signing_certificate.serial_number], 30, NOW)
    empty = authority.revocation_list([], 30, NOW)
    moment = NOW + timedelta(days=1)

    def feed_certificate(data: bytes) -> None:
        member = verify_signing_certificate(data, authority.certificate, empty, moment)
        parsed = x509.load_der_x509_certificate(data)
        require(parsed.tbs_certificate_bytes in members, "a changed certificate is a member")
        require(
            member.fingerprint in {fingerprint(owner.signing_key.public_key()) for owner in owners},
            "a certificate is of an unknown member",
        )

    lists = [one.public_bytes(form) for one in (crl, empty) for form in (Encoding.PEM, Encoding.DER)]
    file = Path(tempfile.mkdtemp(prefix="fedseal-fuzz-", dir="/dev/shm")) / "crl.pem"

    def feed_list(data: bytes) -> None:
        file.write_bytes(data)
        accepted = read_revocations(file, authority.certificate)
        require(
            accepted.tbs_certlist_bytes in {crl.tbs_certlist_bytes, empty.tbs_certlist_bytes},
            "a changed revocation list is the authority's",
        )

    return [
        Target("certificates", 20, lambda rng: mutate_bytes(rng.choice(ders), rng, ders), feed_certificate),
        Target("revocation lists", 14, lambda rng: mutate_bytes(rng.choice(lists), rng, lists), feed_list),
        _request_target(),
    ]


def _request_target() -> Target:
    transport, signing = ec.generate_private_key(ec.SECP384R1()), KEY
    owner = build_request("ward-a", "owner", {"owner-transport": transport, "owner-signing": signing})
    hosts = ("coordinator.example", "127.0.0.1")
    server = build_request("coordinator", "coordinator", {"server": transport}, hosts)
    known = {
        (asked.name, asked.party, asked.hosts, tuple(map(key_sha256, asked.keys.values())))
        for asked in (read_request(owner), read_request(server))
    }

    def feed(data: bytes) -> None:
        asked = read_request(data)
        seen = (asked.name, asked.party, asked.hosts, tuple(map(key_sha256, asked.keys.values())))
        require(seen in known, "a changed request is signed by its keys")

    seeds = [owner, server]
    return Target("signing requests", 12, lambda rng: mutate_bytes(rng.choice(seeds), rng, seeds), feed)


# --- plans and policies ------------------------------------------------------------------------------


def _toml_targets() -> list[Target]:
    plan, policy = Plan.from_fields(PLAN), Policy.model_validate(POLICY)

    def feed_plan_fields(fields: Any) -> None:
        accepted = Plan.from_fields(fields)
        accepted.sha256()
        require(Plan.from_fields(accepted.fields()) == accepted, "a plan does not survive its own fields")

    def feed_plan(text: str) -> None:
        accepted = Plan.from_toml(text)
        require(Plan.from_fields(accepted.fields()) == accepted, "a plan does not survive its own fields")

    def feed_policy(text: str) -> None:
        accepted = Policy.from_toml(text)
        require(
            Policy.model_validate(accepted.model_dump()) == accepted, "a policy does not survive itself"
        )

    policy_fields = policy.model_dump(mode="json", exclude_none=True)
    return [
        Target("plan fields", 20, lambda rng: mutate_value(plan.fields(), rng), feed_plan_fields),
        Target("plan.toml", 14, partial(_toml, _without_none(plan.fields())), feed_plan),
        Target("policy.toml", 14, partial(_toml, policy_fields), feed_policy),
    ]


def _toml(fields: dict[str, Any], rng: random.Random) -> str:
    """Return a changed TOML text: another value, a strange spelling, or damaged text."""
    choice = rng.random()
    value = mutate_value(fields, rng) if choice < 0.6 else fields
    try:
        text = tomli_w.dumps(value)
    except (TypeError, ValueError, AttributeError, RecursionError):
        text = tomli_w.dumps(fields)
    if choice < 0.6:
        return text
    strange = (
        *("a = " + "[" * 20_000, "a = " + "9" * 5000, "a = 1e999", "a = nan", "a = 0x" + "f" * 9999),
        *(
            "[" + ".".join("a" * 3000) + "]",
            "a = " + "{b=" * 5000,
            'a = "\\ud800"',
            "a = 1979-05-27",
            "\x00",
        ),
        *(
            'a = """' + "\\\n" * 3000,
            "[run]\n[run]",
            "a.b = 1\na = 2",
            f"rounds = {rng.choice(HUGE_NUMBERS)}",
        ),
    )
    if choice < 0.8:
        lines = text.splitlines()
        lines.insert(rng.randint(0, len(lines)), rng.choice(strange))
        return "\n".join(lines)
    return mutate_bytes(text.encode(), rng).decode("utf-8", "replace")


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return value


# --- wraps -------------------------------------------------------------------------------------------


def _wrap_targets() -> list[Target]:
    key, other = HpkeKey.generate(), HpkeKey.generate()
    context = WrapContext(DIGESTS[0], DIGESTS[1], DIGESTS[1], DIGESTS[2], "pair")
    secret = bytes(range(32))
    sealed = [wrap(one.public(), secret, context) for one in (key, key, other)]

    def feed_wrap(data: bytes) -> None:
        key.unwrap(data, context)
        require(data in sealed[:2], "a changed wrap opens")

    def feed_public(data: bytes) -> None:
        # any point of the curve is a key: what is wrapped for it opens for nobody who lacks its secret
        wrap(data, secret, context)
        require(len(data) == len(key.public()), "a key of another length")

    return [
        Target("wraps", 8, lambda rng: mutate_bytes(rng.choice(sealed), rng, sealed), feed_wrap),
        Target("one-time keys", 4, lambda rng: mutate_bytes(key.public(), rng), feed_public),
    ]


# --- Flower's records --------------------------------------------------------------------------------

_BATCH = join_batch([b"identifier", bytes(300), b"", b"\xff" * 4096])


def _feed_batch(data: bytes) -> None:
    require(join_batch(split_batch(data)) == data, "a batch does not join to what was received")


def _record_targets() -> list[Target]:
    small = to_record(b'{"a":1}', bytes(range(256)))
    blob = bytes(1000)
    large = RecordDict(
        {
            "fedseal": ConfigRecord({"body": b"{}"}),
            "fedseal-blob": ArrayRecord({"blob": Array(np.frombuffer(blob, dtype=np.uint8))}),
        }
    )
    contents = [
        {identifier: one.deflate() for identifier, one in get_all_nested_objects(record).items()}
        for record in (small, large)
    ]
    roots = [small.object_id, large.object_id]

    def make(rng: random.Random) -> tuple[str, dict[str, bytes]]:
        which = rng.randrange(2)
        changed = dict(contents[which])
        place = rng.choice(list(changed))
        changed[place] = mutate_bytes(changed[place], rng, list(contents[1].values()))
        return roots[which], changed

    def feed(item: tuple[str, dict[str, bytes]]) -> None:
        root, objects = item
        try:
            record = inflate_object_from_contents(root, objects)
        except Exception:  # Flower's own decoder; what it raises is caught where it is called
            raise EncodingInvalid("not a record") from None
        if not isinstance(record, RecordDict):
            raise EncodingInvalid("not a record")
        _feed_record(record)

    return [Target("Flower's objects", 14, make, feed), Target("records", 10, _record, _feed_record)]


def _feed_record(record: RecordDict) -> None:
    body, blob = from_record(record)
    again = from_record(to_record(body, blob))
    require(again == (body, blob), "a record does not hold what was read from it")


def _record(rng: random.Random) -> RecordDict:
    """Return a record with wrong names, types, shapes and serialized arrays."""
    number = rng.choice((0, 7, 2**62))
    values: list[Any] = [b"{}", b"", "text", 1, 0.5, [b"a"], [1, 2], True]
    config = ConfigRecord({name: rng.choice(values) for name in rng.sample(["body", "blob", "x"], 2)})
    header = (
        np.lib.format.magic(1, 0)
        + b"v\x00{'descr': '|u1', 'fortran_order': False, 'shape': (%d,), }" % number
    )
    data = rng.choice(
        (header.ljust(127) + b"\n", b"PK\x03\x04" + bytes(60), b"\x93NUMPY\x01\x00", b"", b"\x80\x04.")
    )
    array = rng.choice(
        (
            Array("uint8", (number,), "numpy.ndarray", mutate_bytes(data, rng)),
            Array("uint8", (number,), rng.choice(("pickle", "", "numpy.ndarray")), data),
            Array(np.zeros((2, 2), np.uint8)),
            Array(np.zeros(3, rng.choice((np.float32, np.int8, np.complex128, np.bool_)))),
            Array(np.zeros(0, np.uint8)),
        )
    )
    names = rng.choice((("fedseal", "fedseal-blob"), ("fedseal", "other"), ("Fedseal", "fedseal-blob")))
    parts: dict[str, Any] = {names[0]: config, names[1]: ArrayRecord({rng.choice(("blob", "b")): array})}
    if rng.random() < 0.3:
        parts[rng.choice(names)] = rng.choice((MetricRecord({"a": 1}), config))
    return RecordDict(parts)


# --- reports -----------------------------------------------------------------------------------------


def _report_target() -> Target:
    signed = build_report(evidence("local", 5), NOW, KEY)
    unsigned = {**signed, "signature": None}
    texts = [_spelled_report(signed), _spelled_report(unsigned)]
    file = Path(tempfile.mkdtemp(prefix="fedseal-fuzz-", dir="/dev/shm")) / "report.json"

    def make(rng: random.Random) -> tuple[bytes, bool]:
        return mutate_json(texts[0], rng, _spelled_report), rng.random() < 0.98

    def feed(item: tuple[bytes, bool]) -> None:
        data, signer_known = item
        file.write_bytes(data)
        verify_report(file, KEY.public_key() if signer_known else None)
        require(data in texts, "a changed report verifies")

    return Target("reports", 2, make, feed)


def _spelled_report(report: Any) -> bytes:
    return json.dumps(report, indent=2, sort_keys=True).encode() + b"\n"
