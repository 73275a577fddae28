"""A package is what its signer made, to the byte, or it is refused; and it says what is true."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.external_data_helper
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from torch import nn

from crypto.certificates import fingerprint
from crypto.signing import sign_bytes
from deploy.build import build_package
from deploy.gate import synthetic_inputs
from deploy.measure import run_session
from deploy.package import (
    COVERED,
    FileEntry,
    PackageParts,
    VerifiedPackage,
    load_session,
    verify_package,
    write_package,
)
from deploy.statement import PrivacyStatement
from protocol.encoding import encode
from protocol.errors import (
    CompressionRefused,
    EncodingInvalid,
    PackageInvalid,
    PackageNotWritten,
)
from protocol.plan import Plan
from tasks.partition import digits
from tasks.registry import task_for

ALL_FILES = sorted(COVERED | {"manifest.json", "manifest.sig"})
KEY, OTHER = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()


def plan_with(**compression: Any) -> Plan:
    return Plan.from_fields(
        {
            "run": {"name": "digits", "rounds": 10},
            "task": {
                "name": "image-classification",
                "input_shape": [8, 8],
                "value_range": [0.0, 16.0],
                "classes": 10,
            },
            "model": {"name": "mlp", "hidden": [64]},
            "cohort": {"minimum": 3, "maximum": 5},
            "training": {"local_steps": 2, "learning_rate": 1.5},
            "privacy": {
                "target_epsilon": 3.0,
                "sample_rate": 0.2,
                "expected_batch_size": 50.0,
                "noise_multiplier": 1.2,
            },
            "compression": compression,
        }
    )


PLAN = plan_with(max_accuracy_drop=0.02)


def privacy_of(plan: Plan) -> dict[str, Any]:
    return PrivacyStatement.for_plan(plan, 2.75, 2.75, 1e-5, "PLD").model_dump(mode="json")


@pytest.fixture(scope="module")
def public():
    _, (x, y) = digits(seed=0, owners=1)
    return task_for(PLAN).check(x, y)


@pytest.fixture(scope="module")
def trained():
    (owner,), _ = digits(seed=0, owners=1)
    examples, model = task_for(PLAN).check(*owner), task_for(PLAN).build_model(PLAN)
    x, y = torch.from_numpy(examples.x), torch.from_numpy(examples.y)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.5)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        batch = torch.randint(0, len(y), (256,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    return model


def build(plan, model, public, out, **changes):
    arguments = {
        "synthetic_x": synthetic_inputs(plan),
        "privacy": privacy_of(plan),
        "schema": task_for(plan).input_schema(plan),
        "progress": lambda _line: None,
    }
    return build_package(
        plan, model, public.x, public.y, signing_key=KEY, out=out, **{**arguments, **changes}
    )


@pytest.fixture(scope="module")
def result(trained, public, tmp_path_factory):
    return build(PLAN, trained, public, tmp_path_factory.mktemp("out"))


@pytest.fixture
def package(result, tmp_path) -> Path:
    return shutil.copytree(result.folder, tmp_path / "copy.fedseal")


@pytest.fixture
def parts(result) -> PackageParts:
    verified = verify_package(result.folder, KEY.public_key())
    return PackageParts("digits", verified.model, verified.schema, verified.privacy, verified.compression)


def sign_again(folder: Path, key: Ed25519PrivateKey) -> None:
    """Make the manifest true again for what now lies in the folder, as an attacker or a signer would."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["files"] = {
        name: FileEntry.of((folder / name).read_bytes()).model_dump() for name in manifest["files"]
    }
    data = encode(manifest)
    (folder / "manifest.json").write_bytes(data)
    (folder / "manifest.sig").write_bytes(sign_bytes(key, "package", data))


def refused(folder: Path, match: str = "FS-PACKAGE-01", trusted: Any = None) -> None:
    with pytest.raises(PackageInvalid, match=match) as caught:
        verify_package(folder, trusted or KEY.public_key())
    assert str(folder) not in str(caught.value)


