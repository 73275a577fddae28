"""Make the known-answer vectors from the product's own code.

`python -m tests.vectors.make_vectors` rewrites the vectors that are functions of fixed inputs. The
encrypted frames are randomized; they are made once, with `--frames`, and kept. The program that checks
the vectors, `test_vectors.py`, shares no code with this one or with the product.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import zstandard
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from crypto.agreement import pair_seed
from crypto.frames import SealContext, SealFile
from crypto.masks import MaskContext, advance, apply_masks, first_chain_key, mask_stream
from crypto.packing import pack, unpack_sum
from crypto.presets import PRESETS, Packing, packing_for
from crypto.secret import SealKey
from crypto.signing import sign
from protocol.encoding import digest, digest_bytes, encode
from protocol.messages import Body, Header, LedgerHead, Opening, Ready, Session

FOLDER: Final = Path(__file__).parent
A, B, C, D = ("a1" * 32, "b2" * 32, "c3" * 32, "d4" * 32)
MULTIPLIER: Final = 2_654_435_761
SMALL_MODULUS: Final = 11
FRAMES_SOURCE: Final = (
    "Made once by crypto.secret with SEAL 4.3 of TenSEAL 0.3.18. `expanded` holds the residues of the "
    "random half as SEAL expanded it from the frame's 64-byte seed (BLAKE2xb), so that the check needs no "
    "expansion of its own; it is packed like the frame's residues, 7 bytes each. `key_residues` is the "
    "secret key in SEAL's number-theoretic transform form, `key_coefficients` the same key as coefficients "
    "of x^0 to x^4095. The key protects nothing else. An owner's value i is "
    "i * multiplier mod (2 half_levels + 1)."
)

CANONICAL: Final[list[Any]] = [
    None,
    True,
    0,
    -1,
    2**64,
    1.0,
    0.1,
    -0.0,
    1e300,
    2.5e-07,
    "",
    'a"b\\c/d',
    "\t\n\u0000\u007f",
    "käse 😀",
    [],
    {},
    {"b": [1, 1.0, True], "a": {"z": None, "": "x"}, "ä": 0, "Z": 1},
]
REFUSED: Final = [
    '{"b":1,"a":2}',
    '{"a":1,"a":1}',
    '{"a": 1}',
    '"\\u0061"',
    '"\\u00FC"',
    '"ü"',
    "1.50",
    "1E5",
    "NaN",
    "[Infinity]",
    "-0",
    " 1",
    "01",
    "",
]


def encoding_vectors() -> dict[str, Any]:
    """Values with their canonical bytes, and texts that no decoder may take."""
    return {
        "source": "Made by protocol.encoding; checked by a writer of canonical JSON of its own.",
        "canonical": [
            {"value": value, "bytes": encode(value).decode("ascii"), "sha256": digest(value)}
            for value in CANONICAL
        ],
        "refused": REFUSED,
    }


def signature_vectors() -> dict[str, Any]:
    """Signed messages of a fixed key, with the hash of what the signature covers."""
    seed = bytes(range(32))
    key = Ed25519PrivateKey.from_private_bytes(seed)
    bodies: list[Body] = [
        Session(session=A),
        Ready(
            session=A,
            attempt=7,
            purpose="train",
            model_hash=B,
            ledger=LedgerHead(sequence=12, head=C),
        ),
        Header(
            version=1,
            session=A,
            attempt=7,
            purpose="train",
            preset_hash=packing_for("exact16", 3).sha256(),
            list_hash=B,
            model_hash=C,
            parameters=5000,
            frames=1,
            frames_hash=digest([digest_bytes(_first_frame())]),
        ),
        Opening(
            session=A,
            attempt=7,
            purpose="train",
            list_hash=B,
            headers_hash=C,
            model_hash=D,
            contributors=3,
            total_weight=3.0,
            sums_hash=A,
        ),
    ]
    return {
        "source": "Made by crypto.signing; Ed25519 is deterministic, RFC 8032.",
        "private_key": seed.hex(),
        "public_key": key.public_key().public_bytes_raw().hex(),
        "messages": [_signature_vector(key, body) for body in bodies],
    }


def _first_frame() -> bytes:
    """Return the frame of the first owner of the vectors that were made with `--frames`."""
    vector = json.loads((FOLDER / "bfv.json").read_text(encoding="ascii"))
    return base64.b64decode(vector["owners"][0]["frame"])


def _signature_vector(key: Ed25519PrivateKey, body: Body) -> dict[str, Any]:
    signed = sign(key, body)
    covered = b"fedseal/" + body.KIND.encode() + b"/1\0" + encode(signed.body)
    return {
        "kind": body.KIND,
        "body": signed.body,
        "signer": signed.signer,
        "input_sha256": hashlib.sha256(covered).hexdigest(),
        "signature": signed.signature.hex(),
    }


def values_for(packing: Packing, parameters: int, multiplier: int) -> NDArray[np.uint64]:
    """Value i is ``i * multiplier mod (2 L + 1)``."""
    index = np.arange(parameters, dtype=np.uint64)
    return index * np.uint64(multiplier) % np.uint64(2 * packing.half_levels + 1)


def packing_vectors() -> dict[str, Any]:
    """Slots of known integers, for every preset: a few in full, all of them by their hash."""
    entries = []
    for name in (one for one in sorted(PRESETS) if PRESETS[one].scheme == "BFV"):
        largest = PRESETS[name].plain_bits[-1][0]
        for cohort, parameters in ((3, 10), (8, 20_000), (256, 8185), *[(1024, 8185)] * (largest > 256)):
            packing = packing_for(name, cohort)
            slots = pack(values_for(packing, parameters, MULTIPLIER), packing)
            places = [(frame, slot) for frame in range(len(slots)) for slot in (0, 1, 9, 4091, 4092, 4095)]
            entries.append(
                {
                    "preset": name,
                    "cohort": cohort,
                    "preset_hash": packing.sha256(),
                    "values_per_slot": packing.preset.values_per_slot,
                    "plain_modulus": packing.plain_modulus,
                    "half_levels": packing.half_levels,
                    "parameters": parameters,
                    "multiplier": MULTIPLIER,
                    "frames": len(slots),
                    "slots": [[frame, slot, int(slots[frame, slot])] for frame, slot in places],
                    "slots_sha256": hashlib.sha256(slots.astype("<u8").tobytes()).hexdigest(),
                }
            )
    return {
        "source": "Made by crypto.packing. Value i is i * multiplier mod (2 half_levels + 1). "
        "slots_sha256 is over all slots as little-endian 64-bit words.",
        "packings": entries,
    }


def seed_vectors() -> dict[str, Any]:
    """A pair's seed from two halves, and its chain keys."""
    lower, higher = bytes(range(32)), bytes(range(100, 132))
    seed = pair_seed(A, B, lower, higher, D)
    chain = first_chain_key(seed)
    return {
        "source": "Made by crypto.agreement and crypto.masks; HKDF-SHA256 is RFC 5869.",
        "lower": {"fingerprint": A, "half": lower.hex()},
        "higher": {"fingerprint": B, "half": higher.hex()},
        "roster_hash": D,
        "pair_seed": seed.hex(),
        "chain": [
            {"attempt": attempt, "chain_key": advance(chain, attempt).hex()} for attempt in (0, 1, 2, 17)
        ],
    }


