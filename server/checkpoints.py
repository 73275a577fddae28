"""Checkpoints: one file per finished round, with the global model and what the optimizer remembers."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from protocol.errors import CheckpointInvalid, FileUnusable
from protocol.optimizers import GlobalModel
from protocol.storage import from_os, translated, write_problem


def write_checkpoint(target: Path, model: GlobalModel, said: dict[str, str]) -> None:
    """Write a model so that a crash leaves either the old file or the new one.

    Args:
        target: The file.
        model: What it holds.
        said: What the file says of the model.

    Raises:
        DiskFull, AccessDenied, DiskFailed, FileUnusable, ResourcesShort: It cannot be written.
    """
    temporary = target.with_suffix(".tmp")
    values = {
        "weights": model.weights,
        "first_moment": model.first_moment,
        "second_moment": model.second_moment,
    }
    with translated(target.name):
        try:
            save_file(values, temporary, said)
        except SafetensorError:
            # its text alone says why the system refused
            raise write_problem(target.parent, target.name) from None
        _sync(temporary)
        os.replace(temporary, target)
        _sync(target.parent)


def read_checkpoint(file: Path) -> tuple[GlobalModel, dict[str, str]]:
    """Return the model of a checkpoint and what the file says of it.

    Raises:
        CheckpointInvalid: There is no such file, or it is damaged.
        AccessDenied, DiskFailed, ResourcesShort: It cannot be read.
    """
    names = ("weights", "first_moment", "second_moment")
    try:
        with safe_open(file, "numpy") as opened:
            said = opened.metadata() or {}
            return GlobalModel(*(opened.get_tensor(name).astype(np.float64) for name in names)), said
    except OSError as error:
        coded = from_os(error, file.name)
        if coded is None or isinstance(coded, FileUnusable):
            raise CheckpointInvalid from None
        raise coded from error
    except (ValueError, TypeError, SafetensorError):
        raise CheckpointInvalid from None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
