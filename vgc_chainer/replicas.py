"""Debug guard: are the parameters of all ranks still the same bits?

They are by construction, unless something outside of the exchange changes them: a parameter that
a rank alone sets, an optimizer hook with randomness, a defective memory. Persistent values
(statistics of BatchNorm) are a rank's own and are not compared.
"""

import hashlib

import chainer
import numpy as np

from vgc_chainer.compressors import options
from vgc_chainer.errors import MismatchError


class ReplicaCheck:
    """Compares parameters every few steps.

    Args:
        interval: Steps between two comparisons, >= 1; None or 0 for never. A comparison costs one
            pass over the parameters, on the host.

    Raises:
        ValueError: The interval is not such a number.
    """

    def __init__(self, interval=None):
        self.interval = options.integer('check_replicas', interval or 0, 0, 2**31)

    def check(self, transport, params, step):
        """Compare, if it is time; collective.

        Args:
            transport: Of the communicator.
            params: ``(name, parameter)`` pairs, the same names on all ranks.
            step: Number of the step that is about to be exchanged.

        Raises:
            MismatchError: On every rank: the first parameter that differs, and where.
        """
        if not self.interval or step % self.interval:
            return
        hashes = np.array([_hash(param.array) for _, param in params], np.int64)
        everybody = transport.allgather_records(hashes)
        differs = (everybody != everybody[0]).any(axis=0)
        if not differs.any():
            return
        first = int(np.flatnonzero(differs)[0])
        ranks = np.flatnonzero(everybody[:, first] != everybody[0, first]).tolist()
        raise MismatchError(
            f'parameter {params[first][0]} is not the same on all ranks before step {step}: '
            f'ranks {ranks} differ from rank 0; {int(differs.sum())} of {len(params)} parameters '
            'differ somewhere'
        )


def _hash(array):
    host = np.ascontiguousarray(chainer.backends.cuda.to_cpu(array))
    digest = hashlib.blake2b(host.data, digest_size=8).digest()
    return int.from_bytes(digest, 'little', signed=True)
