"""Whole runs whose updates travel in parts, with a coordinator that is honest and owners that are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile import HostileFederation
from in_parts import EVIL, FRAMES, long_plan, small_parts
from test_owner_attacks import carried_out, events, folder

from client.owner import Owner
from protocol.encoding import digest_bytes
from protocol.messages import SealReply
from protocol.plan import Plan
from server.store import RunStore

__all__ = ["folder", "long_plan", "small_parts"]


def honest(_: Owner, body: bytes, blob: bytes) -> tuple[bytes, bytes]:
    return body, blob


def flipped_blob(_: Owner, body: bytes, blob: bytes) -> tuple[bytes, bytes]:
    return body, bytes([blob[0] ^ 1]) + blob[1:]


def without_header(_: Owner, body: bytes, blob: bytes) -> tuple[bytes, bytes]:
    return SealReply(header=None).to_bytes(), blob


def residues_too_large(_: Owner, body: bytes, blob: bytes) -> tuple[bytes, bytes]:
    return body, blob[:64] + b"\xff" * (len(blob) - 64)


def repeated_part() -> Callable[[Owner, bytes, bytes], tuple[bytes, bytes]]:
    kept: list[bytes] = []

    def tamper(_: Owner, body: bytes, blob: bytes) -> tuple[bytes, bytes]:
        kept.append(blob)
        return body, kept[0]

    return tamper


def left_behind(store: RunStore) -> list[Path]:
    return [file for file in store.folder.rglob("*") if "frames" in file.parts]


def test_a_run_in_parts_finishes_and_leaves_no_frames(
    federation: HostileFederation, folder: RunStore, long_plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[int] = []
    original = Path.open

    def watched(self: Path, *arguments: Any, **options: Any) -> Any:
        if self.parent.name == "frames":
            modes.extend((self.stat().st_mode & 0o777, self.parent.stat().st_mode & 0o777))
        return original(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", watched)
    assert carried_out(federation, folder, long_plan, "train.seal", honest, monkeypatch) == "finished"
    assert set(modes) == {0o600, 0o700}
    assert left_behind(folder) == []
    for one in folder.attempts():
        assert one["upload_bytes"] > FRAMES * 28_000
        assert one["download_bytes"] > 4 * FRAMES * 28_000


def test_sums_are_fetched_from_an_opener_that_sends_what_it_signed(
    federation: HostileFederation, folder: RunStore, long_plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bought opener signs the right sum and sends another."""

    def lying(_: Owner, body: bytes, blob: bytes) -> tuple[bytes, bytes]:
        return body, bytes(len(blob))

    assert carried_out(federation, folder, long_plan, "query.open", lying, monkeypatch) == "finished"
    evil = federation.owners[EVIL].fingerprint
    for one in folder.attempts():
        assert digest_bytes(folder.sums(one["round"])) == one["sums_hash"]
    assert evil in {opening["signer"] for one in folder.attempts() for opening in one["openings"]}


@pytest.mark.parametrize(
    ("tamper", "code", "event"),
    [
        (flipped_blob, "FS-FRAME-01", False),
        (without_header, "FS-WIRE-03", False),
        (residues_too_large, "FS-FRAME-01", False),
        (repeated_part(), "FS-FRAME-01", True),
    ],
    ids=["flipped", "no header", "residues", "repeated"],
)
def test_a_bad_part_voids_the_attempt(
    federation: HostileFederation,
    folder: RunStore,
    long_plan: Plan,
    monkeypatch: pytest.MonkeyPatch,
    tamper: Any,
    code: str,
    event: bool,
) -> None:
    carried_out(federation, folder, long_plan, "train.seal", tamper, monkeypatch, times=FRAMES)
    first = folder.attempts()[0]
    assert (first["void"], first["openings"]) == (True, [])
    assert folder.refusals()[0]["code"] == code
    assert left_behind(folder) == []
    repeats = [facts["owner"] for facts in events(folder, "repeated_seed")]
    assert bool(repeats) == event
    assert set(repeats) <= {federation.owners[EVIL].name}
