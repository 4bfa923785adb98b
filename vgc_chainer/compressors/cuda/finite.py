"""One launch that looks for NaN and Inf in all arrays of a model."""

import functools

import cupy
import numpy as np

from vgc_chainer.compressors.cuda.source import kernel
from vgc_chainer.compressors.cuda.tables import Arrays, ReadBack, Upload

_CHUNK = 8192


@functools.cache
def _buffers(device):
    return Upload(), ReadBack()


def first_nonfinite(arrays):
    """As :func:`vgc_chainer.compressors.finite.first_nonfinite`, for CuPy arrays."""
    numbers = [k for k, a in enumerate(arrays) if a is not None and a.size]
    # Order within an array is of no account, so Fortran order is as good as C order.
    there = [
        a if a.flags.c_contiguous or a.flags.f_contiguous else cupy.ascontiguousarray(a)
        for a in (arrays[k] for k in numbers)
    ]
    if not there:
        return -1
    table = Arrays(there)
    upload, read_back = _buffers(cupy.cuda.Device().id)
    sizes = np.array(table.sizes, np.int64)
    first = np.concatenate([[0], np.cumsum(-(-sizes // _CHUNK))])
    at = upload.send(
        arrays=table.pointers,
        sizes=sizes,
        codes=table.codes,
        first_chunk=first,
        found=[len(there)],
    )
    kernel('first_nonfinite', ('finite',), STATE_BYTES=4, RULE=0)(
        (int(first[-1]),),
        (256,),
        (at['arrays'], at['sizes'], at['codes'], at['first_chunk'], len(there), at['found']),
    )
    found = int(read_back.read(at['found'], 1, np.int64)[0])
    return numbers[found] if found < len(there) else -1
