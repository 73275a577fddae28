"""What follows the end of a run never hides how it ended."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Console
from scene import Scene

import audit.conclude
from audit.conclude import conclude
from audit.report import verify_report
from console.run import _see_through
from protocol.errors import CompressionRefused, PackageNotWritten, QuorumNotMet, RunPaused
from protocol.optimizers import GlobalModel
from server.home import PUBLIC_DATA
from tasks.partition import digits, write_examples

KEY = Ed25519PrivateKey.generate()
MakeScene = Callable[..., Scene]


def home_of(scene: Scene) -> Path:
    return scene.folder / "server"


def quiet(_text: str) -> None:
    pass


def paused_scene(scene: MakeScene, monkeypatch: pytest.MonkeyPatch) -> Scene:
    """Return a run of three owners for which two came."""
    two = scene(2, deadlines={"join_s": 1.0, "pause_s": 1.0})
    with pytest.raises(QuorumNotMet):
        two.run(monkeypatch, {})
    assert two.store.get("state") == "paused"
    return two


def finished_scene(scene: MakeScene, monkeypatch: pytest.MonkeyPatch, **sections: dict[str, Any]) -> Scene:
    three = scene(3, **({"run": {"rounds": 1}} | sections))
    _, public = digits(0, 3)
    write_examples(three.store.folder / PUBLIC_DATA, *public)
    three.run(monkeypatch, {})
    return three


def test_a_run_that_paused_before_its_first_round_has_a_report(
    scene: MakeScene, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    two = paused_scene(scene, monkeypatch)
    conclusion = conclude(two.store, home_of(two), KEY, tmp_path / "out", quiet)
    report = verify_report(conclusion.report_json, KEY.public_key())
    assert report["subject"]["rounds_finished"] == 0
    assert conclusion.package is None
    assert conclusion.problem is None


@pytest.mark.parametrize(
    ("failure", "said"),
    [(CompressionRefused("of a test"), "of a test"), (OSError(errno.ENOSPC, "of a test"), "FS-DISK-01")],
)
def test_a_failure_that_follows_is_said_second(
    scene: MakeScene, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failure: Exception, said: str
) -> None:
    two = paused_scene(scene, monkeypatch)

    def fail(*_arguments: Any) -> None:
        raise failure

    monkeypatch.setattr(audit.conclude, "collect", fail)
    out = StringIO()
    with pytest.raises(RunPaused) as caught:
        _see_through(Console(file=out, width=200), home_of(two), two.store, KEY, tmp_path / "out", after=0)
    assert caught.value.exit_code == 11
    assert said in out.getvalue()
    assert "paused" in out.getvalue()


def test_a_refused_package_leaves_a_report_that_says_why(
    scene: MakeScene, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    three = finished_scene(scene, monkeypatch)
    (tmp_path / "out" / "small.fedseal").mkdir(parents=True)
    out = StringIO()
    with pytest.raises(PackageNotWritten):
        _see_through(
            Console(file=out, width=300), home_of(three), three.store, KEY, tmp_path / "out", after=0
        )
    assert "report: " in out.getvalue()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    facts = {fact["pointer"]: fact["value"] for fact in report["deployment"]}
    assert facts["/refused/code"] == PackageNotWritten.code
    assert "exists" in facts["/refused/why"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert PackageNotWritten.code in page


def test_a_model_that_cannot_be_compressed_leaves_a_report(
    scene: MakeScene, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    three = finished_scene(scene, monkeypatch)
    model = three.store.read_checkpoint(1)
    broken = GlobalModel(model.weights * float("nan"), model.first_moment, model.second_moment)
    monkeypatch.setattr(type(three.store), "read_checkpoint", lambda _store, _round: broken)
    conclusion = conclude(three.store, home_of(three), KEY, tmp_path / "out", quiet)
    assert isinstance(conclusion.problem, CompressionRefused)
    assert conclusion.report_json.is_file()
