"""Frames in SEAL's own form: exact, of one length, and nothing hostile gets as far as a wrong sum."""

from __future__ import annotations

import base64
import json
import os
import stat
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tenseal.sealapi as seal
from test_policy import TEXT, make_plan

import crypto.frames
import crypto.secret
from client.policy import Policy, admit
from console.sealplan import seal_plan
from crypto.frames import SEAL_HEADER, SealContext, SealFile
from crypto.layouts import SAMPLES, Layout
from crypto.measuring import ciphertext_layout, expanded, key_layout, plan_context
from crypto.packing import unpack_sum
from crypto.presets import PRESETS, broken_byte_promise, packing_for
from crypto.secret import SealKey, self_test
from protocol.errors import EncryptionUnavailable, FrameInvalid, PlanInvalid, PolicyRefused
from server.rounds.layout import frame_layout

NAMES = [name for name in sorted(PRESETS) if PRESETS[name].scheme == "BFV"]
ROOT = Path(__file__).parents[2]
OUTER, COMPRESSION, CLAIM = slice(0, 16), 5, slice(8, 16)


def own_context(name: str, cohort: int = 8) -> SealContext:
    packing = packing_for(name, cohort)
    return SealContext(packing, ciphertext_layout(packing))


@pytest.fixture(scope="module", params=NAMES)
def key(request: pytest.FixtureRequest) -> SealKey:
    return SealKey.generate(own_context(request.param))


@pytest.fixture
def another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """The skeletons made here are those of another SEAL version than the installed one."""
    monkeypatch.setattr(crypto.frames, "_SEAL_VERSION", (9, 9))


def slots_for(key: SealKey, seed: int) -> np.ndarray:
    packing = key.context.packing
    return np.random.default_rng(seed).integers(0, packing.plain_modulus, 4096, dtype=np.uint64)


# --- what works --------------------------------------------------------------------------------------


def test_own_frames_have_one_length_and_open_to_the_exact_sum(key: SealKey) -> None:
    context, modulus = key.context, key.context.packing.plain_modulus
    rows = [slots_for(key, number) for number in range(3)]
    frames = [key.encrypt(row) for row in rows]
    assert {len(frame) for frame in frames} == {context.frame_bytes}
    assert len({context.seed(frame) for frame in frames}) == 3
    assert {len(context.seed(frame)) for frame in frames} == {64}
    for frame in frames:
        context.check(frame)
    columns = zip(*(row.tolist() for row in rows), strict=True)
    assert key.open_sum([frames])[0].tolist() == [sum(column) % modulus for column in columns]
    assert context.split(b"".join(frames), 3) == frames


def test_own_and_packed_frames_hold_the_same_ciphertext(key: SealKey) -> None:
    """The first eight bytes of the content are the first residue; the seed is at the end in both forms."""
    packed, frame = SealContext(key.context.packing), key.encrypt(slots_for(key, 1))
    repacked = packed.frame(frame)
    assert packed.seed(repacked) == key.context.seed(frame)
    copy = SealKey.from_residues(packed, key.residues())
    assert np.array_equal(copy.open_sum([[repacked]])[0], slots_for(key, 1))


def test_the_coordinator_measures_the_same_form_without_code_for_secret_keys() -> None:
    """In a process of its own, as the coordinator is one; an owner's frame passes its check."""
    code = """
import json, sys
import server.rounds.runner
from crypto.frames import SealContext
from crypto.presets import packing_for
from protocol.plan import Plan
from server.rounds.layout import frame_layout
plan = Plan.from_fields(json.loads(sys.argv[1]))
layout = frame_layout(plan)
SealContext(packing_for(plan.encryption.preset, plan.cohort.maximum), layout).check(sys.stdin.buffer.read())
assert not {"crypto.secret", "crypto.sealing", "crypto.measuring"} & sys.modules.keys()
"""
    plan = make_plan(encryption={"frames": "seal"})
    key = SealKey.generate(plan_context(plan))
    frame = key.encrypt(slots_for(key, 1))
    command = [sys.executable, "-c", code, json.dumps(plan.fields())]
    for data, passes in ((frame, True), (frame[:16] + b"\x01" + frame[17:], False)):
        done = subprocess.run(command, cwd=ROOT, input=data, capture_output=True, check=False)
        assert (done.returncode == 0) == passes, done.stderr.decode()[-2000:]
    assert b"FrameInvalid" in done.stderr


