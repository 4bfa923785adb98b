"""Norms that travel as float32: always finite when sent, checked when received."""

import numpy as np

_LARGEST = np.finfo(np.float32).max


def to_float32(xp, values, room=1):
    """`values` as float32, none larger than the largest finite number / `room`.

    A receiver refuses an infinite norm, and one element at the limit would make a norm infinite.
    """
    if values.dtype == np.float64:
        largest = float(_LARGEST) / room
        values = xp.clip(values, -largest, largest)
    return values.astype(np.float32)


def norms_problem(table):
    """What is wrong with a received table of float32 norms, in words, or None."""
    norms = table.view(np.float32)
    if bool(((norms >= 0) & (norms <= _LARGEST)).all()):  # NaN is neither
        return None
    return 'a norm that is negative, NaN or infinite'
