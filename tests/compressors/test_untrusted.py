"""A received message is not trusted, whichever compressor it claims to be from."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import fuzz
from tests.compressors.common import decoded, layout_of, prepared, random_step
from vgc_chainer import wire
from vgc_chainer.errors import WireError
from vgc_chainer.wire import Message

TARGETS = dict(fuzz.targets())


@pytest.mark.parametrize('what', TARGETS)
def test_damaged_messages(what):
    """A short version of ``make fuzz``, with the same damage every time."""
    rng = np.random.default_rng(list(TARGETS).index(what))
    assert fuzz.fuzz(TARGETS[what], 150, rng) < 150


@pytest.mark.gpu
def test_damaged_messages_on_a_gpu():
    import cupy

    for number, (what, target) in enumerate(fuzz.targets(cupy)):
        assert fuzz.fuzz(target, 40, np.random.default_rng(number)) < 40, what


def test_undamaged_messages_are_accepted():
    for what, target in TARGETS.items():
        for record, payload in target.messages:
            assert target.feed(record, payload), what


words = st.one_of(st.integers(0, 2**32 - 1), st.sampled_from(fuzz.EXTREMES.tolist()))


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(sorted(TARGETS)),
    st.integers(0, 4),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), words), max_size=3),
    st.lists(st.tuples(st.integers(0, 7), st.integers(-(2**63), 2**63 - 1)), max_size=2),
)
def test_whatever_is_written_into_a_message(what, number, into_payload, into_header):
    target = TARGETS[what]
    record, payload = (array.copy() for array in target.messages[number])
    for at, word in into_payload:
        if payload.size:
            payload[int(at * payload.size)] = word
    for field, value in into_header:
        record[field] = value
    target.feed(record, payload)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=5, max_size=5))
def test_status_of_another_program(values):
    with pytest.raises(WireError, match='rank 7 speaks another wire format'):
        wire.Status.unpack(np.array([*values[:4], values[4] & ~0xFF], np.int64), 7)


@pytest.mark.parametrize('name', ['qsgd', 'terngrad'])
@pytest.mark.parametrize('norm', [np.nan, np.inf, -np.inf, -1])
def test_impossible_norms(name, norm):
    compressor = prepared(name, {}, layout_of())
    message = compressor.compress(random_step(compressor.layout, np.random.default_rng(0))[0])
    message.table.view(np.float32)[1] = norm
    with pytest.raises(WireError, match='rank 0 sent a norm that is negative, NaN or infinite'):
        decoded(compressor, message)


@pytest.mark.parametrize(
    ('dtype', 'low', 'high'), [(np.float32, -149, 127), (np.float64, -1074, 1023)]
)
def test_impossible_exponents(dtype, low, high):
    compressor = prepared('variance', {}, layout_of([(4,)], dtype))
    one = Message(
        table=np.zeros(1, np.uint32),
        words=np.uint32([2]),
        shard_counts=np.uint32([1]),
    )
    for exponent in (low, high):
        one.table.view(np.int16)[0] = exponent
        np.testing.assert_array_equal(decoded(compressor, one)[2], dtype(2.0) ** dtype(exponent))
    for exponent in (low - 1, high + 1, -32767, 32767):
        one.table.view(np.int16)[0] = exponent
        with pytest.raises(WireError, match=f'an exponent that no {dtype.__name__} has'):
            decoded(compressor, one)


def test_words_of_a_group_that_is_said_to_be_absent_or_dense():
    layout = layout_of([(3,), (3,), (3,)])
    compressor = prepared('strom', {}, layout)
    for index, refused in ((2, False), (3, True), (5, True), (6, False)):
        message = Message(words=np.uint32([index]), shard_counts=np.uint32([1]))
        message.absent = np.uint32([1])
        if refused:
            with pytest.raises(WireError, match='words of group 1, which is absent'):
                decoded(compressor, message)
        else:
            assert np.count_nonzero(decoded(compressor, message)) == 1
    message = Message(words=np.uint32([3]), shard_counts=np.uint32([1]), dense=np.uint32([1]))
    message.dense_values = np.zeros(3, np.float32).view(np.uint32)
    with pytest.raises(WireError, match='words of group 1, which is dense'):
        decoded(compressor, message)


def test_another_number_of_shards():
    compressor = prepared('strom', {}, layout_of([(3,)]))
    message = Message(words=np.uint32([1]), shard_counts=np.uint32([1, 0]))
    with pytest.raises(WireError, match='rank 0 sent 2 shards'):
        decoded(compressor, message)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_dense_values_that_are_not_finite(bad):
    compressor = prepared('none', {}, layout_of())
    message = compressor.compress(random_step(compressor.layout, np.random.default_rng(0))[0])
    message.dense_values.view(np.float32)[77] = bad
    with pytest.raises(WireError, match='rank 0 sent NaN or Inf among its dense values'):
        decoded(compressor, message)


@pytest.mark.parametrize(
    'section', ['table', 'shards', 'absent', 'dense', 'words', 'dense_values']
)
def test_lengths_are_refused_before_memory_is_set_aside(section):
    layout = layout_of()
    for length in (2**31, 2**62):
        with pytest.raises(WireError, match=f'rank 4 announced {length} words of {section[:5]}'):
            wire.require_plausible(wire.Header(**{section: length}), layout, 4)
