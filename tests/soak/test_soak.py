"""What takes minutes or gigabytes; ``make soak`` runs it."""

import re

import numpy as np
import pytest

from tests.compressors.common import decoded, layout_of, prepared
from tests.mpi.common import SETTINGS
from tests.mpi_launcher import mpiexec, run

pytest.importorskip('mpi4py')
pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(mpiexec() is None, reason='there is no mpiexec'),
]


def replicas(n, steps, timeout=3000):
    """Hash of the last parameters of every compressor."""
    env = {'VGC_SOAK_STEPS': str(steps), 'PYTEST_ADDOPTS': '-s'}
    result = run(n, ['-m', 'tests.mpi', 'soak_replicas.py'], timeout=timeout, env=env)
    assert result.returncode == 0, result.stdout
    hashes = dict(re.findall(r'^HASH (\w+) (\w+)$', result.stdout, re.M))
    assert set(hashes) == {name for name, _ in SETTINGS}, result.stdout
    return hashes


@pytest.mark.parametrize('n', [2, 3, 8])
def test_a_thousand_steps_of_every_compressor(n):
    replicas(n, 1000)


def test_thirty_two_ranks():
    replicas(32, 20)


def test_the_same_seeds_give_the_same_run_in_other_processes():
    assert replicas(2, 100) == replicas(2, 100)


def test_three_hundred_million_parameters():
    """Beyond 28 index bits: two shards. About 11 GB."""
    n = 300_000_000
    layout = layout_of([(n,)])
    compressor = prepared('variance', {'alpha': 1.0}, layout)
    assert compressor.words.n_shards(n) == 2
    chosen = np.array([0, 5, 2**28 - 1, 2**28, 2**28 + 77, n - 1])
    g = np.full(n, 0.5, np.float32)
    s = np.ones(n, np.float32)
    s[chosen] = 0.01
    message = compressor.compress([g], [s])
    del g, s
    assert message.shard_counts.tolist() == [3, 3]
    indices, _, _ = compressor.words.unpack(message.words, message.shard_counts, np)
    np.testing.assert_array_equal(indices, chosen)
    np.testing.assert_array_equal(compressor.r[chosen], 0)
    assert compressor.r[chosen[2] - 1] == compressor.r[chosen[4] + 1] == 0.5
    out = decoded(compressor, message)
    np.testing.assert_array_equal(np.flatnonzero(out), chosen)
    np.testing.assert_array_equal(out[chosen], np.float32(0.5))


def test_a_message_of_more_than_two_gigabytes():
    """Two ranks together send 2^29 + 14 words. About 11 GB."""
    result = run(2, ['-m', 'tests.soak.long_message'], timeout=600)
    assert result.returncode == 0 and result.stdout.count('LONG MESSAGE OK') == 2, result.stdout
