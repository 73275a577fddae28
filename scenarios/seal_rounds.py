"""All parties of one round of secure aggregation, in several schemes; the benchmark `seal` plays them.

Each class calls the functions that its product calls, in the same order. Keys, pair seeds and contexts that
live longer than a round are made by the constructor; everything else is part of a round. `begin` starts the
same round anew, so that some clients can seal again while the others' uploads are kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from client.noise import SecureStream
from crypto.frames import SealContext
from crypto.masks import MaskContext, Masks
from crypto.packing import Floats, mean_update, quantize
from crypto.presets import packing_for
from crypto.sealing import open_frames, seal_frames
from crypto.secret import SealKey
from protocol.encoding import digest, digest_bytes
from protocol.errors import FrameInvalid

UPDATE_RANGE: Final = 1.0
"""Every update lies in [-1, 1]; all quantizers are given this range."""

Integers = NDArray[np.unsignedinteger[Any]] | NDArray[np.signedinteger[Any]]


@dataclass(frozen=True)
class Opened:
    """The mean, float (n,), and the integer sums where the scheme has integers."""

    mean: Sequence[float] | NDArray[np.float64]
    integers: Integers | None = None


class Round(Protocol):
    """All parties of one round of one scheme.

    Attributes:
        clients_open: Whether clients open the sum; else the server sees it.
        download_all: Whether an opener needs all uploads besides what every client gets.
        reusable: Whether one upload may be added in the place of another client's. Masks forbid it, and so
            does an opener that refuses copies.
    """

    clients_open: bool
    download_all: bool
    reusable: bool

    def begin(self, *, rehearsal: bool) -> None:
        """Forget what was added. A rehearsal keeps what `sealed_integers` needs."""

    def seal(self, index: int, update: NDArray[np.float32]) -> list[bytes]:
        """Turn one client's update, float32 (n,), into bytes."""

    def sealed_integers(self, update: NDArray[np.float32]) -> NDArray[np.int64] | None:
        """Return what the last `seal` of a rehearsal encoded, int64 (n,); None if the scheme is inexact."""

    def add(self, index: int, upload: list[bytes]) -> None:
        """Take in the upload of one client, as the server: check it, and add it where the server adds."""

    def finish(self) -> Sequence[bytes]:
        """End the sum as the server and return what every client downloads, if the server knows it."""

    def open(self, download: Sequence[bytes]) -> Opened:
        """Open the sum, as whoever may."""


