import numpy as np
import pytest


def _is_check(module):
    return module.__name__.rpartition('.')[2].startswith('checks_')


def pytest_generate_tests(metafunc):
    """Every check runs twice in one process, to catch lazy initialisation."""
    if _is_check(metafunc.module):
        metafunc.fixturenames.append('turn')
        metafunc.parametrize('turn', ['first', 'second'])


@pytest.fixture(autouse=True)
def rank_seed(request):
    if _is_check(request.module):
        from mpi4py import MPI

        np.random.seed(MPI.COMM_WORLD.rank)
