"""Gathers more than 2^31 bytes; prints a line on every rank."""

import numpy as np
from mpi4py import MPI

from vgc_chainer.transport.mpi import MPITransport

world = MPI.COMM_WORLD
counts = [2**28 + 7] * world.size
payload = np.full(counts[0], world.rank + 1, np.uint32)
payload[-1] = 100 + world.rank
received = MPITransport(world).allgatherv(payload, counts)
for rank, part in enumerate(received):
    assert part.size == counts[rank] and part[-1] == 100 + rank
    assert (part[:-1] == rank + 1).all()
print('LONG MESSAGE OK', flush=True)
