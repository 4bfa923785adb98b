"""Algorithm 1: a trace worked by hand, and what must hold for every trace."""

import numpy as np
import pytest

from tests.compressors.common import decoded, flat, layout_of, prepared, random_step
from vgc_chainer.compressors import VarianceCompressor


def one_group(values):
    return [np.array(values, np.float32)]


def test_trace_by_hand():
    """alpha = 2, zeta = 1/2, three elements, three steps; every number worked on paper.

    Step 1, g = (1, 3, -1), s = (1, 4, 0.25):
        r^2 = (1, 9, 1) against 2 v = (2, 8, 0.5): elements 1 and 2 go.
        M = 3, e = 1. |3| > 2^1 -> 2, d = 0. |1| -> 1, d = 1.
        Sent: (0, 2, -1). r = (1, 0, 0), v = (1/2, 0, 0).
    Step 2, g = (0.5, 1, 0), s = (0.25, 1, 0):
        r = (1.5, 1, 0), v = (0.75, 1, 0). r^2 = (2.25, 1, 0) against (1.5, 2, 0): element 0.
        M = 1.5, e = 0. 1.5 > 2^0 -> 1, d = 0. Sent: (1, 0, 0).
        r = (0, 1, 0), v = (0, 1/2, 0): an element of zeros is not sent and has v = 0.
    Step 3, g = (0, 0.75, 5), s = (0, 0.5, 1):
        r = (0, 1.75, 5), v = (0, 1, 1). r^2 = (0, 3.0625, 25) against (0, 2, 2): 1 and 2.
        M = 5, e = 2. 5 > 4 -> 4, d = 0. 1.75 lies between 1 and 2, nearer 2, d = 1.
        Sent: (0, 2, 4).
    """
    compressor = prepared('variance', {'alpha': 2, 'zeta': 0.5}, layout_of([(3,)]))
    steps = [
        ([1, 3, -1], [1, 4, 0.25], [0, 2, -1], [1, 0, 0], [0.5, 0, 0]),
        ([0.5, 1, 0], [0.25, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0.5, 0]),
        ([0, 0.75, 5], [0, 0.5, 1], [0, 2, 4], [0, 0, 0], [0, 0, 0]),
    ]
    for g, s, sent, r, v in steps:
        message = compressor.compress(one_group(g), one_group(s))
        np.testing.assert_array_equal(decoded(compressor, message), np.float32(sent))
        np.testing.assert_array_equal(compressor.r, np.float32(r))
        np.testing.assert_array_equal(compressor.v, np.float32(v))
    assert message.words.size == 2


def test_words_of_a_message_bit_by_bit():
    compressor = prepared('variance', {'alpha': 1}, layout_of([(2,), (4,)]))
    g = [np.array([0, -8], np.float32), np.array([0.5, 0, 0, 1], np.float32)]
    message = compressor.compress(g, [x * x / 8 for x in g])
    sign, code = 1 << 31, 1 << 28
    np.testing.assert_array_equal(message.words, np.uint32([sign | 1, code | 2, 5]))
    np.testing.assert_array_equal(message.table.view(np.int16), [3, 0])


def test_unambiguous_is_strict():
    compressor = prepared('variance', {'alpha': 4}, layout_of([(2,)]))
    message = compressor.compress(one_group([2, 2]), one_group([1, 0.999]))
    np.testing.assert_array_equal(message.words & 0xFFFFFFF, [1])


@pytest.mark.parametrize('policy', ['drop', 'hold'])
@pytest.mark.parametrize('error_feedback', [False, True])
def test_unrepresentable(policy, error_feedback):
    """1 and 2^-8 in one group: d = 8 does not fit in three bits, d = 7 does."""
    options = {'alpha': 1, 'unrepresentable': policy, 'error_feedback': error_feedback}
    compressor = prepared('variance', options, layout_of([(3,)]))
    g = one_group([1, 2.0**-8, 2.0**-7])
    message = compressor.compress(g, [x * x / 8 for x in g])
    np.testing.assert_array_equal(decoded(compressor, message), np.float32([1, 0, 2.0**-7]))
    held = policy == 'hold' or error_feedback
    np.testing.assert_array_equal(compressor.r, np.float32([0, 2.0**-8 if held else 0, 0]))
    v = 2.0**-19 if policy == 'hold' else 0
    np.testing.assert_array_equal(compressor.v, np.float32([0, v, 0]))


def test_error_feedback_loses_nothing():
    """What came in = what went out + what is held, in float64."""
    layout = layout_of(dtype=np.float64)
    compressor = prepared('variance', {'alpha': 1, 'error_feedback': True}, layout)
    rng = np.random.default_rng(0)
    came, went = np.zeros(layout.total), np.zeros(layout.total)
    for _ in range(30):
        gradients, moments = random_step(layout, rng)
        came += flat(gradients, layout)
        went += decoded(compressor, compressor.compress(gradients, moments))
    assert np.abs(went).max() > 1
    np.testing.assert_allclose(went + compressor.r, came, rtol=0, atol=1e-13)


