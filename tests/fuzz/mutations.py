"""Structure-aware mutations of valid inputs; each is a function of the random generator it is given."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from typing import Any, Final

HUGE_NUMBERS: Final = (
    *(-1, 0, 1, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**53 + 1, 2**63, 2**64, 10**40, -(2**63) - 1),
    *(0.0, -0.0, 1e-320, 0.1, 1.0, 1e308, -1e308),
)
STRANGE_TEXTS: Final = (
    *("", "\x00", "\ud800", "\udfff\ud800", "\u202e", "e\u0301", "\uffff", "\U0010ffff", "\x7f", "\x1b[2J"),
    *("../../etc/passwd", "a" * 64, "A" * 64, "f" * 63, "f" * 65, "g" * 64, "ﬁ", "١٢٣", " ", "\n", "=" * 8),
    *("x" * 70_000, "AAAA", "AAA=", "AA==", "!!!!", "%s%n", "{0}", "null", "true", "1", "NaN"),
)
OTHER_TYPES: Final = (None, True, False, [], {}, [[]], {"": None}, "text", 7, 0.5)
DIVERGENT_TEXT: Final = (
    *(b"1e400", b"-1e400", b"NaN", b"Infinity", b"-0", b"1.50", b"01", b"1E5", b"9" * 5000, b"nul", b"'a'"),
    *(
        b"[" * 5000,
        b"[" * 200_000,
        b'{"a":' * 3000,
        b'"\\u00e9"',
        b'"\xc3\xa9"',
        b'"\\ud800"',
        b'"\\u0061"',
    ),
)
"""Spellings that JSON readers treat differently, put in place of a value."""

Bytes = Callable[[bytes, random.Random], bytes]


def mutate_bytes(data: bytes, rng: random.Random, others: Sequence[bytes] = ()) -> bytes:
    """Return changed bytes: one to three of bit flips, cuts, extensions, moves, lengths and splices."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(_BYTE_MUTATIONS)(data, rng)
    if others and rng.random() < 0.1:
        other = rng.choice(others)
        data = data[: rng.randint(0, len(data))] + other[rng.randint(0, len(other)) :]
    return data


def mutate_value(value: Any, rng: random.Random) -> Any:
    """Return a copy of a JSON value that differs at one to three places."""
    changed = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        try:
            changed = _mutate_place(changed, rng)
        except RecursionError:  # nested too deeply for a copy; it is strange enough as it is
            break
    return changed


def mutate_json(
    data: bytes, rng: random.Random, encode: Callable[[Any], bytes], others: Sequence[bytes] = ()
) -> bytes:
    """Return changed JSON: mostly another value in the right spelling, sometimes another spelling or none.

    Args:
        data: Valid input.
        rng: Decides everything.
        encode: Spells a value as the reader expects it.
        others: More valid inputs, for splices.
    """
    choice = rng.random()
    if choice < 0.25:
        return mutate_bytes(data, rng, others)
    value = json.loads(data)
    if choice < 0.35:
        return _misspell(value, rng, encode)
    if choice < 0.40 and others:
        value = json.loads(rng.choice(others))
    return encode(mutate_value(value, rng))


