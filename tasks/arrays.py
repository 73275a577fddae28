"""Reading an owner's `.npz` file. Whatever is wrong with it is one coded error.

The file is opened without waiting and must be a regular one. Each array's header is believed only where it
agrees with the archive's directory, before any memory is taken for it. Errors name neither the path nor a
value: they say what kind of thing is wrong, for the owner alone.
"""

from __future__ import annotations

import errno
import io
import math
import os
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from protocol.errors import DataInvalid, DataUnavailable, FedsealError

Arrays = tuple[NDArray[Any], NDArray[Any]]
"""Raw rows `x` (n, ...) and their labels `y` (n,)."""

_NAMES = ("x", "y")
_CHUNK_BYTES = 1024 * 1024
_LARGEST_HEADER = 10_000
_REASONS = {
    errno.ENOENT: "there is no such file",
    errno.ENOTDIR: "there is no such file",
    errno.ELOOP: "its links lead nowhere",
    errno.EACCES: "this user may not read it",
    errno.EPERM: "this user may not read it",
}


@dataclass(frozen=True)
class Form:
    """Shape and type of one array.

    Attributes:
        shape: One number of each axis.
        dtype: Type of a value, in the byte order of the file.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """Open a regular file for reading; a pipe or a device is refused at once and never waited for.

    Raises:
        DataUnavailable: It is not there, may not be read, or is no regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        raise DataUnavailable(_REASONS.get(error.errno or 0, "it cannot be opened")) from None
    except ValueError:
        raise DataUnavailable("its path is none") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise DataUnavailable("it is no regular file")
    except BaseException:
        os.close(descriptor)
        raise
    with os.fdopen(descriptor, "rb") as file:
        yield file


def read_arrays(path: Path) -> Arrays:
    """Return the arrays `x` and `y` of an `.npz` file, in this machine's byte order and C order.

    Args:
        path: File with `x` (n, ...), float32 or uint8, and `y` (n,) or (n, 1), integer.

    Raises:
        DataUnavailable: The file cannot be opened.
        DataInvalid: It is anything else.
    """
    with opened(path) as file, _coded(), zipfile.ZipFile(file) as archive:
        x, y = (_content(archive, name) for name in _NAMES)
        return plain(x, y)


def read_forms(path: Path) -> tuple[Form, Form]:
    """Return the forms of `x` and `y` from the headers; no value is read.

    Raises:
        DataUnavailable: The file cannot be opened.
        DataInvalid: It has no such arrays.
    """
    with opened(path) as file, _coded(), zipfile.ZipFile(file) as archive:
        forms = []
        for name in _NAMES:
            with _member(archive, name) as (form, _stream, _is_fortran):
                forms.append(form)
        require_plain(*forms)
        return forms[0], forms[1]


def plain(x: NDArray[Any], y: NDArray[Any]) -> Arrays:
    """Return arrays in this machine's byte order and C order, the labels as (n,).

    Raises:
        DataInvalid: They are not rows of float32 or uint8 with one integer for each.
    """
    require_plain(Form(x.shape, x.dtype), Form(y.shape, y.dtype))
    native = (np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")) for array in (x, y))
    rows, labels = native
    return rows, labels.reshape(len(rows))


def require_plain(x: Form, y: Form) -> None:
    """Check the forms of both arrays, as far as no plan is needed for it.

    Raises:
        DataInvalid: Says what is expected, and the type that is there.
    """
    if x.dtype.newbyteorder("=") not in (np.float32, np.uint8):
        raise DataInvalid(f"x must be float32 or uint8, it is {_type_name(x.dtype)}")
    if not x.shape:
        raise DataInvalid("x must have the shape (n, *task.input_shape), it is a single number")
    if y.dtype.kind not in "iu":
        raise DataInvalid(f"y must hold one integer for each row of x, it holds {_type_name(y.dtype)}")
    if y.shape not in (x.shape[:1], (*x.shape[:1], 1)):
        raise DataInvalid("y must hold one integer for each row of x; its shape is neither (n,) nor (n, 1)")


def _type_name(dtype: np.dtype[Any]) -> str:
    """Return a short name; that of a structure holds names of columns, which are not told."""
    return "a structure" if dtype.kind == "V" else dtype.newbyteorder("=").name


@contextmanager
def _coded() -> Iterator[None]:
    """Turn whatever a reader raises into DataInvalid, which names the kind of error and not its text."""
    try:
        yield
    except FedsealError:
        raise
    except Exception as error:  # numpy, zipfile and the decompressors raise a dozen kinds
        kind = type(error).__name__
        raise DataInvalid(f"the file is not an .npz file with the arrays x and y ({kind})") from None


def _content(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    with _member(archive, name) as (form, stream, is_fortran):
        size = form.dtype.itemsize * math.prod(form.shape)
        content = np.empty(size, dtype=np.uint8)
        done = 0
        while done < size:
            piece = stream.read(min(_CHUNK_BYTES, size - done))
            if not piece:
                raise DataInvalid(f"{name} ends early")
            content[done : done + len(piece)] = np.frombuffer(piece, dtype=np.uint8)
            done += len(piece)
        if stream.read(1):  # at the end the archive's checksum is compared
            raise DataInvalid(f"{name} goes on behind its end")
        return content.view(form.dtype).reshape(form.shape, order="F" if is_fortran else "C")


@contextmanager
def _member(archive: zipfile.ZipFile, name: str) -> Iterator[tuple[Form, IO[bytes], bool]]:
    """Open one array behind its header; also tells whether it is in Fortran's order.

    Raises:
        DataInvalid: There is not exactly one of the name, it is no array of plain numbers, or its size is
            not the archive's or beyond this machine's memory.
    """
    entries = [entry for entry in archive.infolist() if entry.filename == f"{name}.npy"]
    if len(entries) != 1:
        raise DataInvalid(f"the file must hold the array {name} once; it holds {len(entries)} of that name")
    with archive.open(entries[0]) as stream:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            header = np.lib.format.read_array_header_1_0(stream, max_header_size=_LARGEST_HEADER)
        elif version == (2, 0):
            header = np.lib.format.read_array_header_2_0(stream, max_header_size=_LARGEST_HEADER)
        else:
            raise DataInvalid(f"{name} is in a form that only structures need")
        shape, is_fortran, dtype = header
        if dtype.hasobject:
            raise DataInvalid(f"{name} holds Python objects, which are never read")
        size = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or size != entries[0].file_size - stream.tell():
            raise DataInvalid(f"the header of {name} claims another size than the archive has")
        if size > _memory_bytes():
            raise DataInvalid(f"{name} is larger than this machine's memory")
        yield Form(shape, dtype), stream, is_fortran


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
