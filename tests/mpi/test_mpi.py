"""Runs the MPI checks under mpiexec with 2, 3 and 8 ranks, on CPUs and sharing one GPU."""

import re

import pytest

from tests.mpi_launcher import mpiexec, run

pytest.importorskip('mpi4py')
pytestmark = pytest.mark.skipif(mpiexec() is None, reason='there is no mpiexec')


def passes(n, *files):
    """All checks pass on all ranks, and all ranks have run the same number of them."""
    result = run(n, ['-m', 'tests.mpi', *files], timeout=300)
    assert result.returncode == 0, result.stdout
    found = re.search(r'checks passed on each rank: \[([\d, ]+)\]', result.stdout)
    counts = [int(count) for count in found.group(1).split(',')]
    assert len(counts) == n and len(set(counts)) == 1 and counts[0] > 0, result.stdout


@pytest.mark.parametrize('n', [2, 3, 8])
def test_checks(n):
    passes(n)


@pytest.mark.gpu
@pytest.mark.parametrize('n', [2, 8])
def test_checks_on_one_gpu(n):
    passes(n, 'checks_gpu.py', 'checks_transport.py')
