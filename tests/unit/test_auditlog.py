"""The log of acts: every way to falsify it, and what a crash leaves behind."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crypto.auditlog import HEAD, LOG, Act, AuditLog, Head, KeptLog, short_facts
from crypto.authority import create_authority
from crypto.certificates import ServerCredentials
from protocol.encoding import encode
from protocol.errors import EncodingInvalid, LogBroken
from protocol.optimizers import GlobalModel
from server.store import RunStore
from tests.credentials import operator_of, owner_of, server_of

AUTHORITY = create_authority("Test CA", 30)
SERVER = server_of(AUTHORITY, ["localhost"], 10)
ACTS = 6


def kept_log(folder: Path, server: ServerCredentials = SERVER) -> KeptLog:
    return KeptLog(AuditLog(folder), "coordinator", server.key, server.certificate)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A log of six acts with a signed head."""
    log = kept_log(tmp_path / "log")
    log.begin(AUTHORITY.certificate)
    for number in range(ACTS):
        log.record("run.round", round=number, members=["a", "b"], accuracy=None)
    log.sign()
    return tmp_path / "log"


def verified(folder: Path, known: Head | None = None) -> list[Act]:
    return AuditLog(folder).verify(AUTHORITY.certificate, known)


def lines_of(folder: Path) -> list[bytes]:
    return (folder / LOG).read_bytes().splitlines(keepends=True)


def write(folder: Path, lines: list[bytes]) -> None:
    (folder / LOG).write_bytes(b"".join(lines))


def test_acts_are_kept_in_order(folder: Path) -> None:
    acts = verified(folder)
    assert [act.sequence for act in acts] == list(range(1, ACTS + 1))
    assert [act.facts["round"] for act in acts] == list(range(ACTS))
    assert all(left.hash == right.previous for left, right in pairwise(acts))
    assert AuditLog(folder).head() == Head(sequence=ACTS, hash=acts[-1].hash)


def test_an_actor_may_be_somebody_else_than_the_keeper(tmp_path: Path) -> None:
    log = kept_log(tmp_path)
    log.begin(AUTHORITY.certificate)
    log.record("operator.start", "f" * 64, run="small")
    log.sign()
    assert [act.actor for act in verified(tmp_path)] == ["f" * 64]


CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "sequence": lambda fields: fields.update(sequence=fields["sequence"] + 1),
    "time": lambda fields: fields.update(time="2020-01-01T00:00:00.000Z"),
    "actor": lambda fields: fields.update(actor="somebody"),
    "act": lambda fields: fields.update(act="run.void"),
    "facts": lambda fields: fields["facts"].update(round=99),
    "fact added": lambda fields: fields["facts"].update(more=True),
    "fact removed": lambda fields: fields["facts"].pop("round"),
    "previous": lambda fields: fields.update(previous="1" * 64),
    "hash": lambda fields: fields.update(hash="2" * 64),
}


@pytest.mark.parametrize("rehashed", [False, True])
@pytest.mark.parametrize("change", sorted(CHANGES))
@pytest.mark.parametrize("position", range(ACTS))
def test_no_field_of_any_line_can_be_changed(
    folder: Path, position: int, change: str, rehashed: bool
) -> None:
    """Also not with the line's own hash made right again: the next line, or the head, holds the old one."""
    lines = lines_of(folder)
    fields = json.loads(lines[position])
    CHANGES[change](fields)
    if rehashed and change != "hash":
        fields["hash"] = Act.from_fields(fields).expected_hash()
    lines[position] = encode(fields) + b"\n"
    write(folder, lines)
    with pytest.raises(LogBroken):
        verified(folder)


def test_a_chain_that_is_made_anew_does_not_fit_the_signed_head(folder: Path, tmp_path: Path) -> None:
    other = AuditLog(tmp_path / "other")
    for number in range(ACTS + 3):
        other.append("coordinator", "run.round", round=number, members=["a", "b"], accuracy=None)
    (folder / LOG).write_bytes((tmp_path / "other" / LOG).read_bytes())
    with pytest.raises(LogBroken, match="signed head"):
        verified(folder)


def test_lines_cannot_be_left_out_moved_doubled_or_cut_off(folder: Path) -> None:
    lines = lines_of(folder)
    for changed in (
        *(lines[:index] + lines[index + 1 :] for index in range(ACTS)),
        *(lines[:index] for index in range(ACTS)),
        [lines[1], lines[0], *lines[2:]],
        [*lines, lines[-1]],
        [*lines[:3], lines[2], *lines[3:]],
        [*lines[:-1], lines[-1][:-1]],
        [*lines[:2], b"\n", *lines[2:]],
        [*lines, b"{}\n"],
    ):
        write(folder, changed)
        if changed:
            with pytest.raises(LogBroken):
                verified(folder)
            with pytest.raises(LogBroken):
                kept_log(folder).begin(AUTHORITY.certificate)
    write(folder, lines)
    assert len(verified(folder)) == ACTS