class FedsealRound:
    """fedseal's own path: the functions that `client.rounds` and `server.rounds` call, in their order."""

    clients_open = True
    download_all = True
    reusable = False

    def __init__(self, preset: str, masked: bool, clients: int) -> None:
        self._packing = packing_for(preset, clients)
        self._server = SealContext(self._packing)
        self._key = SealKey.generate(self._server).residues()
        self._names = [digest(index) for index in range(clients)]
        self._pairs = _pair_secrets(clients) if masked else {}
        self._context = MaskContext(
            session=digest("session"),
            attempt=1,
            purpose="train",
            list_hash=digest("list"),
            model_hash=digest("model"),
            plain_modulus=self._packing.plain_modulus,
        )
        self._hashes: dict[int, str] = {}
        self._parameters = 0
        self.begin(rehearsal=False)

    def begin(self, *, rehearsal: bool) -> None:
        """Forget sums and uploads; digests stay, for uploads of the same round that are added again."""
        self._rehearsal = rehearsal
        self._drawn: list[Floats] = []
        self._uploads: dict[int, bytes] = {}

    def seal(self, index: int, update: NDArray[np.float32]) -> list[bytes]:
        """Quantize, pack, mask with all other clients if there are masks, encrypt, and hash."""
        pairs = {other: frozenset((index, other)) for other in range(len(self._names)) if other != index}
        chains = {self._names[o]: self._pairs[pair] for o, pair in pairs.items() if pair in self._pairs}
        masks = Masks(self._names[index], chains, self._context)
        key = SealKey.from_residues(SealContext(self._packing), self._key)
        uniforms = self._recorded() if self._rehearsal else SecureStream().uniform
        frames = list(seal_frames(update.astype(np.float64), UPDATE_RANGE, uniforms, masks, key))
        self._hashes[index] = _frames_hash(frames)
        self._parameters = update.size
        return [b"".join(frames)]

    def sealed_integers(self, update: NDArray[np.float32]) -> NDArray[np.int64]:
        """Quantize once more, with the random numbers that `seal` drew."""
        uniforms = np.concatenate(self._drawn)
        return quantize(update.astype(np.float64), UPDATE_RANGE, self._packing, uniforms).astype(np.int64)

    def add(self, index: int, upload: list[bytes]) -> None:
        """Compare digests and check residues; adding is left to the openers, as in `server.rounds`."""
        (blob,) = upload
        frames = self._server.split(blob, self._packing.frames_for(self._parameters))
        if _frames_hash(frames) != self._hashes[index]:
            raise FrameInvalid("frames are not the ones whose digest was signed")
        for frame in frames:
            self._server.check(frame)
        self._uploads[index] = blob

    def finish(self) -> Sequence[bytes]:
        """Return nothing: only openers make what clients download."""
        return ()

    def open(self, download: Sequence[bytes]) -> Opened:
        """Check digests and residues of all uploads, add them, decrypt, and check what opens."""
        context = SealContext(self._packing)
        count, clients = self._packing.frames_for(self._parameters), len(self._uploads)
        frames = context.split(b"".join(self._uploads.values()), count * clients)
        rows = [frames[start : start + count] for start in range(0, len(frames), count)]
        if [_frames_hash(row) for row in rows] != [self._hashes[index] for index in self._uploads]:
            raise FrameInvalid("frames are not the ones whose digest was signed")
        if len({digest_bytes(frame) for frame in frames}) != len(frames):
            raise FrameInvalid("a frame occurs twice")
        key = SealKey.from_residues(context, self._key)
        sums = open_frames(list(zip(*rows, strict=True)), self._parameters, key)
        return Opened(mean_update(sums, clients, UPDATE_RANGE, self._packing), sums)

    def _recorded(self) -> Callable[[int], Floats]:
        stream, self._drawn = SecureStream(), []

        def uniforms(count: int) -> Floats:
            self._drawn.append(stream.uniform(count))
            return self._drawn[-1]

        return uniforms


class TensealRound:
    """TenSEAL's high-level CKKS vectors with NVFLARE's parameters, one ciphertext per 4,096 values."""

    clients_open = True
    download_all = False
    reusable = True
    _SLOTS: Final = 4096

    def __init__(self, clients: int) -> None:
        import tenseal

        self._tenseal = tenseal
        self._clients = clients
        self._context = tenseal.context(
            tenseal.SCHEME_TYPE.CKKS,
            poly_modulus_degree=8192,
            coeff_mod_bit_sizes=[60, 40, 40],
            encryption_type=tenseal.ENCRYPTION_TYPE.SYMMETRIC,
        )
        self._context.global_scale = 2**40
        public = self._context.serialize(
            save_public_key=False, save_secret_key=False, save_galois_keys=False, save_relin_keys=True
        )
        self._server = tenseal.context_from(public)
        self.begin(rehearsal=False)

    def begin(self, *, rehearsal: bool) -> None:
        """Forget the sum."""
        self._totals: list[Any] = []

    def seal(self, index: int, update: NDArray[np.float32]) -> list[bytes]:
        """Encrypt and serialize."""
        values = update.astype(np.float64)
        starts = range(0, values.size, self._SLOTS)
        vectors = (self._tenseal.ckks_vector(self._context, values[s : s + self._SLOTS]) for s in starts)
        return [vector.serialize() for vector in vectors]

    def sealed_integers(self, update: NDArray[np.float32]) -> None:
        """Return None: CKKS sums approximate numbers."""

    def add(self, index: int, upload: list[bytes]) -> None:
        """Load and add."""
        vectors = [self._tenseal.ckks_vector_from(self._server, part) for part in upload]
        if not self._totals:
            self._totals = vectors
            return
        for total, vector in zip(self._totals, vectors, strict=True):
            total += vector

    def finish(self) -> Sequence[bytes]:
        """Divide by the number of clients, as NVFLARE does, and serialize."""
        return [(total * (1.0 / self._clients)).serialize() for total in self._totals]

    def open(self, download: Sequence[bytes]) -> Opened:
        """Load and decrypt."""
        mean: list[float] = []
        for part in download:
            mean += self._tenseal.ckks_vector_from(self._context, part).decrypt()
        return Opened(mean)


