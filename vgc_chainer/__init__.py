"""Variance-based gradient compression for Chainer and ChainerMN.

Import it before chainer: the import makes Chainer 7.8.1 run on current Python and NumPy.
"""

from vgc_chainer import compat

compat.apply()

from vgc_chainer import compressors, errors, extensions  # noqa: E402
from vgc_chainer.factory import create_communicator  # noqa: E402

__version__ = '0.1.0'

__all__ = ['VirtualUpdater', 'compressors', 'create_communicator', 'errors', 'extensions']


def __getattr__(name):
    # Needs chainermn, and that mpi4py; import vgc_chainer must work without.
    if name == 'VirtualUpdater':
        from vgc_chainer.virtual import VirtualUpdater

        return VirtualUpdater
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
