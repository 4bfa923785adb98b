import numpy as np
import pytest
from mpi4py import MPI


@pytest.fixture(params=['first', 'second'], autouse=True)
def run_twice(request):
    """Every check runs twice in one process, to catch lazy initialisation."""
    np.random.seed(MPI.COMM_WORLD.rank)
    return request.param
