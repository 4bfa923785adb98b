"""``create_communicator``: the one line that a training script changes."""

import functools

from vgc_chainer.compressors import COMPRESSORS

_CHAINERMN = ('naive', 'flat', 'non_cuda_aware', 'pure_nccl', 'dummy')
_COMMON = (
    'unsupported',
    'nonfinite',
    'second_moment_memory',
    'checksum',
    'transport',
    'watchdog',
    'check_replicas',
)


def create_communicator(communicator_name='variance', mpi_comm=None, **options):
    """Create a communicator, compressed or one of ChainerMN's own.

    ========== ==================================================== =========================
    name       knobs (default)                                      effect of a larger value
    ========== ==================================================== =========================
    variance   alpha (1.5), zeta (0.999), unrepresentable ('drop'), larger alpha or zeta sends less
               error_feedback (False)
    hybrid     tau (0.1), alpha (2), zeta (0.999)                   sends less
    strom      tau (0.01)                                           sends less
    qsgd       bits (2), bucket_size (128), norm ('l2'), seed (0)   bits: more; bucket_size: less
    terngrad   clip (2.5), seed (0)                                 sends less, larger values
    none       --                                                   --
    ========== ==================================================== =========================

    ChainerMN's own names (``naive``, ``flat``, ``non_cuda_aware``, ``pure_nccl``, ``dummy``) are
    passed on to ``chainermn.create_communicator`` with all options.

    Args:
        communicator_name: A name from the table, or one of ChainerMN's.
        mpi_comm: mpi4py communicator; ``MPI.COMM_WORLD`` by default.
        options: Hyperparameters of the algorithm, and for all compressed communicators
            `unsupported`, `nonfinite`, `second_moment_memory`, `checksum`, `transport`,
            `watchdog`, `check_replicas`: see
            :class:`~vgc_chainer.communicator.CompressedCommunicator`. ``virtual_workers=p`` makes
            p workers that take turns in this process: see :mod:`vgc_chainer.virtual`.

    Returns:
        A ChainerMN communicator.

    Raises:
        ValueError: Unknown name, or a hyperparameter out of range.
        TypeError: Unknown option.
        ImportError: mpi4py is missing.
    """
    if communicator_name in _CHAINERMN:
        import chainermn

        return chainermn.create_communicator(communicator_name, mpi_comm, **options)
    if communicator_name not in COMPRESSORS:
        raise ValueError(
            f'unknown communicator {communicator_name!r}; there are '
            f"{', '.join(COMPRESSORS)} and ChainerMN's {', '.join(_CHAINERMN)}"
        )
    virtual_workers = options.pop('virtual_workers', None)
    common = {key: options.pop(key) for key in _COMMON if key in options}
    make_compressor = functools.partial(COMPRESSORS[communicator_name], **options)
    make_compressor()  # a wrong hyperparameter is reported before MPI is touched
    if virtual_workers is not None:
        from vgc_chainer.virtual import VirtualCommunicator

        return VirtualCommunicator(virtual_workers, make_compressor, **common)
    if mpi_comm is None:
        mpi_comm = _world()
    from vgc_chainer.communicator import CompressedCommunicator

    return CompressedCommunicator(mpi_comm, make_compressor, **common)


def _world():
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ImportError(
            f'distributed training needs mpi4py and an MPI ({error}); '
            "pip install 'vgc-chainer[mpi]' brings both"
        ) from error
    return MPI.COMM_WORLD
