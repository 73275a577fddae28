"""Pictures in the audit: how much a rebuilt one resembles the original, and both as small PNG files.

A model's inputs are turned back into brightness by the original's own range. The attacker is given that
range, which favours him: what he rebuilds is compared, not how he guessed the exposure.
"""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
from numpy.typing import NDArray

from protocol.plan import Plan

Floats = NDArray[np.float64]

MOST_DB = 120.0
RECOGNIZABLE_DB = 20.0
"""Peak signal-to-noise ratio from which a rebuilt record counts as rebuilt."""

MARGIN_DB = 10.0
"""How much nearer it must be than one even grey, which is near to a picture that is almost black."""

_PICTURED_MODELS = ("linear", "mlp", "cnn")
_WINDOW = 7
_LUMINANCE, _CONTRAST = 0.01**2, 0.03**2
_PNG_SIDE = 64


def picture_shape(plan: Plan) -> tuple[int, int] | None:
    """Return height and width of a plan's records; None if its model's inputs are no grey pictures."""
    shape = plan.task.input_shape
    if len(shape) != 2 or plan.model.name not in _PICTURED_MODELS:
        return None
    return shape[0], shape[1]


def brightness(rows: Floats, original: Floats) -> Floats:
    """Return rows as brightness in [0, 1], by the range of the original.

    Args:
        rows: Model inputs or what an attack took for some, shape (..., d).
        original: The true input, shape (d,). Its largest magnitude is white, or black if it is negative;
            zero is black where no value is negative, and grey where one is.
    """
    largest = float(np.max(np.abs(original), initial=0.0)) or 1.0
    rows = np.nan_to_num(rows, nan=0.0, posinf=largest, neginf=-largest)
    scaled = rows / largest
    return np.clip(0.5 + 0.5 * scaled if np.any(original < 0) else scaled, 0.0, 1.0)


def deviations(rows: Floats, original: Floats) -> Floats:
    """Return rows that are no pictures over the standard deviation of the original.

    Their peak signal-to-noise ratio is then that of the original's variance to the error: a guess without
    any knowledge has about 0 dB. Features have rare large values, beside which every guess would look good.

    Args:
        rows: Model inputs or what an attack took for some, shape (..., d).
        original: The true input, shape (d,).
    """
    return np.nan_to_num(rows / (float(np.std(original)) or 1.0), nan=0.0, posinf=1e6, neginf=-1e6)


def is_recognizable(ratio_db: float, original: Floats) -> bool:
    """Tell whether a record counts as rebuilt: near to the original, and not by being even.

    Args:
        ratio_db: Peak signal-to-noise ratio of the rebuilt record.
        original: As it was compared, shape (d,).
    """
    even = float(psnr_db(np.full_like(original, original.mean()), original))
    return ratio_db >= max(RECOGNIZABLE_DB, min(even + MARGIN_DB, MOST_DB))


def psnr_db(rebuilt: Floats, original: Floats) -> Floats:
    """Return the peak signal-to-noise ratio of pictures in [0, 1], in decibels, at most `MOST_DB`.

    Args:
        rebuilt: Shape (..., d).
        original: Shape (d,).

    Returns:
        float64, shape (...).
    """
    error = np.mean((rebuilt - original) ** 2, axis=-1)
    ratios: Floats = -10.0 * np.log10(np.maximum(error, 10.0 ** (-MOST_DB / 10)))
    return ratios


def ssim(first: Floats, second: Floats) -> float:
    """Return the structural similarity of two pictures in [0, 1] (Wang et al. 2004), in [-1, 1].

    The mean over all windows of 7 x 7 pixels, or of the picture's size where that is smaller, all pixels
    of a window alike, with sample variances.

    Args:
        first: Shape (height, width).
        second: Of the same shape.
    """
    size = (min(_WINDOW, first.shape[0]), min(_WINDOW, first.shape[1]))
    a, b = (np.lib.stride_tricks.sliding_window_view(each, size) for each in (first, second))
    axes, count = (-2, -1), size[0] * size[1]
    mean_a, mean_b = a.mean(axis=axes, keepdims=True), b.mean(axis=axes, keepdims=True)
    freedom = max(1, count - 1)
    variances = (((a - mean_a) ** 2) + ((b - mean_b) ** 2)).sum(axis=axes) / freedom
    covariance = ((a - mean_a) * (b - mean_b)).sum(axis=axes) / freedom
    product, squares = (mean_a * mean_b)[..., 0, 0], (mean_a**2 + mean_b**2)[..., 0, 0]
    index = (2 * product + _LUMINANCE) * (2 * covariance + _CONTRAST)
    index /= (squares + _LUMINANCE) * (variances + _CONTRAST)
    return float(np.clip(index.mean(), -1.0, 1.0))


def png(picture: Floats) -> str:
    """Return a grey picture as base64 of a PNG file, enlarged by whole pixels to about 64 on a side.

    Args:
        picture: In [0, 1], shape (height, width).
    """
    factor = max(1, _PNG_SIDE // max(picture.shape))
    levels = np.round(np.clip(picture, 0.0, 1.0) * 255).astype(np.uint8)
    enlarged = levels.repeat(factor, axis=0).repeat(factor, axis=1)
    height, width = enlarged.shape
    # every line starts with the number of its filter; 0 is none
    lines = b"".join(b"\0" + line.tobytes() for line in enlarged)
    grey_8_bit = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", grey_8_bit), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, body) for kind, body in parts)
    return base64.b64encode(data).decode("ascii")


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