def deep(levels: int, rng: random.Random) -> Any:
    """Return a value that is nested so deeply."""
    value: Any = 1
    for _ in range(levels):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def places(value: Any) -> list[tuple[Any, Any]]:
    """Return (container, key) of every value inside a JSON value."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        inner = waiting.pop()
        keys = (
            inner.keys()
            if isinstance(inner, dict)
            else range(len(inner))
            if isinstance(inner, list)
            else ()
        )
        for key in keys:
            found.append((inner, key))
            waiting.append(inner[key])
    return found


def _mutate_place(value: Any, rng: random.Random) -> Any:
    found = places(value)
    if not found or rng.random() < 0.02:
        return copy.deepcopy(rng.choice(OTHER_TYPES))
    container, key = rng.choice(found)
    action = rng.random()
    if action < 0.10 and isinstance(container, dict):
        del container[key]
    elif action < 0.16 and isinstance(container, dict):
        container[rng.choice(("", "extra", "version", "\ud800", key + key))] = container[key]
    elif action < 0.24 and isinstance(container, list):
        container.insert(rng.randint(0, len(container)), copy.deepcopy(rng.choice(container or [0])))
    elif action < 0.32:
        other, place = rng.choice(found)
        # copies, because one place may lie inside the other
        first, second = copy.deepcopy(container[key]), copy.deepcopy(other[place])
        container[key], other[place] = second, first
    elif action < 0.36:
        container[key] = deep(rng.choice((1, 5, 31, 33, 150)), rng)
    else:
        container[key] = _other_value(container[key], rng)
    return value


def _other_value(value: Any, rng: random.Random) -> Any:
    if rng.random() < 0.2:
        return copy.deepcopy(rng.choice(OTHER_TYPES))
    if isinstance(value, bool) or value is None:
        return rng.choice((True, False, None, 0, 1, "true"))
    if isinstance(value, int | float):
        near = (value + 1, value - 1, -value, value * 2, float(value), int(value) ^ 1, str(value))
        return rng.choice((*near, *HUGE_NUMBERS))
    if isinstance(value, str):
        if value and rng.random() < 0.6:
            place = rng.randrange(len(value))
            return value[:place] + rng.choice("0123456789abcdefABC+/=\x00é") + value[place + 1 :]
        return rng.choice((*STRANGE_TEXTS, value + value, value[:-1], value.upper(), value[::-1]))
    if isinstance(value, list):
        return rng.choice(([], value + value, value[1:], value[::-1], (value * 200)[:2000]))
    return rng.choice(({}, [value], dict(list(value.items())[1:])))


def _misspell(value: Any, rng: random.Random, encode: Callable[[Any], bytes]) -> bytes:
    """Return JSON that a tolerant reader takes for the value, or that it takes for anything at all."""
    text = encode(value)
    separators = rng.choice(((", ", ": "), (",", ": "), (" ,", ":")))
    forms = (
        lambda: json.dumps(value, separators=separators).encode(),
        lambda: json.dumps(value, indent=1).encode(),
        lambda: json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass"),
        lambda: b"\xef\xbb\xbf" + text,
        lambda: text + rng.choice((b" ", b"\n", b"\x00", b"{}", text)),
        lambda: text.decode("ascii").encode(rng.choice(("utf-16", "utf-32-le", "cp037"))),
        lambda: text.replace(b"{", b'{"' + _first_key(value) + b'":0,', 1),
        lambda: _put(text, rng.choice(DIVERGENT_TEXT), rng),
        lambda: text.replace(b"/", b"\\/") if b"/" in text else text.replace(b"a", b"\\u0061", 1),
        lambda: text.replace(b":1", b":1.0", 1).replace(b":true", b":1", 1),
    )
    return rng.choice(forms)()


def _first_key(value: Any) -> bytes:
    return json.dumps(next(iter(value))).encode()[1:-1] if isinstance(value, dict) and value else b"a"


def _put(text: bytes, spelling: bytes, rng: random.Random) -> bytes:
    colons = [index for index, byte in enumerate(text) if byte == ord(":")]
    if not colons:
        return spelling
    start = rng.choice(colons) + 1
    end = min(
        (place for place in (text.find(b",", start), text.find(b"}", start)) if place > 0),
        default=len(text),
    )
    return text[:start] + spelling + text[end:]


def _flip(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return b"\x00"
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _byte(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data) or 1)
    return (
        data[:place]
        + rng.choice((b"\x00", b"\xff", b"\x7f", b"\x80", b"\n", b'"', b"0"))
        + data[place + 1 :]
    )


def _cut(data: bytes, rng: random.Random) -> bytes:
    start = rng.randint(0, len(data))
    return rng.choice((data[:start], data[start:], data[:-1], data[1:], b""))


def _extend(data: bytes, rng: random.Random) -> bytes:
    filling = rng.choice((b"\x00", b"\xff", rng.randbytes(rng.choice((1, 7, 64, 4096))), data))
    return rng.choice((data + filling, filling + data))


def _remove(data: bytes, rng: random.Random) -> bytes:
    start = rng.randint(0, len(data))
    return data[:start] + data[start + rng.choice((1, 2, 4, 16, 300)) :]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    start, size = rng.randint(0, len(data)), rng.choice((1, 4, 32, 300))
    return data[:start] + data[start : start + size] * rng.choice((2, 3, 50)) + data[start + size :]


def _length(data: bytes, rng: random.Random) -> bytes:
    """Overwrite what may be a length or a count."""
    start, size = rng.randint(0, max(0, len(data) - 8)), rng.choice((1, 2, 4, 8))
    number = rng.choice((0, 1, 2 ** (8 * size - 1) - 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1))
    return data[:start] + number.to_bytes(size, rng.choice(("little", "big"))) + data[start + size :]


def _swap(data: bytes, rng: random.Random) -> bytes:
    size = rng.choice((1, 4, 32))
    first, second = sorted((rng.randint(0, len(data)), rng.randint(0, len(data))))
    a, b = data[first : first + size], data[second : second + size]
    return (
        data
        if first + size > second
        else data[:first] + b + data[first + size : second] + a + data[second + size :]
    )


_BYTE_MUTATIONS: Final[tuple[Bytes, ...]] = (
    *(_flip, _flip, _flip, _byte, _cut, _extend, _remove, _repeat, _length, _swap),
)