class TestBuild:
    def test_says_what_was_asked_and_what_was_reached(self, result):
        record = result.record
        assert (record.prune_ratio_asked, record.quantize_asked) == (0.5, "int8")
        assert 0 < record.parameter_ratio_removed < 1
        assert record.size_ratio == record.size_bytes_before / record.size_bytes_after > 3
        assert record.accuracy_drop <= record.max_accuracy_drop
        assert record.accuracy_before - record.accuracy_after == record.accuracy_drop
        assert [step.step for step in record.steps] == ["prune", "export", "quantize"]

    def test_record_in_the_package_is_the_result(self, result):
        verified = verify_package(result.folder, KEY.public_key())
        assert verified.compression == result.record
        assert len(verified.model) == result.record.size_bytes_after
        assert "accuracy gate" in verified.compression.public_data_use
        assert verified.compression.private_data_use == "nothing"
        assert verified.privacy.private_data_after_training == "nothing"

    def test_result_is_json_without_paths(self, result):
        text = encode(result.to_fields()).decode()
        assert str(result.folder.parent) not in text
        assert json.loads(text)["package"] == "digits.fedseal"

    def test_card_follows_from_the_records(self, result):
        card = (result.folder / "MODEL_CARD.md").read_text()
        for fact in ("epsilon 2.75", "delta 1e-05", "PLD", f"{result.record.accuracy_after:.4f}"):
            assert fact in card
        assert PLAN.sha256() in card

    def test_model_is_not_changed_and_progress_is_told(self, trained, public, tmp_path):
        before = [value.clone() for value in trained.state_dict().values()]
        lines: list[str] = []
        build(PLAN, trained.train(), public, tmp_path, progress=lines.append)
        assert trained.training
        assert all(torch.equal(a, b) for a, b in zip(before, trained.state_dict().values(), strict=True))
        stages = [line.partition(":")[0] for line in lines]
        assert stages == ["prune", "export", "quantize", "measure", "package", "verify"]

    def test_int8_that_breaks_the_gate_falls_back_to_float32(self, trained, public, tmp_path):
        plan = plan_with(prune_ratio=0.0, max_accuracy_drop=0.02)
        narrow = np.full((64, 64), 1e-4, np.float32)  # ranges so narrow that real inputs saturate
        outcome = build(plan, trained, public, tmp_path, synthetic_x=narrow).record
        assert (outcome.quantize_asked, outcome.quantize_used) == ("int8", "none")
        assert "outside the gate" in outcome.steps[2].reached
        assert outcome.accuracy_drop == 0

    def test_linear_model_is_not_said_to_be_pruned(self, public, tmp_path):
        model = nn.Sequential(nn.Linear(64, 10))
        record = build(PLAN, model, public, tmp_path).record
        assert (record.prune_ratio_asked, record.prune_ratio_used) == (0.5, 0.0)
        assert record.parameter_ratio_removed == 0
        assert "none to remove" in record.steps[0].reached

    def test_no_quantization_when_none_is_asked(self, trained, public, tmp_path):
        record = build(plan_with(quantize="none"), trained, public, tmp_path).record
        assert record.quantize_used == "none"
        assert record.steps[2].reached == "float32, as asked"

    def test_weights_that_are_not_finite_leave_no_package(self, public, tmp_path):
        model = nn.Sequential(nn.Linear(64, 10))
        with torch.no_grad():
            model[0].weight[3, 3] = float("nan")
        with pytest.raises(CompressionRefused, match="finite"):
            build(PLAN, model, public, tmp_path)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("field", "value"),
        [("sample_rate", 0.1), ("noise_multiplier", 2.0), ("rounds", 9), ("local_steps", 1)],
    )
    def test_statement_that_contradicts_the_plan_is_refused(self, trained, public, tmp_path, field, value):
        with pytest.raises(PackageNotWritten, match=field):
            build(PLAN, trained, public, tmp_path, privacy={**privacy_of(PLAN), field: value})

    @pytest.mark.parametrize(
        "change",
        [
            {"private_data_after_training": "calibration"},
            {"epsilon": None},
            {"epsilon": -1.0},
            {"noise": "none"},
            {"surprise": 1},
        ],
    )
    def test_impossible_statement_is_refused(self, trained, public, tmp_path, change):
        with pytest.raises(EncodingInvalid):
            build(PLAN, trained, public, tmp_path, privacy={**privacy_of(PLAN), **change})

    def test_no_noise_is_said_in_words(self):
        fields = PLAN.fields()
        fields["privacy"] |= {"noise": "none", "target_epsilon": None, "noise_multiplier": None}
        statement = PrivacyStatement.for_plan(Plan.from_fields(fields), None, None, None, None)
        assert "WITHOUT differential privacy" in statement.statement

    def test_synthetic_inputs_are_seeded_and_in_range(self):
        first = synthetic_inputs(PLAN, count=50)
        assert np.array_equal(first, synthetic_inputs(PLAN, count=50))
        assert not np.array_equal(first, synthetic_inputs(PLAN, count=50, seed=1))
        np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1, rtol=1e-5)


