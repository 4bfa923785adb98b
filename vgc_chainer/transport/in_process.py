"""Transport between virtual workers: p ranks that take turns in one process.

Outside of a worker's turn all workers are taken to hold the same object. Within turns, which come
in rank order, rank 0's broadcasts and point-to-point messages wait for those who receive them
later: enough for ``chainermn.scatter_dataset`` to be called once in every worker's turn.
"""

import collections
import functools
import operator

import numpy as np


class InProcessTransport:
    """Collectives over `size` virtual workers.

    Args:
        size: Number of workers.
    """

    name = 'in_process'

    def __init__(self, size):
        self.size = size
        self._broadcast = None
        self._mail = collections.defaultdict(collections.deque)

    def allgather_records(self, record):
        """One row a worker, all equal: shape (workers, length)."""
        return np.tile(record, (self.size, 1))

    def allgather_objects(self, obj):
        """The object once a worker, as list."""
        return [obj] * self.size

    def allreduce_object(self, obj):
        """Sum over workers that all hold `obj`."""
        return functools.reduce(operator.add, [obj] * self.size)

    def broadcast(self, obj, rank, root):
        """What `root` gave in its turn; `root` has to come first."""
        if rank == root:
            self._broadcast = obj
        return self._broadcast

    def send(self, obj, source, dest):
        self._mail[source, dest].append(obj)

    def receive(self, source, dest):
        """The oldest message; raises LookupError if there is none, since nobody could send it."""
        if not self._mail[source, dest]:
            raise LookupError(f'virtual worker {dest} waits for {source}, which has sent nothing')
        return self._mail[source, dest].popleft()
