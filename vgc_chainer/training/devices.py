"""Which device a rank computes on."""

import chainer
from chainer.backends import cuda

from vgc_chainer.training.collective import allgather_obj
from vgc_chainer.training.errors import UsageError

NEEDS_GPU = ('flat', 'pure_nccl', 'non_cuda_aware')
NEEDS_ONE_GPU_A_RANK = ('pure_nccl', 'non_cuda_aware')  # NCCL refuses two ranks on one device


def check_gpu(gpu, communicator):
    """Raises ValueError if ``--gpu`` is misspelt or does not go with the communicator."""
    if gpu not in ('-1', 'per-rank') and not gpu.isdecimal():
        raise ValueError(f"--gpu must be -1, a device's number or per-rank, not {gpu!r}")
    if gpu == '-1' and communicator in NEEDS_GPU:
        raise ValueError(f'--communicator {communicator} needs a GPU: --gpu per-rank')
    if gpu != 'per-rank' and communicator in NEEDS_ONE_GPU_A_RANK:
        raise ValueError(
            f'--communicator {communicator} needs a GPU of its own a rank: --gpu per-rank'
        )


def select_device(gpu, comm):
    """Makes a device current.

    Args:
        gpu (str): ``'-1'`` for the CPU, a number for that device, shared by all ranks of a host,
            or ``'per-rank'`` for the device numbered as the rank within its host.
        comm: ChainerMN communicator.

    Returns:
        chainer.backend.Device: The device.

    Raises:
        UsageError: A rank has no such device; raised on every rank.
    """
    if gpu == '-1':
        return chainer.get_device('@numpy')
    number = comm.intra_rank if gpu == 'per-rank' else int(gpu)
    counts = allgather_obj(comm, (number, _count_devices()))
    for rank, (wanted, count) in enumerate(counts):
        if wanted >= count:
            raise UsageError(
                f'--gpu {gpu}: rank {rank} needs device {wanted}, but finds {count} devices'
            )
    device = chainer.get_device(f'@cupy:{number}')
    device.use()
    return device


def _count_devices():
    # cuda.available is True with CuPy 14 even where there is no driver: only the count tells.
    if not cuda.available:
        return 0
    try:
        return cuda.cupy.cuda.runtime.getDeviceCount()
    except cuda.cupy.cuda.runtime.CUDARuntimeError:
        return 0
