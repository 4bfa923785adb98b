"""Runs the checks in this folder on every rank: ``mpiexec -n N python -m tests.mpi [FILE...]``.

A rank that fails ends all of them: the others may wait for it in a collective.
"""

import sys
from pathlib import Path

import pytest
from mpi4py import MPI

import vgc_chainer  # noqa: F401  (before mpi4py and chainer)

here = Path(__file__).parent
files = [str(here / name) for name in sys.argv[1:]] or sorted(map(str, here.glob('checks_*.py')))
code = pytest.main(['-q', '-x', '-p', 'no:cacheprovider', '--no-header', *files])
sys.stdout.flush()
if code != 0:
    MPI.COMM_WORLD.Abort(int(code))