def mask_vectors() -> dict[str, Any]:
    """Mask streams of fixed keys; one modulus is small, so that words are rejected."""
    entries = []
    for attempt, modulus, count in ((0, SMALL_MODULUS, 200), (7, 140737488273409, 64)):
        context = MaskContext(A, attempt, "train", B, C, modulus)
        chain_key = advance(first_chain_key(bytes(range(32))), attempt)
        entries.append(
            {
                "chain_key": chain_key.hex(),
                "context": asdict(context),
                "stream": mask_stream(chain_key, context, count).tolist(),
            }
        )
    return {"source": "Made by crypto.masks; AES-256-CTR under HKDF-SHA256.", "streams": entries}


def frame_vectors() -> dict[str, Any]:
    """Three owners' masked, encrypted frames under one key, with everything to open them by hand."""
    packing = packing_for("exact16", 3)
    context = SealContext(packing)
    key = SealKey.generate(context)
    masks = MaskContext(A, 7, "train", B, C, packing.plain_modulus)
    owners, parameters = [A, B, C], 5000
    entries, frames = [], []
    for number, owner in enumerate(owners, start=1):
        slots = pack(values_for(packing, parameters, MULTIPLIER + number), packing)
        chains = {peer: _pair_chain(owner, peer) for peer in owners if peer != owner}
        frames.append(key.encrypt(apply_masks(slots, owner, chains, masks)[0]))
        entries.append(
            {
                "fingerprint": owner,
                "multiplier": MULTIPLIER + number,
                "frame": _text(frames[-1]),
                "expanded": _text(_expanded_half(context, frames[-1])),
            }
        )
    # A vector that does not open must not be written.
    unpack_sum(key.open_sum([frames]), parameters, len(owners), packing)
    return {
        "source": FRAMES_SOURCE,
        "preset": "exact16",
        "cohort": 3,
        "poly_modulus_degree": 4096,
        "coefficient_modulus": packing.preset.coefficient_modulus,
        "plain_modulus": packing.plain_modulus,
        "half_levels": packing.half_levels,
        "parameters": parameters,
        "context": asdict(masks),
        "pair_keys": {
            f"{lower}/{higher}": _pair_chain(lower, higher).hex()
            for lower, higher in ((A, B), (A, C), (B, C))
        },
        "key_residues": _text(key.residues()),
        "key_commitment": key.commitment(),
        "key_coefficients": _ternary(context, key),
        "owners": entries,
    }


