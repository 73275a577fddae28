"""The search for planted markers: every spelling is found everywhere, and nothing else is."""

from __future__ import annotations

import base64
import io
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit.collecting import markers
from audit.collecting.markers import Marker, Search, Searched, integers, marker_scan, numbers, secret, words

VALUES = np.array([13.731058217, 2.8371094613, 0.71356219284, 9.1827364519, 5.5519283746, 1.0203041526])
LEVELS = np.array([131_071, 77_213, 400_127, 12_911, 250_003, 99_991])
PERSON = "Wilhelmine Fahrenkrog 4f1c"
KEY = bytes(range(7, 7 + 64))
ALL = (
    numbers("pixels", VALUES),
    integers("levels", LEVELS),
    words("names", PERSON, "patients-4f1c.npz"),
    secret("key", KEY),
)


@pytest.mark.parametrize("kind", ["<f4", ">f4", "<f8", ">f8"])
@pytest.mark.parametrize("start", range(4))
def test_any_two_neighbours_are_found_in_each_byte_order(kind: str, start: int) -> None:
    data = VALUES.astype(kind)[start : start + 2].tobytes()
    assert Search(ALL).in_bytes(b"x" + data + b"y").found == {"pixels"}


@pytest.mark.parametrize(
    "text",
    [
        str(VALUES[0]),
        str([np.float32(value) for value in VALUES[:2]]),
        f"{VALUES[2]:.8f};{VALUES[3]:.8f}",
        f'{{"first":{VALUES[1]:.6f}, "second":{VALUES[2]:.6f}}}',
        f"array([{np.float32(VALUES[1]):.17g}, 0.1])",
        np.array2string(VALUES.astype(np.float32)),
        VALUES[:2].astype("<f8").tobytes().hex(),
    ],
)
def test_numbers_in_text_are_found(text: str) -> None:
    assert Search(ALL).in_bytes(text.encode()).found == {"pixels"}


def test_a_number_with_few_digits_is_not_found_by_itself() -> None:
    """Among thousands of decimal numbers in a process one begins like a planted one, every now and then."""
    one, two = (str(np.float32(value)) for value in VALUES[:2])
    search = Search(ALL)
    assert not search.in_bytes(f"loss {one}, {VALUES[1]:.4f}, {'-' * 30} {two}".encode()).found
    assert not search.in_bytes(f"{two}, {one}".encode()).found, "neighbours in their order"
    some = np.random.default_rng(0).uniform(0.0, 16.0, 200_000).astype(np.float32)
    assert not search.in_bytes("\n".join(map(str, some)).encode()).found


@pytest.mark.parametrize("chunk", range(1, 80, 13))
def test_neighbours_across_two_pieces_are_found(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(markers, "CHUNK_BYTES", chunk)
    text = np.array2string(VALUES.astype(np.float32)).encode()
    assert Search(ALL).in_stream(io.BytesIO(b"." * 50 + text)).found == {"pixels"}


@pytest.mark.parametrize("shift", range(3))
@pytest.mark.parametrize("marker", ["pixels", "levels", "names", "key"])
def test_base64_is_found_at_each_alignment(shift: int, marker: str) -> None:
    plain = {
        "pixels": VALUES.astype("<f4").tobytes(),
        "levels": LEVELS.astype("<i4").tobytes(),
        "names": PERSON.encode(),
        "key": KEY,
    }
    text = base64.b64encode(b"z" * shift + plain[marker] + b"rest")
    assert Search(ALL).in_bytes(text).found == {marker}


@pytest.mark.parametrize(
    "spelled", [PERSON.lower(), PERSON.upper(), f"x={PERSON}!", "Wilhelmine%20Fahrenkrog%204f1c"]
)
def test_words_are_found_in_other_cases(spelled: str) -> None:
    assert Search(ALL).in_bytes(spelled.encode()).found == {"names"}
    assert Search(ALL).in_bytes(b"\0" + PERSON.encode("utf-16-le")).found == {"names"}


@pytest.mark.parametrize(
    "text", [", ".join(map(str, LEVELS)), ",".join(map(str, LEVELS)), str(LEVELS.tolist())]
)
def test_integers_in_text_are_found(text: str) -> None:
    assert Search(ALL).in_bytes(text.encode()).found == {"levels"}


@pytest.mark.parametrize("piece", [slice(0, 32), slice(32, 64)])
def test_half_a_key_is_found(piece: slice) -> None:
    assert Search(ALL).in_bytes(b"-" + KEY[piece]).found == {"key"}


def test_ciphertext_like_bytes_hold_no_marker() -> None:
    assert Search(ALL).in_bytes(os.urandom(16_000_000)) == Searched(16_000_000, frozenset())


def test_padding_holds_no_marker_and_takes_no_time() -> None:
    big = integers("small levels", np.array([1, 2, 3, 4, 5]))
    assert not Search([*ALL, big]).in_bytes(bytes(16_000_000)).found


@given(st.binary(max_size=60), st.sampled_from([one for marker in ALL for one in sorted(marker.spellings)]))
def test_every_spelling_is_found_wherever_it_stands(before: bytes, spelling: bytes) -> None:
    expected = {marker.name for marker in ALL if any(one in before + spelling for one in marker.spellings)}
    assert Search(ALL).in_bytes(before + spelling).found == expected


@given(st.integers(0, 40), st.integers(1, 9))
def test_a_marker_across_two_pieces_is_found(offset: int, chunk: int) -> None:
    stream = io.BytesIO(b"." * offset + PERSON.encode() + b"." * 7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(markers, "CHUNK_BYTES", chunk)
        searched = Search(ALL).in_stream(stream)
    assert searched == Searched(offset + len(PERSON) + 7, frozenset({"names"}))


def test_folders_are_searched_with_the_names_of_their_files(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "patients-4f1c.npz").write_bytes(b"nothing")
    (tmp_path / "run.db").write_bytes(b"-" * 5_000_000 + struct.pack("<2d", *VALUES[:2]))
    assert Search(ALL).in_folder(tmp_path).found == {"names", "pixels"}


def test_the_memory_of_another_process_is_searched() -> None:
    program = (
        "import sys; kept = sys.stdin.buffer.read(64) + b'!'; print(flush=True); sys.stdin.buffer.read()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=-1, stdout=-1) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(KEY)
        child.stdin.flush()
        child.stdout.readline()
        searched = Search(ALL).in_process(child.pid)
        child.stdin.close()
    assert searched.found == {"key"}
    assert searched.size_bytes > 1_000_000


def test_memory_that_nobody_may_read_is_an_error_not_a_zero() -> None:
    with pytest.raises(OSError):  # noqa: PT011
        Search(ALL).in_process(2**22 + 1)


@pytest.mark.parametrize("text", ["", "abc", "\0" * 8])
def test_a_marker_that_chance_would_find_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="too short"):
        secret("short", text.encode())


def test_a_scan_counts_markers_not_spellings() -> None:
    both = Searched.together([Searched(10, frozenset({"a"})), Searched(5, frozenset({"a", "b"}))])
    scan = marker_scan("wire", Searched(7, frozenset()), both, 3)
    assert (scan.searched_bytes, scan.markers, scan.hits, scan.control_hits) == (7, 3, 0, 2)
    assert marker_scan("disk", both, None, 3).control_hits is None


def test_two_markers_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="one name"):
        Search([secret("key", KEY), secret("key", KEY[::-1])])


def test_an_empty_search_finds_nothing() -> None:
    assert not Search([]).in_bytes(b"anything at all").found
    assert not Search([Marker("x", frozenset({b"secret"}))]).in_bytes(b"se").found
