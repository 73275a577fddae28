"""An arm of the benchmark `seal` that runs NVFLARE's own homomorphic encryption, in its own environment.

It needs a Python with ``nvflare[HE]==2.9.0`` and nothing of fedseal. Requests come one per line on standard
input; each is answered with one JSON line, as `scenarios.bench_arms` describes. It calls what a job with
NVFLARE's HE filters calls: `HEModelEncryptor`, `serialize_nested_dict` (of its serialize filter),
`WeightedAggregationHelper` and `HEModelDecryptor`, with the CKKS parameters that its provisioning sets.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import logging
import os
import platform
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

VERSION = "2.9.0"


class NvflareRound:
    """All parties of one round: clients, server, decryption."""

    def __init__(self) -> None:
        self.np = importlib.import_module("numpy")
        self.ts = importlib.import_module("tenseal")
        encryptor = importlib.import_module("nvflare.app_opt.he.model_encryptor").HEModelEncryptor
        decryptor = importlib.import_module("nvflare.app_opt.he.model_decryptor").HEModelDecryptor
        encrypting = importlib.import_module("nvflare.app_opt.he.homomorphic_encrypt")
        helper = importlib.import_module("nvflare.app_common.aggregators.weighted_aggregation_helper")
        self._serialize = encrypting.serialize_nested_dict
        self._fl_context = importlib.import_module("nvflare.apis.fl_context").FLContext()
        client, self._server = self._contexts()
        self._encryptor, self._decryptor = encryptor(), decryptor()
        self._encryptor.tenseal_context = client
        self._decryptor.tenseal_context = client
        # what its own START_RUN handler and process_dxo set: encrypt all layers, one local iteration
        self._encryptor.encrypt_layers, self._encryptor.n_iter = [True], 1
        self._sum = helper.WeightedAggregationHelper(exclude_vars=None, weigh_by_local_iter=False)

    def seal(self, update: Any) -> bytes:
        """Encrypt and serialize one client's update."""
        encrypted, _ = self._encryptor.encryption({"w": update}, self._fl_context)
        blob: bytes = self._serialize(encrypted)["w"]
        return blob

    def add(self, index: int, blob: bytes) -> None:
        """Load one upload and add it, as the server."""
        vector = self.ts.ckks_vector_from(self._server, blob)
        self._sum.add({"w": vector}, 1.0, f"site-{index}", 0)

    def finish(self) -> bytes:
        """Weigh the sum and serialize it, as the server."""
        blob: bytes = self._serialize(self._sum.get_result())["w"]
        return blob

    def open(self, blob: bytes) -> Any:
        """Load and decrypt the mean, as every client."""
        return self._decryptor.decryption({"w": blob}, {"w": True}, self._fl_context)["w"]

    def _contexts(self) -> tuple[Any, Any]:
        context = self.ts.context(
            self.ts.SCHEME_TYPE.CKKS,
            poly_modulus_degree=8192,
            coeff_mod_bit_sizes=[60, 40, 40],
            encryption_type=self.ts.ENCRYPTION_TYPE.SYMMETRIC,
        )
        context.generate_relin_keys()
        context.global_scale = 2**40
        public = context.serialize(
            save_public_key=False, save_secret_key=False, save_galois_keys=False, save_relin_keys=True
        )
        return context, self.ts.context_from(public)


def measure(request: dict[str, Any]) -> dict[str, float | None]:
    """Play one round, write its mean to the request's result file, and return the figures."""
    parameters, clients = int(request["parameters"]), int(request["clients"])
    with suppress(OSError):
        # a new peak of resident memory
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    parties = NvflareRound()
    sealed, timed, summed = int(request["sealed"]), int(request["timed_adds"]), bool(request["summed"])
    client_s = server_s = 0.0
    upload_bytes = added = 0
    for first in range(sealed):
        offset = 4 * parameters * first
        update = parties.np.fromfile(request["updates"], dtype="<f4", count=parameters, offset=offset)
        start = time.process_time()
        blob = parties.seal(update)
        client_s += time.process_time() - start
        upload_bytes += len(blob)
        # CKKS sums are of numbers: the same upload serves all clients that have the same update
        for index in range(first, clients if summed else sealed, sealed):
            start = time.process_time()
            parties.add(index, blob)
            server_s += time.process_time() - start if added < timed else 0.0
            added += 1
        # nobody needs it any more: it must not count in the peak of the next one's sealing
        del blob
    up = upload_bytes / sealed / parameters
    figures: dict[str, float | None] = {
        "client_cpu_s": client_s / sealed,
        "server_cpu_s": server_s / timed,
        "upload_bytes_per_parameter": up,
        "upload_per_float32": up / 4.0,
        "opening_bytes_per_parameter": None,
        "wrong_integer_sums": None,
    }
    return figures | (open_mean(parties, request) if summed else {})


def open_mean(parties: NvflareRound, request: dict[str, Any]) -> dict[str, float | None]:
    """Finish the sum, open and write the mean, and return the figures of that."""
    start = time.process_time()
    download = parties.finish()
    finished = time.process_time()
    mean = parties.open(download)
    opened = time.process_time()
    parties.np.asarray(mean, dtype="<f8").tofile(request["result"])
    return {
        "server_round_cpu_s": finished - start,
        "opener_cpu_s": opened - finished,
        "download_bytes_per_parameter": len(download) / int(request["parameters"]),
        "peak_rss_mib": peak_rss_mib(),
    }


def peak_rss_mib() -> float:
    """Return the peak of resident memory in MiB.

    Linux counts a parent's memory into a child's `getrusage`, therefore its own counter comes first.
    """
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii")
        return int(text.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        import resource

        unit = 1024**2 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def ready() -> dict[str, Any]:
    """Load everything once; return the first line, or why this environment cannot be used."""
    try:
        versions = {name: importlib.metadata.version(name) for name in ("nvflare", "tenseal", "numpy")}
        if versions["nvflare"] != VERSION:
            return {"error": f"needs nvflare {VERSION}, this Python has {versions['nvflare']}"}
        NvflareRound()
    except ImportError as error:
        return {"error": f"this Python has no {error.name or 'complete nvflare[HE]'}"}
    except Exception as error:
        return {"error": type(error).__name__}
    return {"versions": {"python": platform.python_version(), **versions}, "idle_rss_mib": peak_rss_mib()}


def main() -> None:
    """Answer requests until standard input ends."""
    # TenSEAL prints warnings to file descriptor 1, which would break the answers
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    logging.disable(logging.CRITICAL)
    first = ready()
    print(json.dumps(first), file=answers, flush=True)
    if "error" in first:
        return
    for line in sys.stdin:
        try:
            answer: dict[str, Any] = {"figures": measure(json.loads(line))}
        except Exception as error:
            # only the kind: messages of libraries may hold paths
            answer = {"error": type(error).__name__}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
