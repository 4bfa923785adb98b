"""QSGD, TernGrad and the random numbers under them."""

import numpy as np
import pytest

from tests.compressors.common import decoded, flat, layout_of, prepared, random_step
from vgc_chainer.compressors import QSGDCompressor, TernGradCompressor
from vgc_chainer.compressors.philox import philox4x32, uniform
from vgc_chainer.compressors.reduction import tree_sum


@pytest.mark.parametrize(
    ('counter', 'key', 'expected'),
    [  # known answers of the Random123 distribution
        (
            (0, 0, 0, 0),
            (0, 0),
            (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        ),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    lanes = philox4x32([np.array([c], np.uint64) for c in counter], key)
    assert tuple(int(lane[0]) for lane in lanes) == expected


def test_uniform_does_not_depend_on_where_a_range_starts():
    whole = uniform(np, 1, 2, 3, 0, 1000)
    np.testing.assert_array_equal(uniform(np, 1, 2, 3, 333, 777), whole[333:777])
    assert 0 <= whole.min() and whole.max() < 1
    assert abs(whole.mean() - 0.5) < 0.05
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert not np.array_equal(uniform(np, *other, 0, 1000), whole)


@pytest.mark.parametrize('size', [0, 1, 1023, 1024, 1025, 3_000_000])
def test_tree_sum(size):
    x = np.random.default_rng(0).random(size)
    np.testing.assert_allclose(tree_sum(np, x), x.sum(), rtol=1e-12)


def test_qsgd_by_hand():
    """Bucket (3, 4) has norm 5; with 7 levels 3/5*7 = 4.2 and 4/5*7 = 5.6."""
    compressor = prepared('qsgd', {'bits': 4, 'bucket_size': 2}, layout_of([(3,)]))
    g = [np.float32([3, -4, 2])]
    message = compressor.compress(g)
    np.testing.assert_array_equal(message.table.view(np.float32), [5, 2])
    sent = decoded(compressor, message) / np.float32([5, 5, 2]) * 7
    assert np.abs(sent[0] - 4.5) < 0.6 and np.abs(sent[1] + 5.5) < 0.6
    np.testing.assert_allclose(sent[2], 7, rtol=1e-6)


@pytest.mark.parametrize(
    ('name', 'options'),
    [
        ('qsgd', {'bits': 2, 'bucket_size': 16}),
        ('qsgd', {'bits': 3, 'bucket_size': 9, 'norm': 'max'}),
        ('terngrad', {'clip': 100}),
    ],
)
def test_unbiased(name, options):
    layout = layout_of([(40,), (9,)])
    compressor = prepared(name, options, layout)
    gradients, _ = random_step(layout, np.random.default_rng(0), scale=1)
    n = 4000
    total = sum(decoded(compressor, compressor.compress(gradients)) for _ in range(n))
    largest = np.abs(flat(gradients, layout)).max()
    # A value is at most 2 |bucket| in size, so its mean over n is within a few / sqrt(n).
    np.testing.assert_allclose(
        total / n, flat(gradients, layout), atol=6 * 4 * largest / np.sqrt(n)
    )


@pytest.mark.parametrize('name', ['qsgd', 'terngrad'])
def test_streams_repeat_and_differ_between_ranks_and_steps(name):
    layout = layout_of()
    gradients, _ = random_step(layout, np.random.default_rng(0))

    def words(rank, steps):
        compressor = prepared(name, {'seed': 5}, layout, rank)
        return [compressor.compress(gradients).words for _ in range(steps)][-1]

    np.testing.assert_array_equal(words(0, 2), words(0, 2))
    assert not np.array_equal(words(0, 2), words(1, 2))
    assert not np.array_equal(words(0, 2), words(0, 3))


def test_terngrad_clips_at_a_multiple_of_sigma():
    layout = layout_of([(1001,)])
    compressor = prepared('terngrad', {'clip': 2.5}, layout)
    g = np.random.default_rng(0).standard_normal(1001).astype(np.float32)
    g[0] = 1000
    message = compressor.compress([g])
    sigma = g.astype(np.float64).std()
    np.testing.assert_allclose(message.table.view(np.float32), [2.5 * sigma], rtol=1e-6)
    sent = decoded(compressor, message)
    assert sent[0] > 0 and set(np.unique(np.abs(sent))) <= {0, message.table.view(np.float32)[0]}


@pytest.mark.parametrize('name', ['qsgd', 'terngrad'])
def test_zero_gradients_send_nothing(name):
    layout = layout_of()
    compressor = prepared(name, {}, layout)
    message = compressor.compress([np.zeros(shape, np.float32) for shape in layout.shapes])
    assert message.words.size == 0
    np.testing.assert_array_equal(decoded(compressor, message), 0)


@pytest.mark.parametrize('bits', [1, 9, 2.5, True])
def test_illegal_bits(bits):
    with pytest.raises(ValueError, match='bits'):
        QSGDCompressor(bits=bits)


def test_illegal_options():
    with pytest.raises(ValueError, match='bucket_size'):
        QSGDCompressor(bucket_size=0)
    with pytest.raises(ValueError, match='norm'):
        QSGDCompressor(norm='l1')
    with pytest.raises(ValueError, match='clip'):
        TernGradCompressor(clip=0)
    with pytest.raises(ValueError, match='seed'):
        TernGradCompressor(seed=-1)