class SecAggRound:
    """The arithmetic of Flower's SecAgg+ client mod and server workflow, without key shares and dropouts.

    Defaults of its `SecAggPlusWorkflow` but for the clipping range, which is the one of all arms. Source:
    flwr 1.41, `client/mod/secure_aggregation/secaggplus_mod.py`, `_collect_masked_vectors`, and
    `server/workflow/secure_aggregation/secaggplus_workflow.py`, `unmask_stage`.
    """

    clients_open = False
    download_all = False
    reusable = False
    _TARGET: Final = 1 << 22
    _MODULUS: Final = 1 << 32

    def __init__(self, clients: int) -> None:
        from flwr import common
        from flwr.common.secure_aggregation import ndarrays_arithmetic, quantization, secaggplus_utils

        self._wire, self._arrays = common, ndarrays_arithmetic
        self._quantization, self._random = quantization, secaggplus_utils.pseudo_rand_gen
        self._clients = clients
        self._private = [os.urandom(32) for _ in range(clients)]
        self._pairs = _pair_secrets(clients)
        self.begin(rehearsal=False)

    def begin(self, *, rehearsal: bool) -> None:
        """Forget the sum."""
        self._rehearsal = rehearsal
        self._quantized: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._total: list[NDArray[Any]] = []
        self._opened = Opened(())

    def seal(self, index: int, update: NDArray[np.float32]) -> list[bytes]:
        """Quantize, add the private mask and one mask per other client, serialize."""
        weighted = self._arrays.parameters_multiply([update], 1.0)
        quantized = self._quantization.quantize(weighted, UPDATE_RANGE, self._TARGET)
        if self._rehearsal:
            self._quantized = quantized[0].astype(np.int64)
        masked = self._arrays.factor_combine(self._TARGET, quantized)
        shapes = [array.shape for array in masked]
        own = self._random(self._private[index], self._MODULUS, shapes)
        masked = self._arrays.parameters_addition(masked, own)
        for other in range(self._clients):
            if other != index:
                seed = self._pairs[frozenset((index, other))]
                mask = self._random(seed, self._MODULUS, shapes)
                if index > other:
                    masked = self._arrays.parameters_addition(masked, mask)
                else:
                    masked = self._arrays.parameters_subtraction(masked, mask)
        masked = self._arrays.parameters_mod(masked, self._MODULUS)
        return [self._wire.ndarray_to_bytes(array) for array in masked]

    def sealed_integers(self, update: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return what `seal` kept."""
        return self._quantized

    def add(self, index: int, upload: list[bytes]) -> None:
        """Load and add."""
        arrays = [self._wire.bytes_to_ndarray(part) for part in upload]
        self._total = self._arrays.parameters_addition(self._total, arrays) if self._total else arrays

    def finish(self) -> Sequence[bytes]:
        """Take the private masks off, dequantize, and serialize the mean."""
        total = self._arrays.parameters_mod(self._total, self._MODULUS)
        for seed in self._private:
            mask = self._random(seed, self._MODULUS, self._arrays.get_parameters_shape(total))
            total = self._arrays.parameters_subtraction(total, mask)
        factor, sums = self._arrays.factor_extract(self._arrays.parameters_mod(total, self._MODULUS))
        (mean,) = self._quantization.dequantize(sums, UPDATE_RANGE, self._TARGET)
        mean += -(self._clients - 1) * UPDATE_RANGE
        mean *= self._TARGET / factor
        self._opened = Opened(mean, sums[0])
        return list(self._wire.ndarrays_to_parameters([mean]).tensors)

    def open(self, download: Sequence[bytes]) -> Opened:
        """Return what the server saw in `finish`."""
        return self._opened


ROUNDS: Final[Mapping[str, Callable[[int], Round]]] = {
    "exact16": partial(FedsealRound, "exact16", True),
    "unmasked": partial(FedsealRound, "exact16", False),
    "compact": partial(FedsealRound, "compact", True),
    "tenseal": TensealRound,
    "secagg": SecAggRound,
}


def _frames_hash(frames: Sequence[bytes]) -> str:
    return digest([digest_bytes(frame) for frame in frames])


def _pair_secrets(clients: int) -> dict[frozenset[int], bytes]:
    return {frozenset((a, b)): os.urandom(32) for a in range(clients) for b in range(a)}
