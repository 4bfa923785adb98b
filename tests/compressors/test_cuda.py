"""Kernels and array code on CuPy against NumPy: same words, residuals and gradients, bit for bit.

`VGC_SMALL=1` in the environment keeps the cases few, for runs under compute-sanitizer.
"""

import os

import numpy as np
import pytest

from tests.compressors.common import SETTINGS, SHAPES, layout_of, random_step
from vgc_chainer import wire
from vgc_chainer.compressors import COMPRESSORS
from vgc_chainer.compressors.finite import first_nonfinite
from vgc_chainer.compressors.words import WordFormat
from vgc_chainer.errors import WireError
from vgc_chainer.layout import Layout

pytestmark = pytest.mark.gpu
cupy = pytest.importorskip('cupy')

SMALL = os.environ.get('VGC_SMALL') == '1'
KERNELS = ('variance', 'hybrid', 'strom', 'qsgd', 'terngrad')
RULES = KERNELS[:3]
every_setting = pytest.mark.parametrize(('name', 'options'), SETTINGS)
both_codes = pytest.mark.parametrize('kernels', [True, False], ids=['kernels', 'array code'])


def same(device, host, what=''):
    """Equal in every bit, NaN, the sign of zero and dtype included."""
    device, host = cupy.asnumpy(device), np.asarray(host)
    assert device.dtype == host.dtype and device.shape == host.shape, what
    bits = f'u{host.dtype.itemsize}'
    np.testing.assert_array_equal(
        np.ascontiguousarray(device).view(bits), np.ascontiguousarray(host).view(bits), what
    )


def on_device(arrays):
    return None if arrays is None else [None if a is None else cupy.asarray(a) for a in arrays]


class Pair:
    """One rank on NumPy and its twin on CuPy."""

    def __init__(self, name, options, layout, rank=0, kernels=True, index_bits=None):
        self.layout = layout
        self.host, self.device = (COMPRESSORS[name](**options) for _ in range(2))
        self.device.use_kernels = kernels
        self.host.prepare(layout, np, rank)
        self.device.prepare(layout, cupy, rank)
        for compressor in (self.host, self.device):
            if index_bits:
                compressor.words = WordFormat(compressor.code_bits, index_bits)

    def compress(self, gradients, moments, scale=1.0):
        """Compress on both, compare everything, return both messages as received."""
        with np.errstate(all='ignore'):
            ours = self.host.compress(gradients, moments, scale)
        theirs = self.device.compress(on_device(gradients), on_device(moments), scale)
        for field in ('table', 'words', 'shard_counts', 'absent', 'dense', 'dense_values'):
            same(getattr(theirs, field), getattr(ours, field), field)
        for key, value in self.host.state().items():
            same(self.device.state()[key], value, key)
        received = []
        for message, xp in ((ours, np), (theirs, cupy)):
            payload = message.pack(xp)
            received.append(wire.unpack(payload, message.header(), self.layout, 0))
        same(theirs.pack(cupy), ours.pack(np), 'payload')
        return received

    def decode(self, received, scale=1.0, missing=(), order='C'):
        ours, theirs = zip(*received)
        layout = self.layout
        host = [
            None if k in missing else np.full(shape, np.nan, dtype)
            for k, (shape, dtype) in enumerate(zip(layout.shapes, layout.dtypes))
        ]
        device = [None if a is None else cupy.asarray(a, order=order) for a in host]
        with np.errstate(all='ignore'):
            self.host.decode(ours, host, scale)
        self.device.decode(theirs, device, scale)
        for a, b in zip(device, host):
            if b is not None:
                same(a, b, 'decoded')


def steps_agree(name, options, layout, steps=3, kernels=True, ranks=2, make=random_step, **pair):
    rng = np.random.default_rng(0)
    pairs = [Pair(name, options, layout, rank, kernels, **pair) for rank in range(ranks)]
    for _ in range(steps):
        pairs[0].decode([p.compress(*make(layout, rng)) for p in pairs])
    return pairs


@every_setting
@both_codes
@pytest.mark.parametrize('dtype', [np.float16, np.float32, np.float64])
def test_every_setting(name, options, dtype, kernels):
    steps_agree(name, options, layout_of(dtype=dtype), kernels=kernels)


@pytest.mark.parametrize('name', KERNELS)
def test_mixed_dtypes(name):
    dtypes = (np.float16, np.float32, np.float64)
    for used in (dtypes, dtypes[:2]):
        layout = Layout((f'/{k}', (700 + k,), dtype) for k, dtype in enumerate(used))
        steps_agree(name, {}, layout)


@pytest.mark.parametrize('name', KERNELS)
@pytest.mark.parametrize('seed', range(2 if SMALL else 20))
def test_random_sizes(name, seed):
    """Sizes around the tiles of both passes, 0 and 1 included."""
    rng = np.random.default_rng(seed)
    sizes = rng.choice([0, 1, 2, 31, 32, 33, 511, 512, 513, 2047, 2048, 2049, 4097, 9999], 12)
    layout = layout_of([(int(size),) for size in sizes])
    steps_agree(name, {'alpha': 1} if name == 'variance' else {}, layout)