class TestVerify:
    def test_accepts_key_and_fingerprint(self, package):
        by_key = verify_package(package, KEY.public_key())
        assert by_key == verify_package(package, fingerprint(KEY.public_key()))
        assert by_key.signer == fingerprint(KEY.public_key())

    @pytest.mark.parametrize("name", ALL_FILES)
    @pytest.mark.parametrize("place", [0, 0.5, -1])
    def test_one_changed_bit(self, package, name, place):
        data = bytearray((package / name).read_bytes())
        index = place if isinstance(place, int) else int(place * len(data))
        data[index] ^= 1
        (package / name).write_bytes(data)
        refused(package)
        refused(package, trusted=fingerprint(KEY.public_key()))

    @pytest.mark.parametrize("name", ALL_FILES)
    def test_one_byte_more_or_less(self, package, name):
        data = (package / name).read_bytes()
        (package / name).write_bytes(data + b"\0")
        refused(package)
        (package / name).write_bytes(data[:-1])
        refused(package)

    @pytest.mark.parametrize("name", ALL_FILES)
    def test_missing_file(self, package, name):
        (package / name).unlink()
        refused(package)

    @pytest.mark.parametrize("name", ["extra.txt", ".hidden", "model.onnx.data"])
    def test_extra_file(self, package, name):
        (package / name).write_bytes(b"")
        refused(package, "too many")

    def test_extra_folder(self, package):
        (package / "sub").mkdir()
        refused(package, "too many")

    @pytest.mark.parametrize("name", ALL_FILES)
    def test_link_to_an_equal_file(self, package, tmp_path, name):
        shutil.move(package / name, tmp_path / name)
        (package / name).symlink_to(tmp_path / name)
        refused(package, "link")

    @pytest.mark.parametrize("name", ["model.onnx", "manifest.json"])
    def test_pipe_and_folder_in_place_of_a_file(self, package, name):
        (package / name).unlink()
        os.mkfifo(package / name)
        refused(package, "regular")
        (package / name).unlink()
        (package / name).mkdir()
        refused(package)

    def test_manifest_edited_with_true_digests_but_the_old_signature(self, package):
        signature = (package / "manifest.sig").read_bytes()
        (package / "MODEL_CARD.md").write_text("epsilon 0.01")
        sign_again(package, OTHER)
        (package / "manifest.sig").write_bytes(signature)
        refused(package, "not signed")

    def test_signed_again_by_another_key(self, package):
        (package / "MODEL_CARD.md").write_text("epsilon 0.01")
        public_key = OTHER.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (package / "signer.pub").write_bytes(public_key)
        sign_again(package, OTHER)
        refused(package, "not signed")
        refused(package, "fingerprint", trusted=fingerprint(KEY.public_key()))
        assert verify_package(package, OTHER.public_key()).signer == fingerprint(OTHER.public_key())

    def test_signed_by_another_key_under_the_trusted_name(self, package):
        sign_again(package, OTHER)
        refused(package, "not signed", trusted=fingerprint(KEY.public_key()))
        refused(package, "not the one that signed", trusted=OTHER.public_key())

    def test_signature_made_for_another_purpose(self, package):
        data = (package / "manifest.json").read_bytes()
        (package / "manifest.sig").write_bytes(sign_bytes(KEY, "report", data))
        refused(package, "not signed")

    def test_signature_is_checked_before_parsing(self, package):
        (package / "manifest.json").write_bytes(b"[" * 60_000)
        refused(package, "not signed")

    def test_key_of_another_kind(self, package):
        key = generate_private_key(SECP384R1()).public_key()
        pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (package / "signer.pub").write_bytes(pem)
        refused(package, "fingerprint", trusted=fingerprint(KEY.public_key()))

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("privacy.json", encode({"epsilon": 1.0})),
            ("privacy.json", b"not json"),
            ("schema.json", b"[]"),
            ("schema.json", b'{"a": 1}'),
            ("compression.json", b"{}"),
        ],
    )
    def test_trusted_signer_of_malformed_records(self, package, name, content):
        (package / name).write_bytes(content)
        sign_again(package, KEY)
        refused(package)

    @pytest.mark.parametrize("change", [{"version": 2}, {"name": "../x"}, {"created": "now"}, {"x": 1}])
    def test_trusted_signer_of_another_format(self, package, change):
        manifest = json.loads((package / "manifest.json").read_bytes()) | change
        (package / "manifest.json").write_bytes(encode(manifest))
        sign_again(package, KEY)
        refused(package, "malformed")

    @pytest.mark.parametrize("name", ["../model.onnx", "/etc/hostname", "extra.bin"])
    def test_manifest_that_names_other_files(self, package, name):
        manifest = json.loads((package / "manifest.json").read_bytes())
        manifest["files"][name] = manifest["files"]["model.onnx"]
        data = encode(manifest)
        (package / "manifest.json").write_bytes(data)
        (package / "manifest.sig").write_bytes(sign_bytes(KEY, "package", data))
        refused(package, "does not list")

    def test_no_package_at_all(self, tmp_path):
        refused(tmp_path / "nothing.fedseal", "cannot be opened")


