"""Decoders of frames and dealt keys, in both forms, and the check that binds frames to a signed header."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import numpy as np

from crypto.frames import SealContext
from crypto.measuring import ciphertext_layout
from crypto.presets import SEED_BYTES, packing_for
from crypto.secret import SealKey
from protocol.encoding import digest, digest_bytes
from protocol.errors import FrameInvalid
from tests.fuzz.mutations import mutate_bytes
from tests.fuzz.target import Target, require


def seal_targets() -> list[Target]:
    """Return all targets of this group."""
    targets = []
    for preset in ("exact16", "wide", "fine"):
        packing = packing_for(preset, 8)
        targets += _targets(SealContext(packing), f"packed {preset}", 8)
    packing = packing_for("exact16", 8)
    targets += _targets(SealContext(packing, ciphertext_layout(packing)), "SEAL's own form", 8)
    return targets


def _targets(context: SealContext, name: str, weight: int) -> list[Target]:
    key = SealKey.generate(context)
    slots = np.arange(context.packing.preset.slots, dtype=np.uint64)
    frames = [key.encrypt(slots + np.uint64(number)) for number in range(4)]
    dealt = key.dealt()

    def feed_frame(frame: bytes) -> None:
        context.check(frame)
        context.ciphertext(frame)
        if context.packed:
            words = context.residues(frame[SEED_BYTES:])
            require(frame[SEED_BYTES:] == context.residue_bytes(words), "a frame has two spellings")

    def feed_update(blob: bytes) -> None:
        """The order in which an owner and the coordinator look at frames: length, digests, residues."""
        parts = context.split(blob, len(frames))
        if _digest(parts) != _digest(frames):
            raise FrameInvalid("not the signed frames")
        require(blob == b"".join(frames), "changed frames have the signed digest")

    def feed_key(data: bytes) -> None:
        rebuilt = SealKey.from_dealt(context, data)
        require(rebuilt.dealt() == data, "a dealt key has two spellings")

    return [
        Target(f"frames, {name}", weight, partial(_frame, frames, context), feed_frame),
        Target(f"updates, {name}", 2, partial(_changed, b"".join(frames), frames), feed_update),
        Target(f"dealt keys, {name}", 4, partial(_changed, dealt, [dealt, frames[0]]), feed_key),
    ]


def _digest(frames: list[bytes]) -> str:
    return digest([digest_bytes(frame) for frame in frames])


def _changed(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    return mutate_bytes(data, rng, others)


def _frame(frames: list[bytes], context: SealContext, rng: random.Random) -> bytes:
    """Return a changed frame; half of them keep their length, so that more than the length is looked at."""
    frame = rng.choice(frames)
    changes: tuple[Callable[[], bytes], ...] = (
        lambda: mutate_bytes(frame, rng, frames),
        lambda: rng.randbytes(len(frame)),
        lambda: frame[:SEED_BYTES] + b"\xff" * (len(frame) - SEED_BYTES),
        lambda: _overwritten(frame, rng),
        lambda: _overwritten(frame, rng),
    )
    return rng.choice(changes)()


def _overwritten(frame: bytes, rng: random.Random) -> bytes:
    changed = bytearray(frame)
    for _ in range(rng.choice((1, 4, 64))):
        place = rng.choice((rng.randrange(len(frame)), rng.randrange(200)))
        size = rng.choice((1, 2, 4, 8))
        filling = rng.choice((b"\xff" * size, bytes(size), rng.randbytes(size)))
        changed[place : place + size] = filling[: len(frame) - place]
    return bytes(changed[: len(frame)])
