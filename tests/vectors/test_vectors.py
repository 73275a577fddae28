"""An independent reading of the formats: plain integers, hashes, and two primitives of a library.

Nothing of the product and nothing of SEAL runs here. Who writes another implementation can start from
this file; it is the formats in executable form.
"""

import ast
import base64
import hashlib
import hmac
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

FOLDER = Path(__file__).parent
SLOTS, CHECK_SLOTS, RESIDUE_BYTES = 4096, 4, 7


def load(name: str) -> dict[str, Any]:
    vector: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="ascii"))
    return vector


# --- canonical JSON ----------------------------------------------------------------------------------

SHORT = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\b": "\\b", "\f": "\\f"}


def escaped(character: str) -> str:
    if character in SHORT:
        return SHORT[character]
    if " " <= character <= "~":
        return character
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))


def canonical(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return f'"{"".join(map(escaped, value))}"'
    if isinstance(value, list):
        return f"[{','.join(map(canonical, value))}]"
    if isinstance(value, dict):
        items = (f"{canonical(key)}:{canonical(value[key])}" for key in sorted(value))
        return f"{{{','.join(items)}}}"
    return repr(value)


def test_canonical_encoding() -> None:
    vector = load("encoding")
    assert len(vector["canonical"]) > 10
    for entry in vector["canonical"]:
        assert canonical(entry["value"]) == entry["bytes"]
        assert hashlib.sha256(entry["bytes"].encode("ascii")).hexdigest() == entry["sha256"]


def test_refused_encodings_are_not_canonical() -> None:
    for text in load("encoding")["refused"]:
        try:
            value = json.loads(text)
        except ValueError:
            continue
        assert canonical(value) != text or value in (float("inf"), [float("inf")]) or value != value


# --- signatures --------------------------------------------------------------------------------------


def test_signatures() -> None:
    vector = load("signatures")
    public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(vector["public_key"]))
    assert {message["kind"] for message in vector["messages"]} == {"session", "ready", "header", "opening"}
    for message in vector["messages"]:
        covered = f"fedseal/{message['kind']}/1\0{canonical(message['body'])}".encode("ascii")
        assert hashlib.sha256(covered).hexdigest() == message["input_sha256"]
        public.verify(bytes.fromhex(message["signature"]), covered)


def test_a_header_covers_its_frames() -> None:
    """A header names the SHA-256 of the canonical list of its frames' SHA-256, and is below a kilobyte."""
    (header,) = (one for one in load("signatures")["messages"] if one["kind"] == "header")
    packing = next(
        one for one in load("packing")["packings"] if (one["preset"], one["cohort"]) == ("exact16", 3)
    )
    frame = base64.b64decode(load("bfv")["owners"][0]["frame"])
    digests = canonical([hashlib.sha256(frame).hexdigest()])
    assert header["body"]["frames_hash"] == hashlib.sha256(digests.encode()).hexdigest()
    assert header["body"]["preset_hash"] == packing["preset_hash"]
    assert (header["body"]["parameters"], header["body"]["frames"]) == (5000, 1)
    assert len(canonical(header["body"])) < 1024


# --- packing -----------------------------------------------------------------------------------------


def radix_of(plain_modulus: int, fields: int) -> int:
    """The largest integer whose power fits the plain modulus, by bisection."""
    low, high = 1, plain_modulus
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**fields <= plain_modulus else (low, middle - 1)
    return low


