"""A rank that raises, dies, leaves, stalls: the job ends in seconds and says why."""

import re
import time

import pytest

from tests.mpi_launcher import mpiexec, run
from vgc_chainer import create_communicator
from vgc_chainer.watchdog import Watchdog

pytest.importorskip('mpi4py')
pytestmark = pytest.mark.skipif(mpiexec() is None, reason='there is no mpiexec')

LIMIT = 1.5
WAITED = (
    r'watchdog: rank 0 has waited [1-9]\.\d s in the exchange of status of step 3, longer than the'
)

#: What rank 1 of three does in step 3, and what must be on the screen.
FAULTS = {
    'raise': r'RuntimeError: the user divided by zero(.|\n)*Uncaught exception on rank 1',
    'kill': r'(?i)rank 1(.|\n)*signal:?\s+9|killed by signal: 9',
    'exit': WAITED + r'(.|\n)*rank 1: its process has ended\n  rank 2: waits as well, for',
    'stall': WAITED + r'(.|\n)*rank 1: has not arrived; last in the exchange of words of step 2'
    r'(.|\n)*program\.py:\d+ misbehave\n',
    'stop': WAITED + r'(.|\n)*rank 1: does not answer',
    'wander': WAITED + r'(.|\n)*rank 1: waits as well, for \S+ s in allreduce_obj\(\)',
    'evaluate': r'rank 0 has waited [1-9]\.\d s in allreduce_obj\(\)(.|\n)*program\.py:\d+ main',
}


@pytest.mark.parametrize('fault', FAULTS)
def test_fault(fault):
    start = time.monotonic()
    result = run(3, ['-m', 'tests.faults.program', fault, LIMIT], timeout=60)
    assert time.monotonic() - start < 40
    assert result.returncode != 0
    assert re.search(FAULTS[fault], result.stdout), result.stdout
    steps = re.findall(r'^STEP (\d)$', result.stdout, re.M)
    assert 'DONE' not in result.stdout and steps[:3] == ['0', '1', '2'] and len(steps) == 3


@pytest.mark.soak
def test_a_rank_that_left_is_found_out_long_before_the_limit():
    result = run(3, ['-m', 'tests.faults.program', 'exit', 1000], timeout=60)
    assert re.search(r'has waited 1\d\.\d s .*, for ranks that have ended: \[1\]', result.stdout)


@pytest.mark.soak
@pytest.mark.parametrize('fault', ['exit', 'stall', 'wander', 'evaluate'])
def test_without_the_watchdog_it_would_hang(fault):
    with pytest.raises(TimeoutError, match='STEP 2'):
        run(3, ['-m', 'tests.faults.program', fault, 'none'], timeout=20)


@pytest.mark.parametrize('limit', [0, -1, float('nan')])
def test_illegal_limit(limit):
    from mpi4py import MPI

    with pytest.raises(ValueError, match='watchdog must be a number of seconds > 0 or None'):
        Watchdog(MPI.COMM_SELF, limit)


def test_alone_there_is_nothing_to_watch():
    from mpi4py import MPI

    comm = create_communicator('strom', MPI.COMM_SELF, watchdog=1e-9)
    with comm.watchdog.waiting('something'):
        time.sleep(0.01)
