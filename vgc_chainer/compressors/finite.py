"""Find NaN and Inf in a list of arrays."""

import numpy as np


def first_nonfinite(arrays, xp=np):
    """Number of the first array that holds NaN or Inf, or -1.

    Args:
        arrays: Float arrays; None is passed over.
        xp: numpy or cupy. On CuPy the answer costs one synchronisation.
    """
    if xp is not np:
        from vgc_chainer.compressors.cuda.finite import first_nonfinite as on_device

        return on_device(arrays)
    for number, array in enumerate(arrays):
        if array is None:
            continue
        # A sum is twice as fast as isfinite().all(); it may overflow without a NaN or Inf.
        with np.errstate(over='ignore', invalid='ignore'):
            suspicious = not np.isfinite(array.sum())
        if suspicious and not np.isfinite(array).all():
            return number
    return -1