@pytest.mark.parametrize('name', KERNELS)
def test_one_element_and_no_element(name):
    for shapes in ([(1,)], [()], [(0,), (1,), (0,)], [(0,)], []):
        steps_agree(name, {}, layout_of(shapes))


@pytest.mark.parametrize('name', RULES)
@pytest.mark.parametrize('all_of_them', [True, False])
def test_all_selected_or_none(name, all_of_them):
    def make(layout, rng):
        gradients, moments = random_step(layout, rng)
        factor = np.float32(1e4 if all_of_them else 1e-6)
        far = np.float32(0 if all_of_them else 1e6)
        return [np.full_like(g, factor) for g in gradients], [s * 0 + far for s in moments]

    layout = layout_of([(5000,), (100, 37)])
    pairs = steps_agree(name, {}, layout, make=make)
    message = pairs[0].compress(*make(layout, np.random.default_rng(1)))[0]
    assert message.words.size == (layout.total if all_of_them else 0)


def extreme(layout, rng):
    """Denormals, zeros of both signs, and the far ends of the range."""
    gradients, moments = [], []
    for shape, dtype in zip(layout.shapes, layout.dtypes):
        info = np.finfo(dtype)
        values = [0.0, -0.0, info.smallest_subnormal, -info.smallest_subnormal, info.tiny]
        values += [3 * info.smallest_subnormal, info.max, -info.max, info.max / 3, 1, -1, 1e-3]
        gradients.append(rng.choice(np.array(values, dtype), shape))
        wide = np.finfo(layout.state_dtype)
        values = [0.0, wide.smallest_subnormal, wide.tiny, 1, 1e-6, wide.max, wide.max / 2]
        moments.append(rng.choice(np.array(values, layout.state_dtype), shape))
    return gradients, moments


@pytest.mark.parametrize(('name', 'options'), [s for s in SETTINGS if s[0] in KERNELS])
@pytest.mark.parametrize('dtype', [np.float16, np.float32, np.float64])
def test_extreme_values(name, options, dtype):
    layout = layout_of([(3000,), (64,)], dtype)
    steps_agree(name, options, layout, steps=6, make=extreme)


@pytest.mark.parametrize('name', KERNELS)
def test_ten_thousand_small_arrays(name):
    rng = np.random.default_rng(3)
    count = 300 if SMALL else 10_000
    layout = layout_of([(int(size),) for size in rng.integers(0, 20, count)])
    steps_agree(name, {}, layout, steps=2)


@every_setting
@pytest.mark.parametrize('dtype', [np.float32, np.float64])
def test_dense_and_absent_groups(name, options, dtype):
    def make(layout, rng):
        gradients, moments = random_step(layout, rng)
        for k in rng.choice(len(layout), 2, replace=False):
            gradients[k] = moments[k] = None
        for k in rng.choice(len(layout), 2, replace=False):
            moments[k] = None
        return gradients, moments

    shapes = [(30, 70), (0,), (1,), (500,), (3, 3, 3), (4000,)]
    pairs = steps_agree(name, options, layout_of(shapes, dtype), steps=5, make=make, ranks=3)
    rng = np.random.default_rng(9)
    received = [pair.compress(*make(pair.layout, rng)) for pair in pairs]
    pairs[0].decode(received, missing=(0, 3))


@every_setting
@pytest.mark.parametrize('dtype', [np.float16, np.float32])
@pytest.mark.parametrize('scale', [128.0, 3.0])
def test_loss_scale(name, options, scale, dtype):
    pair = Pair(name, options, layout_of(dtype=dtype))
    rng = np.random.default_rng(0)
    for _ in range(3):
        pair.decode([pair.compress(*random_step(pair.layout, rng), scale)], scale)


@every_setting
@pytest.mark.parametrize('index_bits', [1, 6, 11, 12])
def test_shards(name, options, index_bits):
    steps_agree(name, options, layout_of(), index_bits=index_bits, steps=2)


@every_setting
@pytest.mark.parametrize('ranks', [1, 3, 8, 9])
def test_many_messages(name, options, ranks):
    steps_agree(name, options, layout_of([(3000,), (100,)]), ranks=ranks, steps=2)


@every_setting
def test_fortran_order_and_slices(name, options):
    layout = layout_of([(30, 70), (40, 5)])
    rng = np.random.default_rng(0)
    gradients, moments = random_step(layout, rng)
    pair = Pair(name, options, layout)
    expected = pair.host.compress(gradients, moments)
    wide = [cupy.zeros((2 * g.shape[0], g.shape[1]), np.float32) for g in gradients]
    for w, g in zip(wide, gradients):
        w[::2] = cupy.asarray(g)
    message = pair.device.compress(
        [w[::2] for w in wide], [cupy.asarray(s, order='F') for s in moments]
    )
    same(message.words, expected.words)
    pair.decode([(expected, message)], order='F')


def test_messages_of_earlier_steps_stay():
    """Buffers come from the pool: a message that is still held is not overwritten."""
    pair = Pair('variance', {'alpha': 1}, layout_of([(5000,)]))
    rng = np.random.default_rng(0)
    held = [pair.compress(*random_step(pair.layout, rng)) for _ in range(3)]
    for ours, theirs in held:
        same(theirs.words, ours.words)


