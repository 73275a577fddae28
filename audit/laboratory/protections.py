"""Tests of what stands around the mechanism: masks, frames, signatures, the ledger, the exported model.

Each one tries what must not work (read a frame, add a foreign one, forge a signature) or compares what is
charged with an independent bound, on made-up values and with keys that are thrown away.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from audit.evidence.experiments import ConformanceTest
from audit.laboratory.record_tests import made_up
from audit.statistics.judging import exactly, uniformity
from client.ledger import Ledger
from client.membership import verified_bodies
from client.noise import SecureStream
from client.policy import Policy
from crypto.certificates import fingerprint
from crypto.frames import SealContext
from crypto.masks import MaskContext
from crypto.packing import pack_frame, quantize
from crypto.presets import SEED_BYTES, packing_for
from crypto.sealing import masks_for, open_frames, seal_frames
from crypto.secret import SealKey
from crypto.signing import sign
from deploy.build import compress
from deploy.gate import synthetic_inputs
from protocol.accounting import mechanism
from protocol.errors import FedsealError
from protocol.messages import Header, Signed
from protocol.plan import Plan
from protocol.privacy_loss import lower_bound_of_steps
from tasks.registry import task_for

Integers = NDArray[np.uint64]

OWNERS = ("a" * 64, "b" * 64, "c" * 64)
CHARGED_ROUNDS = 4


@dataclass(frozen=True)
class Sealed:
    """One made-up owner's frames for a list of three, and what went into them."""

    frames: list[bytes]
    values: Integers


class Table:
    """Three made-up owners around a throw-away key, who seal the same number of values for one list.

    Args:
        plan: Names preset and cohort.
        parameters: Values of an update; by default more than one frame holds.
    """

    def __init__(self, plan: Plan, parameters: int | None = None) -> None:
        self.packing = packing_for(plan.encryption.preset, max(plan.cohort.maximum, len(OWNERS)))
        self.parameters = parameters or self.packing.values_per_frame + 8
        self.range = plan.update_range
        self.key = SealKey.generate(SealContext(self.packing))
        pairs = [(a, b) for a in OWNERS for b in OWNERS if a < b]
        self._chains = {pair: os.urandom(32) for pair in pairs}
        zero = "00" * 32
        self._context = MaskContext(zero, 1, "train", zero, zero, self.packing.plain_modulus)

    def seal(
        self,
        owner: str,
        update: NDArray[np.float64],
        key: SealKey | None = None,
        coins: NDArray[np.float64] | None = None,
    ) -> Sealed:
        """Seal an update as this owner, by the owners' own code; also return its integers.

        Args:
            owner: One of `OWNERS`.
            update: float64 (parameters,).
            key: Instead of the table's.
            coins: Rounding coins in [0, 1); fresh ones unless given.
        """
        if coins is None:
            coins = SecureStream().uniform(update.size)
        taken = iter(coins)
        chains = {
            peer: self._chains[min(owner, peer), max(owner, peer)] for peer in OWNERS if peer != owner
        }
        masks = masks_for(self.packing, owner, chains, self._context)
        frames = seal_frames(
            update,
            self.range,
            lambda count: np.fromiter(taken, dtype=np.float64, count=count),
            masks,
            key or self.key,
        )
        return Sealed(list(frames), quantize(update, self.range, self.packing, coins))

    def updates(self) -> list[NDArray[np.float64]]:
        """Return a made-up update for each owner, within the public range."""
        rng = np.random.default_rng(0)
        return [rng.uniform(-0.5, 0.5, self.parameters) * self.range for _ in OWNERS]


def sealing_tests(plan: Plan) -> Iterator[ConformanceTest]:
    """Yield the tests of masks, frames and sums."""
    table = Table(plan)
    updates = table.updates()
    sealed = [table.seal(owner, update) for owner, update in zip(OWNERS, updates, strict=True)]
    yield _uniform_frames(table, sealed)
    yield _fresh_frames(table, updates[0])
    if table.packing.preset.scheme == "BFV":
        yield _masked(table, sealed[0])
    yield _exact_sum(table, sealed)
    yield _foreign_key(table, sealed, updates)


