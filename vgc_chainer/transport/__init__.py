"""Bytes in, bytes out: how packed messages reach all ranks. Knows nothing of gradients.

``'mpi'`` carries everything, staged through page-locked host memory where it comes from a GPU;
``'nccl'`` carries GPU payloads from GPU to GPU; ``'auto'`` takes NCCL where it can work, that is,
on GPUs of which no two ranks share one. All deliver the same bytes.
"""

from vgc_chainer.transport.mpi import MPITransport

TRANSPORTS = ('auto', 'mpi', 'nccl')


def create_transport(name, mpi_comm):
    """Transport for GPU payloads; collective.

    Args:
        name: One of :data:`TRANSPORTS`.
        mpi_comm: mpi4py intracommunicator.

    Raises:
        TransportError: What was asked for cannot work; on every rank.
    """
    if name == 'mpi':
        return MPITransport(mpi_comm)
    from vgc_chainer.transport.nccl import NCCLTransport, why_not_nccl

    if name == 'auto' and why_not_nccl(mpi_comm) is not None:
        return MPITransport(mpi_comm)
    return NCCLTransport(mpi_comm)
