"""BatchNorm against explicit loops after PAPER.md section 12: batch statistics are constants."""

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest

from tests.second_moment.common import assert_close, observed


def by_loops(x, gy, eps, mean, var):
    """Channel by channel, sample by sample, position by position; channels on axis 1."""
    n, channels = x.shape[:2]
    s_gamma, s_beta = np.zeros(channels), np.zeros(channels)
    g_gamma, g_beta = np.zeros(channels), np.zeros(channels)
    for channel in range(channels):
        for z in range(n):
            c_gamma = c_beta = 0.0
            for value, upstream in zip(x[z, channel].ravel(), gy[z, channel].ravel()):
                c_gamma += upstream * (value - mean[channel]) / np.sqrt(var[channel] + eps)
                c_beta += upstream
            s_gamma[channel] += c_gamma**2
            s_beta[channel] += c_beta**2
            g_gamma[channel] += c_gamma
            g_beta[channel] += c_beta
    return {'/gamma': s_gamma, '/beta': s_beta}, {'/gamma': g_gamma, '/beta': g_beta}


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('shape', [(6, 3), (6, 3, 4, 5), (6, 3, 7)])
@pytest.mark.parametrize(('dtype', 'rtol'), [(np.float32, 1e-5), (np.float64, 1e-10)])
def test_against_loops(train, shape, dtype, rtol):
    rng = np.random.default_rng(0)
    x, gy = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    link = L.BatchNormalization(3, dtype=dtype)
    link.avg_mean[...], link.avg_var[...] = rng.random(3), 0.5 + rng.random(3)
    link.gamma.array[...] = rng.standard_normal(3)
    axes = (0, *range(2, x.ndim))
    if train:
        mean, var = x.astype(np.float64).mean(axis=axes), x.astype(np.float64).var(axis=axes)
    else:
        mean, var = link.avg_mean.copy(), link.avg_var.copy()
    with chainer.using_config('train', train):
        moments, hook = observed(link, lambda: F.sum(link(x) * gy).backward())
    expected, gradients = by_loops(x.astype(np.float64), gy.astype(np.float64), 2e-5, mean, var)
    for name, param in link.namedparams():
        assert_close(moments[name], expected[name], rtol, name)
        assert_close(param.grad, gradients[name], 10 * rtol, name)
    rule = 'batch_normalization' if train else 'fixed_batch_normalization'
    assert {c.rule for c in hook.coverage()} == {rule}


def test_channels_last():
    rng = np.random.default_rng(0)
    x, gy = (rng.standard_normal((6, 4, 5, 3)) for _ in range(2))
    link = L.BatchNormalization(axis=(0, 1, 2), size=3, dtype=np.float64)
    moments, _ = observed(link, lambda: F.sum(link(x) * gy).backward())
    x, gy = x.transpose(0, 3, 1, 2), gy.transpose(0, 3, 1, 2)
    expected, _ = by_loops(x, gy, 2e-5, x.mean(axis=(0, 2, 3)), x.var(axis=(0, 2, 3)))
    for name in expected:
        assert_close(moments[name], expected[name], 1e-10, name)


def test_weights_below_batch_normalization():
    """c_z of a layer is formed from dL/dy at its own output, sample by sample."""
    rng = np.random.default_rng(0)
    x, gy = rng.standard_normal((6, 4)), rng.standard_normal((6, 3))
    with chainer.using_config('dtype', np.float64):
        link = chainer.Sequential(L.Linear(4, 3), L.BatchNormalization(3))
    upstream = {}

    def run():
        h = link[0](x)
        F.sum(link[1](h) * gy).backward(retain_grad=True)
        upstream['h'] = h.grad

    moments, _ = observed(link, run)
    c = upstream['h'][:, :, None] * x[:, None, :]
    assert_close(moments['/0/W'], (c**2).sum(axis=0), 1e-10)
    assert_close(c.sum(axis=0), link[0].W.grad, 1e-10)


def test_statistics_of_every_sample_are_refused():
    """Without axis 0 among the aggregated axes every sample has a gamma of its own."""
    link = L.BatchNormalization(axis=1, size=6)
    with pytest.raises(NotImplementedError, match='/gamma .*BatchNormalization'):
        observed(link, lambda: F.sum(link(np.ones((6, 3), np.float32))).backward())
