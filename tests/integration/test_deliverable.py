"""What cannot be delivered is refused before anybody joins; a model without public data is delivered."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from real_federation import small_plan
from rich.console import Console
from scene import Scene

from audit.conclude import conclude
from audit.deliverable import needed_bytes, require_deliverable
from console.progress import AGREEMENT as SHOWN
from console.run import _see_through
from deploy.measure import ACCURACY, AGREEMENT, CompressionRecord
from deploy.package import verify_package
from protocol.errors import (
    DataInvalid,
    EncodingInvalid,
    PackageImpossible,
    PackageNotWritten,
    ResultUndeliverable,
)
from protocol.plan import Plan
from server.home import PUBLIC_DATA
from server.submit import add_public_data
from tasks.partition import digits, write_examples
from tasks.resolve import resolve

KEY = Ed25519PrivateKey.generate()
MakeScene = Callable[..., Scene]


def quiet(_text: str) -> None:
    pass


@pytest.fixture(scope="module")
def plan() -> Plan:
    return resolve(small_plan())


def test_a_new_folder_is_fine_and_nothing_is_left_behind(plan: Plan, tmp_path: Path) -> None:
    require_deliverable(plan, tmp_path, tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ResultUndeliverable, match="--out"):
        require_deliverable(plan, tmp_path, tmp_path / "file" / "out")
    with pytest.raises(ResultUndeliverable, match="--out"):
        require_deliverable(plan, tmp_path, Path("/proc/out"))


@pytest.mark.parametrize("name", ["small.fedseal", "report.json", "report.html"])
def test_an_output_of_an_earlier_run_is_refused(plan: Plan, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(PackageNotWritten):
        require_deliverable(plan, tmp_path, tmp_path)


def test_a_disk_that_is_too_small_is_refused(tmp_path: Path) -> None:
    wide = resolve(small_plan(run={"rounds": 10_000}, model={"name": "mlp", "hidden": [20_000]}))
    assert needed_bytes(wide) > 4e11
    with pytest.raises(ResultUndeliverable, match="GB are free"):
        require_deliverable(wide, tmp_path, tmp_path / "out")


def test_the_estimate_holds_for_a_finished_run(scene: MakeScene, monkeypatch: pytest.MonkeyPatch) -> None:
    three = scene(3)
    three.run(monkeypatch, {})
    taken = sum(file.stat().st_size for file in three.store.folder.iterdir() if file.is_file())
    assert taken < needed_bytes(three.plan)


def test_settings_under_which_nothing_can_be_packaged_are_refused(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime is told to refuse every model, which stands for a layer that it does not know."""

    class Refusing:
        def __init__(self, *_arguments: Any, **_options: Any) -> None:
            raise RuntimeError("unknown operator")

    monkeypatch.setattr("deploy.measure.ort.InferenceSession", Refusing)
    with pytest.raises(PackageImpossible, match="cannot load"):
        require_deliverable(plan, tmp_path, tmp_path / "out")


def test_a_run_that_goes_on_may_write_over_its_own_report_only(
    scene: MakeScene, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one, other = scene(3, run={"rounds": 1}), scene(3, run={"rounds": 1})
    one.run(monkeypatch, {})
    one.store.set("state", "paused")
    other.run(monkeypatch, {})
    conclude(one.store, one.folder / "server", KEY, tmp_path, quiet)
    require_deliverable(one.plan, tmp_path, tmp_path, one.store)
    with pytest.raises(PackageNotWritten):
        require_deliverable(other.plan, tmp_path, tmp_path, other.store)
    with pytest.raises(PackageNotWritten):
        require_deliverable(one.plan, tmp_path, tmp_path)
    (one.store.folder / PUBLIC_DATA).write_bytes(b"cut off")
    with pytest.raises(DataInvalid):
        require_deliverable(one.plan, tmp_path, tmp_path, one.store)


def test_without_public_data_the_model_is_packaged_by_agreement_and_measured_later(
    scene: MakeScene, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    three = scene(
        3, run={"rounds": 1}, model={"name": "mlp", "hidden": [16]}, compression={"prune_ratio": 0.5}
    )
    three.run(monkeypatch, {})
    home, store = three.folder / "server", three.store

    def see_through() -> str:
        out = StringIO()
        _see_through(Console(file=out, width=300), home, store, KEY, None, after=0)
        return out.getvalue()

    assert "package: " in see_through()
    first = verify_package(store.folder / "result" / "small.fedseal", KEY.public_key())
    record = first.compression
    assert (record.measure, record.public_examples, record.accuracy_before) == (AGREEMENT, 0, 1.0)
    assert record.accuracy_after >= 1 - record.max_accuracy_drop
    assert "No public examples were given" in record.public_data_use
    card = (store.folder / "result" / "small.fedseal" / "MODEL_CARD.md").read_text()
    assert "No accuracy was measured on public data" in card
    assert "public examples decided" not in card.lower()
    report = json.loads((store.folder / "result" / "report.json").read_text())
    facts = {fact["pointer"]: fact["value"] for fact in report["deployment"]}
    assert facts["/measure"] == AGREEMENT == SHOWN

    write_examples(tmp_path / "public.npz", *digits(0, 3)[1])
    add_public_data(store, three.plan, tmp_path / "public.npz")
    assert "result-2" in see_through()
    second = verify_package(store.folder / "result-2" / "small.fedseal", KEY.public_key())
    assert second.compression.measure == ACCURACY
    assert second.compression.public_examples == len(np.load(tmp_path / "public.npz")["y"])
    assert "result-3" in see_through()


def test_federated_evaluation_is_told_with_the_package(
    scene: MakeScene, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    section = {"every": 1, "target_epsilon": 4.0, "holdout_share": 0.5}
    three = scene(3, run={"rounds": 1}, evaluation=section)
    three.run(monkeypatch, {})
    conclusion = conclude(three.store, three.folder / "server", KEY, tmp_path, quiet)
    assert conclusion.package is not None
    verified = verify_package(conclusion.package, KEY.public_key())
    (told,) = [facts for _, _, kind, facts in three.store.events() if kind == "evaluation"]
    assert verified.compression.federated_accuracy == min(max(told["accuracy"], 0.0), 1.0)
    assert "Federated evaluation" in (conclusion.package / "MODEL_CARD.md").read_text()


def test_a_record_from_before_the_measure_was_named_is_read_as_it_was_written() -> None:
    old = old_record()
    assert CompressionRecord.from_fields(old).measure is None
    assert CompressionRecord.from_fields(old).model_dump(mode="json") == old
    with pytest.raises(EncodingInvalid):
        CompressionRecord.from_fields(old | {"measure": None})
    with pytest.raises(EncodingInvalid):
        CompressionRecord.from_fields(old | {"measure": AGREEMENT})


def old_record() -> dict[str, Any]:
    return {
        "baseline": "float32",
        "plan_sha256": "0" * 64,
        "size_bytes_before": 10,
        "size_bytes_after": 5,
        "size_ratio": 2.0,
        "speed_ratio_b1": 2.0,
        "accuracy_before": 0.9,
        "accuracy_after": 0.9,
        "accuracy_drop": 0.0,
        "max_accuracy_drop": 0.1,
        "public_examples": 10,
        "prune_ratio_asked": 0.5,
        "prune_ratio_used": 0.5,
        "parameter_ratio_removed": 0.5,
        "quantize_asked": "int8",
        "quantize_used": "int8",
        "steps": [],
        "public_data_use": "as it was",
        "private_data_use": "nothing",
    }
