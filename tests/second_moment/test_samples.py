"""What counts as a sample: what is refused because samples cannot be told apart in it."""

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest

from tests.second_moment.common import Tagger, assert_close, observed, params
from vgc_chainer.second_moment import EmbedTerm, SampleTerm, UnsupportedFunctionError

NOT_COUNTED = 'where axis 0 of the data does not count samples'
NOT_DATA = 'whose other inputs do not depend on data, sample by sample'


def time_major(link, x):
    h = F.transpose(chainer.as_variable(x), (1, 0, 2))
    return link(F.reshape(h, (-1, x.shape[2])))


def positions(link, x):
    """The same table for every sample."""
    return x + F.broadcast_to(link(np.arange(x.shape[1], dtype=np.int32)), x.shape)


def masked_tokens(link, x):
    h = F.reshape(chainer.as_variable(x), (-1, x.shape[2]))
    return link(h[np.arange(len(h)) % 3 == 0])


def grouped_as_weights(link, x):
    return F.linear(x[:, 0], link.p * np.ones((2, 3)))


REFUSED = {
    'time-major': (lambda: L.Linear(3, 2), time_major, NOT_COUNTED),
    'swapped axes': (
        lambda: L.Linear(5, 2),
        lambda link, x: link(F.swapaxes(chainer.as_variable(x), 0, 2), n_batch_axes=2),
        NOT_COUNTED,
    ),
    'moved axes': (
        lambda: L.Linear(5, 2),
        lambda link, x: link(F.moveaxis(chainer.as_variable(x), 0, 2), n_batch_axes=2),
        NOT_COUNTED,
    ),
    'rolled axes': (
        lambda: L.Linear(5, 2),
        lambda link, x: link(F.rollaxis(chainer.as_variable(x), 0, 3), n_batch_axes=2),
        NOT_COUNTED,
    ),
    'steps concatenated along axis 0': (
        Tagger,
        lambda link, x: link.out(F.concat(link.states(x), axis=0)),
        NOT_COUNTED,
    ),
    'steps stacked along axis 0': (
        Tagger,
        lambda link, x: link.out(F.stack(link.states(x)), n_batch_axes=2),
        NOT_COUNTED,
    ),
    'some rows of every sample': (lambda: L.Linear(3, 2), masked_tokens, NOT_COUNTED),
    'sum over samples': (
        lambda: L.Linear(3, 2),
        lambda link, x: link(F.sum(chainer.as_variable(x), axis=0)),
        NOT_COUNTED,
    ),
    'table of positions': (lambda: L.EmbedID(4, 3), positions, NOT_DATA),
    'weight times array': (params(lambda link, x: 0, p=(3,)), grouped_as_weights, NOT_DATA),
    'standardised weight': (
        params(lambda link, x: 0, W=(2, 3)),
        lambda link, x: F.linear(x[:, 0], link.W - F.broadcast_to(F.mean(link.W), (2, 3))),
        NOT_DATA,
    ),
    'weight scaled': (
        params(lambda link, x: 0, W=(2, 3)),
        lambda link, x: F.linear(x[:, 0], 0.5 * link.W),
        NOT_DATA,
    ),
}


@pytest.mark.parametrize(('make', 'call', 'why'), REFUSED.values(), ids=REFUSED)
def test_refused(make, call, why):
    x = np.random.default_rng(0).standard_normal((5, 4, 3))
    with chainer.using_config('dtype', np.float64):
        link = make()
    with pytest.raises(UnsupportedFunctionError, match=why):
        observed(link, lambda: F.sum(F.sin(call(link, x))).backward())
    assert all(param.grad is None for param in link.params())
    moments, hook = observed(
        link, lambda: F.sum(F.sin(call(link, x))).backward(), unsupported='batch'
    )
    batch = [c.name for c in hook.coverage() if c.rule == 'batch']
    gradients = dict(link.namedparams())
    assert batch
    for name in batch:
        np.testing.assert_array_equal(moments[name], gradients[name].grad ** 2)


def test_independent_batches_in_one():
    """A discriminator sees real and generated samples as one batch: twice as many samples."""
    rng = np.random.default_rng(0)
    real, noise = rng.standard_normal((5, 3)), rng.standard_normal((5, 4))
    with chainer.using_config('dtype', np.float64):
        model = chainer.Chain(generator=L.Linear(4, 3), discriminator=L.Linear(3, 1))

    def run():
        both = F.concat([real, F.tanh(model.generator(noise))], axis=0)
        F.sum(F.sin(model.discriminator(both))).backward()

    moments, _ = observed(model, run)
    expected = 0
    for row in np.concatenate([real, F.tanh(model.generator(noise)).array]):
        model.cleargrads()
        F.sum(F.sin(model.discriminator(row[None]))).backward()
        expected = expected + model.discriminator.W.grad**2
    assert_close(moments['/discriminator/W'], expected, 1e-12)


def test_a_dead_output_does_not_matter():
    """The cell of the last step is never used: its variable is gone when backward begins."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 3))
    with chainer.using_config('dtype', np.float64):
        model = Tagger()

    def loss(x):
        return F.sum(F.sin(model.out(model.rnn(None, None, x)[1])))

    moments, _ = observed(model, lambda: loss(x).backward())
    expected = 0
    for row in x:
        model.cleargrads()
        loss(row[None]).backward()
        expected = expected + model.out.W.grad**2
    assert_close(moments['/out/W'], expected, 1e-12)


def test_parameters_of_others_are_no_data():
    """Neither for a sum with a parameter of a model that is not observed."""
    mine, other = (params(lambda link, x: 0, p=(1, 3))() for _ in range(2))
    with pytest.raises(UnsupportedFunctionError, match=NOT_DATA):
        observed(mine, lambda: F.sum(np.ones((5, 3), np.float32) * (mine.p + other.p)).backward())


@pytest.mark.parametrize('policy', ['batch', 'dense'])
def test_different_numbers_of_samples_under_a_policy(policy):
    x = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    link = L.Linear(4, 3)
    moments, hook = observed(
        link, lambda: (F.sum(link(x)) + F.sum(link(x[:3]))).backward(), unsupported=policy
    )
    if policy == 'batch':
        np.testing.assert_array_equal(moments['/W'], link.W.grad**2)
    else:
        assert moments['/W'] is None and hook.is_dense(link.W)


def test_user_rules_may_count_rows():
    """A term with one contribution a row is folded to one a sample."""
    rows = np.arange(24.0).reshape(6, 4)
    expected = rows[::2] + rows[1::2]
    term = SampleTerm(rows)
    for folded in (term.folded(3), term.reshaped((2, 2)).folded(3)):
        c = folded.per_sample(0, 3)
        np.testing.assert_array_equal(c.reshape(3, 4), expected)
        np.testing.assert_array_equal(folded.square_sum(1), (c**2).sum(axis=0))
    ids = np.array([0, 1, 1, 1, 0, 2])[:, None]
    term = EmbedTerm(ids, rows[:, None], 3)
    folded = term.folded(3).per_sample(0, 3)
    assert folded.shape == (3, 3, 4)
    np.testing.assert_array_equal(folded[1, 1], rows[2] + rows[3])
    np.testing.assert_array_equal(folded.sum(axis=0), term.per_sample(0, 6).sum(axis=0))
