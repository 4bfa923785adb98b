"""Strom's threshold and Algorithm 2."""

import numpy as np
import pytest

from tests.compressors.common import decoded, flat, layout_of, prepared, random_step
from vgc_chainer.compressors import HybridCompressor, StromCompressor


def test_hybrid_trace_by_hand():
    """tau = 1, alpha = 1, zeta = 1/2; three elements, two steps, worked on paper.

    Step 1, g = (3, 0.5, -2), s = (4, 0.1, 5):
        |r| > 1: 0 and 2. r^2 = (9, ., 4) against v = (4, ., 5): only 0.
        S = 1: v = max(4 - 2*1*3 + 1, 0) = 0, r = 2.
        The others: v *= 1/2. r = (2, 0.5, -2), v = (0, 0.05, 2.5).
    Step 2, g = (0, 0.25, -4), s = (1, 0.05, 7):
        r = (2, 0.75, -6), v = (1, 0.1, 9.5). Element 1 is below tau though unambiguous.
        r^2 = (4, ., 36) against (1, ., 9.5): 0 and 2.
        0: S = 1, v = max(1 - 4 + 1, 0) = 0, r = 1.
        2: S = -1, v = max(9.5 - 12 + 1, 0) = 0, r = -5.
    """
    compressor = prepared('hybrid', {'tau': 1, 'alpha': 1, 'zeta': 0.5}, layout_of([(3,)]))
    steps = [
        ([3, 0.5, -2], [4, 0.1, 5], [1, 0, 0], [2, 0.5, -2], [0, 0.05, 2.5]),
        ([0, 0.25, -4], [1, 0.05, 7], [1, 0, -1], [1, 0.75, -5], [0, 0.05, 0]),
    ]
    for g, s, sent, r, v in steps:
        message = compressor.compress([np.float32(g)], [np.float32(s)])
        np.testing.assert_array_equal(decoded(compressor, message), np.float32(sent))
        np.testing.assert_array_equal(compressor.r, np.float32(r))
        np.testing.assert_allclose(compressor.v, np.float32(v), rtol=1e-7)


def test_hybrid_keeps_what_remains_of_the_moment():
    """v = 9.5, r = 4, S = 1: 9.5 - 8 + 1 = 2.5, and no decay on top."""
    compressor = prepared('hybrid', {'tau': 1, 'alpha': 1, 'zeta': 0.5}, layout_of([(1,)]))
    compressor.compress([np.float32([4])], [np.float32([9.5])])
    np.testing.assert_array_equal(compressor.v, np.float32([2.5]))


def test_strom_trace_by_hand():
    compressor = prepared('strom', {'tau': 0.5}, layout_of([(3,)]))
    for g, sent, r in (
        ([1.75, -0.5, 0.25], [0.5, 0, 0], [1.25, -0.5, 0.25]),
        ([0, -0.25, 0.25], [0.5, -0.5, 0], [0.75, -0.25, 0.5]),
        ([0, 0, 0], [0.5, 0, 0], [0.25, -0.25, 0.5]),
    ):
        message = compressor.compress([np.float32(g)])
        np.testing.assert_array_equal(decoded(compressor, message), np.float32(sent))
        np.testing.assert_array_equal(compressor.r, np.float32(r))


@pytest.mark.parametrize(('name', 'options'), [('strom', {}), ('hybrid', {'alpha': 1})])
def test_nothing_is_lost(name, options):
    layout = layout_of(dtype=np.float64)
    compressor = prepared(name, {'tau': 0.05, **options}, layout)
    rng = np.random.default_rng(0)
    came, went = np.zeros(layout.total), np.zeros(layout.total)
    for _ in range(30):
        gradients, moments = random_step(layout, rng)
        came += flat(gradients, layout)
        went += decoded(compressor, compressor.compress(gradients, moments))
    assert np.abs(went).max() > 0.1
    np.testing.assert_allclose(went + compressor.r, came, rtol=0, atol=1e-13)


@pytest.mark.parametrize('tau', [0, -1, float('nan')])
def test_illegal_tau(tau):
    for cls in (StromCompressor, HybridCompressor):
        with pytest.raises(ValueError, match='tau'):
            cls(tau=tau)
