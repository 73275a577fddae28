"""Planted markers: values, words and keys of owners, and the search for them where they must not be.

A marker is written in every spelling that a leak could have: the bytes of 32- and 64-bit numbers in either
order, decimal text as Python and numpy print it, hexadecimal, base64 at each of its three alignments, and
for words also UTF-16 and other cases. Binary patterns of numbers are runs of neighbouring values, at least
eight bytes, so that a chance hit of a spelling in a gigabyte has a probability below one in ten million.
The memory of a process with numerical libraries holds thousands of decimal numbers (5,156 were counted), so
that decimal text needs ten digits to count: of one number, or of two neighbours that stand close together.

What is searched is never opened or decompressed: a leak in compressed form would not be found.
"""

from __future__ import annotations

import base64
import itertools
import os
import urllib.parse
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from audit.evidence.experiments import MarkerScan, Place

CHUNK_BYTES: Final = 4 * 1024 * 1024
SHORTEST_BYTES: Final = 6
"""A shorter spelling would be found by chance."""

FEWEST_DIGITS: Final = 10
"""Likewise, significant digits of decimal text."""

NEAR_BYTES: Final = 24
"""So far apart the texts of two neighbours may stand: separators, brackets, padding."""

_RUN: Final = 2
_INTEGER_RUN: Final = 4
_ANCHOR: Final = 4


@dataclass(frozen=True)
class Marker:
    """Something planted.

    Attributes:
        name: What it is and whose, for example ``owner-1: pixels of every record``.
        spellings: The bytes that would give it away.
        neighbours: Texts of two neighbours that give it away where the second follows the first closely.
    """

    name: str
    spellings: frozenset[bytes]
    neighbours: frozenset[tuple[bytes, bytes]] = frozenset()


@dataclass(frozen=True)
class Searched:
    """What a search found in one place.

    Attributes:
        size_bytes: Bytes that were searched.
        found: Names of the markers that were found.
    """

    size_bytes: int
    found: frozenset[str]

    @classmethod
    def together(cls, parts: Iterable[Searched]) -> Searched:
        """Return several searches of one place as one."""
        listed = list(parts)
        found = frozenset[str]().union(*(part.found for part in listed))
        return cls(sum(part.size_bytes for part in listed), found)


def words(name: str, *texts: str) -> Marker:
    """Return a marker for texts, such as a patient's name or the name of a file."""
    spellings = set[bytes]()
    for text in texts:
        for cased in (text, text.lower(), text.upper()):
            spellings |= {cased.encode(), cased.encode("utf-16-le"), urllib.parse.quote(cased).encode()}
        spellings |= _encoded(text.encode())
    return _marker(name, spellings)


def secret(name: str, key: bytes) -> Marker:
    """Return a marker for a key or a passphrase; long keys are searched for by pieces of 32 bytes.

    Raises:
        ValueError: It is too short to be told from chance.
    """
    if len(key) < SHORTEST_BYTES or not any(key):
        raise ValueError("a secret is too short to be told from chance")
    pieces = [key[start : start + 32] for start in range(0, min(len(key), 4096), 32)]
    return _marker(name, set(pieces) | _encoded(pieces[0]))


def numbers(name: str, values: NDArray[np.floating[Any]]) -> Marker:
    """Return a marker for neighbouring values, such as pixels of a record or a part of an update.

    Args:
        name: See `Marker`.
        values: Any floating type, shape (n,), n >= 2, all different and not zero.
    """
    spellings = set[bytes]()
    for kind in ("<f8", ">f8", "<f4", ">f4"):
        run = values.astype(kind)
        pairs = [run[start : start + _RUN].tobytes() for start in range(run.size - _RUN + 1)]
        spellings.update(pairs)
        spellings |= _encoded(pairs[0])
    texts = [_decimal_texts(value) for value in values]
    spellings |= {text.encode() for listed in texts for text in listed if _digits(text) >= FEWEST_DIGITS}
    texted = {pair for one, two in itertools.pairwise(texts) for pair in zip(one, two, strict=True)}
    neighbours = {
        (first.encode(), second.encode())
        for first, second in texted
        if _digits(first) + _digits(second) >= FEWEST_DIGITS and len(first) >= SHORTEST_BYTES
    }
    return replace(_marker(name, spellings), neighbours=frozenset(neighbours))


