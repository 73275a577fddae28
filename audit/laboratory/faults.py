"""Faults that are planted in the running code on purpose, to see that an audit notices them.

A fault replaces one function of the shipping code while a `with` block runs, and only for the thread and
context that planted it: an owner that trains in another thread of the same process keeps its noise. Faults
of noise and coins also take away the check that training begins with, as a careless change might, so that
what notices them is a measurement. Code that trains, seals or opens must never import this.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import client.training
import crypto.sealing
import crypto.signing
import deploy.build
from client.gradients import GradientEngine, Sums, batch_sums
from client.noise import SecureStream
from crypto.masks import Masks
from crypto.presets import SEED_BYTES, Packing
from crypto.secret import SealKey
from protocol.accounting import Mechanism
from protocol.plan import Plan
from tasks.images import Examples
from tasks.registry import task_for

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Layer = Literal["training", "sealing", "signatures", "ledger", "export"]
Maker = Callable[[Callable[..., Any]], Callable[..., Any]]

_NOISE_BLOCK = 2**15

_ACTIVE: ContextVar[bool] = ContextVar("fault", default=False)
_LOCK = threading.RLock()


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: Short and stable, for tables.
        layer: Whose tests must notice it.
        test: The test that is there for it; others may notice it too.
        plant: Gives the context in which the fault is there.
    """

    name: str
    layer: Layer
    test: str
    plant: Callable[[], AbstractContextManager[None]]


@contextmanager
def replaced(owner: Any, name: str, make: Maker) -> Iterator[None]:
    """Replace a function of a module or class for this context, and put it back after.

    Args:
        owner: Module or class that holds the function.
        name: Its name there.
        make: Gives from the original the function to call instead.
    """
    with _LOCK:
        original = getattr(owner, name)
        fault = make(original)

        def either(*arguments: Any, **named: Any) -> Any:
            return (fault if _ACTIVE.get() else original)(*arguments, **named)

        token = _ACTIVE.set(True)
        setattr(owner, name, either)
        try:
            yield
        finally:
            setattr(owner, name, original)
            _ACTIVE.reset(token)


@contextmanager
def _unguarded() -> Iterator[None]:
    with replaced(client.training, "require_secret_randomness", lambda _: lambda *_a: None):
        yield


@contextmanager
def _stream(name: str, make: Maker) -> Iterator[None]:
    """Replace a method of the secure stream, and the check that would see it."""
    with _unguarded(), replaced(SecureStream, name, make):
        yield


# --- noise ---------------------------------------------------------------------------------------------


def scaled_noise(factor: float) -> AbstractContextManager[None]:
    """Give every noise value this share of its deviation; 0 switches the noise off."""

    def make(gaussian: Callable[..., Any]) -> Callable[..., Any]:
        def scaled(stream: SecureStream, n: int) -> Floats:
            values: Floats = factor * gaussian(stream, n)
            return values

        return scaled

    return _stream("gaussian", make)


def _noise_of_another_shape() -> AbstractContextManager[None]:
    def uniform(_stream: SecureStream, n: int) -> Floats:
        return np.random.default_rng().uniform(-(3**0.5), 3**0.5, n)

    return _stream("gaussian", lambda _: uniform)