class TestLoad:
    def test_runs_the_verified_bytes_whatever_lies_on_disk_now(self, package, public):
        verified = verify_package(package, KEY.public_key())
        (package / "model.onnx").write_bytes(b"swapped")
        logits = run_session(load_session(verified), public.x)
        assert np.mean(logits.argmax(axis=1) == public.y) == verified.compression.accuracy_after

    def test_refuses_a_model_that_reads_other_files(self, package):
        verified = verify_package(package, KEY.public_key())
        model = onnx.load_model_from_string(verified.model)
        tensor = next(t for t in model.graph.initializer if t.HasField("raw_data"))
        onnx.external_data_helper.set_external_data(tensor, "weights.bin")
        with pytest.raises(PackageInvalid, match="other files"):
            load_session(_with_model(verified, model.SerializeToString()))

    def test_refuses_bytes_that_are_no_model(self, package):
        verified = verify_package(package, KEY.public_key())
        with pytest.raises(PackageInvalid):
            load_session(_with_model(verified, b"\x08\x0a"))


def _with_model(verified: VerifiedPackage, model: bytes) -> VerifiedPackage:
    return VerifiedPackage(**{**vars(verified), "model": model})


class TestWrite:
    def test_never_overwrites(self, package, parts):
        before = {file.name: file.read_bytes() for file in package.iterdir()}
        with pytest.raises(PackageNotWritten, match="exists"):
            write_package(package, parts, OTHER)
        assert {file.name: file.read_bytes() for file in package.iterdir()} == before
        assert list(package.parent.iterdir()) == [package]

    def test_never_follows_a_link_or_fills_an_empty_folder(self, tmp_path, parts):
        (tmp_path / "link.fedseal").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "empty.fedseal").mkdir()
        for name in ("link.fedseal", "empty.fedseal"):
            with pytest.raises(PackageNotWritten):
                write_package(tmp_path / name, parts, KEY)
        assert not (tmp_path / "elsewhere").exists()

    def test_other_suffix_is_refused(self, tmp_path, parts):
        with pytest.raises(PackageNotWritten, match="fedseal"):
            write_package(tmp_path / "digits", parts, KEY)

    def test_failure_leaves_nothing(self, tmp_path, parts, monkeypatch):
        def full_disk(_descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", full_disk)
        with pytest.raises(OSError, match="No space"):
            write_package(tmp_path / "new.fedseal", parts, KEY)
        assert list(tmp_path.iterdir()) == []

    def test_schema_that_is_not_json_is_refused(self, tmp_path, parts):
        broken = PackageParts("digits", parts.model, {"x": {1}}, parts.privacy, parts.compression)
        with pytest.raises(EncodingInvalid):
            write_package(tmp_path / "new.fedseal", broken, KEY)
        assert list(tmp_path.iterdir()) == []

    def test_library_versions_are_the_installed_ones(self, package):
        listed = json.loads((package / "sbom.json").read_bytes())
        versions = {item["name"]: item["version"] for item in listed["components"]}
        assert (
            versions["torch"] == torch.__version__.split("+")[0] or versions["torch"] == torch.__version__
        )
        assert {"opacus", "tenseal", "flwr", "onnxruntime", "cryptography"} <= set(versions)

    def test_files_are_readable_and_tell_nothing_of_the_machine(self, package):
        assert package.stat().st_mode & 0o777 == 0o755
        for file in package.iterdir():
            data = file.read_bytes()
            assert b"site-packages" not in data
            assert str(Path.cwd()).encode() not in data