def _decimal_texts(value: np.floating[Any]) -> list[str]:
    """Return how Python and numpy print a number, in always the same order."""
    double, single = float(value), np.float32(value)
    return [
        repr(double),
        f"{double:.17g}",
        f"{double:.8f}",
        f"{double:.6f}",
        f"{float(single):.17g}",
        str(single),
        np.format_float_positional(single),
    ]


def _digits(text: str) -> int:
    """Return the number of significant digits of a decimal number."""
    mantissa = text.split("e")[0].replace(".", "").lstrip("-0")
    return len(mantissa.rstrip("0"))


def integers(name: str, values: NDArray[np.integer[Any]]) -> Marker:
    """Return a marker for neighbouring integers, such as quantized values of an update.

    Args:
        name: See `Marker`.
        values: Shape (n,), n >= 4, from a range so wide that four in a row do not occur by chance.
    """
    spellings = set[bytes]()
    for kind in ("<i4", ">i4", "<i8", ">i8"):
        run = values.astype(kind)
        pieces = [
            run[start : start + _INTEGER_RUN].tobytes() for start in range(run.size - _INTEGER_RUN + 1)
        ]
        spellings.update(pieces)
        spellings |= _encoded(pieces[0])
    listed = [str(int(value)) for value in values[:_INTEGER_RUN]]
    spellings |= {separator.join(listed).encode() for separator in (",", ", ", " ", "\n")}
    return _marker(name, spellings)