def test_larger_alpha_never_selects_more():
    layout = layout_of()
    gradients, _ = random_step(layout, np.random.default_rng(1))
    rng = np.random.default_rng(2)
    moments = [(4 * g * g * rng.random(g.shape)).astype(np.float32) for g in gradients]
    selected = []
    for alpha in (0.3, 0.5, 1, 2, 4):
        # 'hold' keeps what is selected and does not fit; r = 0 marks what was sent.
        compressor = prepared('variance', {'alpha': alpha}, layout)
        compressor.compress(gradients, moments)
        selected.append(set(np.flatnonzero((compressor.r == 0) & (flat(gradients, layout) != 0))))
    for fewer, more in zip(selected[1:], selected):
        assert fewer < more


@pytest.mark.parametrize('scale', [1.0, 128.0, 2.0**16])
def test_loss_scale_is_divided_out(scale):
    layout = layout_of()
    plain, scaled = (prepared('variance', {'alpha': 1}, layout) for _ in range(2))
    rng = np.random.default_rng(3)
    for _ in range(3):
        g, s = random_step(layout, rng)
        a = plain.compress(g, s)
        b = scaled.compress(
            [np.float32(scale) * x for x in g], [np.float32(scale**2) * x for x in s], scale
        )
        np.testing.assert_array_equal(a.words, b.words)
        np.testing.assert_array_equal(plain.r, scaled.r)
        np.testing.assert_array_equal(plain.v, scaled.v)
    out = [np.zeros(shape, np.float32) for shape in layout.shapes]
    scaled.decode([b], out, scale)
    np.testing.assert_array_equal(flat(out, layout), decoded(plain, a) * np.float32(scale))


def test_neither_square_nor_product_overflows_or_vanishes():
    """float32 r^2 would be Inf or 0 here; the test in float64 decides rightly."""
    compressor = prepared('variance', {'alpha': 2}, layout_of([(4,)]))
    g = one_group([1e30, 1e30, 1e-30, 1e-30])
    compressor.v[:] = [1e38, 3e38, 1e-45, 0]
    compressor.r[:] = 0
    s = one_group([0, 0, 0, 0])
    sent = decoded(compressor, compressor.compress(g, s))
    np.testing.assert_array_equal(sent[:2], np.float32([2.0**99, 2.0**99]))
    tiny = prepared('variance', {'alpha': 2}, layout_of([(2,)]))
    tiny.v[:] = [1e-45, 1e-45]
    sent = decoded(tiny, tiny.compress(one_group([1e-22, 1e-23]), one_group([0, 0])))
    assert sent[0] > 0
    np.testing.assert_array_equal(tiny.r[1], np.float32(1e-23))


def test_an_overflowing_moment_does_not_silence_an_element_for_ever():
    compressor = prepared('variance', {'alpha': 1, 'zeta': 0.5}, layout_of([(1,)]))
    compressor.compress(one_group([0]), one_group([3e38]))
    compressor.v[:] = 3.4e38
    compressor.compress(one_group([0]), one_group([3e38]))
    assert np.isfinite(compressor.v[0])


def test_an_overflowing_residual_is_sent():
    compressor = prepared('variance', {'alpha': 1}, layout_of([(1,)]))
    compressor.r[:] = 3e38
    with np.errstate(over='ignore'):
        message = compressor.compress(one_group([3e38]), one_group([1]))
    np.testing.assert_array_equal(decoded(compressor, message), np.float32([2.0**127]))
    np.testing.assert_array_equal(compressor.r, [0])


@pytest.mark.parametrize(
    ('options', 'named'),
    [
        ({'alpha': 0}, 'alpha'),
        ({'alpha': -1}, 'alpha'),
        ({'alpha': float('nan')}, 'alpha'),
        ({'alpha': float('inf')}, 'alpha'),
        ({'zeta': 0}, 'zeta'),
        ({'zeta': 1.001}, 'zeta'),
        ({'unrepresentable': 'keep'}, 'unrepresentable'),
    ],
)
def test_illegal_hyperparameters(options, named):
    with pytest.raises(ValueError, match=named):
        VarianceCompressor(**options)


def test_ports_that_use_the_mean_of_squares_can_never_fire():
    """The trap of two public ports: v = mean of g_z^2, b times too large.

    With g_z equal for all samples, the clearest case there is, r^2 = g^2 and their v = g^2: for
    alpha >= 1 nothing is ever sent on one batch. s = sum of (g_z / b)^2 = g^2 / b fires.
    """
    b, per_sample = 8, np.full(8, 0.25)
    g = [np.array([per_sample.mean()], np.float32)]
    right = [np.array([((per_sample / b) ** 2).sum()], np.float32)]
    wrong = [np.array([(per_sample**2).mean()], np.float32)]
    for moments, count in ((right, 1), (wrong, 0)):
        compressor = prepared('variance', {'alpha': 1}, layout_of([(1,)]))
        assert compressor.compress(g, moments).words.size == count
