"""NCCL transport: payloads of different lengths travel from GPU to GPU.

NCCL has no allgatherv. Three ways to make one, all with the same result:

* ``'padded'``: one allGather with every payload padded to the longest. One collective at full
  speed; moves ranks * longest words.
* ``'broadcast'``: a group of broadcasts, one a rank. Moves no padding; each costs a launch.
* ``'sendrecv'``: a group in which everybody sends to everybody. No padding either; for few ranks.

``'auto'`` pads while that adds little or the payloads are small, and broadcasts otherwise. The
lengths are known from the headers, which go over MPI, so all ranks choose alike.
"""

import numpy as np

from vgc_chainer.errors import TransportError
from vgc_chainer.transport.mpi import MPITransport

METHODS = ('auto', 'padded', 'broadcast', 'sendrecv')
#: Pad while the padded size is at most this many times the sum of the lengths ...
_SKEW = 1.25
#: ... or at most this many bytes, where latency counts and not bandwidth.
_SMALL = 1 << 18


class NCCLTransport(MPITransport):
    """Allgatherv over NCCL; records and objects over MPI.

    Args:
        mpi_comm: mpi4py intracommunicator; collective.
        method: One of :data:`METHODS`.

    Raises:
        TransportError: NCCL cannot work here; on every rank, with the reason.
    """

    name = 'nccl'

    def __init__(self, mpi_comm, method='auto'):
        super().__init__(mpi_comm)
        if method not in METHODS:
            raise ValueError(f'method must be one of {METHODS}, not {method!r}')
        self.method = method
        reason = why_not_nccl(mpi_comm)
        if reason is not None:
            raise TransportError(f"transport 'nccl' cannot work: {reason}")
        from cupy.cuda import nccl

        self._nccl = nccl
        unique_id = mpi_comm.bcast(nccl.get_unique_id() if mpi_comm.rank == 0 else None)
        self._comm = nccl.NcclCommunicator(mpi_comm.size, unique_id, mpi_comm.rank)

    def allgatherv(self, payload, counts):
        if isinstance(payload, np.ndarray):
            return super().allgatherv(payload, counts)
        import cupy

        counts = [int(count) for count in counts]
        payload = cupy.ascontiguousarray(payload)
        stream = cupy.cuda.get_current_stream().ptr
        if self._choose(counts) == 'padded':
            return self._padded(payload, counts, stream)
        received = cupy.empty(sum(counts), np.uint32)
        starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        parts = [received[starts[i] : starts[i + 1]] for i in range(self.size)]
        everybody = self._broadcasts if self._choose(counts) == 'broadcast' else self._sends
        self._nccl.groupStart()
        try:
            everybody(payload, parts, stream)
        finally:
            self._nccl.groupEnd()
        return parts

    def _choose(self, counts):
        if self.method != 'auto':
            return self.method
        padded = self.size * max(counts)
        small = 4 * padded <= _SMALL
        return 'padded' if small or padded <= _SKEW * sum(counts) else 'broadcast'

    def _padded(self, payload, counts, stream):
        import cupy

        longest = max(counts)
        if not longest:
            return [payload] * self.size
        send = cupy.zeros(longest, np.uint32)
        send[: payload.size] = payload
        received = cupy.empty((self.size, longest), np.uint32)
        self._comm.allGather(
            send.data.ptr, received.data.ptr, longest, self._nccl.NCCL_UINT32, stream
        )
        return [received[rank, :count] for rank, count in enumerate(counts)]

    def _broadcasts(self, payload, parts, stream):
        for root, part in enumerate(parts):
            if part.size:
                source = payload if root == self.rank else part
                self._comm.broadcast(
                    source.data.ptr, part.data.ptr, part.size, self._nccl.NCCL_UINT32, root, stream
                )

    def _sends(self, payload, parts, stream):
        kind = self._nccl.NCCL_UINT32
        for peer, part in enumerate(parts):
            if payload.size:
                self._comm.send(payload.data.ptr, payload.size, kind, peer, stream)
            if part.size:
                self._comm.recv(part.data.ptr, part.size, kind, peer, stream)


def why_not_nccl(mpi_comm):
    """Why NCCL cannot connect these ranks, or None; collective, the same answer everywhere."""
    answers = mpi_comm.allgather(_describe_device())
    seen = {}
    for rank, (problem, device) in enumerate(answers):
        if problem is not None:
            return f'rank {rank}: {problem}'
        if device in seen:
            host, bus = device
            return f'ranks {seen[device]} and {rank} share one GPU (host {host}, {bus})'
        seen[device] = rank
    return None


def _describe_device():
    """``(problem, None)`` or ``(None, (host, PCI bus of the current device))``."""
    try:
        import cupy
    except ImportError as error:
        return f'no CuPy ({error})', None
    try:
        if not cupy.cuda.runtime.getDeviceCount():
            return 'no CUDA device', None
        bus = cupy.cuda.runtime.deviceGetPCIBusId(cupy.cuda.Device().id)
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f'no CUDA device ({error})', None
    try:
        from cupy.cuda import nccl

        nccl.get_unique_id()
    except Exception as error:
        return f'CuPy finds no NCCL ({error})', None
    from mpi4py import MPI

    return None, (MPI.Get_processor_name(), bus)
