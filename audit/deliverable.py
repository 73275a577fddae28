"""What can be known before a run begins: whether its result can be made and written.

A run costs privacy that nobody gets back. So everything cheap that could keep its package and report from
being written is tried before anybody is asked to join, and again before a run goes on.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

import torch

from deploy.export import export_onnx
from deploy.gate import synthetic_inputs
from deploy.package import SUFFIX, refuse_existing
from deploy.prune import prune
from deploy.quantize import quantize
from protocol.encoding import digest_bytes
from protocol.errors import CompressionRefused, PackageImpossible, PackageNotWritten, ResultUndeliverable
from protocol.plan import Plan
from server.home import PUBLIC_DATA
from server.store import RunStore
from tasks.registry import task_for

_ROUND_BYTES_PER_PARAMETER: Final = 3 * 8 + 4
"""A checkpoint holds three float64 vectors, and the record of a round holds the opened sums as uint32."""

_RECORD_BYTES_PER_OWNER: Final = 4_000
_MARGIN_BYTES: Final = 64 * 1024**2
_TRIED_INPUTS: Final = 64
_REPORT: Final = ("report.json", "report.html")


def require_deliverable(plan: Plan, home: Path, out: Path | None, store: RunStore | None = None) -> None:
    """Check that a run's package and report can be made and written. Nothing is left behind.

    Args:
        plan: Resolved.
        home: The coordinator's home, which keeps the run's folder.
        out: Where package and report go; None for the run's own folder.
        store: The run, if it goes on; a report of it may be there and is written over.

    Raises:
        ResultUndeliverable: A folder cannot be written, or the disk has too little space.
        PackageNotWritten: A package, or another run's report, is there already.
        PackageImpossible: The plan's model cannot be packaged with the plan's settings.
        DataInvalid: The run's public data cannot be read or do not fit its task.
    """
    if out is not None:
        _require_writable(out)
        require_free_names(plan, out, store)
    _require_space(plan, home, 0 if store is None else store.finished_rounds())
    if store is not None and (store.folder / PUBLIC_DATA).exists():
        task_for(plan).read(store.folder / PUBLIC_DATA)
    require_packable(plan)


def require_free_names(plan: Plan, out: Path, store: RunStore | None = None) -> None:
    """Check that no package and no other run's report is in a folder.

    Raises:
        PackageNotWritten: There is one.
    """
    refuse_existing(out / f"{plan.run.name}{SUFFIX}")
    for name in _REPORT:
        if os.path.lexists(out / name) and not _is_report_of(out / _REPORT[0], store):
            raise PackageNotWritten(f"{name} of another run is in the folder that --out names")


def require_packable(plan: Plan) -> None:
    """Prune, export and quantize the plan's untrained model as the trained one will be.

    Raises:
        PackageImpossible: A step fails.
    """
    synthetic = synthetic_inputs(plan, _TRIED_INPUTS)
    shape = synthetic.shape[1:]
    try:
        model = task_for(plan).build_model(plan).eval()
        smaller = prune(model, torch.zeros(1, *shape), plan.compression.prune_ratio)
        exported = export_onnx(smaller.model, shape)
        if plan.compression.quantize == "int8":
            quantize(exported, synthetic)
    except CompressionRefused as error:
        raise PackageImpossible(error.detail) from error


def needed_bytes(plan: Plan, finished: int = 0) -> int:
    """Return an upper estimate of what the folder of a run takes on the disk from now on."""
    parameters = task_for(plan).initial_weights(plan).size
    rounds = plan.run.rounds - finished + 1
    records = _RECORD_BYTES_PER_OWNER * plan.cohort.maximum
    return rounds * (_ROUND_BYTES_PER_PARAMETER * parameters + records) + _MARGIN_BYTES


def _require_space(plan: Plan, home: Path, finished: int) -> None:
    needed, free = needed_bytes(plan, finished), shutil.disk_usage(home).free
    if free < needed:
        raise ResultUndeliverable(
            f"the run's checkpoints take about {needed / 1e9:.1f} GB in the home, and "
            f"{free / 1e9:.1f} GB are free"
        )


def _require_writable(out: Path) -> None:
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ResultUndeliverable(f"the folder that --out names: {error.strerror}") from None
    finally:
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _is_report_of(file: Path, store: RunStore | None) -> bool:
    if store is None:
        return False
    try:
        run = json.loads(file.read_text(encoding="utf-8"))["subject"]["run"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    # before owners joined, a report names a run by its folder
    return run in (store.get("run"), digest_bytes(store.folder.name.encode()))
