"""Errors of the user, which end all ranks together with one message."""

import contextlib
import os
import sys

from vgc_chainer.errors import VgcError


class UsageError(VgcError):
    """The user asked for what cannot be; raised on every rank alike."""


@contextlib.contextmanager
def leave_on_usage_error(mpi_comm):
    """Turns a `UsageError` into one line on rank 0's standard error and exit code 2 of every rank.

    Args:
        mpi_comm: MPI communicator whose ranks all raise the error, if one does.
    """
    try:
        yield
    except UsageError as error:
        if mpi_comm.rank == 0:
            print(f'{os.path.basename(sys.argv[0])}: error: {error}', file=sys.stderr, flush=True)
        mpi_comm.Barrier()  # mpiexec ends all ranks when the first one leaves: print before that
        raise SystemExit(2) from None