def test_packed_plans_measure_nothing() -> None:
    assert frame_layout(make_plan()) is None
    assert plan_context(make_plan()).packed


def test_a_library_with_other_skeletons_refuses_packed_frames_and_works_with_its_own(
    another_version: None,
) -> None:
    with pytest.raises(EncryptionUnavailable) as refused:
        self_test(plan_context(make_plan()))
    assert "encryption.frames = 'seal'" in refused.value.explain()
    assert "plans.allow_seal_frames" in refused.value.explain()
    for name in NAMES:
        self_test(own_context(name))


def test_a_key_is_dealt_as_residues_unless_the_library_does_not_take_them(
    key: SealKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert key.dealt() == key.residues()
    monkeypatch.setattr(crypto.frames, "_SEAL_VERSION", (9, 9))
    dealt = key.dealt()
    assert len(dealt) == key_layout(key.context).size_bytes > len(key.residues())
    copy = SealKey.from_dealt(key.context, dealt)
    assert (copy.dealt(), copy.commitment()) == (dealt, key.commitment())
    assert np.array_equal(copy.open_sum([[key.encrypt(slots_for(key, 1))]])[0], slots_for(key, 1))
    assert SealKey.generate(key.context).commitment() != key.commitment()


# --- plan, policy, promise ---------------------------------------------------------------------------


def test_a_policy_must_allow_own_frames_by_name() -> None:
    policy, plan = Policy.from_toml(TEXT), make_plan(encryption={"frames": "seal"})
    assert not policy.plans.allow_seal_frames
    with pytest.raises(PolicyRefused, match=r"plans\.allow_seal_frames"):
        admit(policy, plan)
    admit(Policy.from_toml(TEXT.replace("[plans]", "[plans]\nallow_seal_frames = true")), plan)
    assert plan.sha256() != make_plan().sha256()


def test_masked_residues_need_packed_frames() -> None:
    with pytest.raises(PlanInvalid, match=r"encryption\.frames = 'packed'"):
        make_plan(encryption={"preset": "ckks", "frames": "seal"})


@pytest.mark.parametrize("name", NAMES)
def test_the_promise_that_larger_frames_break_is_named(name: str) -> None:
    context = own_context(name)
    each = context.frame_bytes / context.packing.values_per_frame
    broken = broken_byte_promise(name, each)
    assert broken is not None
    assert (f"the {3.6 if name == 'exact16' else 2.4} that {name}" in broken) == (
        name in ("exact16", "compact")
    )
    assert ("float32" in broken) == (name != "compact")
    packing = context.packing
    assert broken_byte_promise(name, packing.frame_bytes / packing.values_per_frame) is None


def test_seal_plan_shows_form_bytes_and_broken_promise() -> None:
    privacy = {"target_epsilon": 8.0, "delta": 1e-5, "sample_rate": 0.1, "expected_batch_size": 48.0}
    facts = seal_plan(make_plan(privacy, encryption={"frames": "seal"}), 1_000_000)
    assert facts["frame_format"] == "seal"
    assert facts["upload_bytes"] == facts["frames"] * facts["frame_bytes"]
    assert facts["upload_bytes_per_parameter"] == pytest.approx(4.05, abs=0.01)
    assert facts["broken_byte_promise"].startswith("4.03 bytes per value")
    facts = seal_plan(make_plan(privacy), 1_000_000)
    assert (facts["frame_format"], facts["broken_byte_promise"]) == ("packed", None)


# --- what is refused ---------------------------------------------------------------------------------


def changed(data: bytes, place: int | slice, value: bytes) -> bytes:
    copy = bytearray(data)
    copy[place if isinstance(place, slice) else slice(place, place + len(value))] = value
    return bytes(copy)


def test_fixed_bytes_are_compared(key: SealKey, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before SEAL sees any of it: all before and after the residues, and some of the zeros in them."""
    context, frame = key.context, key.encrypt(slots_for(key, 1))
    fixed = np.flatnonzero(~ciphertext_layout(context.packing).content)
    assert fixed[:16].tolist() == list(range(16))
    monkeypatch.setattr(seal.Ciphertext, "load", lambda *_: pytest.fail("SEAL parsed it"))
    edges = (fixed < 150) | (fixed > len(frame) - 100)
    for place in [*fixed[edges].tolist(), *fixed[~edges][::20].tolist()]:
        with pytest.raises(FrameInvalid, match="fixed part"):
            context.ciphertext(changed(frame, place, bytes([frame[place] ^ 1 << place % 8])))


HOSTILE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "one byte short": lambda frame: frame[:-1],
    "one byte long": lambda frame: frame + b"\0",
    "first byte gone": lambda frame: frame[1:],
    "half": lambda frame: frame[: len(frame) // 2],
    "twice": lambda frame: frame * 2,
    "zlib": lambda frame: changed(frame, COMPRESSION, b"\1"),
    "zstd": lambda frame: changed(frame, COMPRESSION, b"\2"),
    "unknown compression": lambda frame: changed(frame, COMPRESSION, b"\7"),
    "larger claim": lambda frame: changed(frame, CLAIM, struct.pack("<Q", 2**40)),
    "smaller claim": lambda frame: changed(frame, CLAIM, struct.pack("<Q", 16)),
    "another version": lambda frame: changed(frame, 3, b"\3"),
    "another parms id": lambda frame: changed(frame, 16, bytes(32)),
    "NTT form": lambda frame: changed(frame, 48, b"\1"),
    "three polynomials": lambda frame: changed(frame, 49, struct.pack("<Q", 3)),
    "2**40 polynomials": lambda frame: changed(frame, 49, struct.pack("<Q", 2**40)),
    "larger degree": lambda frame: changed(frame, 57, struct.pack("<Q", 2**40)),
    "many primes": lambda frame: changed(frame, 65, struct.pack("<Q", 2**40)),
    "seed of no type": lambda frame: changed(frame, len(frame) - 65, b"\0"),
    "seed of another type": lambda frame: changed(frame, len(frame) - 65, b"\2"),
    "all bits": lambda frame: b"\xff" * len(frame),
    "no bits": lambda frame: bytes(len(frame)),
}


@pytest.mark.parametrize("attack", sorted(HOSTILE))
def test_hostile_frames_are_refused(key: SealKey, attack: str) -> None:
    hostile = HOSTILE[attack](key.encrypt(slots_for(key, 1)))
    for refuse in (key.context.ciphertext, key.context.check):
        with pytest.raises(FrameInvalid):
            refuse(hostile)


def test_a_residue_that_is_not_below_its_prime_is_refused_by_the_checked_load(key: SealKey) -> None:
    context, frame = key.context, key.encrypt(slots_for(key, 1))
    start = len(frame) - 8 * 4096 * len(context.packing.preset.coefficient_moduli) - 64 - 17
    for row, prime in enumerate(context.packing.preset.coefficient_moduli):
        for place in (0, 1, 2047, 4095):
            at = start + 8 * (4096 * row + place)
            context.ciphertext(changed(frame, at, struct.pack("<Q", prime - 1)))
            for value in (prime, prime + 1, (1 << prime.bit_length()) - 1):
                with pytest.raises(FrameInvalid, match="SEAL refuses"):
                    context.ciphertext(changed(frame, at, struct.pack("<Q", value)))


def test_a_frame_of_another_preset_with_the_same_length_is_refused() -> None:
    context, other = own_context("exact16"), SealKey.generate(own_context("fine"))
    assert other.context.frame_bytes == context.frame_bytes
    with pytest.raises(FrameInvalid, match="fixed part"):
        context.ciphertext(other.encrypt(np.zeros(4096, dtype=np.uint64)))


def test_what_seal_itself_would_save_is_refused() -> None:
    """Compressed, and the unseeded form of a sum: neither has the one form that is taken."""
    context = own_context("exact16")
    key, file = SealKey.generate(context), SealFile()
    frame = key.encrypt(np.zeros(4096, dtype=np.uint64))
    context.ciphertext(frame).save(file.path)
    compressed = file.read()
    assert compressed[COMPRESSION] == 2
    padded = compressed + bytes(context.frame_bytes - len(compressed) % context.frame_bytes)
    for blob in (compressed, padded[: context.frame_bytes], expanded(compressed)):
        with pytest.raises(FrameInvalid):
            context.ciphertext(blob)


@pytest.mark.parametrize("name", NAMES)
def test_hostile_keys_are_refused(name: str, another_version: None) -> None:
    context = own_context(name)
    key = SealKey.generate(context)
    dealt, size = key.dealt(), 8 * 4096 * len(context.packing.preset.coefficient_moduli)
    prime = context.packing.preset.coefficient_moduli[-1]
    wrong = [b"", dealt[:-1], dealt + b"\0", key.residues(), b"\xff" * len(dealt), bytes(len(dealt))]
    wrong += [changed(dealt, place, bytes([dealt[place] ^ 1])) for place in range(0, len(dealt) - size, 5)]
    wrong += [changed(dealt, COMPRESSION, b"\2"), changed(dealt, CLAIM, struct.pack("<Q", 2**40))]
    wrong += [changed(dealt, len(dealt) - 8, struct.pack("<Q", prime))]
    for data in wrong:
        with pytest.raises(FrameInvalid):
            SealKey.from_dealt(context, data)


def test_hostile_frames_cost_no_memory_and_no_crash() -> None:
    """In a process that may not grow by more than 48 MB: claims of a terabyte, 1,000 random changes."""
    code = """
import json, resource, sys
from pathlib import Path
import numpy as np
from crypto.frames import SealContext
from crypto.measuring import ciphertext_layout
from crypto.presets import packing_for
from protocol.errors import FrameInvalid
packing = packing_for("exact16", 8)
context = SealContext(packing, ciphertext_layout(packing))
frame, *hostile_frames = map(bytes.fromhex, json.load(sys.stdin))
context.ciphertext(frame)
rng = np.random.default_rng(7)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 48 * 2**20,) * 2)
for hostile in hostile_frames:
    try:
        context.ciphertext(hostile)
        sys.exit("taken")
    except FrameInvalid:
        pass
