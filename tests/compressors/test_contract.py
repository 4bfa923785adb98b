"""What every compressor promises, whatever its algorithm."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compressors.common import (
    SETTINGS,
    SHAPES,
    decoded,
    flat,
    layout_of,
    prepared,
    random_step,
)
from vgc_chainer import wire
from vgc_chainer.compressors import COMPRESSORS, base
from vgc_chainer.compressors.quantizer import MAX_CODE, dequantize, quantize
from vgc_chainer.compressors.words import WordFormat
from vgc_chainer.errors import LayoutError, StateError, WireError
from vgc_chainer.layout import Layout

every_setting = pytest.mark.parametrize(('name', 'options'), SETTINGS)


def sent_over_the_wire(message, layout, rank=0):
    header = wire.Header.unpack(message.header().pack(), rank)
    return wire.unpack(message.pack(np), header, layout, rank)


def assert_same_message(a, b):
    for field in ('table', 'words', 'shard_counts', 'absent', 'dense', 'dense_values'):
        np.testing.assert_array_equal(getattr(a, field), getattr(b, field), err_msg=field)


@every_setting
@pytest.mark.parametrize('dtype', [np.float16, np.float32, np.float64])
def test_mean_of_three_ranks(name, options, dtype):
    """decode() is the sum over ranks of what each message says, divided by three."""
    layout = layout_of(dtype=dtype)
    ranks = [prepared(name, options, layout, rank) for rank in range(3)]
    rng = np.random.default_rng(0)
    for _ in range(3):
        messages = [
            sent_over_the_wire(c.compress(*random_step(layout, rng)), layout) for c in ranks
        ]
        expected = sum(decoded(ranks[0], m) for m in messages) / np.asarray(3, layout.state_dtype)
        for compressor in ranks:
            out = [np.full(shape, np.nan, dtype) for shape in layout.shapes]
            compressor.decode(messages, out)
            np.testing.assert_array_equal(flat(out, layout), expected.astype(dtype))
    assert np.abs(expected).max() > 0


@every_setting
def test_words_are_in_index_order(name, options):
    layout = layout_of()
    compressor = prepared(name, options, layout)
    message = compressor.compress(*random_step(layout, np.random.default_rng(0)))
    indices, _, _ = compressor.words.unpack(message.words, message.shard_counts, np)
    assert (np.diff(indices) > 0).all()
    assert name == 'none' or indices.size > 100


@every_setting
def test_header_counts_what_the_buffers_hold(name, options):
    layout = layout_of()
    message = prepared(name, options, layout).compress(
        *random_step(layout, np.random.default_rng(0))
    )
    header = message.header()
    assert header.payload_words * 4 == message.pack(np).nbytes
    assert header.elements == (layout.total if name == 'none' else message.words.size)


@every_setting
@pytest.mark.parametrize('block', [1, 7, 1000])
def test_blocks_do_not_show(name, options, block, monkeypatch):
    layout = layout_of()
    rng = np.random.default_rng(0)
    steps = [random_step(layout, rng) for _ in range(3)]
    whole = prepared(name, options, layout)
    expected = [whole.compress(*step) for step in steps]
    monkeypatch.setattr(base, 'BLOCK', block)
    blocked = prepared(name, options, layout)
    for step, message in zip(steps, expected):
        assert_same_message(blocked.compress(*step), message)
    for key, value in whole.state().items():
        np.testing.assert_array_equal(blocked.state()[key], value)


@every_setting
@pytest.mark.parametrize('index_bits', [1, 6, 11])
def test_shards_do_not_show(name, options, index_bits):
    """A model beyond the index bits decodes to the same; here with few index bits."""
    layout = layout_of()
    plain, sharded = (prepared(name, options, layout) for _ in range(2))
    sharded.words = WordFormat(sharded.code_bits, index_bits)
    gradients, moments = random_step(layout, np.random.default_rng(0))
    a, b = plain.compress(gradients, moments), sharded.compress(gradients, moments)
    assert b.shard_counts.size == -(-layout.total // (1 << index_bits))
    np.testing.assert_array_equal(
        decoded(sharded, sent_over_the_wire(b, layout)), decoded(plain, a)
    )


@every_setting
def test_absent_groups_keep_their_state(name, options):
    layout = layout_of()
    compressor = prepared(name, options, layout)
    rng = np.random.default_rng(0)
    compressor.compress(*random_step(layout, rng))
    before = {k: np.copy(v) for k, v in compressor.state().items()}
    gradients, moments = random_step(layout, rng)
    gradients[0] = moments[0] = gradients[3] = moments[3] = None
    message = sent_over_the_wire(compressor.compress(gradients, moments), layout)
    np.testing.assert_array_equal(message.absent, [0, 3])
    sent = decoded(compressor, message)
    for group in (0, 3):
        np.testing.assert_array_equal(sent[layout.slice(group)], 0)
        for key in compressor.state_names:
            after = compressor.state()[key][layout.slice(group)]
            np.testing.assert_array_equal(after, before[key][layout.slice(group)])
    assert np.abs(sent).max() > 0


@pytest.mark.parametrize(('name', 'options'), [s for s in SETTINGS if s[0] in 'variance hybrid'])
def test_dense_groups_flush_their_residual(name, options):
    """A group without second moment is sent whole, with what was held back before."""
    layout = layout_of()
    compressor = prepared(name, options, layout)
    rng = np.random.default_rng(0)
    compressor.compress(*random_step(layout, rng, noise=20))
    held = compressor.r[layout.slice(0)].copy()
    assert np.abs(held).max() > 0
    gradients, moments = random_step(layout, rng)
    moments[0] = None
    message = sent_over_the_wire(compressor.compress(gradients, moments), layout)
    assert message.dense_elements == layout.sizes[0]
    sent = decoded(compressor, message)[layout.slice(0)]
    np.testing.assert_array_equal(sent, gradients[0].reshape(-1) + held)
    np.testing.assert_array_equal(compressor.r[layout.slice(0)], 0)


@every_setting
def test_nothing_to_send(name, options):
    layout = layout_of()
    compressor = prepared(name, options, layout)
    zeros = [np.zeros(shape, np.float32) for shape in layout.shapes]
    for gradients in (zeros, [None] * len(layout)):
        message = sent_over_the_wire(compressor.compress(gradients, gradients), layout)
        out = [np.ones(shape, np.float32) for shape in layout.shapes]
        compressor.decode([message, message], out)
        np.testing.assert_array_equal(flat(out, layout), 0)


@every_setting
def test_empty_model(name, options):
    layout = Layout([])
    compressor = prepared(name, options, layout)
    message = sent_over_the_wire(compressor.compress([], []), layout)
    compressor.decode([message], [])
    assert message.words.size == 0


@every_setting
def test_saved_and_loaded_is_uninterrupted(name, options):
    """k steps + save + load + k steps = 2k steps, bit for bit."""
    layout = layout_of()
    rng = np.random.default_rng(0)
    steps = [random_step(layout, rng) for _ in range(6)]
    straight = prepared(name, options, layout, rank=1)
    expected = [straight.compress(*step) for step in steps]
    first = prepared(name, options, layout, rank=1)
    for step in steps[:3]:
        first.compress(*step)
    saved = {key: np.array(value) for key, value in first.state().items()}
    second = prepared(name, options, layout, rank=1)
    second.load_state(saved)
    for step, message in zip(steps[3:], expected[3:]):
        assert_same_message(second.compress(*step), message)
    for key, value in straight.state().items():
        np.testing.assert_array_equal(second.state()[key], value)


def test_load_state_names_what_does_not_fit():
    compressor = prepared('variance', {}, layout_of())
    state = compressor.state()
    with pytest.raises(StateError, match='lacks v'):
        compressor.load_state({'step': 1, 'r': state['r']})
    with pytest.raises(StateError, match=r'r of compressor variance: saved float32\(3,\)'):
        compressor.load_state({**state, 'r': np.zeros(3, np.float32)})


def test_a_changed_model_keeps_the_residuals_of_what_stayed():
    compressor = prepared('variance', {'alpha': 3}, layout_of([(50,), (20,)]))
    compressor.compress(*random_step(compressor.layout, np.random.default_rng(0), noise=9))
    r = compressor.r.copy()
    assert np.abs(r).min() == 0 < np.abs(r[50:]).max()
    grown = Layout(
        [('/new', (5,), np.float32), ('/p0', (25, 2), np.float32), ('/p1', (20,), np.float32)]
    )
    compressor.prepare(grown)
    np.testing.assert_array_equal(compressor.r[:55], 0)
    np.testing.assert_array_equal(compressor.r[55:], r[50:])


@every_setting
def test_non_contiguous_gradients(name, options):
    layout = layout_of([(30, 70)])
    gradients, moments = random_step(layout, np.random.default_rng(0))
    a = prepared(name, options, layout).compress(gradients, moments)
    b = prepared(name, options, layout).compress(
        [np.asfortranarray(gradients[0])], [np.asfortranarray(moments[0])]
    )
    assert_same_message(a, b)


finite = st.floats(allow_nan=False, allow_infinity=False, width=32).filter(lambda x: x != 0)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(finite, st.integers(0, 3)), min_size=1, max_size=40))
def test_quantiser_bound(elements):
    """Every representable value is within the quantiser's bound, denormals included."""
    elements.sort(key=lambda e: e[1])
    values = np.array([value for value, _ in elements], np.float32)
    groups = np.array([group for _, group in elements], np.int64)
    exponents, d = quantize(values, groups, 4, np)
    assert (d >= 0).all()
    fits = d <= MAX_CODE
    back = dequantize(values < 0, np.minimum(d, MAX_CODE), exponents, groups, np.float32, np)
    ratio = back[fits].astype(np.float64) / values[fits].astype(np.float64)
    assert (ratio > 0.5).all() and (ratio <= 4 / 3).all()
    for group in np.unique(groups):
        largest = np.abs(values[groups == group].astype(np.float64)).max()
        assert 2.0 ** exponents[group] <= largest < 2.0 ** (exponents[group] + 1)
    # What is lost is more than 2^7 times smaller than the group's power of two.
    top = 2.0 ** exponents[groups].astype(np.float64)
    assert (np.abs(values[~fits].astype(np.float64)) < top[~fits] / 2**7).all()
    # Below the cut of the largest binade the rounding is to the nearer power.
    below = fits & (np.abs(values.astype(np.float64)) <= top)
    error = np.abs(back[below].astype(np.float64) - values[below])
    assert (error <= np.abs(values[below].astype(np.float64)) / 3).all()


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(0, 7), st.integers(1, 24))
def test_word_roundtrip(data, code_bits, index_bits):
    total = min(5 << index_bits, 10_000_000)
    index_bits = min(index_bits, 31 - code_bits)
    words = WordFormat(code_bits, index_bits)
    indices = np.array(
        sorted(data.draw(st.sets(st.integers(0, total - 1), max_size=50))), np.int64
    )
    n = indices.size
    negative = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)), bool)
    codes = np.array(
        data.draw(st.lists(st.integers(0, 2**code_bits - 1), min_size=n, max_size=n)), np.int32
    )
    counts = words.shard_counts(indices, total, np)
    assert counts.sum() == n and counts.size == words.n_shards(total)
    back = words.unpack(words.pack(indices, negative, codes), counts, np)
    for got, expected in zip(back, (indices, negative, codes)):
        np.testing.assert_array_equal(got, expected)


