"""Splitting a public dataset into owners, for demonstrations, simulations and tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocol.errors import DataInvalid, DatasetMissing

Shard = tuple[NDArray[Any], NDArray[Any]]
"""Raw rows `x` (n, ...) and their labels `y` (n,)."""

DIGITS_TEST_ROWS = 360
DIGITS_RANGE = (0.0, 16.0)
DIGITS_SHAPE = (8, 8)

DATA_VARIABLE = "FEDSEAL_DATA"
"""Names the folder of public datasets that are too large to be bundled."""

FASHION_MNIST = "fashion_mnist"

_DIRICHLET_TRIES = 100


def split(
    x: NDArray[Any],
    y: NDArray[Any],
    owners: int,
    seed: int,
    test_share: float,
    alpha: float | None = None,
) -> tuple[list[Shard], Shard]:
    """Split rows into disjoint owners and a public test set.

    Args:
        x: Rows, shape (n, ...).
        y: Labels, shape (n,).
        owners: Number of owners, >= 1.
        seed: Public seed; equal seeds give equal splits.
        test_share: Share of rows that becomes the test set, in [0, 1).
        alpha: Concentration of the Dirichlet law by which each class is dealt to the owners (Hsu et
            al. 2019); small is uneven. None deals all rows alike.

    Returns:
        One shard for each owner, and the test set; together they hold every row once.

    Raises:
        DataInvalid: An owner would get no row.
    """
    order = np.random.default_rng(seed).permutation(len(y))
    test_rows = round(test_share * len(y))
    test, rest = order[:test_rows], order[test_rows:]
    if alpha is None:
        parts = np.array_split(rest, owners)
    else:
        parts = _dirichlet_parts(rest, y[rest], owners, seed, alpha)
    if min(len(part) for part in parts) == 0:
        raise DataInvalid("an owner would get no row; use fewer owners or a larger alpha")
    return [(x[part], y[part]) for part in parts], (x[test], y[test])


def digits(seed: int, owners: int) -> tuple[list[Shard], Shard]:
    """Return scikit-learn's bundled handwritten digits as owners and 360 public test rows.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998; 1,797
    images of 8 x 8 pixels, float32 in [0, 16], with labels 0 to 9.
    """
    from sklearn.datasets import load_digits  # two seconds that only this function should cost

    bundle = load_digits()
    x = bundle.images.astype(np.float32)
    y = bundle.target.astype(np.int64)
    return split(x, y, owners, seed, test_share=DIGITS_TEST_ROWS / len(y))


def fashion_mnist(seed: int, owners: int, holdout_rows: int = 0) -> tuple[list[Shard], Shard]:
    """Return Fashion-MNIST's 60,000 training images as owners, and its 10,000 test images as public.

    Images are uint8, 28 x 28, with labels 0 to 9, from ``train.npz`` and ``test.npz`` (arrays `x` and
    `y`) in the folder ``fashion_mnist`` of ``$FEDSEAL_DATA``, or of ``../shared/data`` beside the
    checkout. Source: Xiao, Rasul and Vollgraf, arXiv 1708.07747, 2017; MIT licence.

    Args:
        seed: Public seed; equal seeds give equal splits.
        owners: Number of owners.
        holdout_rows: Training images that take the place of the test images, for choosing constants; no
            owner has them. 0 for the test images.

    Raises:
        DatasetMissing: The files are not there.
        DataInvalid: An owner would get no row.
    """
    x, y = _fashion_mnist_part("train")
    shards, holdout = split(x, y, owners, seed, test_share=holdout_rows / len(y))
    return shards, holdout if holdout_rows else _fashion_mnist_part("test")


def write_examples(path: Path, x: NDArray[Any], y: NDArray[Any]) -> None:
    """Write rows as an `.npz` file that only its owner may read (mode 0600), whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        np.savez(file, x=x, y=y)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _fashion_mnist_part(part: str) -> Shard:
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    file = Path(os.environ.get(DATA_VARIABLE) or beside) / FASHION_MNIST / f"{part}.npz"
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as archive:
            return archive["x"], archive["y"].astype(np.int64)
    except Exception:  # numpy, zipfile and the decompressors raise a dozen kinds
        raise DatasetMissing(f"{FASHION_MNIST}/{part}.npz with the arrays x and y") from None


def _dirichlet_parts(
    rows: NDArray[np.int64], labels: NDArray[Any], owners: int, seed: int, alpha: float
) -> list[NDArray[np.int64]]:
    generator = np.random.default_rng([seed, 1])
    for _ in range(_DIRICHLET_TRIES):
        parts: list[list[NDArray[np.int64]]] = [[] for _ in range(owners)]
        for label in np.unique(labels):
            members = rows[labels == label]
            shares = generator.dirichlet(np.full(owners, alpha))
            ends = np.round(np.cumsum(shares)[:-1] * len(members)).astype(int)
            for part, piece in zip(parts, np.split(members, ends), strict=True):
                part.append(piece)
        joined = [np.concatenate(part) for part in parts]
        if min(len(part) for part in joined) > 0:
            break
    return joined
