"""Runs the MPI checks under mpiexec with 2, 3 and 8 ranks."""

import pytest

from tests.mpi_launcher import mpiexec, run

pytest.importorskip('mpi4py')
pytestmark = pytest.mark.skipif(mpiexec() is None, reason='there is no mpiexec')


@pytest.mark.parametrize('n', [2, 3, 8])
def test_checks(n):
    result = run(n, ['-m', 'tests.mpi'], timeout=300)
    assert result.returncode == 0, result.stdout
    # Every rank has run every check.
    assert result.stdout.count(' passed') == n, result.stdout


@pytest.mark.gpu
@pytest.mark.parametrize('n', [2, 8])
def test_checks_on_one_gpu(n):
    result = run(n, ['-m', 'tests.mpi', 'checks_gpu.py'], timeout=300)
    assert result.returncode == 0, result.stdout
    assert result.stdout.count(' passed') == n, result.stdout
