"""The ends of the number range: overflow, float16, denormals."""

import numpy as np
import pytest

from tests.compressors.common import SETTINGS, decoded, flat, layout_of, prepared
from vgc_chainer.compressors.finite import first_nonfinite

MAX = np.finfo(np.float32).max
every_setting = pytest.mark.parametrize(('name', 'options'), SETTINGS)


def step(compressor, values, dtype=np.float32, scale=1.0):
    """Compress one group of these values as if the batch had been one sample of eight."""
    g = [np.array(values, dtype)]
    with np.errstate(over='ignore', under='ignore'):
        s = [(g[0].astype(compressor.layout.state_dtype) ** 2 / 8)]
    s = [np.minimum(s[0], np.finfo(s[0].dtype).max)]
    return compressor.compress(g, s, scale)


def mean(compressor, messages, dtype, scale=1.0):
    out = [np.zeros(shape, dtype) for shape in compressor.layout.shapes]
    compressor.decode(messages, out, scale)
    return flat(out, compressor.layout)


@every_setting
def test_the_largest_numbers_stay_finite(name, options):
    """Gradients at the end of float32 for three steps: words, residuals and means are finite."""
    compressor = prepared(name, options, layout_of([(6,)]))
    for _ in range(3):
        message = step(compressor, [MAX, -MAX, MAX / 2, 1, 1e-30, 0])
        result = mean(compressor, [message] * 3, np.float32)
        assert np.isfinite(result).all()
        if name in ('variance', 'none'):
            assert result[0] > MAX / 4 and result[1] < -MAX / 4
    for key in compressor.state_names:
        assert np.isfinite(compressor.state()[key]).all(), key


def test_a_mean_that_overflows_as_a_sum_is_the_largest_number():
    compressor = prepared('none', {}, layout_of([(3,)]))
    messages = [compressor.compress([np.float32([MAX, -MAX, 1])]) for _ in range(2)]
    np.testing.assert_array_equal(mean(compressor, messages, np.float32), [MAX, -MAX, 1])


def test_a_dense_group_whose_residual_overflows():
    compressor = prepared('variance', {'alpha': 2.0}, layout_of([(2,)]))
    compressor.r[:] = [MAX, -MAX]
    message = compressor.compress([np.float32([MAX, MAX])], [None])
    np.testing.assert_array_equal(decoded(compressor, message), [MAX, 0])


@pytest.mark.parametrize('scale', [1.0, 1024.0])
@pytest.mark.parametrize('name', ['variance', 'none'])
def test_float16_gradients_saturate(name, scale):
    """What a residual gathered may be more than a float16 holds, even more so when scaled."""
    layout = layout_of([(4,)], np.float16)
    compressor = prepared(name, {'alpha': 1.0} if name == 'variance' else {}, layout)
    if name == 'variance':
        compressor.r[:2] = [1e6, -1e6]
    message = step(compressor, [60000, -60000, 2, 0], np.float16)
    result = mean(compressor, [message], np.float16, scale)
    assert np.isfinite(result).all()
    if name == 'variance' or scale > 1:
        np.testing.assert_array_equal(result[:2], [65504, -65504])
    assert result[2] == (2 * scale if name == 'none' else 0)


@every_setting
def test_float16_denormals(name, options):
    """2^-24, the smallest float16: neither lost in residuals nor an error."""
    compressor = prepared(name, options, layout_of([(8,)], np.float16))
    tiny = 2.0**-24
    message = step(compressor, [tiny, -tiny, 0, 3 * tiny] * 2, np.float16)
    sent = decoded(compressor, message)
    assert np.isfinite(sent).all()
    if name == 'variance':
        np.testing.assert_array_equal(sent[:3], np.float32([tiny, -tiny, 0]))
        assert sent[3] == np.float32(2 * tiny)  # the group's power of two
    if name in ('strom', 'hybrid'):
        np.testing.assert_array_equal(compressor.r[:2], np.float32([tiny, -tiny]))


@every_setting
@pytest.mark.parametrize('smallest', [1e-45, 1e-40])
def test_float32_denormals(name, options, smallest):
    compressor = prepared(name, options, layout_of([(4,)]))
    for _ in range(20):
        message = step(compressor, [smallest, -smallest, 0, 0])
        sent = decoded(compressor, message)
        assert np.isfinite(sent).all() and (sent[2:] == 0).all()
        assert np.abs(sent).max() <= 20 * smallest or name == 'qsgd'
    for key in compressor.state_names:
        assert np.isfinite(compressor.state()[key]).all()
    if name in ('strom', 'hybrid'):
        np.testing.assert_allclose(compressor.r[0], 20 * np.float32(smallest), rtol=1e-6)


def test_a_moment_that_vanishes_does_not_stop_an_element():
    """g = 1e-25: s = g^2 / b underflows in float32 to 0; r^2 > 0 holds in float64."""
    compressor = prepared('variance', {'alpha': 2.0}, layout_of([(1,)]))
    message = compressor.compress([np.float32([1e-25])], [np.float32([0])])
    assert message.words.size == 1


@pytest.mark.parametrize('scale', [2.0**-10, 2.0**24, 3.0])
def test_extreme_loss_scales(scale):
    plain, scaled = (prepared('variance', {'alpha': 1.0}, layout_of([(3,)])) for _ in range(2))
    a = step(plain, [1, -3, 0.25])
    b = scaled.compress(
        [np.float32([scale, -3 * scale, 0.25 * scale])],
        [np.float32([1, 9, 0.0625]) / 8 * np.float32(scale**2)],
        scale,
    )
    np.testing.assert_array_equal(a.words, b.words)
    np.testing.assert_allclose(
        mean(scaled, [b], np.float32, scale), [scale, -2 * scale, scale / 4]
    )


@pytest.mark.parametrize('dtype', [np.float16, np.float32, np.float64])
def test_search_for_nan_and_inf(dtype):
    largest = np.finfo(dtype).max
    fine = np.full(1000, largest, dtype)  # the sum overflows
    cancel = np.array([largest, -largest] * 500, dtype)
    assert first_nonfinite([None, fine, cancel, np.empty(0, dtype), fine[0]]) == -1
    for bad in (np.nan, np.inf, -np.inf):
        for at in (0, 500, 999):
            array = cancel.copy()
            array[at] = bad
            assert first_nonfinite([fine, None, array, array]) == 2
    both = np.zeros(1000, dtype)
    both[[3, 7]] = np.inf, -np.inf
    assert first_nonfinite([both]) == 0


def test_a_bucket_whose_norm_overflows_is_sent_with_a_finite_one():
    compressor = prepared('qsgd', {'bits': 8, 'bucket_size': 128}, layout_of([(128,)]))
    message = compressor.compress([np.full(128, MAX)])
    sent = decoded(compressor, message)
    assert (sent > MAX / 300).all() and np.isfinite(sent).all()