def _encoded(data: bytes) -> set[bytes]:
    """Return data in hexadecimal, and in base64 as it looks at each place of a longer text."""
    found = {data.hex().encode(), data.hex().upper().encode()}
    for shift in range(3):
        text = base64.b64encode(bytes(shift) + data)
        # characters at the edges also hold bits of the neighbours
        found.add(text[-(-8 * shift // 6) : 8 * (shift + len(data)) // 6])
    return found


def _marker(name: str, spellings: Iterable[bytes]) -> Marker:
    usable = frozenset(one for one in spellings if len(one) >= SHORTEST_BYTES and any(one))
    if not usable:
        raise ValueError("a marker is too short to be told from chance")
    return Marker(name, usable)


class Search:
    """Looks for all spellings of many markers at once.

    Of each spelling the four bytes that are least like padding are its anchor. At every place the first
    two bytes of all anchors are looked up in a table, and only what is left is compared further.

    Args:
        markers: What to look for.

    Raises:
        ValueError: Two of them have one name.
    """

    def __init__(self, markers: Sequence[Marker]) -> None:
        if len({marker.name for marker in markers}) < len(markers):
            raise ValueError("two markers have one name and would count as one")
        self._by_anchor: dict[bytes, list[tuple[bytes, int, bytes, str]]] = defaultdict(list)
        self._starts = np.zeros(2**16, dtype=np.bool_)
        for marker in markers:
            for spelling, second in (*((one, b"") for one in marker.spellings), *marker.neighbours):
                offset = _anchor(spelling)
                anchor = spelling[offset : offset + _ANCHOR]
                self._by_anchor[anchor].append((spelling, offset, second, marker.name))
                self._starts[int.from_bytes(anchor[:2], "little")] = True
        self._anchors = np.sort(np.frombuffer(b"".join(self._by_anchor), dtype="<u4"))
        lengths = [len(one) for m in markers for one in m.spellings]
        lengths += [len(one) + NEAR_BYTES + len(second) for m in markers for one, second in m.neighbours]
        self._overlap = max(lengths, default=1) - 1

    def in_bytes(self, data: bytes) -> Searched:
        """Search bytes in memory."""
        return Searched(len(data), frozenset(self._found(data)))

    def in_stream(self, stream: BinaryIO) -> Searched:
        """Search what is left of a stream, piece by piece."""
        return self._in_pieces(iter(lambda: stream.read(CHUNK_BYTES), b""))

    def in_folder(self, folder: Path) -> Searched:
        """Search the content and the names of all files below a folder, as they are now."""
        parts = []
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            parts.append(self.in_bytes(str(file.relative_to(folder)).encode()))
            try:
                with file.open("rb") as stream:
                    parts.append(self.in_stream(stream))
            except FileNotFoundError:
                continue
        return Searched.together(parts)

    def in_process(self, pid: int) -> Searched:
        """Search everything that a process of this machine can write to: heap, stacks, buffers.

        Linux only; the process is not stopped and nothing in it changes.

        Raises:
            OSError: Its memory cannot be read: another system, or the kernel does not permit it.
        """
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            regions = list(_writable(Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")))
            searched = [self._in_pieces(_region(memory, start, end)) for start, end in regions]
        result = Searched.together(searched)
        if not result.size_bytes:
            raise OSError("no memory of the process could be read")
        return result

    def _in_pieces(self, pieces: Iterable[bytes]) -> Searched:
        size, kept, found = 0, b"", set[str]()
        for piece in pieces:
            size += len(piece)
            joined = kept + piece
            found |= self._found(joined)
            kept = joined[-self._overlap :] if self._overlap else b""
        return Searched(size, frozenset(found))

    def _found(self, data: bytes) -> set[str]:
        view = np.frombuffer(data, dtype=np.uint8)
        if view.size < _ANCHOR or not self._by_anchor:
            return set()
        starts = view[:-1].astype(np.uint16)
        starts |= view[1:].astype(np.uint16) << np.uint16(8)
        places = np.flatnonzero(self._starts[starts])
        places = places[places <= view.size - _ANCHOR]
        anchors = np.zeros(places.size, dtype=np.uint32)
        for byte in range(_ANCHOR):
            anchors |= view[places + byte].astype(np.uint32) << np.uint32(8 * byte)
        nearest = np.minimum(np.searchsorted(self._anchors, anchors), self._anchors.size - 1)
        found = set[str]()
        for place in places[self._anchors[nearest] == anchors].tolist():
            for spelling, offset, second, name in self._by_anchor[data[place : place + _ANCHOR]]:
                if name in found or place < offset or not data.startswith(spelling, place - offset):
                    continue
                end = place - offset + len(spelling)
                if data.find(second, end, end + NEAR_BYTES + len(second)) >= 0:
                    found.add(name)
        return found


def _anchor(spelling: bytes) -> int:
    """Return where the four bytes begin that are the most different ones and the fewest zeros."""

    def worth(start: int) -> tuple[int, int]:
        piece = spelling[start : start + _ANCHOR]
        return len(set(piece) - {0}), len(set(piece[:2]) - {0})

    return max(range(len(spelling) - _ANCHOR + 1), key=worth)


def marker_scan(place: Place, searched: Searched, control: Searched | None, markers: int) -> MarkerScan:
    """Return what a report says about one place.

    Args:
        place: Where was searched.
        searched: What was found there.
        control: What the same search found in the control; None where there is none.
        markers: Markers that were searched for.
    """
    return MarkerScan(
        place=place,
        searched_bytes=searched.size_bytes,
        markers=markers,
        hits=len(searched.found),
        control_hits=None if control is None else len(control.found),
    )


def _writable(maps: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of the regions that a process can read and write, from ``/proc/PID/maps``."""
    for line in maps.splitlines():
        span, access, *_ = line.split()
        if access.startswith("rw"):
            start, _, end = span.partition("-")
            yield int(start, 16), int(end, 16)


def _region(memory: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    """Yield the memory between two addresses; what goes away meanwhile is left out."""
    for place in range(start, end, CHUNK_BYTES):
        try:
            piece = os.pread(memory.fileno(), min(CHUNK_BYTES, end - place), place)
        except (OSError, OverflowError):
            return
        if not piece:
            return
        yield piece
