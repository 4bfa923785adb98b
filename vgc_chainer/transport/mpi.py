"""MPI transport: allgather of fixed-size records and allgatherv of payloads.

On the GPU payloads are staged through page-locked host buffers, since the MPI of a wheel has
no CUDA and would take a device pointer for a host one.
"""

import numpy as np

#: Words in one MPI call, all ranks together: 2^31 bytes. Some MPIs count bytes in 32-bit integers.
_MAX_WORDS = 2**29 - 1


class MPITransport:
    """Collectives over an mpi4py communicator.

    Args:
        mpi_comm: mpi4py intracommunicator.
    """

    name = 'mpi'

    def __init__(self, mpi_comm):
        self.mpi_comm = mpi_comm
        self._buffers = {}

    @property
    def rank(self):
        return self.mpi_comm.rank

    @property
    def size(self):
        return self.mpi_comm.size

    def allgather_records(self, record):
        """Gather one int64 array of the same length from every rank: shape (ranks, length)."""
        gathered = np.empty((self.size, record.size), np.int64)
        self.mpi_comm.Allgather(np.ascontiguousarray(record), gathered)
        return gathered

    def allgather_objects(self, obj):
        """Gather one picklable object from every rank, as list."""
        return self.mpi_comm.allgather(obj)

    def allgatherv(self, payload, counts):
        """Gather payloads of different lengths.

        Every rank takes part, with an empty payload too: who stays away hangs the others.

        Args:
            payload: uint32 array, NumPy or CuPy, of ``counts[rank]`` words.
            counts: Length of every rank's payload, in words, known beforehand.

        Returns:
            One uint32 array a rank, on the device of `payload`. They share a buffer that the
            next call overwrites.
        """
        counts = [int(count) for count in counts]
        on_host = isinstance(payload, np.ndarray)
        send = np.ascontiguousarray(payload) if on_host else self._to_host(payload)
        received = self._buffer('receive', sum(counts), pinned=not on_host)
        starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        if sum(counts) <= _MAX_WORDS:
            self._allgatherv(send, received, counts)
        else:
            self._allgatherv_in_parts(send, received, counts, starts)
        if not on_host:
            received = self._to_device(received)
        return [received[starts[i] : starts[i + 1]] for i in range(self.size)]

    def _allgatherv(self, send, received, counts):
        starts = [0, *np.cumsum(counts, dtype=np.int64).tolist()]
        self.mpi_comm.Allgatherv(send, [received, counts, starts[:-1], _uint32()])

    def _allgatherv_in_parts(self, send, received, counts, starts):
        """The same in several calls, each of which MPI can count; all ranks make as many."""
        share = max(1, _MAX_WORDS // self.size)
        for done in range(0, max(counts), share):
            now = [min(max(count - done, 0), share) for count in counts]
            part = np.empty(sum(now), np.uint32)
            self._allgatherv(send[done : done + now[self.rank]], part, now)
            at = 0
            for rank, length in enumerate(now):
                start = starts[rank] + done
                received[start : start + length] = part[at : at + length]
                at += length

    def _to_host(self, payload):
        import cupy

        staged = self._buffer('send', payload.size, pinned=True)
        if payload.size:
            payload.get(out=staged)
            cupy.cuda.get_current_stream().synchronize()
        return staged

    def _to_device(self, host):
        import cupy

        device = self._buffers.get('device')
        if device is None or device.size < host.size:
            device = self._buffers['device'] = cupy.empty(_grown(host.size), np.uint32)
        device = device[: host.size]
        device.set(host)
        # The page-locked buffer is written again in the next step.
        cupy.cuda.get_current_stream().synchronize()
        return device

    def _buffer(self, name, size, pinned):
        """Host buffer that is kept and grows, page-locked for transfers to a GPU."""
        key = (name, pinned)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.size < size:
            room = _grown(size)
            if pinned:
                import cupy

                memory = cupy.cuda.alloc_pinned_memory(4 * room)
                buffer = np.frombuffer(memory, np.uint32, room)
            else:
                buffer = np.empty(room, np.uint32)
            self._buffers[key] = buffer
        return buffer[:size]


def _grown(size):
    """Room to grow, so that slowly rising sizes do not allocate in every step."""
    return max(1024, size + size // 4)


def _uint32():
    from mpi4py import MPI

    return MPI.UINT32_T
