"""CUDA kernels that replace whole passes of the array code, through CuPy.

The array code in the parent package is the specification: kernels give the same words, residuals
and gradients bit for bit. They are compiled at first use, without contraction of
multiply-and-add and with IEEE division.

``VGC_CHAINER_KERNELS=0`` in the environment, or ``compressor.use_kernels = False``, leaves
everything to the array code.
"""

import os

from vgc_chainer.compressors.cuda.passes import KernelPasses


def passes_for(compressor):
    """Kernel passes of a prepared compressor on CuPy, or None if they are switched off."""
    if not compressor.use_kernels or os.environ.get('VGC_CHAINER_KERNELS') == '0':
        return None
    return KernelPasses(compressor)