def test_kernels_run_where_they_should():
    """Otherwise the tests above would compare the array code with itself."""
    pair = Pair('variance', {'alpha': 1}, layout_of([(5000,)]))
    gradients, moments = random_step(pair.layout, np.random.default_rng(0))
    passes = pair.device._passes
    message = passes.compress(on_device(gradients), on_device(moments), 1.0)
    assert message.words.size and message.packed is not None
    out = on_device(gradients)
    assert passes.decode([message], out, 1.0)
    pair.device.use_kernels = False
    pair.device.prepare(pair.layout, cupy)
    assert pair.device._passes is None


def damaged(header, payload):
    """``(what is said of it, payload)`` of messages that must be refused."""

    def changed(where, value):
        copy = payload.copy()
        copy[where] = value
        return copy

    words = header.payload_words - header.words
    yield 'sent indices', changed(-1, payload[-2])
    yield 'sent indices', changed(-1, payload[-1] | 0xFFFFFFF)
    yield 'sent indices', changed(words, payload[words] | 0xFFFFFFF)
    yield 'sent elements of a group without exponent', changed(slice(header.table), 0x80008000)
    yield 'sent an exponent', changed(0, 0x7F007F00)


@both_codes
@pytest.mark.parametrize('rank', [0, 1])
def test_damaged_messages_are_refused_before_anything_is_written(rank, kernels):
    layout = layout_of()
    pair = Pair('variance', {'alpha': 1}, layout, kernels=kernels)
    good = pair.device.compress(*map(on_device, random_step(layout, np.random.default_rng(0))))
    header, payload = good.header(), cupy.asnumpy(good.pack(cupy))
    for match, bad in damaged(header, payload):
        messages = [good, good]
        messages[rank] = wire.unpack(cupy.asarray(bad), header, layout, rank)
        assert_refused(pair.device, messages, f'rank {rank} {match}')


def assert_refused(compressor, messages, match):
    out = [cupy.full(shape, 7, np.float32) for shape in compressor.layout.shapes]
    with pytest.raises(WireError, match=match):
        compressor.decode(messages, out)
    assert all((array == 7).all() for array in out)


@pytest.mark.parametrize('name', ['qsgd', 'terngrad'])
@pytest.mark.parametrize('bad', [np.nan, np.inf, -1.0])
def test_damaged_norms_are_refused(name, bad):
    pair = Pair(name, {}, layout_of())
    gradients, _ = random_step(pair.layout, np.random.default_rng(0))
    message = pair.device.compress(on_device(gradients))
    message.table.view(np.float32)[-1] = bad
    assert_refused(pair.device, [message], 'rank 0 sent a norm')


def test_words_of_absent_and_dense_groups_are_refused():
    pair = Pair('variance', {'alpha': 1}, layout_of())
    gradients, moments = random_step(pair.layout, np.random.default_rng(0))
    message = pair.device.compress(on_device(gradients), on_device(moments))
    message.absent = np.array([3], np.uint32)
    assert_refused(pair.device, [message], 'words of group 3, which is absent')
    moments[3] = None
    message = pair.device.compress(on_device(gradients), on_device(moments))
    message.dense_values.view(np.float32)[5] = np.nan
    assert_refused(pair.device, [message], 'NaN or Inf among its dense values')


def test_first_nonfinite():
    rng = np.random.default_rng(0)
    sizes = [(0,), (1,), (8191,), (8193,), (100, 200), (30_000,)]
    for dtype in (np.float16, np.float32, np.float64):
        arrays = [cupy.asarray(rng.standard_normal(size).astype(dtype)) for size in sizes]
        arrays[4] = cupy.asarray(arrays[4], order='F')
        arrays.insert(2, None)
        assert first_nonfinite(arrays, cupy) == -1
        for number in (6, 5, 4, 3, 1):  # ever earlier ones
            array = arrays[number]
            array[tuple(int(rng.integers(n)) for n in array.shape)] = rng.choice(
                [np.nan, np.inf, -np.inf]
            )
            assert first_nonfinite(arrays, cupy) == number
    assert first_nonfinite([], cupy) == first_nonfinite([None], cupy) == -1
    largest = cupy.full(10, np.finfo(np.float32).max, np.float32)
    assert first_nonfinite([largest], cupy) == -1
    assert first_nonfinite([largest[::2]], cupy) == -1


@pytest.mark.parametrize('bucket_size', [1, 32, 33, 64, 1000, 1024, 1025])
def test_qsgd_buckets(bucket_size):
    """Of every width that a warp folds; the last one is left to the array code."""
    options = {'bits': 3, 'bucket_size': bucket_size}
    steps_agree('qsgd', options, layout_of([(30, 70), (0,), (1,), (2049,)]))


def test_a_large_array():
    layout = layout_of([(20_000 if SMALL else 3_000_017,), (77,)])
    for name in KERNELS:
        steps_agree(name, {}, layout, steps=2)


def test_shapes_are_those_of_the_other_tests():
    assert layout_of().shapes == tuple(SHAPES)