def _uniform_frames(table: Table, sealed: list[Sealed]) -> ConformanceTest:
    """A ciphertext's residues look uniform below their prime; packed values or masks alone do not."""
    preset, context = table.packing.preset, table.key.context
    primes = np.repeat(np.array(preset.coefficient_moduli, dtype=np.float64), preset.poly_modulus_degree)
    places = [
        context.residues(frame[SEED_BYTES:]).astype(np.float64) / primes
        for owner in sealed
        for frame in owner.frames
    ]
    return uniformity(
        "frames-uniform",
        "Distance of what a frame shows to a reader without a key from uniform noise",
        np.sort(np.concatenate(places)),
    )


def _fresh_frames(table: Table, update: NDArray[np.float64]) -> ConformanceTest:
    """Equal integers under equal masks must still give other ciphertexts each time."""
    coins = np.full(update.size, 0.5)
    first, again = (table.seal(OWNERS[0], update, coins=coins) for _ in range(2))
    repeated = sum(
        int(np.sum(np.frombuffer(a, np.uint64, 8) == np.frombuffer(b, np.uint64, 8)))
        for a, b in zip(first.frames, again.frames, strict=True)
    )
    return exactly(
        "frames-fresh",
        "Equal random words of two encryptions of one update",
        repeated,
        0.0,
        8 * len(again.frames),
        holds=repeated == 0,
    )


def _masked(table: Table, sealed: Sealed) -> ConformanceTest:
    """Whoever has the key and one owner's frame must still read nothing but uniform integers."""
    opened = table.key.decrypt(table.key.context.ciphertext(sealed.frames[0]))
    packed = pack_frame(sealed.values[: table.packing.values_per_frame], table.packing)
    known = int(np.sum(opened == packed))
    test = uniformity(
        "masked",
        "Distance of one owner's masked values, opened with the key, from uniform noise",
        np.sort(opened / float(table.packing.plain_modulus)),
    )
    # a value in 2^42 is hit by chance; a mask that is missing hits all of them
    return test if known == 0 else test.model_copy(update={"p_value": 0.0})


def _exact_sum(table: Table, sealed: list[Sealed]) -> ConformanceTest:
    expected = np.sum([owner.values for owner in sealed], axis=0)
    try:
        opened = open_frames(_columns(sealed), table.parameters, table.key)
        wrong = int(np.sum(opened != expected))
    except FedsealError:
        wrong = table.parameters
    return exactly(
        "sum-exact",
        "Values of an opened sum that differ from the sum of what went in",
        wrong,
        0.0,
        table.parameters,
        holds=wrong == 0,
    )


def _foreign_key(table: Table, sealed: list[Sealed], updates: list[NDArray[np.float64]]) -> ConformanceTest:
    """A frame under another key is well formed; the sum with it must not open."""
    stranger = SealKey.generate(table.key.context)
    foreign = table.seal(OWNERS[2], updates[2], stranger)
    return _refused(
        "foreign-key",
        "Sums that were opened although a frame was encrypted under another key",
        lambda: open_frames(_columns([*sealed[:2], foreign]), table.parameters, table.key),
    )


def _columns(sealed: list[Sealed]) -> list[tuple[bytes, ...]]:
    return list(zip(*(owner.frames for owner in sealed), strict=True))


