"""Laws that hold for every trace of gradients: conservation, monotony, no preferred element."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compressors.common import SETTINGS, decoded, flat, layout_of, prepared

every_trace = settings(max_examples=30, deadline=None)

#: Multiples of 2^-10 below 8: every sum and difference of a trace is exact in float64.
numbers = st.integers(-(2**13), 2**13).map(lambda n: n / 1024)
shapes = st.lists(st.integers(0, 9).map(lambda n: (n,)), min_size=1, max_size=4)


@st.composite
def traces(draw, dtype=np.float64, max_steps=6):
    """A layout and the gradients and second moments of some steps."""
    layout = layout_of(draw(shapes), dtype)
    steps = []
    for _ in range(draw(st.integers(1, max_steps))):
        elements = [
            draw(st.lists(st.tuples(numbers, st.integers(0, 6)), min_size=n, max_size=n))
            for n in layout.sizes
        ]
        g = [np.array([x for x, _ in group], dtype) for group in elements]
        # From "all samples say the same" to "all but cancel": s between g^2 / 8 and 8 g^2.
        s = [
            np.array([x * x * 2.0 ** (k - 3) for x, k in group], layout.state_dtype)
            for group in elements
        ]
        steps.append((g, s))
    return layout, steps


KEEP_EVERYTHING = [
    ('strom', {'tau': 0.5}),
    ('hybrid', {'tau': 0.5, 'alpha': 1.0}),
    ('variance', {'alpha': 1.0, 'error_feedback': True}),
    ('variance', {'alpha': 2.0, 'error_feedback': True, 'unrepresentable': 'hold'}),
    ('none', {}),
]


@pytest.mark.parametrize(('name', 'options'), KEEP_EVERYTHING)
@every_trace
@given(traces())
def test_what_came_in_is_what_went_out_and_what_is_held(name, options, trace):
    """Exactly, element by element: no tolerance."""
    layout, steps = trace
    compressor = prepared(name, options, layout)
    came, went = np.zeros(layout.total), np.zeros(layout.total)
    for g, s in steps:
        came += flat(g, layout)
        went += decoded(compressor, compressor.compress(g, s))
        held = compressor.r if 'r' in compressor.state_names else 0
        np.testing.assert_array_equal(went + held, came)


@pytest.mark.parametrize('policy', ['drop', 'hold'])
@every_trace
@given(traces())
def test_the_paper_loses_only_what_it_says(policy, trace):
    """Without error feedback: the rounding of what is sent, and with 'drop' what has no code.

    All else is conserved exactly.
    """
    layout, steps = trace
    compressor = prepared('variance', {'alpha': 1.0, 'unrepresentable': policy}, layout)
    for g, s in steps:
        before = compressor.r + flat(g, layout)
        message = compressor.compress(g, s)
        sent = decoded(compressor, message)
        lost = before - sent - compressor.r
        words, _, _ = compressor.words.unpack(message.words, message.shard_counts, np)
        travelled = np.zeros(layout.total, bool)
        travelled[words] = True
        assert (np.abs(lost[travelled]) <= np.abs(before[travelled]) / 2).all()
        assert (compressor.r[travelled] == 0).all()
        stayed = ~travelled & (compressor.r == before)
        assert (lost[stayed] == 0).all()
        dropped = ~travelled & ~stayed
        if policy == 'hold':
            assert not dropped.any()
        for index in np.flatnonzero(dropped):
            exponent = message.table.view(np.int16)[layout.group_of(index)]
            assert compressor.r[index] == 0
            assert abs(before[index]) < 2.0**exponent / 2**7


@pytest.mark.parametrize(
    ('name', 'options'), [s for s in SETTINGS if s[0] in ('qsgd', 'terngrad')]
)
@every_trace
@given(traces(np.float32))
def test_stochastic_rounding_goes_to_a_neighbour(name, options, trace):
    """No residual: each element comes out as one of the two levels around it."""
    layout, steps = trace
    compressor = prepared(name, options, layout)
    for g, _ in steps:
        message = compressor.compress([x.copy() for x in g])
        sent = decoded(compressor, message).astype(np.float64)
        x = flat(g, layout).astype(np.float64)
        norms = message.table.view(np.float32).astype(np.float64)
        for group in range(len(layout)):
            where = layout.slice(group)
            mine, theirs = x[where], sent[where]
            if name == 'terngrad':
                assert np.isin(np.abs(theirs), [0, norms[group]]).all()
                assert (theirs * mine >= 0).all()
                continue
            first = compressor._first_bucket[group]
            norm = norms[first + np.arange(mine.size) // compressor.bucket_size]
            assert (np.abs(theirs - mine) <= norm / compressor.levels * (1 + 1e-6)).all()
            assert (theirs * mine >= 0).all()


@every_trace
@given(traces(np.float32), st.floats(0.05, 20), st.floats(1, 10), st.sampled_from(['r', 'both']))
def test_a_larger_alpha_never_selects_more(trace, alpha, factor, start):
    """From the same r and v: variance and hybrid."""
    layout, steps = trace
    (g0, s0), (g, s) = steps[0], steps[-1]
    for name, options in (('variance', {'unrepresentable': 'hold'}), ('hybrid', {'tau': 0.25})):
        chosen = []
        for a in (alpha, alpha * factor):
            compressor = prepared(name, {'alpha': a, **options}, layout)
            compressor.r[:] = flat(g0, layout)
            if start == 'both':
                compressor.v[:] = flat(s0, layout)
            r, v = compressor.r + flat(g, layout), compressor.v + flat(s, layout)
            selected = compressor._rule(r, v)[0]
            chosen.append(set(selected.tolist()))
        assert chosen[1] <= chosen[0]


DETERMINISTIC = [s for s in SETTINGS if s[0] in ('variance', 'hybrid', 'strom', 'none')]


@pytest.mark.parametrize(('name', 'options'), DETERMINISTIC)
@every_trace
@given(traces(np.float32), st.randoms(use_true_random=False))
def test_permuting_elements_of_a_group_permutes_the_words(name, options, trace, random):
    layout, steps = trace
    orders = [random.sample(range(n), n) for n in layout.sizes]
    plain, shuffled = prepared(name, options, layout), prepared(name, options, layout)
    back = np.concatenate(
        [layout.offsets[k] + np.array(order, np.int64) for k, order in enumerate(orders)]
    )
    for g, s in steps:
        a = plain.compress(g, s)
        b = shuffled.compress(
            [x[order] for x, order in zip(g, orders)], [x[order] for x, order in zip(s, orders)]
        )
        np.testing.assert_array_equal(a.table, b.table)
        index_a, negative_a, code_a = plain.words.unpack(a.words, a.shard_counts, np)
        index_b, negative_b, code_b = plain.words.unpack(b.words, b.shard_counts, np)
        order = np.argsort(back[index_b])
        np.testing.assert_array_equal(back[index_b][order], index_a)
        np.testing.assert_array_equal(negative_b[order], negative_a)
        np.testing.assert_array_equal(code_b[order], code_a)
        np.testing.assert_array_equal(decoded(plain, a)[back], decoded(shuffled, b))
        for key in plain.state_names:
            np.testing.assert_array_equal(plain.state()[key][back], shuffled.state()[key])
