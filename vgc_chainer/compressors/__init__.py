"""One file an algorithm; the docstring of the file is the algorithm."""

from vgc_chainer.compressors.base import Compressor
from vgc_chainer.compressors.hybrid import HybridCompressor
from vgc_chainer.compressors.none import NoneCompressor
from vgc_chainer.compressors.qsgd import QSGDCompressor
from vgc_chainer.compressors.strom import StromCompressor
from vgc_chainer.compressors.terngrad import TernGradCompressor
from vgc_chainer.compressors.variance import VarianceCompressor

#: Compressor classes by the name that :func:`vgc_chainer.create_communicator` takes.
COMPRESSORS = {
    cls.name: cls
    for cls in (
        VarianceCompressor,
        HybridCompressor,
        StromCompressor,
        QSGDCompressor,
        TernGradCompressor,
        NoneCompressor,
    )
}

__all__ = ['COMPRESSORS', 'Compressor'] + sorted(cls.__name__ for cls in COMPRESSORS.values())