def _noise_repeated_in_the_model() -> AbstractContextManager[None]:
    def make(gaussian: Callable[..., Any]) -> Callable[..., Any]:
        return lambda stream, n: np.resize(gaussian(stream, max(1, n // 4)), n)

    return _stream("gaussian", make)


def _noise_repeated_after_a_block() -> AbstractContextManager[None]:
    def make(gaussian: Callable[..., Any]) -> Callable[..., Any]:
        return lambda stream, n: np.resize(gaussian(stream, min(n, _NOISE_BLOCK)), n)

    return _stream("gaussian", make)


@contextmanager
def _halved_at_the_own_size() -> Iterator[None]:
    """Halve the noise where it is drawn for as many values as the plan's own model has, nowhere else."""
    state = {"size": 0}

    def preparing(prepared: Callable[..., Any]) -> Callable[..., Any]:
        def begin(task: Any, plan: Plan, model_vector: Floats, examples: Examples) -> Any:
            state["size"] = sum(p.numel() for p in task_for(plan).build_model(plan).parameters())
            return prepared(task, plan, model_vector, examples)

        return begin

    def make(gaussian: Callable[..., Any]) -> Callable[..., Any]:
        def halved(stream: SecureStream, n: int) -> Floats:
            values: Floats = gaussian(stream, n) * (0.5 if n == state["size"] else 1.0)
            return values

        return halved

    with replaced(client.training, "_prepared", preparing), _stream("gaussian", make):
        yield


@contextmanager
def _seeded_noise(seed_of: Callable[[Floats], int]) -> Iterator[None]:
    """Draw the noise from a seed that is set when a round of training begins."""
    state = {"seed": 0, "draws": 0}

    def preparing(prepared: Callable[..., Any]) -> Callable[..., Any]:
        def begin(task: Any, plan: Plan, model_vector: Floats, examples: Examples) -> Any:
            state.update(seed=seed_of(model_vector), draws=0)
            return prepared(task, plan, model_vector, examples)

        return begin

    def seeded(_stream: SecureStream, n: int) -> Floats:
        state["draws"] += 1
        return np.random.default_rng([state["seed"], state["draws"]]).standard_normal(n)

    with replaced(client.training, "_prepared", preparing), _stream("gaussian", lambda _: seeded):
        yield


def _seed_of_model(model_vector: Floats) -> int:
    return int.from_bytes(hashlib.sha256(model_vector.tobytes()).digest()[:8], "little")


@contextmanager
def _noise_once_a_round() -> Iterator[None]:
    state = {"draws": 0}

    def preparing(prepared: Callable[..., Any]) -> Callable[..., Any]:
        def begin(*arguments: Any) -> Any:
            state["draws"] = 0
            return prepared(*arguments)

        return begin

    def make(gaussian: Callable[..., Any]) -> Callable[..., Any]:
        def first(stream: SecureStream, n: int) -> Floats:
            state["draws"] += 1
            values: Floats = gaussian(stream, n) * (state["draws"] == 1)
            return values

        return first

    with replaced(client.training, "_prepared", preparing), _stream("gaussian", make):
        yield


# --- clipping, sampling, dividing ----------------------------------------------------------------------


def _no_clip() -> AbstractContextManager[None]:
    def unclipped(engine: GradientEngine, _plan: Plan) -> Sums:
        return lambda x, y: batch_sums(engine, engine.plain_sums, x, y)

    return replaced(client.training, "_clipped", lambda _: unclipped)


def _batch_clip() -> AbstractContextManager[None]:
    def clip_the_sum(engine: GradientEngine, plan: Plan) -> Sums:
        def sums(x: Any, y: Any) -> list[Any]:
            totals = batch_sums(engine, engine.plain_sums, x, y)
            norm = sum(float(total.square().sum()) for total in totals) ** 0.5
            return [total * min(1.0, plan.privacy.max_grad_norm / (norm + 1e-6)) for total in totals]

        return sums

    return replaced(client.training, "_clipped", lambda _: clip_the_sum)


def _coins(make: Callable[[Callable[..., Bools], int, float], Bools]) -> AbstractContextManager[None]:
    def replace(coins: Callable[..., Bools]) -> Callable[..., Bools]:
        return lambda stream, n, probability: make(partial(coins, stream), n, probability)

    return _stream("coins", replace)


def _double_rate() -> AbstractContextManager[None]:
    return _coins(lambda coins, n, probability: coins(n, min(1.0, 2 * probability)))


def _some_always() -> AbstractContextManager[None]:
    return _coins(lambda coins, n, probability: coins(n, probability) | (np.arange(n) < n // 20))


def _shuffle() -> AbstractContextManager[None]:
    """Go through the records in a shuffled order, batch by batch, instead of tossing a coin for each."""
    left: dict[int, list[int]] = {}

    def batch(_coins_of: Callable[..., Bools], n: int, probability: float) -> Bools:
        order, size = left.setdefault(n, []), round(n * probability)
        if len(order) < size:
            order[:] = np.random.default_rng().permutation(n).tolist()
        chosen = np.zeros(n, dtype=np.bool_)
        chosen[order[:size]] = True
        del order[:size]
        return chosen

    return _coins(batch)


def _divisor_of_records() -> AbstractContextManager[None]:
    def make(train: Callable[..., Any]) -> Callable[..., Any]:
        def private(prepared: Any, plan: Plan, examples: Examples, noise: float) -> Any:
            size = max(1, len(examples)) * plan.privacy.sample_rate
            privacy = plan.privacy.model_copy(update={"expected_batch_size": size})
            return train(prepared, plan.model_copy(update={"privacy": privacy}), examples, noise)

        return private

    return replaced(client.training, "_train", make)


# --- accounting, sealing, signing, exporting -----------------------------------------------------------


def _rounds_forgotten() -> AbstractContextManager[None]:
    """Price every round as if it were the only one, as a fresh accountant in each round does."""

    def make(epsilon: Callable[..., float]) -> Callable[..., float]:
        return lambda mechanism, rounds: epsilon(mechanism, min(rounds, 1))

    return replaced(Mechanism, "epsilon", make)


def _plain_frame(key: SealKey, slots: NDArray[np.uint64]) -> bytes:
    """Return a frame of the right form whose residues are the slots themselves."""
    primes = key.context.packing.preset.coefficient_moduli
    residues = np.concatenate([np.resize(slots, slots.size) % np.uint64(prime) for prime in primes])
    return os.urandom(SEED_BYTES) + key.context.residue_bytes(residues)


def _encryption_off() -> AbstractContextManager[None]:
    return replaced(SealKey, "encrypt", lambda _: _plain_frame)


def _frames_repeated() -> AbstractContextManager[None]:
    """Encrypt equal slots to equal frames."""
    known: dict[bytes, bytes] = {}

    def make(encrypt: Callable[..., bytes]) -> Callable[..., bytes]:
        def remembered(key: SealKey, slots: NDArray[np.uint64]) -> bytes:
            text = slots.tobytes()
            if text not in known:
                known[text] = encrypt(key, slots)
            return known[text]

        return remembered

    return replaced(SealKey, "encrypt", make)


def _masks_off() -> AbstractContextManager[None]:
    return replaced(Masks, "apply", lambda _: lambda _masks, slots: slots)


def _foreign_key_accepted() -> AbstractContextManager[None]:
    """Take whatever a sum decrypts to, without looking at check slots and ranges."""

    def lenient(packed: NDArray[np.uint64], parameters: int, _owners: int, _packing: Packing) -> Any:
        return np.resize(packed.reshape(-1), parameters)

    return replaced(crypto.sealing, "unpack_sum", lambda _: lenient)


def _signature_ignored() -> AbstractContextManager[None]:
    return replaced(crypto.signing, "verify_bytes", lambda _: lambda *_a: None)


def _calibrated_on_records() -> AbstractContextManager[None]:
    def make(within: Callable[..., Any]) -> Callable[..., Any]:
        return lambda plain, settings, records, _synthetic, word: within(
            plain, settings, records, records[0], word
        )

    return replaced(deploy.build, "_quantize_within", make)


def _rebuilt_on_records() -> AbstractContextManager[None]:
    def make(prune: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *a: prune(*a[:-1], a[2][0])

    return replaced(deploy.build, "prune_within", make)


FAULTS = (
    Fault("no noise", "training", "noise-scale", partial(scaled_noise, 0.0)),
    Fault("half the noise", "training", "noise-scale", partial(scaled_noise, 0.5)),
    Fault("0.8 of the noise", "training", "noise-scale", partial(scaled_noise, 0.8)),
    Fault("0.95 of the noise", "training", "noise-scale", partial(scaled_noise, 0.95)),
    Fault("noise in one step of a round", "training", "noise-scale", _noise_once_a_round),
    Fault("noise of another shape", "training", "noise-distribution", _noise_of_another_shape),
    Fault(
        "noise repeated in the model", "training", "noise-across-coordinates", _noise_repeated_in_the_model
    ),
    Fault(
        "noise repeated after 32,768 values",
        "training",
        "noise-across-coordinates-own-model",
        _noise_repeated_after_a_block,
    ),
    Fault(
        "half the noise at the plan's own model size",
        "training",
        "noise-scale-own-model",
        _halved_at_the_own_size,
    ),
    Fault(
        "noise seed reused per round",
        "training",
        "noise-across-rounds",
        partial(_seeded_noise, lambda _: 7),
    ),
    Fault(
        "noise shared across owners",
        "training",
        "noise-across-owners",
        partial(_seeded_noise, _seed_of_model),
    ),
    Fault("no clip", "training", "clip", _no_clip),
    Fault("batch clipped, not examples", "training", "clip", _batch_clip),
    Fault("double sampling rate", "training", "participation-rate", _double_rate),
    Fault("shuffle instead of Poisson", "training", "batch-dispersion", _shuffle),
    Fault("some records in every batch", "training", "record-dispersion", _some_always),
    Fault("divisor from the owner's records", "training", "record-count", _divisor_of_records),
    Fault("epsilon forgotten across rounds", "ledger", "ledger-composition", _rounds_forgotten),
    Fault("encryption off", "sealing", "frames-uniform", _encryption_off),
    Fault("encryption repeats itself", "sealing", "frames-fresh", _frames_repeated),
    Fault("masks off", "sealing", "masked", _masks_off),
    Fault("frame under another key accepted", "sealing", "foreign-key", _foreign_key_accepted),
    Fault("wrong signature accepted", "signatures", "forged-signature", _signature_ignored),
    Fault("export calibrated on records", "export", "export-independent", _calibrated_on_records),
    Fault("export rebuilt on records", "export", "export-independent", _rebuilt_on_records),
)
"""Every fault that a self-test plants, one by one."""
