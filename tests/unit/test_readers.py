"""Whatever lies where an owner's data should be: it is read or a coded error, and nothing hangs."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protocol.errors import DataInvalid
from protocol.plan import Plan
from tasks.registry import task_for

PLAN = Plan.from_fields(
    {
        "run": {"name": "unit", "rounds": 4},
        "task": {
            "name": "image-classification",
            "input_shape": [8, 8],
            "value_range": [-16.0, 16.0],
            "classes": 10,
        },
        "model": {"name": "linear"},
        "cohort": {"minimum": 3, "maximum": 8},
        "training": {"local_steps": 5, "learning_rate": 0.5},
        "privacy": {"noise": "none", "sample_rate": 0.2, "expected_batch_size": 4.0},
    }
)
TASK = task_for(PLAN)
X = np.random.default_rng(3).uniform(-16, 16, (6, 8, 8)).astype(np.float32)
Y = np.array([0, 1, 2, 9, 8, 7])
ORDINARY = TASK.check(X, Y)


def npy(array: np.ndarray[Any, Any], **options: Any) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, **options)
    return file.getvalue()


def claimed(shape: tuple[int, ...], descr: str = "<f4", content: bytes = b"\0" * 64) -> bytes:
    """An array whose header claims what the content does not hold."""
    file = io.BytesIO()
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + content


def zipped(x: bytes, y: bytes, **options: Any) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        archive.writestr("x.npy", x)
        archive.writestr("y.npy", y)
    return file.getvalue()


def with_fields(data: bytes, flags: int | None = None, method: int | None = None) -> bytes:
    """Change the flags or the compression method of every entry, where it is and in the directory."""
    changed = bytearray(data)
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = changed.find(signature)
        while start >= 0:
            if flags is not None:
                struct.pack_into("<H", changed, start + offset, flags)
            if method is not None:
                struct.pack_into("<H", changed, start + offset + 2, method)
            start = changed.find(signature, start + 4)
    return bytes(changed)


def with_size(data: bytes, size: int) -> bytes:
    """Let the directory claim another size of every entry."""
    changed = bytearray(data)
    start = changed.find(b"PK\x01\x02")
    while start >= 0:
        struct.pack_into("<I", changed, start + 24, size)
        start = changed.find(b"PK\x01\x02", start + 4)
    return bytes(changed)


def twice() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in (("x.npy", X), ("y.npy", Y)):
            archive.writestr(name, npy(array))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("x.npy", npy(X))
    return file.getvalue()


def named(first: str, second: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(first, npy(X))
        archive.writestr(second, npy(Y))
    return file.getvalue()


GOOD = zipped(npy(X), npy(Y))
RECORDS = np.zeros(6, dtype=[("a", "<f4"), ("b", "<i4")])
WRONG: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "text": lambda: b"age,sex,label\n61,1,0\n",
    "a single array": lambda: npy(X),
    "a pickle": lambda: b"\x80\x04].",
    "cut in the directory": lambda: GOOD[:-40],
    "cut in the middle": lambda: GOOD[: len(GOOD) // 2],
    "encrypted": lambda: with_fields(GOOD, flags=1),
    "Deflate64": lambda: with_fields(GOOD, method=9),
    "an unknown method": lambda: with_fields(GOOD, method=77),
    "garbled bzip2": lambda: with_fields(GOOD, method=12),
    "garbled LZMA": lambda: with_fields(GOOD, method=14),
    "a size that is not so": lambda: with_size(GOOD, 2**31),
    "a member that is no array": lambda: zipped(b"0,1,2,3", npy(Y)),
    "members without .npy": lambda: named("x", "y"),
    "an array twice": twice,
    "no y": lambda: named("x.npy", "z.npy"),
    "a huge shape": lambda: zipped(claimed((2**40, 8, 8)), npy(Y)),
    "a shape beyond 64 bits": lambda: zipped(claimed((2**40, 2**40, 8)), npy(Y)),
    "a negative shape": lambda: zipped(claimed((-1, -4, 4)), npy(Y)),
    "a shape of no size": lambda: zipped(claimed((0, 2**62, 2**62), content=b""), npy(Y[:0])),
    "less than claimed": lambda: zipped(claimed((6, 8, 8)), npy(Y)),
    "more than claimed": lambda: zipped(npy(X) + b"\0", npy(Y)),
    "a header of the future": lambda: zipped(b"\x93NUMPY\x09\x00" + npy(X)[8:], npy(Y)),
    "a header that is no dictionary": lambda: zipped(npy(X)[:10] + b"(" * 118 + npy(X)[128:], npy(Y)),
    "objects": lambda: zipped(npy(np.array([{}] * 6), allow_pickle=True), npy(Y)),
    "objects as labels": lambda: zipped(npy(X), npy(Y.astype(object), allow_pickle=True)),
    "structures": lambda: zipped(npy(RECORDS), npy(Y)),
    "complex numbers": lambda: zipped(npy(X.astype(np.complex64)), npy(Y)),
    "text as values": lambda: zipped(npy(X.astype("<U4")), npy(Y)),
    "dates": lambda: zipped(npy(np.zeros((6, 8, 8), "<M8[s]")), npy(Y)),
    "float16": lambda: zipped(npy(X.astype(np.float16)), npy(Y)),
    "float64": lambda: zipped(npy(X.astype(np.float64)), npy(Y)),
    "truth values": lambda: zipped(npy(X > 0), npy(Y)),
    "whole numbers": lambda: zipped(npy(X.astype(np.int64)), npy(Y)),
    "one number": lambda: zipped(npy(np.float32(1.0).reshape(())), npy(Y)),
    "one label": lambda: zipped(npy(X), npy(np.array(1))),
    "labels with a point": lambda: zipped(npy(X), npy(Y.astype(np.float64))),
    "truth values as labels": lambda: zipped(npy(X), npy(Y > 0)),
    "too few labels": lambda: zipped(npy(X), npy(Y[:5])),
    "labels in a row": lambda: zipped(npy(X), npy(Y.reshape(1, 6))),
    "one-hot labels": lambda: zipped(npy(X), npy(np.eye(10, dtype=np.int64)[Y])),
}
RIGHT: dict[str, Callable[[], bytes]] = {
    "as numpy writes it": lambda: GOOD,
    "compressed": lambda: zipped(npy(X), npy(Y), compression=zipfile.ZIP_DEFLATED),
    "bzip2": lambda: zipped(npy(X), npy(Y), compression=zipfile.ZIP_BZIP2),
    "a newer header": lambda: zipped(npy(X, version=(2, 0)), npy(Y)),
    "big-endian": lambda: zipped(npy(X.astype(">f4")), npy(Y.astype(">i8"))),
    "Fortran's order": lambda: zipped(npy(np.asfortranarray(X)), npy(Y)),
    "labels in a column": lambda: zipped(npy(X), npy(Y.reshape(6, 1))),
    "short labels": lambda: zipped(npy(X), npy(Y.astype(np.uint8))),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_read_is_one_coded_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / "secret-ward.npz"
    path.write_bytes(WRONG[name]())
    for read in (TASK.read, TASK.read_private):
        with pytest.raises(DataInvalid) as caught:
            read(path)
        assert "secret-ward" not in str(caught.value)
        assert caught.value.detail
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize("name", RIGHT)
def test_what_numpy_writes_is_read_alike(tmp_path: Path, name: str) -> None:
    path = tmp_path / "rows.npz"
    path.write_bytes(RIGHT[name]())
    for read in (TASK.read, TASK.read_private):
        examples = read(path)
        np.testing.assert_array_equal(examples.x, ORDINARY.x)
        np.testing.assert_array_equal(examples.y, Y)
        assert examples.x.dtype == np.float32
        assert examples.y.dtype == np.int64


def test_sixty_four_bit_archives_and_no_rows_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in (("x.npy", X), ("y.npy", Y)):
            with archive.open(name, "w", force_zip64=True) as member:
                member.write(npy(array))
    np.testing.assert_array_equal(TASK.read(path).x, ORDINARY.x)
    np.savez(path, x=X[:0], y=Y[:0])
    assert TASK.read(path).x.shape == (0, 64)


def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "secret-ward.npz"

    def refused() -> str:
        with pytest.raises(DataInvalid) as caught:
            TASK.read_private(path)
        assert "secret-ward" not in str(caught.value)
        return str(caught.value)

    assert "FS-DATA-03" in refused()
    path.symlink_to(tmp_path / "gone")
    assert "FS-DATA-03" in refused()
    path.unlink()
    path.mkdir()
    assert "FS-DATA-03" in refused()
    path.rmdir()
    os.mkfifo(path)  # a reader that opens it as a file waits for ever
    assert "FS-DATA-03" in refused()
    path.unlink()
    path.symlink_to("/dev/zero")
    assert "FS-DATA-03" in refused()
    path.unlink()
    path.write_bytes(GOOD)
    np.testing.assert_array_equal(TASK.read(path).x, ORDINARY.x)


def test_a_file_that_this_user_may_not_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.npz"
    path.write_bytes(GOOD)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(DataInvalid, match="FS-DATA-03"):
        TASK.read(path)


def test_rows_with_odd_values_are_left_out_alone(tmp_path: Path) -> None:
    x, y = X.copy(), Y.copy()
    x[0, 0, 0], x[1, 2, 3], x[2, 7, 7], y[3], y[4] = np.nan, -np.inf, 17.0, 10, -1
    np.savez(tmp_path / "rows.npz", x=x, y=y)
    examples = TASK.read_private(tmp_path / "rows.npz")
    np.testing.assert_array_equal(examples.x, ORDINARY.x[5:])
    np.savez(tmp_path / "rows.npz", x=X * 0, y=Y)
    zeros = TASK.read_private(tmp_path / "rows.npz").x
    np.savez(tmp_path / "rows.npz", x=X * 0 * -1, y=Y)
    assert TASK.read_private(tmp_path / "rows.npz").x.tobytes() == zeros.tobytes()
