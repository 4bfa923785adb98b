"""Sums and maxima in a fixed order, so that NumPy, CuPy and a kernel give the same bits."""

import numpy as np

_ROW = 1024


def fold(rows, operation):
    """Reduce the last axis of `rows` (a power of two long) by repeated halving."""
    while rows.shape[-1] > 1:
        half = rows.shape[-1] // 2
        rows = operation(rows[..., :half], rows[..., half:])
    return rows[..., 0]


def pad_to(xp, flat, multiple):
    """`flat` with zeros behind it up to a multiple of `multiple`."""
    missing = -flat.size % multiple
    if not missing:
        return flat
    return xp.concatenate([flat, xp.zeros(missing, flat.dtype)])


def tree_sum(xp, flat):
    """Sum of a flat float64 array in a fixed tree order: rows of 1024 are halved, then again.

    Returns a 0-d array; 0 for an empty one.
    """
    flat = pad_to(xp, flat, _ROW) if flat.size else xp.zeros(_ROW, np.float64)
    while flat.size > 1:
        flat = fold(pad_to(xp, flat, _ROW).reshape(-1, _ROW), xp.add)
    return flat[0]