def _pair_chain(one: str, other: str) -> bytes:
    return hashlib.sha256("/".join(sorted((one, other))).encode()).digest()


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _expanded_half(context: SealContext, frame: bytes) -> bytes:
    file = SealFile()
    context.ciphertext(frame).save(file.path)
    body = zstandard.ZstdDecompressor().decompressobj().decompress(file.read()[16:])
    file.close()
    words = np.frombuffer(body[-2 * 4096 * 8 :], dtype="<u8").reshape(2, 4096)
    if not np.array_equal(words[0], context.residues(frame[64:])):
        raise RuntimeError("SEAL's expanded ciphertext does not have the expected layout")
    return context.residue_bytes(words[1].astype(np.uint64))


def _ternary(context: SealContext, key: SealKey) -> str:
    """Invert SEAL's transform: entry i, bits reversed, is the value at psi**(2 i + 1), psi minimal."""
    modulus, degree = context.packing.preset.coefficient_modulus, 4096
    values = context.residues(key.residues()).tolist()
    ordered = [values[int(f"{index:012b}"[::-1], 2)] for index in range(degree)]
    inverse_root = pow(_minimal_root(modulus, 2 * degree), -1, modulus)
    coefficients = _transform(ordered, pow(inverse_root, 2, modulus), modulus)
    scale, signs = pow(degree, -1, modulus), {0: "0", 1: "+", modulus - 1: "-"}
    return "".join(
        signs[value * scale * pow(inverse_root, index, modulus) % modulus]
        for index, value in enumerate(coefficients)
    )


def _minimal_root(modulus: int, order: int) -> int:
    base = next(
        root
        for root in (pow(g, (modulus - 1) // order, modulus) for g in range(2, 1000))
        if pow(root, order // 2, modulus) == modulus - 1
    )
    return min(pow(base, exponent, modulus) for exponent in range(1, order, 2))


def _transform(values: list[int], root: int, modulus: int) -> list[int]:
    """Return the sums of values[j] * root**(j k), a radix-2 transform in plain integers."""
    if len(values) == 1:
        return values
    even = _transform(values[::2], root * root % modulus, modulus)
    odd = _transform(values[1::2], root * root % modulus, modulus)
    twisted = [value * pow(root, index, modulus) for index, value in enumerate(odd)]
    return [(a + b) % modulus for a, b in zip(even, twisted, strict=True)] + [
        (a - b) % modulus for a, b in zip(even, twisted, strict=True)
    ]


DETERMINISTIC: Final = {
    "encoding": encoding_vectors,
    "signatures": signature_vectors,
    "packing": packing_vectors,
    "seeds": seed_vectors,
    "masks": mask_vectors,
}


def write(name: str, document: dict[str, Any]) -> None:
    """Write one vector file beside this program."""
    text = json.dumps(document, indent=1, ensure_ascii=True)
    (FOLDER / f"{name}.json").write_text(text + "\n", encoding="ascii")


def main() -> None:
    """Write the vector files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", action="store_true", help="make new encrypted frames as well")
    chosen = parser.parse_args()
    # a header among the signatures covers one of the frames
    if chosen.frames:
        write("bfv", frame_vectors())
    for name, make in DETERMINISTIC.items():
        write(name, make())


if __name__ == "__main__":
    main()