def signature_tests() -> Iterator[ConformanceTest]:
    """Yield the tests that a header is accepted from its signer alone, and as it was signed."""
    member, stranger = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    name = fingerprint(member.public_key())
    keys, zero = {name: member.public_key()}, "00" * 32
    header = Header(
        version=1,
        session=zero,
        attempt=1,
        purpose="train",
        preset_hash=zero,
        list_hash=zero,
        model_hash=zero,
        parameters=1,
        frames=1,
        frames_hash=zero,
    )
    true = sign(member, header)
    forged = sign(stranger, header).model_copy(update={"signer": name})
    changed = true.model_copy(update={"body": {**true.body, "frames_hash": "11" * 32}})

    def offer(message: Signed) -> None:
        verified_bodies([message], keys, Header)

    offer(true)
    yield _refused(
        "forged-signature", "Headers that were accepted under a stranger's signature", lambda: offer(forged)
    )
    yield _refused(
        "changed-header", "Headers that were accepted after they were changed", lambda: offer(changed)
    )


def _refused(test: str, what: str, attempt: Callable[[], object]) -> ConformanceTest:
    try:
        attempt()
        accepted = 1
    except FedsealError:
        accepted = 0
    return exactly(test, what, accepted, 0.0, 1, holds=accepted == 0)


# --- ledger --------------------------------------------------------------------------------------------


def ledger_tests(plan: Plan) -> Iterator[ConformanceTest]:
    """Yield the test that an owner's ledger charges all rounds together, from a ledger in a new folder."""
    priced = mechanism(plan)
    if priced is None:
        return
    rounds, run = min(CHARGED_ROUNDS, plan.paid_rounds), "00" * 32
    with tempfile.TemporaryDirectory(prefix="fedseal-audit-") as folder:
        ledger = Ledger.open(Path(folder) / "ledger" / "ledger.db", _policy(), Path(folder) / "head")
        try:
            ledger.open_run(run, plan)
            for attempt in range(1, rounds + 1):
                ledger.reserve(run, attempt)
            charged = ledger.spent(run).epsilon or 0.0
        finally:
            ledger.close()
    least = lower_bound_of_steps(
        priced.sample_rate, priced.noise_multiplier, rounds * priced.steps, priced.delta
    )
    yield exactly(
        "ledger-composition",
        "Epsilon that a ledger charges for several rounds; an independent lower bound of their loss",
        charged,
        least,
        rounds,
        holds=charged >= least,
    )


def _policy() -> Policy:
    most = 1e9
    budget = {
        "epsilon_total": most,
        "epsilon_per_run": most,
        "epsilon_worst": most,
        "delta_total": 0.999,
    }
    return Policy.model_validate(
        {
            "dataset": "audit",
            "data_file": "none",
            "budget": budget,
            "plans": {"tasks": ["image-classification"], "models": ["linear"]},
        }
    )


# --- exported model ------------------------------------------------------------------------------------


def export_test(plan: Plan) -> ConformanceTest:
    """Test that the exported model is the same whatever records stand beside its making.

    The model is compressed twice beside different made-up records. They may decide whether a step keeps
    enough accuracy; they have labels that no answer matches, so that these decisions are the same, and
    nothing else may follow from them.
    """
    task = task_for(plan)
    wide = plan.model_copy(
        update={"compression": plan.compression.model_copy(update={"max_accuracy_drop": 1.0})}
    )
    model, synthetic = task.build_model(plan), synthetic_inputs(plan, 256)
    packed = []
    for seed, scale in ((1, 1.0), (2, 0.25)):
        records = made_up(task, plan, 64, seed)
        public = (records.x * np.float32(scale), np.full_like(records.y, -1))
        packed.append(compress(wide, model, public, synthetic, lambda _: None).onnx_bytes)
    differing = sum(a != b for a, b in zip(*packed, strict=False)) + abs(len(packed[0]) - len(packed[1]))
    return exactly(
        "export-independent",
        "Bytes of an exported model that follow from records beside its making",
        differing,
        0.0,
        len(packed[0]),
        holds=differing == 0,
    )


def protection_tests(plan: Plan) -> list[ConformanceTest]:
    """Return the tests of sealing, signatures and ledger; that of the export takes seconds of its own."""
    return [*sealing_tests(plan), *signature_tests(), *ledger_tests(plan)]