def test_words_of_the_paper():
    """1 sign bit, 3 bits of d, 28 bits of index."""
    words = WordFormat(3)
    packed = words.pack(np.array([0x8765432]), np.array([True]), np.array([5]))
    np.testing.assert_array_equal(packed, np.uint32([0x80000000 | 5 << 28 | 0x8765432]))
    assert words.n_shards(2**28) == 1 and words.n_shards(2**28 + 1) == 2


def test_damaged_messages_are_refused():
    layout = layout_of()
    compressor = prepared('variance', {'alpha': 1}, layout)
    message = compressor.compress(*random_step(layout, np.random.default_rng(0)))
    header, payload = message.header(), message.pack(np)

    def refused(match, payload=payload, **changes):
        fields = {**vars(header), **changes}
        with pytest.raises(WireError, match=match):
            received = wire.unpack(payload, wire.Header(**fields), layout, 3)
            compressor.accumulate(received, np.zeros(layout.total, np.float32), 3)

    refused('rank 3 announced', payload[:-1])
    refused('rank 3 announced', words=header.words + 1)
    refused('shard counts of rank 3', words=header.words - 1, table=header.table + 1)
    refused('rank 3 announced .* elements', elements=header.elements + 1)
    refused('fails its checksum', checksum=1)
    twice = payload.copy()
    twice[-1] = twice[-2]
    refused('rank 3 sent indices', twice)
    beyond = payload.copy()
    beyond[-1] |= 0xFFFFFFF
    refused('rank 3 sent indices', beyond)
    no_exponent = payload.copy()
    no_exponent[: header.table] = 0x80008000
    refused('rank 3 sent elements of a group without exponent', no_exponent)
    with pytest.raises(WireError, match='negative words'):
        wire.Header(words=-1).check(0)
    status = wire.Status().pack()
    status[-1] += 1
    with pytest.raises(WireError, match='another wire format'):
        wire.Status.unpack(status, 0)


def test_checksum_catches_a_flipped_bit():
    layout = layout_of()
    message = prepared('strom', {}, layout).compress(
        random_step(layout, np.random.default_rng(0))[0]
    )
    payload, header = message.pack(np), message.header()
    header.checksum = wire.checksum(payload)
    wire.unpack(payload, header, layout, 0)
    payload[5] ^= 1 << 30
    with pytest.raises(WireError, match='checksum'):
        wire.unpack(payload, header, layout, 0)


def test_layout_refuses_what_it_cannot_hold():
    with pytest.raises(LayoutError, match='/x has dtype int32'):
        Layout([('/x', (3,), np.int32)])
    with pytest.raises(LayoutError, match='/x appears twice'):
        Layout([('/x', (3,), np.float32)] * 2)
    assert layout_of(SHAPES, np.float16).state_dtype == np.float32


def test_every_compressor_is_covered_here():
    assert {name for name, _ in SETTINGS} == set(COMPRESSORS)
