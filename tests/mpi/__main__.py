"""Runs the checks in this folder on every rank: ``mpiexec -n N python -m tests.mpi [FILE...]``.

A rank that fails ends all of them: the others may wait for it in a collective. At the end rank 0
prints how many checks passed on each rank.
"""

import sys
from pathlib import Path

import pytest
from mpi4py import MPI

import vgc_chainer  # noqa: F401  (before chainer)


class Count:
    """Pytest plugin that counts the checks that passed."""

    passed = 0

    def pytest_runtest_logreport(self, report):
        self.passed += report.when == 'call' and report.passed


def main(names):
    here = Path(__file__).parent
    files = [str(here / name) for name in names] or sorted(map(str, here.glob('checks_*.py')))
    count = Count()
    arguments = ['-q', '-x', '--color=no', '-p', 'no:cacheprovider', '--no-header', *files]
    code = pytest.main(arguments, plugins=[count])
    sys.stdout.flush()
    if code != 0:
        MPI.COMM_WORLD.Abort(int(code))
    counts = MPI.COMM_WORLD.gather(count.passed)
    if counts is not None:
        print(f'\nchecks passed on each rank: {counts}', flush=True)


if __name__ == '__main__':
    main(sys.argv[1:])