def test_no_flipped_bit_goes_unnoticed(folder: Path) -> None:
    data = (folder / LOG).read_bytes()
    for position in range(0, 8 * len(data), 101):
        damaged = bytearray(data)
        damaged[position // 8] ^= 1 << (position % 8)
        (folder / LOG).write_bytes(bytes(damaged))
        with pytest.raises(LogBroken):
            verified(folder)


def test_the_head_is_signed_by_the_keeper_and_nobody_else(folder: Path) -> None:
    owner = owner_of(AUTHORITY, "ward-a", 10)
    operator = operator_of(AUTHORITY, "alice", 10)
    foreign = server_of(create_authority("Test CA", 30), ["localhost"], 10)
    good = (folder / HEAD).read_bytes()
    for key, certificate in (
        (owner.transport_key, owner.transport_certificate),
        (operator.key, operator.certificate),
        (foreign.key, foreign.certificate),
        (operator.key, SERVER.certificate),
    ):
        AuditLog(folder).sign_head(key, certificate)
        with pytest.raises(LogBroken):
            verified(folder)
    for damaged in (b"", b"{}", good[:-1], good.replace(b'"sequence":6', b'"sequence":5')):
        (folder / HEAD).write_bytes(damaged)
        with pytest.raises(LogBroken):
            verified(folder)
    (folder / HEAD).unlink()
    with pytest.raises(LogBroken, match="missing"):
        verified(folder)
    (folder / HEAD).write_bytes(good)
    assert verified(folder)


def test_a_renewed_or_replaced_key_of_the_keeper_goes_on(folder: Path) -> None:
    other = kept_log(folder, server_of(AUTHORITY, ["localhost"], 10))
    other.begin(AUTHORITY.certificate)
    other.record("server.start")
    other.sign()
    assert len(verified(folder)) == ACTS + 1


def test_a_log_that_was_put_back_with_its_head_is_caught_by_a_head_kept_elsewhere(folder: Path) -> None:
    saved = {name: (folder / name).read_bytes() for name in (LOG, HEAD)}
    log = kept_log(folder)
    log.begin(AUTHORITY.certificate)
    known = log.record("run.finished")
    log.sign()
    assert verified(folder, known)
    for name, content in saved.items():
        (folder / name).write_bytes(content)
    assert verified(folder), "both were put back: alone they look right"
    with pytest.raises(LogBroken, match="known head"):
        verified(folder, known)
    with pytest.raises(LogBroken):
        log.record("run.after")
    with pytest.raises(LogBroken):
        log.sign()


def test_half_a_line_of_a_crash_is_taken_away_at_every_byte(folder: Path, tmp_path: Path) -> None:
    """What was acknowledged is whole at every moment at which a crash may happen."""
    whole, log = (folder / LOG).read_bytes(), AuditLog(folder)
    log.append("coordinator", "run.finished", rounds=2)
    line = (folder / LOG).read_bytes()[len(whole) :]
    for kept in range(len(line)):
        (folder / LOG).write_bytes(whole + line[:kept])
        assert len(verified(folder)) == ACTS
        if kept % 20 == 0:
            AuditLog(folder).append("coordinator", "run.finished", rounds=2)
            assert len(verified(folder)) == ACTS + 1


def _append(folder: Path, name: str, count: int) -> None:
    log = AuditLog(folder)
    for number in range(count):
        log.append(name, "run.round", round=number)


def test_several_processes_append_to_one_chain(folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=_append, args=(folder, f"worker-{number}", 20)) for number in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    acts = verified(folder)
    assert len(acts) == ACTS + 80
    for number in range(4):
        rounds = [act.facts["round"] for act in acts if act.actor == f"worker-{number}"]
        assert rounds == list(range(20))


def test_an_empty_log_is_whole(tmp_path: Path) -> None:
    assert AuditLog(tmp_path / "log").verify(AUTHORITY.certificate) == []
    with pytest.raises(LogBroken):
        AuditLog(tmp_path / "log").verify(AUTHORITY.certificate, Head(sequence=1, hash="0" * 64))


def test_facts_are_small_and_floats_stand_as_a_hash(tmp_path: Path) -> None:
    facts = short_facts({"round": 1, "code": None, "accuracy": 0.5, "names": ["a"], "more": {"x": [1.0]}})
    assert set(facts) == {"round", "code", "names", "facts_sha256"}
    AuditLog(tmp_path).append("coordinator", "run.round", **facts)
    for wrong in ({"x": 0.5}, {"x": {"y": 1}}, {"x": ["a" * 300_000]}):
        with pytest.raises(EncodingInvalid):
            AuditLog(tmp_path).append("coordinator", "run.round", **wrong)  # type: ignore[arg-type]
    assert len(AuditLog(tmp_path).acts()) == 1


def test_what_the_run_store_records_is_chained(tmp_path: Path) -> None:
    """Refusals, events and openings, with hashes and fingerprints and without any figure of a model."""
    store = RunStore(tmp_path / "small-1", AuditLog(tmp_path / "log"))
    model = GlobalModel.initial(np.zeros(3))
    facts = {"contributors": ["a" * 64], "sums_hash": "b" * 64, "accuracy": 0.5, "headers": [{"x": 1}]}
    store.event("joined", owners=1, members=["a" * 64])
    store.refuse("c" * 64, "query.join", "FS-CERT-01")
    store.finish_round(1, 1, facts, b"sums", model)
    store.finish_evaluation(2, 1, facts, b"sums")
    store.close()
    acts = AuditLog(tmp_path / "log").acts()
    assert [act.act for act in acts] == ["run.joined", "run.refusal", "run.opening", "run.opening"]
    assert {act.facts["run"] for act in acts} == {"small-1"}
    assert acts[1].facts["code"] == "FS-CERT-01"
    assert acts[2].facts["model_hash"] == model.sha256()
    assert acts[2].facts["contributors"] == ["a" * 64]
    assert "0.5" not in (tmp_path / "log" / LOG).read_text()
