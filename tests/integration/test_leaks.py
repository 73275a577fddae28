"""Planted markers, everything at its most talkative: no log, reply, store or folder holds one."""

from __future__ import annotations

import io
import logging
import struct
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from real_federation import small_plan
from test_federated_evaluation import Wire

import client.contribution
import client.evaluation
from client.app import make_app
from client.owner import POLICY, Owner, open_owner
from crypto.auditlog import AuditLog
from crypto.trust import load_trust
from protocol.errors import FedsealError
from scenarios.federation import PolicySettings, make_federation
from scenarios.grid import LocalGrid
from server.app import run_plan
from server.store import RunStore
from tasks.partition import digits
from tasks.resolve import resolve
from tests.virtual_time import virtual_time

OWNERS = 5
PIXEL = 13.731058
"""In every record, in a place that is white on all digits; raw values go up to 16."""

LABEL = 7
LOGGERS = ("", "flwr", "fedseal", "uvicorn", "httpx", "httpcore", "opacus", "asyncio")


class Talkative(logging.Handler):
    """Keeps every record of every logger, tracebacks included."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.stream = io.StringIO()
        self.setFormatter(logging.Formatter("%(name)s %(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.stream.write(self.format(record) + "\n")

    @contextmanager
    def attached(self) -> Iterator[None]:
        loggers = [logging.getLogger(name) for name in LOGGERS]
        before = [(logger, logger.level) for logger in loggers]
        for logger in loggers:
            logger.addHandler(self)
            logger.setLevel(logging.DEBUG)
        try:
            yield
        finally:
            for logger, level in before:
                logger.removeHandler(self)
                logger.setLevel(level)


@dataclass
class Leaky:
    """A run in which everything that can fail fails with private text in its hand.

    Attributes:
        homes: Folder of each owner.
        markers: What only one owner has, by owner: names and the texts of its planted errors.
        seen: What each place holds, by its name.
        data_files: The owners' data, where markers belong.
    """

    homes: list[Path]
    markers: list[list[bytes]] = field(default_factory=list)
    seen: dict[str, bytes] = field(default_factory=dict)
    data_files: list[Path] = field(default_factory=list)
    raised: int = 0


def value_needles() -> list[bytes]:
    """Return the ways in which a record's value can be written."""
    single = float(np.float32(PIXEL))
    texts = [str(PIXEL), repr(np.float32(PIXEL)), f"{single:.17g}", "13.7310", "PatientLabel"]
    packed = [struct.pack("<f", PIXEL), struct.pack("<d", single), struct.pack("<d", PIXEL)]
    return [*(text.encode() for text in texts), *packed]


