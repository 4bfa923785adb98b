"""ChainerMN's array collectives for GPU arrays over an MPI that knows no CUDA.

``MpiCommunicatorBase`` hands device pointers to MPI. This mix-in copies to the host before and
back to the device after; on host arrays it changes nothing but one small object that tells a
receiver where the sender's array was, since ChainerMN promises that a received array lies on
the current device whenever the sent one did.
"""

import chainer
import numpy as np
from chainer.backends import cuda


def _is_device(x):
    if isinstance(x, (tuple, list)):
        return any(_is_device(item) for item in x)
    return x is not None and chainer.backend.get_array_module(x) is not np


def _to_host(x):
    if isinstance(x, (tuple, list)):
        return tuple(_to_host(item) for item in x)
    return cuda.to_cpu(x) if _is_device(x) else x


def _to_device(x):
    if isinstance(x, (tuple, list)):
        return tuple(_to_device(item) for item in x)
    return None if x is None else cuda.to_gpu(x)


class HostStaging:
    """Mix-in before ``MpiCommunicatorBase``: GPU arrays travel through the host."""

    def _staged(self, method, x, *args):
        result = method(_to_host(x), *args)
        return _to_device(result) if _is_device(x) else result

    def alltoall(self, xs):
        return self._staged(super().alltoall, xs)

    def allgather(self, x):
        return self._staged(super().allgather, x)

    def allreduce(self, x):
        return self._staged(super().allreduce, x)

    def gather(self, x, root=0):
        return self._staged(super().gather, x, root)

    def send(self, data, dest, tag):
        self.mpi_comm.send(_is_device(data), dest=dest, tag=tag)
        super().send(_to_host(data), dest, tag)

    def recv(self, source, tag):
        to_device = self.mpi_comm.recv(source=source, tag=tag)
        data = super().recv(source, tag)
        return _to_device(data) if to_device else data

    def bcast(self, x, root=0):
        to_device = self.mpi_comm.bcast(_is_device(x) if self.rank == root else None, root)
        result = super().bcast(_to_host(x) if self.rank == root else x, root)
        return _to_device(result) if to_device else result

    def scatter(self, xs, root=0):
        to_device = self.mpi_comm.bcast(_is_device(xs) if self.rank == root else None, root)
        result = super().scatter(_to_host(xs) if self.rank == root else xs, root)
        return _to_device(result) if to_device else result

    def _multi_node_mean(self, sendbuf, recvbuf):
        if not _is_device(recvbuf):
            super()._multi_node_mean(sendbuf, recvbuf)
            return
        host = _to_host(recvbuf)
        super()._multi_node_mean(_to_host(sendbuf), host)
        recvbuf[...] = cuda.to_gpu(host)
