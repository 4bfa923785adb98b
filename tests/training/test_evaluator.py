import chainer
import numpy as np
import pytest

from tests.training.common import FakeComm
from vgc_chainer.training import ExactEvaluator


class Target(chainer.Chain):
    """Reports the batch mean of its input."""

    def forward(self, x):
        assert not chainer.config.train
        assert not chainer.config.enable_backprop
        chainer.report({'value': chainer.functions.mean(x), 'number': float(x.mean())}, self)


class ShardComm(FakeComm):
    """One of the ranks; knows how many samples the others have and what they report."""

    def __init__(self, sizes, rank):
        super().__init__(rank, [size for i, size in enumerate(sizes) if i != rank])

    def gather_obj(self, names):
        return [names, ['main/number', 'main/value']]


@pytest.mark.parametrize('batchsize', [1, 4, 7, 100])
@pytest.mark.parametrize('sizes', [[10], [10, 13], [3, 0, 9]])
def test_mean_over_ranks_is_the_mean_over_samples(sizes, batchsize):
    data = np.random.default_rng(0).random(sum(sizes)).astype(np.float32)
    shards = np.split(data, np.cumsum(sizes)[:-1])
    results = []
    for rank, shard in enumerate(shards):
        iterator = chainer.iterators.SerialIterator(shard, batchsize, repeat=False, shuffle=False)
        evaluator = ExactEvaluator(iterator, Target(), ShardComm(sizes, rank))
        results.append(evaluator())
        assert evaluator() == results[-1]  # the iterator starts again
    for name in ('main/value', 'main/number'):
        assert np.mean([result[name] for result in results]) == pytest.approx(
            data.mean(), rel=1e-6
        )