refused = 0
for _ in range(1000):
    data = bytearray(frame)
    start, end = sorted(rng.integers(0, len(data), 2).tolist())
    kind = int(rng.integers(4))
    if kind == 0:
        data[start] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        data[start:end] = rng.bytes(end - start)
    elif kind == 2:
        place = int(rng.integers(0, 200))
        data[place : place + 8] = (2 ** int(rng.integers(64))).to_bytes(8, "little")
    else:
        data = data[:end]
    try:
        context.ciphertext(bytes(data))
    except FrameInvalid:
        refused += 1
print(refused, end="")
"""
    frame = SealKey.generate(own_context("exact16")).encrypt(np.zeros(4096, dtype=np.uint64))
    frames = json.dumps([frame.hex(), *(attack(frame).hex() for attack in HOSTILE.values())])
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=ROOT, input=frames.encode(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert int(done.stdout) > 600


# --- measuring ---------------------------------------------------------------------------------------


def test_two_measurements_agree_in_everything_but_content() -> None:
    packing = packing_for("exact16", 8)
    one, two = ciphertext_layout(packing), ciphertext_layout(packing)
    assert np.array_equal(one.content, two.content)
    two.require(one.sample)
    assert int(one.content.sum()) == packing.frame_bytes
    copy = Layout.from_bytes(one.to_bytes())
    assert copy.sample == one.sample
    assert np.array_equal(copy.content, one.content)


def test_a_form_without_fixed_length_or_without_seed_is_not_used() -> None:
    rng = np.random.default_rng(3)
    samples = [rng.bytes(200) for _ in range(SAMPLES)]
    for wrong in (samples[:-1], [*samples[:-1], samples[-1] + b"\0"], []):
        with pytest.raises(EncryptionUnavailable):
            Layout.measure(wrong)
    packing = packing_for("exact16", 8)
    for tail in (b"", b"end"):
        with pytest.raises(EncryptionUnavailable, match="seed"):
            SealContext(packing, Layout.measure([sample + tail for sample in samples]))
    with pytest.raises(EncryptionUnavailable, match="seed"):
        SealContext(packing, Layout.measure([bytes(10)] * SAMPLES))
    for damaged in (b"", b"12", Layout.measure(samples).to_bytes()[:-1]):
        with pytest.raises(EncryptionUnavailable):
            Layout.from_bytes(damaged)


def test_a_coordinator_that_cannot_measure_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(EncryptionUnavailable):
        frame_layout(make_plan(encryption={"frames": "seal"}))


def test_own_objects_are_expanded_however_they_were_compressed() -> None:
    context = own_context("exact16")
    plain = SealKey.generate(context).encrypt(np.zeros(4096, dtype=np.uint64))
    body = zlib.compress(plain[16:])
    header = SEAL_HEADER.unpack_from(plain)
    squeezed = SEAL_HEADER.pack(*header[:4], 1, 0, 16 + len(body)) + body
    assert expanded(plain) == expanded(squeezed) == plain
    for damaged in (
        b"",
        plain[:10],
        plain[:-1],
        changed(plain, 2, b"\x20"),
        changed(plain, COMPRESSION, b"\5"),
    ):
        with pytest.raises(EncryptionUnavailable):
            expanded(damaged)
    with pytest.raises(EncryptionUnavailable):
        expanded(changed(plain, COMPRESSION, b"\1"))


# --- without anonymous memory files ------------------------------------------------------------------


@pytest.mark.parametrize("frames", ["packed", "seal"])
def test_without_memfd_the_same_frames_go_through_a_private_file(
    frames: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    file = SealFile()
    file.write(b"secret")
    assert stat.S_IMODE(os.stat(file.path).st_mode) == 0o600
    assert file.read() == b"secret"
    file.close()
    assert not any(tmp_path.iterdir())
    context = plan_context(make_plan(encryption={"frames": frames}))
    self_test(context)
    key = SealKey.generate(context)
    frame = key.encrypt(slots_for(key, 1))
    monkeypatch.undo()
    copy = SealKey.from_dealt(plan_context(make_plan(encryption={"frames": frames})), key.dealt())
    assert np.array_equal(copy.open_sum([[frame]])[0], slots_for(key, 1))
    del key, context
    assert not any(tmp_path.iterdir())


def test_without_memfd_the_published_frames_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    vector = json.loads((ROOT / "tests/vectors/bfv.json").read_text())
    key = SealKey.from_dealt(
        SealContext(packing_for("exact16", 3)), base64.b64decode(vector["key_residues"])
    )
    assert key.commitment() == vector["key_commitment"]
    frames = [base64.b64decode(owner["frame"]) for owner in vector["owners"]]
    assert unpack_sum(key.open_sum([frames]), 5000, 3, key.context.packing)[0] == 0