@pytest.fixture(scope="module")
def leaky(tmp_path_factory: pytest.TempPathFactory) -> Leaky:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("leaky")
    temporary = folder / "temporary"
    temporary.mkdir()
    splits, _ = digits(seed=0, owners=OWNERS)
    shards = []
    for x, y in splits:
        raw = x[:80].astype(np.float32)
        raw[:, 0, 0] = PIXEL
        shards.append((raw, y[:80]))
    made = make_federation(folder / "federation", shards, PolicySettings(epsilon_total=50.0))
    run = Leaky([home.folder for home in made.owners])
    for index, home in enumerate(made.owners):
        run.markers.append(_hide_names(home.folder, index))
        run.data_files.append(home.folder / f"secret-ward-{index}" / f"patients-of-{index}.npz")
    plan = resolve(
        small_plan(
            run={"rounds": 2, "spare_attempts": 6, "paid_spares": 4},
            cohort={"minimum": 3, "maximum": OWNERS},
            privacy={"target_epsilon": 1.0},
            evaluation={"every": 1, "target_epsilon": 1.0, "delta": 1e-7, "holdout_share": 0.3},
        )
    )
    log, output = Talkative(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        # handlers that tests of the command line left in this process write to streams that are closed
        patch.setattr(logging.getLogger("fedseal"), "handlers", [])
        patch.setattr(tempfile, "tempdir", str(temporary))
        patch.setattr(sys, "stderr", output)
        patch.setattr(sys, "stdout", output)
        wire = Wire(patch)
        owners = [open_owner(home.folder, home.passphrase) for home in made.owners]
        apps = {100 + i: make_app(partial(_fixed, owner)) for i, owner in enumerate(owners)}
        store = RunStore(folder / "run", AuditLog(made.server_home / "log"))
        store.set("plan", plan.fields())
        store.set("plan_hash", plan.sha256())
        _plant_errors(patch, run)
        with log.attached(), virtual_time():
            run_plan(LocalGrid(apps), store, load_trust(made.server_home / "identity"))
        assert store.get("state") == "finished"
        store.close()
        for owner in owners:
            owner.close()
    run.seen = {
        "the logs": log.stream.getvalue().encode(),
        "standard output and error": output.getvalue().encode(),
        "replies": b"\0".join(kind.encode() + body + blob for kind, body, blob in wire.received),
        "the run store": _content(folder / "run"),
        "the coordinator's home": _content(made.server_home),
        "temporary folders": _content(temporary),
    }
    return run


def _fixed(owner: Owner, _context: Any) -> Owner:
    return owner


def _hide_names(home: Path, index: int) -> list[bytes]:
    """Move an owner's data to a folder and a file whose names tell something, and name its dataset."""
    folder, name, dataset = home / f"secret-ward-{index}", f"patients-of-{index}.npz", f"cohort-hiv-{index}"
    folder.mkdir()
    (home / "data.npz").rename(folder / name)
    fields = tomllib.loads((home / POLICY).read_text(encoding="utf-8"))
    fields |= {"data_file": f"{folder.name}/{name}", "dataset": dataset}
    (home / POLICY).write_text(tomli_w.dumps(fields), encoding="utf-8")
    return [folder.name.encode(), name.encode(), dataset.encode(), f"planted-{index}".encode()]


def _plant_errors(patch: pytest.MonkeyPatch, run: Leaky) -> None:
    """Let training, counting and reading fail now and then, with values, labels and paths in the text."""
    calls = {"update": 0, "examples": 0}
    honest_update, honest_examples = client.contribution.local_update, Owner.examples

    def raises(owner: int, values: Any) -> None:
        run.raised += 1
        raise RuntimeError(
            f"planted-{owner} PatientLabel={LABEL} {PIXEL} {values!r} {run.data_files[owner]}"
        )

    def update(*arguments: Any) -> Any:
        calls["update"] += 1
        if calls["update"] == 2:
            raises(1, np.full(3, PIXEL, np.float32))
        return honest_update(*arguments)

    def examples(owner: Owner, plan: Any) -> Any:
        calls["examples"] += 1
        if calls["examples"] == 2 * OWNERS + 1:
            raises(2, np.array([PIXEL]))
        return honest_examples(owner, plan)

    def count(*_arguments: Any) -> Any:
        raises(3, PIXEL)

    patch.setattr(client.contribution, "local_update", update)
    patch.setattr(Owner, "examples", examples)
    patch.setattr("tasks.images.ImageClassification.correct", count)


def _content(folder: Path, *left_out: Path) -> bytes:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file not in left_out]
    return b"\0".join(file.read_bytes() for file in files)


def test_everything_failed_that_was_planted(leaky: Leaky) -> None:
    assert leaky.raised >= 4
    assert b"failed: RuntimeError at" in leaky.seen["the logs"], "an owner must see that something fails"
    assert b"left out of an evaluation" in leaky.seen["the logs"]
    assert len(leaky.seen["replies"]) > 100_000
    assert b'"run.round"' in leaky.seen["the coordinator's home"], "the log of acts is searched too"


def test_no_value_label_or_error_text_is_anywhere(leaky: Leaky) -> None:
    for place, content in leaky.seen.items():
        for needle in [*value_needles(), b"planted-"]:
            assert needle not in content, f"{needle!r} in {place}"


def test_no_name_of_an_owners_data_leaves_its_home(leaky: Leaky) -> None:
    """Folders, files and datasets have names that tell something; the owner's own log may name them."""
    for index, markers in enumerate(leaky.markers):
        for marker in markers:
            for place, content in leaky.seen.items():
                if place != "the logs":
                    assert marker not in content, f"{marker!r} in {place}"
            for other, home in enumerate(leaky.homes):
                if other != index:
                    assert marker not in _content(home), f"{marker!r} at another owner"


def test_an_owners_own_databases_hold_no_record(leaky: Leaky) -> None:
    for home, data in zip(leaky.homes, leaky.data_files, strict=True):
        content = _content(home, data)
        for needle in [*value_needles(), b"planted-"]:
            assert needle not in content, needle


def test_the_search_finds_what_is_there(leaky: Leaky) -> None:
    with np.load(leaky.data_files[0]) as archive:
        content = archive["x"].tobytes()
    assert struct.pack("<f", PIXEL) in content
    text = f"planted-0 {np.full(3, PIXEL, np.float32)!r}".encode()
    assert any(needle in text for needle in value_needles())
    assert any(
        needle in repr(FedsealError(f"{np.float32(PIXEL)!r}")).encode() for needle in value_needles()
    )