def packed(entry: dict[str, Any], fields: int) -> list[list[int]]:
    """Slots of a vector's values: frame by frame, field by field, slot by slot; then four ones."""
    span, radix = 2 * entry["half_levels"] + 1, radix_of(entry["plain_modulus"], fields)
    usable = SLOTS - CHECK_SLOTS
    frames = [[0] * usable for _ in range(-(-entry["parameters"] // (usable * fields)))]
    for index in range(entry["parameters"]):
        frame, place = divmod(index, usable * fields)
        field, slot = divmod(place, usable)
        frames[frame][slot] += index * entry["multiplier"] % span * radix**field
    return [frame + [1] * CHECK_SLOTS for frame in frames]


@pytest.mark.parametrize(
    "entry", load("packing")["packings"], ids=lambda entry: f"{entry['preset']}-{entry['cohort']}"
)
def test_packing(entry: dict[str, Any]) -> None:
    fields, modulus = entry["values_per_slot"], entry["plain_modulus"]
    radix = radix_of(modulus, fields)
    assert entry["half_levels"] == (radix - 1) // (4 * entry["cohort"])
    frames = packed(entry, fields)
    assert len(frames) == entry["frames"]
    for frame, slot, expected in entry["slots"]:
        assert frames[frame][slot] == expected
    data = b"".join(word.to_bytes(8, "little") for frame in frames for word in frame)
    assert hashlib.sha256(data).hexdigest() == entry["slots_sha256"]


# --- seeds and masks ---------------------------------------------------------------------------------


def hkdf(secret: bytes, info: bytes) -> bytes:
    """HKDF-SHA256 without salt, one block of output; RFC 5869."""
    extracted = hmac.digest(bytes(32), secret, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")


def test_pair_seed_and_chain_keys() -> None:
    vector = load("seeds")
    lower, higher = vector["lower"], vector["higher"]
    assert lower["fingerprint"] < higher["fingerprint"]
    names = canonical([vector["roster_hash"], lower["fingerprint"], higher["fingerprint"]])
    halves = bytes.fromhex(lower["half"] + higher["half"])
    seed = hkdf(halves, b"fedseal/pair/1\0" + names.encode())
    assert seed.hex() == vector["pair_seed"]
    for entry in vector["chain"]:
        key = hashlib.sha256(b"fedseal/chain/1\0" + seed).digest()
        for _ in range(entry["attempt"]):
            key = hashlib.sha256(b"fedseal/ratchet/1\0" + key).digest()
        assert key.hex() == entry["chain_key"]


def stream(chain_key: bytes, context: dict[str, Any], count: int) -> list[int]:
    """Words of a counter-mode key stream, cut to the modulus' bits; those not below it are skipped."""
    modulus = context["plain_modulus"]
    info = canonical({**context, "plain_modulus": str(modulus)}).encode()
    key = hkdf(chain_key, b"fedseal/mask/1\0" + info)
    cipher = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
    keep = 2 ** (modulus - 1).bit_length() - 1
    numbers: list[int] = []
    while len(numbers) < count:
        number = int.from_bytes(cipher.update(bytes(8)), "little") & keep
        if number < modulus:
            numbers.append(number)
    return numbers


def test_mask_streams() -> None:
    for entry in load("masks")["streams"]:
        key, expected = bytes.fromhex(entry["chain_key"]), entry["stream"]
        assert stream(key, entry["context"], len(expected)) == expected


# --- frames ------------------------------------------------------------------------------------------


def residues(data: bytes) -> list[int]:
    assert len(data) == SLOTS * RESIDUE_BYTES
    return [
        int.from_bytes(data[start : start + RESIDUE_BYTES], "little")
        for start in range(0, len(data), RESIDUE_BYTES)
    ]


def times_ternary(polynomial: list[int], signs: str, modulus: int) -> list[int]:
    """Multiply by a ternary polynomial modulo x^4096 + 1, as two products of long integers (Kronecker)."""
    limb = 10
    number = int.from_bytes(b"".join(value.to_bytes(limb, "little") for value in polynomial), "little")
    result = [0] * SLOTS
    for sign, weight in (("+", 1), ("-", -1)):
        mask = b"".join(int(entry == sign).to_bytes(limb, "little") for entry in signs)
        product = (number * int.from_bytes(mask, "little")).to_bytes(2 * SLOTS * limb, "little")
        for index in range(2 * SLOTS):
            value = int.from_bytes(product[index * limb : (index + 1) * limb], "little")
            result[index % SLOTS] += weight * (value if index < SLOTS else -value)
    return [value % modulus for value in result]


def minimal_root(modulus: int, order: int) -> int:
    """The smallest primitive root of unity of an order that is a power of two."""
    for generator in range(2, 1000):
        root = pow(generator, (modulus - 1) // order, modulus)
        if pow(root, order // 2, modulus) == modulus - 1:
            step, power, smallest = root * root % modulus, root, root
            for _ in range(order // 2):
                power = power * step % modulus
                smallest = min(smallest, power)
            return smallest
    raise AssertionError("the modulus has no such root")


def evaluations(values: list[int], root: int, modulus: int) -> list[int]:
    """Values of a polynomial at root**0, root**1, ...; splits it into its even and odd part."""
    if len(values) == 1:
        return values
    even = evaluations(values[::2], root * root % modulus, modulus)
    odd = evaluations(values[1::2], root * root % modulus, modulus)
    half, power, results = len(even), 1, []
    for index in range(len(values)):
        results.append((even[index % half] + power * odd[index % half]) % modulus)
        power = power * root % modulus
    return results


def slots_of(plaintext: list[int], modulus: int) -> list[int]:
    """Slot i of the first half is the value at psi**(3**i); the second half has the inverse points."""
    psi, order = minimal_root(modulus, 2 * SLOTS), 2 * SLOTS
    twisted = [value * pow(psi, index, modulus) % modulus for index, value in enumerate(plaintext)]
    at_odd = evaluations(twisted, psi * psi % modulus, modulus)
    exponents = [pow(3, index, order) for index in range(SLOTS // 2)]
    return [at_odd[(exponent - 1) // 2] for exponent in exponents] + [
        at_odd[(order - exponent - 1) // 2] for exponent in exponents
    ]


def decrypted(vector: dict[str, Any], phase: list[int], fresh: int) -> list[int]:
    """Round away the noise of `fresh` added ciphertexts, which must be within its proved bound."""
    q, t = vector["coefficient_modulus"], vector["plain_modulus"]
    plaintext = [((2 * t * value + q) // (2 * q)) % t for value in phase]
    for value, message in zip(phase, plaintext, strict=True):
        noise = (t * value - q * message) % (q * t)
        assert 2 * min(noise, q * t - noise) <= 43 * fresh * t
    return slots_of(plaintext, t)


def masked(vector: dict[str, Any], owner: dict[str, Any]) -> list[int]:
    """What this owner encrypted, from its values and its pairs' keys."""
    t, own = vector["plain_modulus"], owner["fingerprint"]
    (slots,) = packed({**vector, **owner}, fields=2)
    for pair, key in vector["pair_keys"].items():
        lower, higher = pair.split("/")
        if own in (lower, higher):
            sign = 1 if own == lower else -1
            masks = stream(bytes.fromhex(key), vector["context"], SLOTS)
            slots = [(slot + sign * mask) % t for slot, mask in zip(slots, masks, strict=True)]
    return slots


@pytest.fixture(scope="module")
def phases() -> list[list[int]]:
    """c0 + c1 s of each owner's frame, modulo q."""
    vector = load("bfv")
    q, result = vector["coefficient_modulus"], []
    for owner in vector["owners"]:
        first = residues(base64.b64decode(owner["frame"])[64:])
        product = times_ternary(
            residues(base64.b64decode(owner["expanded"])), vector["key_coefficients"], q
        )
        result.append([(a + b) % q for a, b in zip(first, product, strict=True)])
    return result


def test_the_secret_key_is_ternary_and_matches_its_transform() -> None:
    vector = load("bfv")
    q, signs = vector["coefficient_modulus"], vector["key_coefficients"]
    assert len(signs) == SLOTS
    assert set(signs) == set("+0-")
    values = [{"+": 1, "0": 0, "-": q - 1}[sign] for sign in signs]
    psi = minimal_root(q, 2 * SLOTS)
    twisted = [value * pow(psi, index, q) % q for index, value in enumerate(values)]
    at_odd = evaluations(twisted, psi * psi % q, q)
    stored = residues(base64.b64decode(vector["key_residues"]))
    assert [stored[int(f"{index:012b}"[::-1], 2)] for index in range(SLOTS)] == at_odd
    commitment = hashlib.sha256(b"fedseal/bfv-key/1\0" + base64.b64decode(vector["key_residues"]))
    assert commitment.hexdigest() == vector["key_commitment"]


def test_each_frame_decrypts_to_the_masked_slots(phases: list[list[int]]) -> None:
    vector = load("bfv")
    for owner, phase in zip(vector["owners"], phases, strict=True):
        assert len(base64.b64decode(owner["frame"])) == 64 + SLOTS * RESIDUE_BYTES
        assert decrypted(vector, phase, fresh=1) == masked(vector, owner)


def test_the_sum_of_the_frames_decrypts_to_the_sum_of_the_values(phases: list[list[int]]) -> None:
    vector = load("bfv")
    q, span = vector["coefficient_modulus"], 2 * vector["half_levels"] + 1
    total = [sum(column) % q for column in zip(*phases, strict=True)]
    opened, radix = decrypted(vector, total, fresh=3), radix_of(vector["plain_modulus"], 2)
    usable = SLOTS - CHECK_SLOTS
    assert opened[usable:] == [3] * CHECK_SLOTS
    fields = [slot % radix for slot in opened[:usable]] + [slot // radix for slot in opened[:usable]]
    parameters = vector["parameters"]
    assert fields[parameters:] == [0] * (2 * usable - parameters)
    assert fields[:parameters] == [
        sum(index * owner["multiplier"] % span for owner in vector["owners"]) for index in range(parameters)
    ]


def test_this_program_shares_no_code_with_the_product() -> None:
    imported = set()
    for node in ast.walk(ast.parse(Path(__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).partition(".")[0])
    allowed = {"ast", "base64", "hashlib", "hmac", "json", "pathlib", "typing", "pytest", "cryptography"}
    assert imported == allowed
